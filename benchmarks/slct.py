"""sLCT's claim: impulsive outliers in latents break iCT, and five changes mend it. On CIFAR-10's latents, and by dose.

    python benchmarks/autoencoder.py --data ../shared/data/cifar10        # once: AutoencoderKL 32x32 -> [4, 8, 8]
    python benchmarks/features.py --data ../shared/data/cifar10           # once: what Frechet distances are measured with
    python benchmarks/slct.py ladder --seeds 0 1 2 --jobs 2 --out benchmarks/results/DATE-slct-ladder.json
    python benchmarks/slct.py dose --seeds 0 --jobs 2 --out benchmarks/results/DATE-slct-dose.json

ladder: iLCT (pseudo-Huber over the sum, as iCT means it, and over the mean, as sLCT's authors' baseline has it), then on the
latter + Cauchy, + diffusion term, + OT, + adaptive c, + non-scaling LayerNorm = sLCT; one network (but for the norm), one
length, one data order. The data are `fewstep encode`'s latents, normalised per element as in the paper; their kurtosis and
outliers stand in the JSON. Frechet distance of decoded samples to CIFAR-10's training images, 1 and 2 steps, the weights and
the second sigma chosen on other noise; `floor` is the same distance of the autoencoder's own reconstructions.

dose: the same latents without their own tails (clamped to 4 std), then each element of the data set, once and for all, hit with
probability p by an impulse of +-10 std; normalised by the clean std, so that only the loss can suffer. What is asked is how
well the bulk was learned, so the distance must not see the impulses themselves: samples are clamped to the same 4 std, which
bounds what one impulse can do to less than the width of the bulk, and compared with clean held-out latents by the energy
distance 2 E|x - y| - E|x - x'| - E|y - y'| (unbiased, Euclidean norm of the 256 elements). `floor` is the energy distance
of the dosed training data themselves, clamped: what a perfect model of them would have.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import itertools
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from autoencoder import VAE, tails
from features import cached_reference, load_cifar_extractor
from fewstep.data import BatchOrder, DataSpec, Images, open_images, originals, preparation, to_uint8
from fewstep.evaluation import EVALUATION_SEED, Generator
from fewstep.metrics import Moments
from fewstep.networks import Architecture, UNet
from fewstep.progress import LearningRate
from fewstep.recipe import Recipe
from fewstep.samplers import FewStep
from fewstep.training import TrainState, training_steps
from fewstep.types import FewstepError
from methods import AVERAGES, CACHE, Setting, Yardstick, recipe_for, trained
from tasks import Task, Value, carry_out, paired, spread

PARTS = ("cauchy", "denoising", "ot", "adaptive-c", "nsln")  # in the order of the ladder
LADDER: dict[str, tuple[str, str, tuple[str, ...]]] = {  # rung: method, preset, parts left out
    "ilct": ("ilct", "digits", ()),
    "ilct-mean": ("ilct", "digits-mean", ()),
    **{f"+{part}": ("slct", "digits", PARTS[i + 1 :]) for i, part in enumerate(PARTS)},
}
DOSED = ("ilct", "ilct-mean", "+cauchy", "+nsln")
DOSES = (0.0, 1e-4, 1e-3, 1e-2)
IMPULSE, LIMIT = 10.0, 4.0  # in standard deviations of the clean latents
NETWORK = UNet(24, (1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8)
SECOND_SIGMAS = (0.15, 0.3, 0.6, 1.2, 2.4)  # tried by `dose`
LATENTS = CACHE / "cifar10-latents"


def prepare(cifar: str) -> None:
    """CIFAR-10's latents in the cache, encoded once; goes on where it was stopped."""
    from fewstep.encoding import Encoding, encode

    if not (VAE / "how.json").exists():
        raise FewstepError(f"{VAE} holds no finished autoencoder: run python benchmarks/autoencoder.py first")
    if not (LATENTS / "latents.json").exists():
        spec = DataSpec(str(Path(cifar).resolve()), resolution=32)
        encode(spec, LATENTS, str(VAE), Encoding(flip=False, shard_size=5000), statistics="element", batch=250)


def recipe_of(rung: str, setting: Setting, lr: float, seed: int) -> Recipe:
    """A rung of the ladder."""
    method, preset, left_out = LADDER[rung]
    recipe = replace(recipe_for(method, setting, setting.rest_nimg, seed, preset), lr=LearningRate(lr))
    for part in left_out:
        from fewstep.recipes.slct import without

        recipe = without(recipe, part)
    return replace(recipe, name=rung)


# The ladder


@cache
def latent_yardstick(num: int, search_num: int) -> Yardstick:
    """Decoded samples against CIFAR-10's training images at 32x32."""
    from fewstep.latents import decoder

    def make(model: Any) -> Generator:
        arch = model.info.architecture
        return Generator(model.denoiser, arch.shape, arch.num_classes, batch=250, decode=decoder(model.info.latents))

    extractor = load_cifar_extractor()
    reference = cached_reference(open_images(DataSpec(str(LATENTS))).split("train", 0.1), extractor, "cifar32[train]")
    return Yardstick(extractor, reference, num, search_num, make)


def climb(rung: str, setting: Setting, lr: float, seed: int, work: Path) -> Value:
    """One rung, trained and measured."""
    folder = work / f"{rung}-{setting.rest_nimg}-{lr:g}-{seed}"
    spent = trained(recipe_of(rung, setting, lr, seed), folder, None)
    return {"rung": rung, "seed": seed, **spent, **latent_yardstick(setting.num, setting.search_num).measure(folder)}


def describe(num: int) -> Value:
    """The latents' tails beside the pixels', and the distance of the autoencoder's reconstructions."""
    from fewstep.latents import decoder

    images = open_images(DataSpec(str(LATENTS)))
    shown, held = images.split("train", 0.1), images.split("heldout", 0.1)
    x = normalised(shown, 10_000)
    pixels = originals(shown).pixels(range(5000)).float() / 127.5 - 1
    yardstick, decode = latent_yardstick(num, num), decoder(images.space)
    assert decode is not None
    distances = []
    for offset in range(3):
        some = normalised(held, num * (offset + 1))[num * offset :]
        features = [yardstick.extractor(to_uint8(decode(z))) for z in some.split(250)]
        distances.append(yardstick.reference.frechet.distance(Moments.of(torch.cat(features))))
    return {"latents": tails(x), "pixels": tails(pixels), "floor": spread(distances)}


def normalised(images: Images, num: int) -> Tensor:
    """One posterior sample [num, C, H, W] each of the first `num` latents, normalised."""
    return preparation(images)(images.pixels(range(num)), 0, 0)


def ladder_summary(runs: dict[str, Value]) -> Value:
    """Distances by rung over seeds, and each rung over the one before, seed by seed."""
    of: dict[str, dict[int, Value]] = {}
    for run in runs.values():
        if "rung" in run:
            of.setdefault(run["rung"], {})[run["seed"]] = run
    rungs = [rung for rung in LADDER if rung in of]
    fd = {rung: {k: {s: run["fd"][k] for s, run in of[rung].items()} for k in ("1", "2")} for rung in rungs}
    rows = {
        rung: {
            "fd": {k: spread(list(fd[rung][k].values())) for k in ("1", "2")},
            "seeds": list(of[rung]), "second_sigma": [run["second_sigma"] for run in of[rung].values()],
            "weights": [run["weights"] for run in of[rung].values()],
            "seconds": spread([run["seconds"] for run in of[rung].values() if "seconds" in run] or [math.nan]),
            "skipped_steps": [run.get("skipped") for run in of[rung].values()],
        }
        for rung in rungs
    }  # fmt: skip
    pairs = list(itertools.pairwise(rungs))
    pairs += [(a, "+nsln") for a in ("ilct", "ilct-mean") if {a, "+nsln"} <= set(rungs)]
    ratios = {f"{b} over {a}": {f"{k} step": paired(fd[a][k], fd[b][k]) for k in ("1", "2")} for a, b in pairs}
    return {"ladder": rows, "paired": ratios}


# The dose


@cache
def bulk(which: Literal["train", "heldout"]) -> tuple[Tensor, Tensor]:
    """Normalised latents [n, 4, 8, 8] of a split, clamped to LIMIT standard deviations, and their labels."""
    images = open_images(DataSpec(str(LATENTS))).split(which, 0.1)
    assert images.space is not None
    assert images.labels is not None
    limit = LIMIT * images.space.sigma_data
    return normalised(images, len(images)).clamp(-limit, limit), images.labels


def dosed(x: Tensor, p: float) -> Tensor:
    """Each element hit with probability p by an impulse of +-IMPULSE std; the same ones at every call, more at a larger p."""
    generator = torch.Generator().manual_seed(1)
    hit = torch.rand(x.shape, generator=generator) < p
    sign = torch.randint(0, 2, x.shape, generator=generator) * 2.0 - 1
    return torch.where(hit, x + sign * IMPULSE * 0.5, x)


def energy(a: Tensor, b: Tensor) -> float:
    """The energy distance of two sets [n, d], [m, d]: unbiased, so it may be slightly below 0."""
    within = [torch.cdist(x, x).double().sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).double().mean() - within[0] - within[1])


def to_bulk(x: Tensor) -> Tensor:
    """Clamped to the bulk and flattened."""
    return x.clamp(-LIMIT * 0.5, LIMIT * 0.5).flatten(1).double()


def administer(rung: str, p: float, setting: Setting, lr: float, seed: int) -> Value:
    """Train on the dosed latents, and measure how well the bulk was learned."""
    x, labels = bulk("train")
    x = dosed(x, p)
    recipe = recipe_of(rung, setting, lr, seed)
    architecture = Architecture(recipe.network, tuple(x.shape[1:]), 10, recipe.sigma_data, recipe.sigma_min)
    state = TrainState.create(recipe, architecture, torch.device("cpu"))
    began, cpu = time.monotonic(), time.process_time()
    steps = training_steps(state, recipe, feed(x, labels, recipe), None, as_stored)
    while state.nimg < recipe.total_nimg:
        next(steps)
    steps.close()
    spent = {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    began, denoiser = time.monotonic(), architecture.build().eval().requires_grad_(False)
    generator = Generator(denoiser, architecture.shape, 10)
    clean = bulk("heldout")[0]
    clean = to_bulk(clean[: setting.num])

    def distance(sigmas: tuple[float, ...], noise_seed: int, num: int) -> float:
        return energy(to_bulk(torch.cat(list(generator(FewStep(sigmas), num, noise_seed)))), clean)

    tried = {}
    for name in ("online", *state.averages):
        denoiser.load_state_dict(state.weights(name))
        tried[name] = distance((80.0,), EVALUATION_SEED, setting.search_num)
    best = min(tried, key=lambda name: tried[name])
    denoiser.load_state_dict(state.weights(best))
    sigma = min(SECOND_SIGMAS, key=lambda s: distance((80.0, s), EVALUATION_SEED, setting.search_num))
    found = {
        key: spread([distance(sigmas, noise_seed, setting.num) for noise_seed in (0, 1, 2)])
        for key, sigmas in (("1", (80.0,)), ("2", (80.0, sigma)))
    }
    return {
        "rung": rung, "p": p, "seed": seed, **spent, "skipped": state.skipped, "weights": best, "second_sigma": sigma,
        "distance": {key: value["mean"] for key, value in found.items()},
        "distance_noise_std": {key: value["std"] for key, value in found.items()},
        "measure_seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def feed(x: Tensor, labels: Tensor, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in the run's order."""
    order, nimg = BatchOrder(len(x), recipe.seed), 0
    while True:
        rows = order.indices(nimg, recipe.batch_size)
        yield x[rows], labels[rows]
        nimg += recipe.batch_size


def as_stored(stored: Tensor, seed: int, nimg: int, rank: int = 0, world: int = 1) -> Tensor:
    """These data are normalised already."""
    return stored


def doses(num: int, levels: tuple[float, ...]) -> Value:
    """Per dose: the data's tails, and the floor."""
    x, clean = bulk("train")[0][:10_000], to_bulk(bulk("heldout")[0][:num])
    told = {}
    for p in levels:
        y = dosed(x, p)
        kept = {
            key: value for key, value in tails(y).items() if key.startswith(("excess_kurtosis_mean", "outliers_all"))
        }
        parts = [energy(to_bulk(y[i * num : (i + 1) * num]), clean) for i in range(3)]
        told[f"{p:g}"] = {"std": float(y.std()), **kept, "floor": spread(parts)}
    return {"doses": told}


def dose_summary(runs: dict[str, Value]) -> Value:
    """Energy distance by rung and dose, over seeds; and over that rung's at dose 0, and over sLCT's at the same dose."""
    rows: dict[str, Value] = {}
    cells: dict[tuple[str, float, str], dict[int, float]] = {}
    for run in runs.values():
        for k in ("1", "2") if "rung" in run else ():
            cells.setdefault((run["rung"], run["p"], k), {})[run["seed"]] = run["distance"][k]
    for (rung, p, k), values in cells.items():
        row = rows.setdefault(rung, {}).setdefault(f"{p:g}", {})
        row[f"{k} step"] = spread(list(values.values()))
        for name, other in (("over dose 0", (rung, 0.0, k)), ("over sLCT", ("+nsln", p, k))):
            if other in cells and min(*values.values(), *cells[other].values()) > 0:
                row[f"{k} step {name}"] = paired(cells[other], values)
    return {"by_dose": rows}


# The command line


@dataclass(frozen=True)
class Arguments:
    part: tyro.conf.Positional[Literal["ladder", "dose"]]
    out: Path
    """the JSON file; finished runs that it holds are not repeated"""
    seeds: tuple[int, ...] = (0,)
    rungs: tuple[str, ...] = ()
    """which to run; none: the whole ladder, or for dose ilct, ilct-mean, +cauchy and +nsln (= sLCT)"""
    doses: tuple[float, ...] = DOSES
    jobs: int = 1
    """runs at a time, one thread each"""
    nimg: int | None = None
    """images per run; None: 96,000 (ladder), 38,400 (dose)"""
    lr: float = 1e-3
    """of all rungs: at 48,000 images better than 5e-4 in one step for iLCT and for sLCT (one seed)"""
    num: int | None = None
    """samples per noise seed of a report and of a search; None: 1500 and 500 (ladder), 2000 and 1000 (dose)"""
    cifar: str = "../shared/data/cifar10"
    """where CIFAR-10 lies"""
    work: Path = CACHE / "slct"
    """where the ladder's run directories go"""


def main(arguments: Arguments) -> None:
    """Run what is missing, then print the figures."""
    ladder = arguments.part == "ladder"
    lr, work = arguments.lr, arguments.work
    nimg = arguments.nimg or (96_000 if ladder else 38_400)
    sizes = (arguments.num,) * 2 if arguments.num else (1500, 500) if ladder else (2000, 1000)
    setting = Setting(DataSpec(str(LATENTS)), NETWORK, 0, nimg, *sizes)
    rungs = arguments.rungs or (tuple(LADDER) if ladder else DOSED)
    if unknown := set(rungs) - LADDER.keys():
        raise FewstepError(f"unknown rungs {', '.join(sorted(unknown))}: choose from {', '.join(LADDER)}")
    torch.set_num_threads(1)
    prepare(arguments.cifar)
    if ladder:
        tasks = {"data": Task(describe, (setting.num,))}
        for seed in arguments.seeds:
            for rung in rungs:
                tasks[f"{rung}/{seed}"] = Task(climb, (rung, setting, lr, seed, work), ("data",))
    else:
        tasks = {"data": Task(doses, (setting.num, arguments.doses))}
        for seed in arguments.seeds:
            for p in arguments.doses:
                for rung in rungs:
                    tasks[f"{rung}/{p:g}/{seed}"] = Task(administer, (rung, p, setting, lr, seed), ("data",))
    header = {
        "what": "sLCT's five changes one after another on CIFAR-10 latents" if ladder else "Impulsive noise by dose",
        "command": "python benchmarks/slct.py " + " ".join(sys.argv[1:]),
        "settings": {
            "lr": lr,
            "averages": [law.name for law in AVERAGES],
            "second_sigmas": SECOND_SIGMAS,
            **asdict(setting),
        },
    }
    result = carry_out(tasks, arguments.out, header, arguments.jobs, ladder_summary if ladder else dose_summary)
    show(result, ladder)
    for name, problem in result["failures"].items():
        print(f"FAILED {name}: {problem}")


def show(result: Value, ladder: bool) -> None:
    """Markdown tables."""

    def cell(value: Value) -> str:
        return f"{value['mean']:.3g}" + (f" ± {value['std']:.2g}" if value["std"] is not None else "")

    data = result["runs"].get("data", {})
    if ladder:
        print("| rung | 1 step | 2 steps |\n|---|---|---|")
        for rung, row in result["ladder"].items():
            print(f"| {rung} | {cell(row['fd']['1'])} | {cell(row['fd']['2'])} |")
        if data:
            print(f"| (reconstructions) | {cell(data['floor'])} | |")
            print(
                f"latents' excess kurtosis {data['latents']['excess_kurtosis']}, pixels' {data['pixels']['excess_kurtosis']}"
            )
        return
    print("| rung | dose | 1 step | 2 steps | floor |\n|---|---|---|---|---|")
    for rung, row in result["by_dose"].items():
        for p, values in row.items():
            floor = cell(data["doses"][p]["floor"]) if p in data.get("doses", {}) else ""
            print(f"| {rung} | {p} | {cell(values['1 step'])} | {cell(values['2 step'])} | {floor} |")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
