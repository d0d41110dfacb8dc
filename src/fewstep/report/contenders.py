"""What `fewstep compare` compares: runs, results of searches and loose records, read without their weights."""

import math
import statistics
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from fewstep.files import read_json
from fewstep.metrics import Record
from fewstep.model import ModelInfo, find, read_info
from fewstep.recipe import Recipe
from fewstep.report.result import ResultView, result_file
from fewstep.rundir import WEIGHTS, RunDir
from fewstep.snapshots.format import read_header
from fewstep.types import FewstepError


class Spent(NamedTuple):
    """Images seen and seconds trained; nan where the seconds are unknown."""

    nimg: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A record and its row in the tables; weights: which of the row's, nimg: images seen, 0 where unknown."""

    record: Record
    row: str
    weights: str = ""
    nimg: int = 0


@dataclass(frozen=True)
class Contender:
    """A run, a search's result, or a model that is only known from its records."""

    label: str
    method: str = ""
    path: Path | None = None
    parameters: int | None = None
    spent: Spent | None = None
    """in the run itself; of a search, in the run that it combines"""
    before: Spent | None = Spent(0, 0.0)
    """in the runs that its first weights come from; None: they are not among those given"""
    origin: str = ""
    """the run of those weights"""
    rate: float | None = None
    """images per second of training alone"""
    search_seconds: float | None = None
    measured: tuple[Measured, ...] = ()
    curve: tuple[Measured, ...] = ()
    """the evaluations in training"""
    log: list[dict[str, Any]] = field(default_factory=list)
    recipe: Recipe | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    data: str = ""

    @property
    def in_all(self) -> Spent | None:
        """With what went before; None where that is unknown."""
        if self.spent is None or self.before is None:
            return None
        return Spent(self.spent.nimg + self.before.nimg, self.spent.seconds + self.before.seconds)

    def seconds_at(self, nimg: int) -> float:
        """Seconds of training alone, without evaluations, pictures and files, after so many images of the run."""
        return seconds_at(self.log, nimg)


def seconds_at(log: Sequence[Mapping[str, Any]], nimg: int) -> float:
    """From the rows of log.jsonl: images over images per second, row by row, in proportion within one."""
    seen = [0, *(row["nimg"] for row in log)]
    rates = [row["images_per_second"] for row in log]
    if not rates:
        return math.nan
    last = min(bisect_left(seen, nimg), len(rates))  # the row in which nimg lies; beyond the log, its last rate
    whole = sum((seen[i + 1] - seen[i]) / max(rates[i], 1e-9) for i in range(last - 1))
    return whole + max(nimg - seen[max(last - 1, 0)], 0) / max(rates[max(last - 1, 0)], 1e-9)


@dataclass(frozen=True)
class Start:
    """Weights that a run may have begun with."""

    owner: str
    spent: Spent
    initialised_from: str


class Opened(NamedTuple):
    """A contender before the others are known: the hash of its first weights, and all its weights by theirs."""

    contender: Contender
    began: str
    weights: dict[str, Start]


def open_all(runs: Sequence[str | Path], records: Sequence[str | Path] = ()) -> list[Contender]:
    """All that is compared, in the order given; FewstepError for what is none or is given twice."""
    paths = [Path(run) for run in runs]
    twice = [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise FewstepError(f"{twice[0]} is given twice: name each run once")
    if not runs and not records:
        raise FewstepError(
            "nothing to compare: fewstep compare RUN RUN... (and --records FILE.json of fewstep evaluate)"
        )
    loose = list(dict.fromkeys(record for file in records for record in read_records(Path(file))))
    known = {header_hash(file): path for path in reversed(paths) for file in weight_files(path)}
    same = {path.resolve(): path for path in paths}  # a record may name a run by another way to it
    places = {record.model_sha256: home(record) for record in loose}
    homes = {sha: same.get(path.resolve()) or known.get(sha, path) for sha, path in places.items()}
    names = short_names([*paths, *homes.values()])
    opened = [open_result(path, names[path]) if result_file(path) else open_run(path, names[path]) for path in paths]
    weights = {sha: start for one in reversed(opened) for sha, start in one.weights.items()}
    found = {path: with_origin(one, weights) for path, one in zip(paths, opened, strict=True)}
    return with_records(found, loose, homes, names)


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """As many of the last parts of each path as tell it from the others."""
    found, parts = {}, {path: path.absolute().parts for path in dict.fromkeys(paths)}
    for path, own in parts.items():
        others = [other for other in parts.values() if other != own]
        depth = next(d for d in range(1, len(own) + 1) if all(other[-d:] != own[-d:] for other in others))
        found[path] = "/".join(own[-depth:])
    return found


def weight_files(path: Path) -> list[Path]:
    """The weights that a run has saved, or the combined ones of a search."""
    folder = path.parent if path.suffix == ".json" else path
    return [file for pattern in (*WEIGHTS, "combined.safetensors") for file in sorted(folder.glob(pattern))]


def header_hash(file: Path) -> str:
    return str(read_header(file)["weights_sha256"])


def parameters_of(info: ModelInfo) -> int:
    return sum(p.numel() for p in info.architecture.skeleton().parameters())


def open_run(path: Path, label: str) -> Opened:
    """A run directory; FewstepError when it is none."""
    run = RunDir(path)
    recipe, log, files = run.recipe(), run.log(), weight_files(path)
    infos = {header_hash(file): read_info(read_header(file), file) for file in files}
    curve = [Measured(Record.from_json(r["record"]), label, r["weights"], r["nimg"]) for r in run.metrics()]
    nimg = max([row["nimg"] for row in log] + [info.nimg for info in infos.values()], default=0)
    began = next((info.initialised_from for info in infos.values()), "")
    if not infos and run.state_file.exists():
        began = run.progress()["initialised_from"]
    contender = Contender(
        label, recipe.name, path, parameters_of(next(iter(infos.values()))) if infos else None,
        Spent(nimg, seconds_at(log, nimg)), rate=statistics.median(r["images_per_second"] for r in log) if log else None,
        measured=tuple(curve), curve=tuple(curve), log=log, recipe=recipe,
        machine=read_json(run.environment_file) if run.environment_file.exists() else {},
        data=Path(recipe.data.source).name,
    )  # fmt: skip
    starts = {
        sha: Start(label, Spent(info.nimg, seconds_at(log, info.nimg)), info.initialised_from)
        for sha, info in infos.items()
    }
    return Opened(contender, began, starts)


def open_result(path: Path, label: str) -> Opened:
    """A result of `fewstep combine`, its candidates as rows of their own; FewstepError when it is none."""
    view = ResultView.open(path, "cpu")
    measured = [
        Measured(record, label if name == "lcsc" else f"{label}: {view.name(name)}")
        for name, records in view.records.items()
        for record in records
    ]
    cost = (view.data.get("cost") or {}).get("seconds")
    info = view.model.info if view.model else None
    nimg = view.nimg[-1] if view.counted else 0
    contender = Contender(
        label, "lcsc", path, parameters_of(info) if info else None, search_seconds=cost, measured=tuple(measured),
        machine=view.data.get("environment") or {}, data=view.source,
    )  # fmt: skip
    sha = view.data["snapshots"][-1]["sha256"]
    own = {view.model.sha256: Start(label, Spent(nimg, math.nan), info.initialised_from)} if view.model and info else {}
    return Opened(contender, sha, own)


def with_origin(one: Opened, weights: Mapping[str, Start]) -> Contender:
    """The contender with what its first weights took; of a search, with what the combined run took."""
    contender, start = one.contender, weights.get(one.began)
    if not one.began:
        return contender
    before = total(weights, one.began)
    if contender.method != "lcsc":
        return replace(contender, before=before, origin=start.owner if start else "")
    if start is None:
        known = next(iter(one.weights.values()), None)
        return replace(contender, spent=known.spent if known else None, before=None)
    return replace(contender, spent=start.spent, before=total(weights, start.initialised_from), origin=start.owner)


def total(weights: Mapping[str, Start], sha256: str) -> Spent | None:
    """What weights took from random ones on, over all runs given; None where one is missing."""
    nimg, seconds, seen = 0, 0.0, set[str]()
    while sha256:
        start = weights.get(sha256)
        if start is None or sha256 in seen:
            return None
        seen.add(sha256)
        nimg, seconds, sha256 = nimg + start.spent.nimg, seconds + start.spent.seconds, start.initialised_from
    return Spent(nimg, seconds)


def read_records(file: Path) -> list[Record]:
    """What `fewstep evaluate` printed; FewstepError otherwise."""
    rows = read_json(file)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise FewstepError(f"{file} holds no list of records: give what `fewstep evaluate ... > {file.name}` wrote")
    try:
        return [Record.from_json(row) for row in rows]
    except FewstepError as error:
        raise FewstepError(f"{file}: {error}") from None


def home(record: Record) -> Path:
    """The run directory, search or file of a record's model, as its path says."""
    file = Path(record.model or "unnamed")
    if file.parent.name in ("averages", "snapshots"):
        return file.parent.parent
    return file.parent if file.name == "combined.safetensors" else file


def with_records(
    found: Mapping[Path, Contender], loose: Sequence[Record], homes: Mapping[str, Path], names: Mapping[Path, str]
) -> list[Contender]:
    """Each loose record with the contender whose weights it is of, else with a new one; each model is a row of its own."""
    found, several = dict(found), Counter(homes.values())
    for record in loose:
        path, info = homes[record.model_sha256], info_of(record)
        weights = f"{info.weights} at {info.nimg:,}" if info else Path(record.model).stem
        old = found.get(path) or unopened(names[path], info)
        row = f"{old.label}, {weights}" if several[path] > 1 else old.label
        new = Measured(record, row, weights, info.nimg if info else 0)
        found[path] = replace(old, measured=(*old.measured, new))
    return list(found.values())


def unopened(label: str, info: ModelInfo | None) -> Contender:
    """A model whose run is not among those given; info: what its file says, if it is there."""
    if info is None:
        return Contender(label, before=None)
    before = None if info.initialised_from else Spent(0, 0.0)
    spent = Spent(info.nimg, math.nan)
    return Contender(label, info.recipe, parameters=parameters_of(info), spent=spent, before=before, data=info.data)


def info_of(record: Record) -> ModelInfo | None:
    """What the record's model says of itself, if its file is still there and still the same."""
    try:
        file = find(record.model)
        header = read_header(file)
        return read_info(header, file) if header["weights_sha256"] == record.model_sha256 else None
    except (FewstepError, OSError):
        return None
