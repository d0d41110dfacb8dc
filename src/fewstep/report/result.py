"""A result of `fewstep combine` as the report sees it."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.files import read_json
from fewstep.metrics import Record
from fewstep.model import Model, load, load_weights
from fewstep.report.numbers import ranked
from fewstep.samplers import DPMSolver, FewStep, Heun, Sampler
from fewstep.snapshots import Bank, read_header
from fewstep.types import FewstepError

SAMPLERS: dict[str, type[FewStep] | type[Heun] | type[DPMSolver]] = {
    "FewStep": FewStep, "Heun": Heun, "DPMSolver": DPMSolver,
}  # fmt: skip
WAYS = {"FewStep": "step", "Heun": "Heun step", "DPMSolver": "DPM-Solver++ step"}


def result_file(path: str | Path) -> Path | None:
    """The result.json that a path means, if it means one: itself, or that of a folder which is no run."""
    path = Path(path)
    file = path / "result.json"
    if path.is_dir():
        return file if file.is_file() and not (path / "recipe.json").exists() else None
    return path if path.suffix == ".json" else None


def number(value: Any) -> float:
    """A JSON number, or one of those that JSON lacks; nan for null."""
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class ResultView:
    """What a result.json tells, and the weights beside it; `problem` says why there is no model."""

    file: Path
    data: dict[str, Any]
    records: dict[str, list[Record]]
    model: Model | None
    problem: str
    label: str

    @classmethod
    def open(cls, path: str | Path, device: str) -> "ResultView":
        """Read a result; FewstepError when it is none."""
        file = result_file(path)
        data = read_json(file) if file else {}
        needed = {"version", "snapshots", "coefficients", "candidates", "records", "verdict"}
        if not file or not isinstance(data, dict) or not needed <= data.keys() or data["version"] != 1:
            raise FewstepError(f"{path} is no result of this version: give a folder that `fewstep combine` wrote")
        records = {name: [Record.from_json(r) for r in found] for name, found in data["records"].items()}
        model, problem = opened(file.with_name("combined.safetensors"), data.get("weights_sha256"), device)
        view = cls(file, data, records, model, problem, "")
        of = f" on {view.source}" * bool(view.source) + f", {view.way}" * bool(view.way)
        return replace(view, label=f"LCSC{of or f' of {len(view.nimg)} checkpoints'}")

    @property
    def source(self) -> str:
        """The name of the images that it is about; "" with a metric of the user's own."""
        return Path((self.data.get("reference") or {}).get("report", "").partition("[")[0]).name

    @property
    def sampler(self) -> Sampler | None:
        """The result's own, if it is one of ours."""
        told = self.data.get("sampler") or {}
        kind = SAMPLERS.get(told.get("name", ""))
        return kind(tuple(map(float, told["sigmas"]))) if kind else None

    @property
    def way(self) -> str:
        """1 step, 18 Heun steps; "" where the metric samples for itself."""
        steps = len(self.sampler.sigmas) if self.sampler else 0
        return f"{steps} {WAYS[type(self.sampler).__name__]}{'s' * (steps != 1)}" if steps else ""

    @property
    def nimg(self) -> list[int]:
        """Images seen at each checkpoint, or its position where that is unknown."""
        return [snapshot["nimg"] for snapshot in self.data["snapshots"]]

    @property
    def counted(self) -> bool:
        """Whether the checkpoints tell their images seen."""
        return self.nimg != list(range(len(self.nimg)))

    @property
    def kind(self) -> str:
        """The searcher that found it."""
        return self.data.get("chosen", "").partition("/")[0]

    @property
    def searches(self) -> dict[str, dict[str, Any]]:
        """That searcher's searches, one for each seed."""
        found = self.data.get("searches") or {}
        return {name: held for name, held in found.items() if held["search"] == self.kind and held["coefficients"]}

    def name(self, name: str) -> str:
        """The label and, of an average, which one."""
        kind, _, value = (held := self.data["candidates"][name]).get("profile", "").partition(":")
        what = {"ema": "decay", "power": "width"}.get(kind, "")
        return f"{held['label']}, {what} {value}" if what else held["label"]

    @property
    def metric(self) -> str:
        """What was searched for; of a user's function, its name."""
        return self.data.get("metric", "cost").rpartition(":")[2]

    def ordered(self) -> list[list[tuple[str, Record]]]:
        """The held-out records by candidate, those of one stamp together, best first; the searched metric comes first."""
        groups: dict[str, dict[str, Record]] = {}
        for name, found in self.records.items():
            for record in found:
                groups.setdefault(record.metric, {})[name] = record
        if self.data.get("sampler"):
            return [group for records in groups.values() for group in ranked(records)]
        return [sorted(records.items(), key=lambda item: item[1].value) for records in groups.values()]  # costs

    def standing(self, name: str) -> str:
        """How LCSC stands to a candidate: better, within the noise, worse; "" where that is not known."""
        gain = (self.data.get("gains") or {}).get(name)
        if not gain:
            return ""
        if gain["within_noise"]:
            return "within the noise"
        return "worse" if number(gain["paired_mean"]) < 0 else "better"

    def rival(self) -> str:
        """The candidate that the verdict names; "" if it names none."""
        places = {name: self.data["verdict"].find(held["label"]) for name, held in self.data["candidates"].items()}
        named = {name: place for name, place in places.items() if place >= 0 and name != "lcsc"}
        return min(named, key=lambda name: named[name], default="")

    def rebuilt(self, names: Sequence[str]) -> tuple[dict[str, Model], str]:
        """The candidates' models of those names, from the bank; and what is wrong, if they cannot be had."""
        file, said = self.file.with_name("bank.safetensors"), self.data["snapshots"]
        names = [name for name in names if name in self.data["candidates"]]
        assert self.model is not None
        try:
            bank = Bank.open(file)
            if [source.sha256 for source in bank.sources] != [snapshot["sha256"] for snapshot in said]:
                raise FewstepError(f"{file.name} is of other checkpoints")
            vectors = [self.data["candidates"][name]["coefficients"] for name in names]
            models = {}
            for name, row in zip(names, bank.combine(torch.tensor(vectors, dtype=torch.float64)), strict=True):
                denoiser = deepcopy(self.model.denoiser)
                load_weights(denoiser, bank.tensors(row), str(file))
                models[name] = replace(self.model, denoiser=denoiser, sha256="")
            return models, ""
        except FewstepError as error:
            return {}, str(error) if file.exists() else f"{file.name} is gone"


def opened(file: Path, sha256: str | None, device: str) -> tuple[Model | None, str]:
    """The combined weights as a model, or why there is none."""
    try:
        if not file.exists():
            return None, f"{file.name} is gone"
        if "model" not in read_header(file):
            return None, "fewstep knows no network for these weights"
        model = load(file, device)
    except FewstepError as error:
        return None, str(error)
    return (model, "") if model.sha256 == sha256 else (None, f"{file.name} holds other weights than this result's")
