"""What a search for coefficients is asked for, and what it brings: values, without files or networks."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from fewstep.fitness import MEASURE
from fewstep.metrics import Record
from fewstep.metrics.record import LOWER_IS_BETTER
from fewstep.snapshots.search import Space, Vector, searches
from fewstep.types import FewstepError

LABELS = {
    "last": "last snapshot", "uniform": "uniform average", "ema": "best EMA", "power": "best power EMA",
    "random": "random search", "soup": "greedy soup",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How to search, and how much to spend on it."""

    search: str = "span"
    """span (ours), evolution (the paper's), cmaes, random, soup, ema, power"""
    budget: int = 60
    """candidates that each search, the baselines' too, may evaluate"""
    minutes: float | None = None
    """stop searching after so long, but each search sees its first vectors; what is found is re-ranked and reported"""
    search_seeds: int = 1
    """search so many times with other seeds, and tell how far the results differ"""
    num: int = 2000
    """images for each candidate"""
    rerank: int = 5
    """the best few of each search that meet fresh noise"""
    rerank_num: int = 4000
    """images for each of those"""
    report_num: int = 5000
    """images per noise seed of the reported numbers"""
    seeds: int = 3
    """noise seeds of the report: 0, 1, 2, ..."""
    second: tuple[str, ...] = ("kid", "prdc")
    """metrics that are reported and were not searched"""
    baselines: tuple[str, ...] = ("ema", "power", "random")
    """searches to compare with, at the same budget; the last snapshot and the uniform average are always there"""

    def __post_init__(self) -> None:
        unknown = {self.search, *self.baselines} - set(searches())
        if unknown:
            raise FewstepError(f"unknown search {', '.join(sorted(unknown))}: choose from {', '.join(searches())}")
        counts = (self.search_seeds, self.num - 1, self.rerank, self.rerank_num - 1, self.report_num - 1, self.seeds)
        if min(counts) < 1 or (self.minutes is not None and self.minutes <= 0):
            raise FewstepError("a search needs seeds and --rerank of 1 or more, images of 2 or more, --minutes above 0")
        if "prdc" in self.second and self.report_num < 10:
            raise FewstepError("prdc needs 10 images or more: raise --report-num, or leave it out of --second")
        if set(self.second) - {"fd", "kid", "prdc"}:
            raise FewstepError("--second metrics: choose from fd, kid, prdc")


@dataclass
class Found:
    """What one search brought."""

    name: str
    tried: dict[bytes, tuple[float, Vector]] = field(default_factory=dict)
    trace: list[tuple[int, float]] = field(default_factory=list)
    evaluations: int = 0
    dropped: int = 0
    failed: int = 0
    names: dict[bytes, str] = field(default_factory=dict)
    """the profile that a vector is, where it has a name"""
    choice: "Choice | None" = None

    @property
    def best(self) -> float:
        return min((cost for cost, _ in self.tried.values()), default=math.inf)

    def to_json(self, records: Sequence[Record]) -> dict[str, Any]:
        """What one seed brought; records: its held-out numbers, where there are several seeds."""
        kind, _, seed = self.name.partition("/")
        choice = self.choice.to_json() if self.choice else {}
        return {
            "search": kind, "seed": int(seed), "coefficients": choice.get("coefficients"),
            "search_score": choice.get("search"), "rerank_score": choice.get("rerank"),
            "evaluations": self.evaluations, "records": [record.to_json() for record in records],
        }  # fmt: skip

    def top(self, n: int) -> list[tuple[float, Vector]]:
        """The n best that were measured in full, best first."""
        return sorted(self.tried.values(), key=lambda pair: pair[0])[:n]


@dataclass(frozen=True)
class Choice:
    """One coefficient vector of the final comparison; costs on search and re-ranking noise."""

    label: str
    origin: str
    coefficients: Vector
    search: float
    rerank: float
    profile: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "label": self.label, "from": self.origin, "profile": self.profile,
            "coefficients": self.coefficients.tolist(), "search": number(self.search), "rerank": number(self.rerank),
        }  # fmt: skip


def spread(space: Space, choices: Sequence[Choice]) -> dict[str, Any]:
    """How far the results of several seeds lie apart: weights in units of the bank's radius, coefficients by angle."""
    vectors = [choice.coefficients for choice in choices]
    unit = [v / np.linalg.norm(v) for v in vectors]
    return {
        "distance": [[space.distance(a, b) / space.radius for a in vectors] for b in vectors],
        "cosine": [[float(a @ b) for a in unit] for b in unit],
    }


def cost(found: Iterable[Found], rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the searches and the re-ranking took, the report excepted; rows: of evaluations.jsonl.

    Seconds are of evaluating candidates, summed over processes and interruptions.
    """
    searches, scored = list(found), [row for row in rows if "cost" in row]
    return {
        "evaluations": sum(f.evaluations for f in searches), "evaluated": len(scored),
        "raced_out": sum(f.dropped for f in searches), "failed": sum(f.failed for f in searches),
        "images": sum(row["images"] for row in scored), "seconds": round(sum(row["seconds"] for row in scored), 1),
    }  # fmt: skip


def verdict(records: Mapping[str, Sequence[Record]], metric: str, label: str = "LCSC") -> dict[str, Any]:
    """LCSC against each of the others on the searched metric, held out: paired over the noise seeds."""
    sign = 1 if metric in LOWER_IS_BETTER or metric not in MEASURE else -1
    mine, gains = records["lcsc"][0], {}
    for name, (other, *_) in records.items():
        if name == "lcsc":
            continue
        differences = [sign * (b - a) for a, b in zip(mine.values, other.values, strict=True)]
        mean = statistics.fmean(differences)
        std = statistics.stdev(differences) if len(differences) > 1 and math.isfinite(mean) else math.inf
        gains[name] = {
            "fraction": number(mean / abs(other.value)) if other.value else None, "paired_mean": number(mean),
            "paired_std": number(std), "within_noise": within_noise(mine, other),
        }  # fmt: skip
    return {"gains": gains, "verdict": sentence(gains, records, metric, sign, label)}


def within_noise(a: Record, b: Record) -> bool:
    """Whether the noise seeds alone may have made the difference: Student's test at 95 %, paired where the seeds are the same.

    True where there are fewer than two seeds, or a value is not finite: nothing is shown then.
    """
    if min(len(a.seeds), len(b.seeds)) < 2 or not all(map(math.isfinite, (*a.values, *b.values))):
        return True
    if a.seeds != b.seeds:
        return not stats.ttest_ind(a.values, b.values, equal_var=False).pvalue < 0.05
    differences = [x - y for x, y in zip(a.values, b.values, strict=True)]
    limit = float(stats.t.ppf(0.975, len(differences) - 1)) / math.sqrt(len(differences))
    return not abs(statistics.fmean(differences)) > limit * statistics.stdev(differences)


def sentence(
    gains: Mapping[str, Any], records: Mapping[str, Sequence[Record]], metric: str, sign: int, label: str
) -> str:
    """The verdict in words, against the better of best EMA and last snapshot; others that do as well are named."""

    def cost(name: str) -> float:
        value = sign * records[name][0].value
        return value if math.isfinite(value) else math.inf

    rival = min([name for name in gains if name in ("ema", "last")] or list(gains), key=cost)
    gain, mine = gains[rival], records["lcsc"][0]
    numbers = (
        f"{metric} {mine.value:.4g} against {records[rival][0].value:.4g} of the {LABELS.get(rival, rival)}, held out"
    )
    share, beyond = abs(100 * (gain["fraction"] or 0)), f"beyond the noise of {len(mine.seeds)} seeds"
    if gain["within_noise"]:
        more = "; one seed shows no noise, give more --seeds" if len(mine.seeds) == 1 else ""
        text = f"No gain beyond the noise: {numbers} over {len(mine.seeds)} noise seed(s){more}."
    elif (gain["paired_mean"] or 0) < 0:
        text = f"{label} is worse: {numbers}: {share:.0f} %, {beyond}."
    else:
        text = f"{label} improves {numbers}: {share:.0f} %, {beyond}."
    if len(records["lcsc"]) > 1:  # a metric that was not searched
        second, other = records["lcsc"][1], records[rival][1]
        text += f" {second.metric}, not searched: {second.value:.3g} against {other.value:.3g}."
    equals = [
        LABELS.get(n, n) for n, g in gains.items() if n != rival and (g["within_noise"] or (g["paired_mean"] or 0) < 0)
    ]
    return text + f" As good or better: {', '.join(equals)}." * bool(equals)


def number(value: float) -> float | None:
    """For strict JSON."""
    return float(value) if math.isfinite(value) else None
