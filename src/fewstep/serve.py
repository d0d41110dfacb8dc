"""A local page to look at few-step generators: any of their weights, alone or two from the same noise (fewstep serve)."""

import itertools
import math
import re
import shlex
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image

from fewstep._version import __version__
from fewstep.data import to_uint8
from fewstep.files import read_json, write_json
from fewstep.fitness import generator
from fewstep.model import Model, ModelInfo, find, in_order, load, read_info
from fewstep.outcome import LABELS
from fewstep.pictures import CELL, captioned, grid, png
from fewstep.report.contenders import short_names
from fewstep.samplers import Sampler
from fewstep.snapshots.sources import read_foreign_header
from fewstep.types import Denoiser, FewstepError, Labels, Sample, Times

EACH = "each"  # a class per column
COLUMNS, MOST = 10, 64  # classes beside each other, images
WIDE, LARGE = 880, 160  # pixels that all grids, and a small image in them, are about wide at most
LOWEST, HIGHEST = 0.05, 20.0  # EDM noise levels of the second step
STEPS, SOLVER_STEPS, SOLVER_DEFAULT = 4, 40, 18  # 18 of Heun's: EDM's own on CIFAR-10
Tick = Callable[[int, int], None]  # network evaluations done, of so many


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw."""

    weights: str
    compare: str = ""
    """other weights, drawn beside them from the same noise and labels"""
    seed: int = 0
    label: str = ""
    """a class by name or number; each: a class per column; empty: drawn uniformly for each image"""
    steps: int = 1
    """of consistency models"""
    solver_steps: int = SOLVER_DEFAULT
    """of diffusion models, Heun's: N are 2N - 1 network evaluations"""
    second_sigma: float | None = None
    """EDM noise level of a consistency model's second (its last) step; None: each model's own"""
    num: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.num <= MOST:
            raise FewstepError(f"{self.num} images: give 1 to {MOST}; `fewstep sample` makes any number")
        if max(self.steps, self.solver_steps) > 1000:
            raise FewstepError("more than 1000 steps: give fewer")

    def sampler(self, info: ModelInfo) -> Sampler:
        """How this model is asked to sample."""
        if info.kind == "diffusion":
            return info.sampler(self.solver_steps)
        return replace(info, second_sigma=self.second_sigma or info.second_sigma).sampler(self.steps)

    def layout(self, info: ModelInfo) -> tuple[int, int, int | list[int] | None]:
        """How many images in how many columns, and their class: one for all, one per column, or None."""
        classes = min(info.architecture.num_classes, COLUMNS)
        if self.label == EACH and classes:
            return classes * max(1, round(self.num / classes)), classes, list(range(classes))
        return self.num, math.ceil(math.sqrt(self.num)), info.label(self.label or None)


@dataclass(frozen=True)
class Drawing:
    """A picture, and how it was made: JSON-able, with the program that makes the same images."""

    image: Image.Image
    told: dict[str, Any]


@dataclass(frozen=True)
class Counted:
    """A denoiser that tells each of its evaluations."""

    denoiser: Denoiser
    tick: Callable[[], None]

    def __call__(self, x: Sample, t: Times, label: Labels = None, /) -> Sample:
        self.tick()
        return self.denoiser(x, t, label)


class Studio:
    """Sets of weights by name, loaded when they are first drawn, the latest few kept; one picture at a time."""

    def __init__(self, models: Sequence[str], device: torch.device | str = "cpu", kept: int = 4):
        self.sources, self.device, self.kept = named(models), torch.device(device), kept
        self.lock, self.loaded = Lock(), OrderedDict[tuple[Path, int], Model]()

    def weights(self) -> list[str]:
        """The names of all sets of weights."""
        return list(self.sources)

    def file(self, name: str) -> Path:
        """Where they lie now: a run that goes on has newer ones."""
        if name not in self.sources:
            raise FewstepError(f"unknown weights {name!r}: choose from {', '.join(self.sources)}")
        return find(self.sources[name])

    def info(self, name: str) -> ModelInfo:
        """What the file says, unloaded."""
        return info_of(*dated(self.file(name)))

    def model(self, name: str) -> Model:
        """Loaded, from memory where the file is as it was."""
        key = dated(self.file(name))
        if key not in self.loaded:
            self.loaded[key] = load(key[0], self.device)
        self.loaded.move_to_end(key)
        while len(self.loaded) > self.kept:
            self.loaded.popitem(last=False)
        return self.loaded[key]

    def draw(self, request: Request, tick: Tick | None = None) -> Drawing:
        """The picture; FewstepError for what does not exist or go together."""
        names = [request.weights] + [request.compare] * (request.compare not in ("", request.weights))
        with self.lock:
            models = {name: self.model(name) for name in names}
            first, last = (models[name].info for name in (names[0], names[-1]))
            if not fit(first, last):
                raise FewstepError(
                    f"{names[0]} and {names[-1]} make images of other sizes or classes: no noise is the same for both"
                )
            num, columns, label = request.layout(max(first, last, key=lambda info: info.architecture.num_classes))
            total, ticks = sum(request.sampler(model.info).nfe for model in models.values()), itertools.count(1)
            panels, grids = [], {}
            for letter, (name, model) in zip("AB", models.items(), strict=False):
                sampler, make = request.sampler(model.info), generator(model)
                if tick:
                    make = replace(make, denoiser=Counted(model.denoiser, lambda: tick(next(ticks), total)))
                began = time.perf_counter()
                images = torch.cat([to_uint8(x).cpu() for x in make(sampler, num, request.seed, label)])
                took = round(1000 * (time.perf_counter() - began), 1)
                own = label if model.info.architecture.num_classes else None
                again = repeated(model, sampler, num, request.seed, own)
                panels.append({"weights": name, **described(model, sampler), "milliseconds": took, **again})
                picture = grid(images, columns, cell=max(CELL, min(WIDE // len(names) // columns, LARGE)))
                grids[caption(f"{letter}  {name}, NFE {sampler.nfe}", picture.width)] = picture
        told = {
            "fewstep": __version__, "device": str(self.device), "seed": request.seed, "num": num, "columns": columns,
            "label": label, "panels": panels,
        }  # fmt: skip
        return Drawing(captioned(grids) if len(grids) > 1 else next(iter(grids.values())), told)


def dated(file: Path) -> tuple[Path, int]:
    """A file and when it was last written, which is what its content goes by."""
    return file, file.stat().st_mtime_ns if file.exists() else 0


@lru_cache(maxsize=256)
def info_of(file: Path, changed: int) -> ModelInfo:
    """What a file says of its model; FewstepError where that is not enough to draw it."""
    header = read_foreign_header(file)
    return read_info(header, file) if header else load(file).info


def fit(a: ModelInfo, b: ModelInfo) -> bool:
    """Whether the same noise and labels go into both."""
    classes = {a.architecture.num_classes, b.architecture.num_classes} - {0}
    return a.architecture.shape == b.architecture.shape and len(classes) < 2


def caption(text: str, width: int) -> str:
    """Text that fits over a picture so many pixels wide, without its middle if need be."""
    room = max(width // 9, 8)
    return text if len(text) <= room else f"{text[: room // 3]}...{text[len(text) - room + room // 3 + 3 :]}"


def named(models: Sequence[str]) -> dict[str, str]:
    """Every set of weights that MODEL arguments hold: a short name -> what `fewstep sample` takes. A file counts once."""
    bases = {text: Path(text) if Path(text).exists() else Path(text.rpartition(":")[0] or text) for text in models}
    short, listed = short_names(list(bases.values())), list[tuple[str, str]]()
    for text, base in bases.items():
        find(text)  # refused here if it holds nothing
        inside = members(base) if Path(text) == base else {text[text.rindex(":") :]: text}
        listed += [(short[base] + name, source) for name, source in inside.items()]
    for base in bases.values():
        listed += [(f"{short[base]}, {name}", source) for name, source in compared(base / "result.json").items()]
    found = dict[Path, tuple[str, str]]()
    for name, source in listed:
        info_of(*dated(find(source)))
        found.setdefault(find(source).resolve(), (name, source))
    return dict(found.values())


def members(path: Path) -> dict[str, str]:
    """The weights of a run directory, of a search's folder or of a file: what comes after its name -> source."""
    averages = in_order(sorted((path / "averages").glob("*.safetensors")), path / "recipe.json")
    averages.sort(key=lambda file: file.stem != "best")
    found = {f":{file.stem}": f"{path}:{file.stem}" for file in averages}
    if any((path / "snapshots").glob("*.safetensors")):
        found[":online"] = f"{path}:online"
    return found or {"": str(path)}


def compared(result: Path) -> dict[str, str]:
    """What a search was compared with, where its file is at hand: the last snapshot, averages made by `fewstep average`."""
    told = read_json(result) if result.exists() else {}
    files = {}
    for kind, choice in told.get("candidates", {}).items():
        if kind in LABELS and choice.get("profile") and told.get("run"):
            stem = f"{choice['profile'].replace(':', '-')}-snapshots"
            files[LABELS[kind]] = f"{told['run']}/averages/{stem}.safetensors"
    for source in told.get("snapshots", [])[-1:]:
        files[LABELS["last"]] = source["path"]
    return {label: file for label, file in files.items() if Path(file).exists()}


def described(model: Model, sampler: Sampler) -> dict[str, Any]:
    """What draws, and what it takes."""
    return {
        "model": str(model.path), "model_sha256": model.sha256, "kind": model.info.kind, "trained": model.info.weights,
        "nimg": model.info.nimg, "sampler": type(sampler).__name__, "sigmas": list(sampler.sigmas), "nfe": sampler.nfe,
    }  # fmt: skip


def repeated(model: Model, sampler: Sampler, num: int, seed: int, label: int | list[int] | None) -> dict[str, Any]:
    """The program, and where there is one the command, that make the same images."""
    info, steps, device = (
        model.info,
        len(sampler.sigmas),
        "" if model.device.type == "cpu" else f", {str(model.device)!r}",
    )
    called = info.class_names[label] if isinstance(label, int) and info.class_names else label
    lines = [
        "import fewstep",
        f"from fewstep.samplers import {type(sampler).__name__}",
        "",
        f"model = fewstep.load({str(model.path)!r}{device})  # SHA-256 {model.sha256[:12]}",
        f"sampler = {sampler!r}",
        f"images = fewstep.sample(model, num={num}, seed={seed}, label={called!r}, sampler=sampler)",
    ]
    command = f"fewstep sample {shlex.quote(str(model.path))} --steps {steps} --num {num} --seed {seed}"
    command += "" if label is None else f" --label {shlex.quote(str(called))}"
    if isinstance(label, list):
        lines[:1] = [
            "import torch",
            "import fewstep",
            "from fewstep.api import generator",
            "from fewstep.data import to_uint8",
        ]
        lines[-1:] = [
            f"batches = generator(model)(sampler, {num}, seed={seed}, label={label})",
            "images = torch.cat([to_uint8(batch).cpu() for batch in batches])",
        ]
    sayable = sampler == info.sampler(steps) and not isinstance(label, list)
    return {"command": command if sayable else None, "python": "\n".join([*lines, ""])}


def controls(studio: Studio, weights: str, compare: str, label: str, steps: int, sigma: float | None) -> dict[str, Any]:
    """What each control that depends on the weights shows; values that are possible stay. sigma: None for the model's own."""
    compare = compare if compare != weights else ""
    infos = [studio.info(name) for name in (weights, compare) if name]
    most = max(infos, key=lambda info: info.architecture.num_classes)
    classes, kinds = most.architecture.num_classes, {info.kind for info in infos}
    names = list(most.class_names) or [str(k) for k in range(classes)]
    each = "each: a class per column" + f", the first {COLUMNS}" * (classes > COLUMNS)
    own = next((info.second_sigma for info in infos if info.kind == "consistency"), infos[0].second_sigma)
    sigma, second = sigma or own, "consistency" in kinds and steps > 1
    return {
        "compare": {"value": compare, "visible": len(studio.weights()) > 1},
        "label": {
            "choices": [(each, EACH), ("any: drawn for each image", ""), *names] if classes else [("any", "")],
            "value": label if classes and label in (EACH, "", *names) else EACH if classes else "",
            "visible": bool(classes),
        },
        "steps": {"visible": "consistency" in kinds},
        "solver_steps": {"visible": "diffusion" in kinds},
        "sigma": {"value": sigma, "visible": second, "info": f"EDM noise level (80: pure noise); the model's own: {own:g}"},
        "log_sigma": {"value": math.log10(min(max(sigma, LOWEST), HIGHEST)), "visible": second},
    }  # fmt: skip


def details(told: dict[str, Any]) -> str:
    """What a picture took, as Markdown."""
    label = told["label"]
    lines = [f"{told['num']} images of seed {told['seed']}" + ", a class per column" * isinstance(label, list)]
    for letter, one in zip("AB", told["panels"], strict=False):
        levels = [f"{sigma:.4g}" for sigma in one["sigmas"]]
        levels = levels if len(levels) < 6 else [*levels[:2], "...", levels[-1]]
        lines.append(
            f"{f'**{letter}** ' * (len(told['panels']) > 1)}`{one['weights']}`: {one['kind']}, {one['trained']} after "
            f"{one['nimg']:,} images, NFE {one['nfe']} at σ {', '.join(levels)}, {one['milliseconds']:.0f} ms, "
            f"SHA-256 `{one['model_sha256'][:12]}`"
        )
    return "\n\n".join(lines)


def saved(drawing: Drawing, folder: Path) -> tuple[str, str]:
    """The picture and how it was made, as files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = "-".join(re.sub(r"[^\w.-]+", "-", one["weights"]) for one in drawing.told["panels"])
    stem = folder / f"{words[:80]}-seed-{drawing.told['seed']}"
    picture, told = Path(f"{stem}.png"), Path(f"{stem}.json")
    picture.write_bytes(png(drawing.image))
    write_json(told, drawing.told)
    return str(picture), str(told)
