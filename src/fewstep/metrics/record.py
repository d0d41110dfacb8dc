"""A measured number with everything it depends on. Numbers whose stamps differ are never ranked together."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from fewstep.types import FewstepError

LOWER_IS_BETTER: Final = frozenset({"fd", "kid"})  # of every other metric, more is better
STAMP: Final = ("metric", "n", "extractor", "extractor_sha256", "reference_sha256", "reference_n")


@dataclass(frozen=True)
class Record:
    """One metric of one model under one sampler."""

    metric: str
    value: float  # mean of values
    std: float  # their standard deviation, ddof = 1; 0 for a single one
    values: tuple[float, ...]  # one for each seed
    seeds: tuple[int, ...]  # of the noise
    n: int  # samples per seed
    extractor: str
    extractor_sha256: str  # of the weights
    reference: str
    reference_n: int
    reference_sha256: str  # of the set of images
    sampler: str
    sigmas: tuple[float, ...]  # the noise levels it visits
    nfe: int  # network evaluations per sample
    model: str = ""
    model_sha256: str = ""

    @classmethod
    def of(cls, metric: str, values: Sequence[float], seeds: Sequence[int], **rest: Any) -> "Record":
        """The record of these values; `rest` are the fields from n on."""
        if not values or len(values) != len(seeds):
            raise FewstepError(f"{len(values)} value(s) of {metric} for {len(seeds)} seed(s): give one for each")
        mean = float(sum(values) / len(values))
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
        return cls(metric, mean, std, tuple(map(float, values)), tuple(seeds), **rest)

    def stamp(self) -> tuple[str | int, ...]:
        """What must agree before two values may be ranked. Sampler, seeds and model are what is being compared."""
        return tuple(getattr(self, name) for name in STAMP)

    def to_json(self) -> dict[str, Any]:
        """Plain values for json.dumps. Numbers that strict JSON lacks become "inf", "-inf", "nan"."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Record":
        """The inverse of to_json."""
        names = {field.name for field in fields(cls)}
        if data.keys() != names:
            unknown, missing = sorted(data.keys() - names), sorted(names - data.keys())
            raise FewstepError(f"not a record of this version: unknown keys {unknown}, missing keys {missing}")
        floats = {name: float(data[name]) for name in ("value", "std")}
        lists = {name: tuple(map(float, data[name])) for name in ("values", "sigmas")}
        return cls(**{**data, **floats, **lists, "seeds": tuple(data["seeds"])})

    def __str__(self) -> str:
        value = f"{self.value:.0f}" if 1000 <= abs(self.value) < math.inf else f"{self.value:.3g}"
        seeds = f"{len(self.seeds)} seed" + "s" * (len(self.seeds) != 1)
        of = f"n={self.n} x {seeds}, {self.extractor}, ref {self.reference} {self.reference_n}, {self.nfe} NFE"
        return f"{self.metric} {value} ± {self.std:.2g} ({of})"


def rank(records: Sequence[Record]) -> list[Record]:
    """Best first; what is not finite comes last, ties keep their order. Unlike stamps are refused."""
    for record in records:
        _require_same_stamp(records[0], record)
    return sorted(records, key=_cost)


def better(a: Record, b: Record) -> bool:
    """Whether a is strictly better than b. Unlike stamps are refused."""
    _require_same_stamp(a, b)
    return _cost(a) < _cost(b)


def _cost(record: Record) -> float:
    """Less is better."""
    if not math.isfinite(record.value):
        return math.inf
    return record.value if record.metric in LOWER_IS_BETTER else -record.value


def _require_same_stamp(a: Record, b: Record) -> None:
    pairs = zip(STAMP, a.stamp(), b.stamp(), strict=True)
    unlike = ", ".join(f"{name} ({x} and {y})" for name, x, y in pairs if x != y)
    if unlike:
        raise FewstepError(f"these numbers must not be ranked together, measure both alike: they differ in {unlike}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
