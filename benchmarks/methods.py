"""Every method at equal images seen, on digits and on CIFAR-10 at 16x16, in pixels: one table each.

    python benchmarks/features.py --data ../shared/data/cifar10            # once; cifar16 is measured with it
    python benchmarks/methods.py --data digits --seeds 0 1 2 --jobs 2 --out benchmarks/results/DATE-methods-digits.json
    python benchmarks/methods.py --data cifar16 --seeds 0 1 --jobs 2 --out benchmarks/results/DATE-methods-cifar16.json

Per seed: a short diffusion model (`pretrain`), from it ECT and CD (it is CD's teacher) and, half of the rest each, ECT then
TCM; from random weights CT, iCT, sLCT and, for all the images, diffusion. Pre-training counts. Same network (sLCT's has its
own norm, TCM's a frozen copy), same data order; batch size, rate and objective are each recipe's digits preset. `forwards`
counts the network's passes per run, a backward pass as two: 3 an image for diffusion, 4 for consistency, 6 for CD.

Measured alike: the best of raw weights and both averages at one step on other noise (diffusion: 5 steps of
DPM-Solver++), the second sigma searched on other noise, then noise seeds 0, 1, 2 at 1 and 2 steps (diffusion: at 1 to 17
evaluations) against the training images. Every finished run is in the JSON at once, and never repeated; runs lie in --work.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the networks are tiny: a second thread slows them (docs/log.md)

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from fewstep import codec
from fewstep.data import DataSpec, Images, open_images
from fewstep.ema import AverageLaw, ConstantEMA
from fewstep.evaluation import EVALUATION_SEED, Generator, evaluate, reference_of, search_second_sigma
from fewstep.files import read_json, write_json
from fewstep.metrics import Extractor, Reference, load_extractor
from fewstep.model import load
from fewstep.networks import UNet
from fewstep.recipe import Evaluation, Recipe
from fewstep.recipes import recipe as get_recipe
from fewstep.run import train
from fewstep.rundir import RunDir
from fewstep.samplers import DPMSolver, FewStep
from fewstep.types import FewstepError
from tasks import CACHE, Task, Value, carry_out, paired, spread

AVERAGES: tuple[AverageLaw, ...] = (ConstantEMA(0.99), ConstantEMA(0.98))
EVALUATIONS = (1, 2, 5, 9, 17)  # of the diffusion model
METHODS = ("diffusion", "ct", "ict", "ect", "tcm", "cd", "slct")


@dataclass(frozen=True)
class Setting:
    """A data set, the network that all methods share, and how much of both is used."""

    data: DataSpec
    network: UNet
    pretrain_nimg: int
    rest_nimg: int
    num: int
    """samples per noise seed of a report"""
    search_num: int
    """samples per trial of a search"""


SETTINGS = {
    "digits": Setting(
        DataSpec("digits"), UNet(16, (1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8), 38_400, 76_800, 3000, 2000
    ),
    "cifar16": Setting(
        DataSpec(str(CACHE / "cifar16.npz"), flip=True),
        UNet(16, (1, 2, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8), 24_320, 48_640, 2500, 1000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run of a seed: a recipe, its images, and the run that it starts from."""

    recipe: str
    nimg: int
    init: str = ""
    forwards: int = 4


def plan(setting: Setting) -> dict[str, Run]:
    """All runs of one seed by name; each chain sees pretrain_nimg + rest_nimg images."""
    pretrain, rest = setting.pretrain_nimg, setting.rest_nimg
    total, half = pretrain + rest, rest // 256 * 128
    return {
        "pretrain": Run("edm", pretrain, forwards=3),
        "diffusion": Run("edm", total, forwards=3),
        "ect": Run("ect", rest, "pretrain"),
        "cd": Run("cd", rest, "pretrain", forwards=6),
        "ect-half": Run("ect", half, "pretrain"),
        "tcm": Run("tcm", rest - half, "ect-half"),
        **{name: Run(name, total) for name in ("ct", "ict", "slct")},
    }


def chain(runs: dict[str, Run], name: str) -> list[str]:
    """A run and those before it, first to last."""
    return [*(chain(runs, runs[name].init) if runs[name].init else []), name]


def recipe_for(name: str, setting: Setting, nimg: int, seed: int, preset: str = "digits") -> Recipe:
    """A recipe's preset on this data, network and length; its own norm, its own splice, no measuring on the way."""
    base = get_recipe(name, preset)
    own: Any = base.network
    network: Any = replace(setting.network, norm=own.norm) if hasattr(own, "norm") else setting.network
    return replace(
        base, data=setting.data, network=replace(own, network=network) if hasattr(own, "network") else network,
        total_nimg=nimg, seed=seed, averages=AVERAGES, snapshot_nimg=0, grid_nimg=0, evaluation=Evaluation(),
    )  # fmt: skip


def trained(recipe: Recipe, folder: Path, init: Path | None) -> Value:
    """Carry the recipe out in `folder`, or go on with what is there if it is this recipe's; wall and CPU seconds."""
    wall, cpu, run = time.monotonic(), time.process_time(), RunDir(folder)
    same = run.state_file.exists() and codec.encode(run.recipe()) == codec.encode(recipe)
    if same and run.progress()["nimg"] >= recipe.total_nimg and (folder / "seconds.json").exists():
        return {"nimg": recipe.total_nimg, **read_json(folder / "seconds.json")}
    model = load(init) if init else None
    train(recipe, folder, init=model, resume=same, overwrite=not same, quiet=True, device="cpu")
    spent = {
        "seconds": round(time.monotonic() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
        "skipped": run.progress()["skipped"],
    }  # fmt: skip
    write_json(folder / "seconds.json", spent)
    return {"nimg": recipe.total_nimg, **spent}


@dataclass(frozen=True)
class Yardstick:
    """What samples are measured with: features, the real images, how many samples; and how a run's model makes images."""

    extractor: Extractor
    reference: Reference
    num: int
    search_num: int
    make: Callable[[Any], Generator] = field(
        default=lambda model: Generator(
            model.denoiser, model.info.architecture.shape, model.info.architecture.num_classes
        )
    )

    def distance(self, model: Any, sampler: Any, seeds: Sequence[int], num: int) -> tuple[float, float]:
        """Mean and standard deviation over noise seeds of the Frechet distance."""
        record = evaluate(self.make(model), sampler, self.reference, self.extractor, num, seeds)[0]
        return record.value, statistics.stdev(record.values) if len(seeds) > 1 else 0.0

    def measure(self, folder: Path) -> Value:
        """The best weights of a run, its second noise level, and its distances as the docstring of this file says."""
        began = time.monotonic()
        names = ["online", *(law.name for law in AVERAGES)]
        diffusion = load(f"{folder}:online").info.kind == "diffusion"
        chosen_by = DPMSolver.karras(5) if diffusion else FewStep((80.0,))
        tried = {
            name: self.distance(load(f"{folder}:{name}"), chosen_by, (EVALUATION_SEED,), self.search_num)[0]
            for name in names
        }
        best = min(tried, key=lambda name: tried[name])
        model, samplers, found = load(f"{folder}:{best}"), dict[str, Any](), dict[str, Any]()
        if diffusion:
            samplers = {str(k): DPMSolver.karras(k) for k in EVALUATIONS}
        else:
            sigma, _ = search_second_sigma(self.make(model), self.reference, self.extractor, self.search_num, coarse=7)
            found["second_sigma"] = sigma
            samplers = {"1": FewStep((80.0,)), "2": FewStep((80.0, sigma))}
        values = {key: self.distance(model, sampler, (0, 1, 2), self.num) for key, sampler in samplers.items()}
        return {
            "fd": {key: value for key, (value, _) in values.items()},
            "fd_noise_std": {key: std for key, (_, std) in values.items()},
            **found, "weights": best, "weights_tried": tried, "measure_seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip


def pixel_yardstick(data: str, setting: Setting) -> Yardstick:
    """The digits extractor, or for CIFAR-10 the one of benchmarks/features.py, against the training images."""
    images = open_images(setting.data)
    if data == "digits":
        extractor = load_extractor("digits")
        reference = reference_of(images, extractor, "train", setting.data.heldout)
    else:
        from features import cached_reference, load_cifar_extractor

        extractor = load_cifar_extractor()
        reference = cached_reference(images.split("train", setting.data.heldout), extractor, f"{data}[train]")
    return Yardstick(extractor, reference, setting.num, setting.search_num)


def prepare_cifar16(source: str) -> Path:
    """CIFAR-10 resized to 16x16 as an .npz in the cache, so that no run decodes it again; written once."""
    path = Path(SETTINGS["cifar16"].data.source)
    if not path.exists():
        images: Images = open_images(DataSpec(source, resolution=16))
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{os.getpid()}.npz")
        pixels = images.pixels(range(len(images))).permute(0, 2, 3, 1).numpy()
        assert images.labels is not None
        np.savez(new, images=pixels, labels=images.labels.numpy())
        new.replace(path)
    return path


# The table of methods


def one(data: str, name: str, setting: Setting, seed: int, work: Path) -> Value:
    """One run of the plan: trained, and measured unless it is but a stage of another."""
    run = plan(setting)[name]
    recipe = recipe_for(run.recipe, setting, run.nimg, seed)
    init = work / f"{run.init}-{seed}" if run.init else None
    spent = trained(recipe, work / f"{name}-{seed}", init)
    measured = {} if name == "ect-half" else pixel_yardstick(data, setting).measure(work / f"{name}-{seed}")
    return {"method": name, "seed": seed, **spent, **measured}


def table(runs: dict[str, Value], setting: Setting) -> Value:
    """Per method: distances over seeds, images, forwards, seconds; and the pairs that the issue asks about."""
    of: dict[str, dict[int, Value]] = {}
    for run in runs.values():
        of.setdefault(run["method"], {})[run["seed"]] = run
    known, rows = plan(setting), {}
    for name in [n for n in ("pretrain", *METHODS) if n in of]:
        stages = chain(known, name)
        complete = [s for s in of[name] if all(s in of.get(stage, {}) for stage in stages)]
        rows[name] = {
            "fd": {k: spread([run["fd"][k] for run in of[name].values()]) for k in next(iter(of[name].values()))["fd"]},
            "seeds": list(of[name]), "images": sum(known[stage].nimg for stage in stages),
            "forwards": sum(known[stage].nimg * known[stage].forwards for stage in stages),
            **{
                key: spread([sum(of[stage][s].get(key, math.nan) for stage in stages) for s in complete])
                for key in ("seconds", "cpu_seconds") if complete
            },
            "second_sigma": [run.get("second_sigma") for run in of[name].values()],
            "weights": [run["weights"] for run in of[name].values()],
        }  # fmt: skip
    fd = {name: {k: {s: run["fd"][k] for s, run in of[name].items()} for k in ("1", "2")} for name in rows}
    against = {
        f"{b} / {a}": {f"{k} step": paired(fd[a][k], fd[b][k]) for k in ("1", "2")}
        for a, b in itertools.permutations(("ect", "ict", "slct", "tcm", "cd"), 2)
        if a in fd and b in fd and (a == "ect" or (a, b) == ("ict", "slct"))
    }
    return {"table": rows, "paired": against}


def markdown(rows: dict[str, Value]) -> str:
    """The table as docs/methods.md has it."""

    def cell(value: Value | None, digits: int = 3) -> str:
        if not value:
            return ""
        return f"{value['mean']:.{digits}g}" + (f" ± {value['std']:.2g}" if value["std"] is not None else "")

    lines = ["| method | images | forwards | CPU s | 1 step | 2 steps | others |", "|---|---|---|---|---|---|---|"]
    for name, row in rows.items():
        others = ", ".join(f"{k} NFE: {cell(v)}" for k, v in row["fd"].items() if k not in ("1", "2"))
        lines.append(
            f"| {name} | {row['images']:,} | {row['forwards']:,} | {cell(row.get('cpu_seconds'))} | {cell(row['fd'].get('1'))} "
            f"| {cell(row['fd'].get('2'))} | {others} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Arguments:
    out: Path
    """the JSON file; finished runs that it holds are not repeated"""
    data: Literal["digits", "cifar16"] = "digits"
    seeds: tuple[int, ...] = (0, 1, 2)
    methods: tuple[str, ...] = METHODS
    jobs: int = 1
    """runs at a time, one thread each"""
    cifar: str = "../shared/data/cifar10"
    """where CIFAR-10 lies"""
    work: Path = CACHE / "methods"
    """where the run directories go"""
    nimg: int | None = None
    """images per method, a third of them pre-training; None: the setting's"""
    num: int | None = None
    """samples per noise seed of a report and of a search; None: the setting's"""


def main(arguments: Arguments) -> None:
    """Run what is missing, then print the table."""
    setting = SETTINGS[arguments.data]
    if arguments.nimg:
        third = max(arguments.nimg // 384, 2) * 128
        setting = replace(setting, pretrain_nimg=third, rest_nimg=2 * third)
    if arguments.num:
        setting = replace(setting, num=arguments.num, search_num=arguments.num)
    if arguments.data == "cifar16":
        prepare_cifar16(arguments.cifar)
    known = plan(setting)
    if unknown := set(arguments.methods) - known.keys():
        raise FewstepError(f"unknown methods {', '.join(sorted(unknown))}: choose from {', '.join(METHODS)}")
    work = arguments.work / f"{arguments.data}-{setting.pretrain_nimg + setting.rest_nimg}"
    tasks: dict[str, Task] = {}
    for seed in arguments.seeds:
        for name in [stage for method in arguments.methods for stage in chain(known, method)]:
            needs = (f"{known[name].init}/{seed}",) if known[name].init else ()
            tasks[f"{name}/{seed}"] = Task(one, (arguments.data, name, setting, seed, work), needs)
    header = {
        "what": f"Every method at equal images seen on {arguments.data}: Frechet distance, one and two steps",
        "command": "python benchmarks/methods.py " + " ".join(sys.argv[1:]),
        "settings": {"data": arguments.data, **asdict(setting)},
    }
    result = carry_out(tasks, arguments.out, header, arguments.jobs, lambda runs: table(runs, setting))
    print(markdown(result["table"]))
    for pair, by_steps in result["paired"].items():
        print(pair, json.dumps(by_steps))
    for name, problem in result["failures"].items():
        print(f"FAILED {name}: {problem}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
