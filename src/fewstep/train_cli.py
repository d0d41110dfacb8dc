"""`fewstep train`: every field of a recipe as an option."""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from fewstep import codec, distributed, recipes
from fewstep.choices import CHOICES, choose
from fewstep.console import say
from fewstep.data import open_images
from fewstep.ema import AverageLaw, average_law
from fewstep.estimate import estimate, summary
from fewstep.model import Model, load
from fewstep.networks import Architecture, Network, Stock, inherited
from fewstep.networks.stock import VariancePreserving
from fewstep.recipe import Recipe, with_sigma_data
from fewstep.run import architecture_for
from fewstep.run import train as run_train
from fewstep.rundir import RunDir
from fewstep.types import FewstepError

BOUND = (
    1.0  # of an epsilon network's amplification in tuning: 3.3 in one step where 3 gives 6.6 and none 30 (docs/log.md)
)
# A preset's published figures are quoted only while these fields are the preset's.
PUBLISHED_WITH = (
    "objective",
    "network",
    "timesteps",
    "total_nimg",
    "batch_size",
    "optimizer",
    "lr",
    "sigma_data",
    "precision",
)


def train(args: Sequence[str]) -> dict[str, Any] | None:
    """Train a recipe: fewstep train RECIPE --data SOURCE --out RUN; see fewstep train RECIPE --help for every field."""
    if not args or args[0].startswith("-"):
        return train_overview(args)
    name, rest = args[0], [f"--data.source{a[6:]}" if a.partition("=")[0] == "--data" else a for a in args[1:]]
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=f"fewstep train {name}")
    peek.add_argument("--preset")
    peek.add_argument("--init")
    peek.add_argument("--out", type=Path)
    peek.add_argument("--resume", action="store_true")
    peek.add_argument("--without", nargs="*", default=[])
    for option in CHOICES:
        peek.add_argument(f"--{option}")
    early, _ = peek.parse_known_args(rest)
    preset = recipe = recipes.recipe(name, early.preset)
    init = load(early.init) if early.init else None
    chosen = {option: value for option in CHOICES if (value := getattr(early, option))}
    fixed = [*(["preset"] if early.preset else []), *(["without"] if early.without else []), *chosen]
    if early.resume and fixed:
        raise FewstepError(f"--resume keeps the recipe of the run: leave out --{', --'.join(fixed)}")
    if init and "network" in chosen:
        raise FewstepError("the network is that of --init: leave out --network")
    if early.resume and early.out:
        recipe = stored_recipe(early.out, name)
    elif init:
        recipe = inherit(recipe, init)
    for option, value in chosen.items():
        recipe = choose(recipe, option, value)
    for part in early.without:
        recipe = recipes.without(name, recipe, part)
    options, recipe = parse_train(name, rest, recipe)
    if any(codec.encode(getattr(recipe, f)) != codec.encode(getattr(preset, f)) for f in PUBLISHED_WITH):
        recipe = replace(recipe, published="")
    if options.dry_run:
        return dry_run(recipe, init)
    check_train(options, recipe)
    first = os.environ.get("RANK", "0") == "0"  # torchrun starts several of us; one speaks
    if recipe.starts_from and not recipe.needs_init and not init and not options.resume and first:
        say(
            f"note: {name} usually starts from {recipe.starts_from} (--init RUN; `fewstep train edm` makes one); "
            "this run starts from random weights"
        )

    began = time.monotonic()
    assert options.out is not None
    run = run_train(
        recipe, options.out, init=init, resume=options.resume, overwrite=options.overwrite, device=options.device
    )
    distributed.stop()
    if not first:
        return None
    done, rows = run.progress(), run.log()
    return {
        "run": str(run.path), "nimg": done["nimg"], "skipped": done["skipped"],
        "seconds": round(time.monotonic() - began, 1), "losses": rows[-1]["losses"],
        "images_per_second": statistics.median(row["images_per_second"] for row in rows),
    }  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """What `fewstep train` takes besides the recipe's fields."""

    out: Path | None = None
    """the run directory"""
    preset: str | None = None
    """a named set of the recipe's constants"""
    init: str | None = None
    """model whose weights training starts from (RUN, RUN:ema-0.999 or a snapshot); the network is inherited from it"""
    resume: bool = False
    """continue the run in --out, bit for bit"""
    overwrite: bool = False
    """replace the run in --out"""
    without: tuple[str, ...] = ()
    """parts of a method to leave out, for ablations: see the recipe's page (slct: cauchy denoising ot adaptive-c nsln)"""
    network: str | None = None
    """unet, ddpm++, ncsn++, edm2-xs, -s, -m, -l, dit-s, -b, -l, -xl in place; then --network.FIELD"""
    coupling: str | None = None
    """which noise goes with which image: independent or ot; then --objective.coupling.FIELD"""
    distance: str | None = None
    """of consistency terms: l2, pseudo-huber, cauchy, geman-mcclure, lpips; --objective.terms.consistency.distance.FIELD"""
    c: str | None = None
    """the distance's constant: dimension (0.00054 sqrt(d)), intervals (sLCT's closed form) or residual (measured online)"""
    times: str | None = None
    """an adaptive law of times on top of the recipe's: variance or learned (own: none); then --timesteps.FIELD"""
    dry_run: bool = False
    """print the resolved recipe and its cost, and stop"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""


def parse_train(name: str, args: Sequence[str], recipe: Recipe) -> tuple[TrainOptions, Recipe]:
    """Options and recipe from the command line, every field of the recipe being an option."""

    @dataclass(frozen=True)
    class Train:
        options: Annotated[TrainOptions, tyro.conf.arg(name="")]
        recipe: Annotated[Recipe, tyro.conf.arg(name="")]

    page = (recipes.module(name).__doc__ or "") + f"\npresets: {', '.join(recipes.presets(name))}"
    with by_name():
        parsed = tyro.cli(
            Train,
            args=list(args),
            prog=f"fewstep train {name}",
            description=page,
            default=Train(TrainOptions(), recipe),
            config=(tyro.conf.AvoidSubcommands,),
        )
    return parsed.options, parsed.recipe


def by_name() -> tyro.constructors.ConstructorRegistry:
    """Lets --averages take the averages' names: --averages ema-0.999 power-0.1."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type is not AverageLaw:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="ema-DECAY|power-STD",
            instance_from_str=lambda names: average_law(names[0]),
            is_instance=lambda value: isinstance(value, AverageLaw),
            str_from_instance=lambda law: [law.name],
        )

    return registry


def train_overview(args: Sequence[str]) -> dict[str, Any]:
    """`fewstep train --help`: the recipes there are."""
    lines = [
        "usage: fewstep train RECIPE --data SOURCE --out RUN [--init MODEL] [--preset NAME] [--resume] [--dry-run]",
        "",
    ]
    for name in recipes.names():
        first = (recipes.module(name).__doc__ or "").splitlines()[0]
        lines += [f"  {name:6} {first}", f"         presets: {', '.join(recipes.presets(name))}"]
    lines += ["", "fewstep train RECIPE --help lists every field of a recipe with its default."]
    if args and args[0] not in ("-h", "--help"):
        raise FewstepError(f"name a recipe first: fewstep train {recipes.names()[0]} {' '.join(args)}")
    print("\n".join(lines), file=sys.stdout if args else sys.stderr)
    raise SystemExit(0 if args else 2)


def stored_recipe(out: Path, name: str) -> Recipe:
    """The recipe of the run to resume; its method must be the one named."""
    recipe = RunDir(out).recipe()
    if recipe.name != name:
        raise FewstepError(
            f"{out} is a run of {recipe.name}, not of {name}: fewstep train {recipe.name} --resume --out {out}"
        )
    return recipe


def inherit(recipe: Recipe, init: Model) -> Recipe:
    """The recipe with the network, classes and image size of the model it starts from, and its own dropout."""
    arch = init.info.architecture
    start = bounded(arch.network) if recipe.kind == "consistency" and init.info.kind == "diffusion" else arch.network
    network = inherited(recipe.network, start)
    data = replace(recipe.data, resolution=recipe.data.resolution or init.info.image_shape[-1])
    recipe = replace(recipe, network=network, data=data, conditional=arch.num_classes > 0)
    return with_sigma_data(recipe, arch.sigma_data)


def bounded(network: Network) -> Network:
    """A network that predicts epsilon as a consistency model can be tuned from it: no amplification of its output."""
    if not (isinstance(network, Stock) and isinstance(network.parametrisation, VariancePreserving)):
        return network
    speaks = network.parametrisation
    if speaks.prediction != "epsilon" or speaks.bound is not None:
        return network
    return replace(network, parametrisation=replace(speaks, bound=BOUND))


def check_train(options: TrainOptions, recipe: Recipe) -> None:
    """FewstepError for what is missing or contradictory."""
    if not recipe.data.source:
        raise FewstepError(
            "say where the images are: --data digits, a folder, FILE.zip, FILE.parquet, FILE.npz or hf:NAME"
        )
    if options.out is None:
        raise FewstepError("say where the run goes: --out runs/NAME")
    if options.resume and options.overwrite:
        raise FewstepError("--resume continues a run and --overwrite replaces it: give one of them")


def dry_run(recipe: Recipe, init: Model | None) -> dict[str, Any]:
    """The resolved recipe and what it will cost; without --data for 3 x 32 x 32 images."""
    if recipe.data.source:
        architecture = architecture_for(recipe, open_images(replace(recipe.data, streamed=True)))
    elif init:
        architecture = init.info.architecture
    else:
        size = recipe.data.resolution or 32
        say(f"no --data: assuming 3 x {size} x {size} images" + (" of 1000 classes" if recipe.conditional else ""))
        architecture = Architecture(recipe.network, (3, size, size), 1000 if recipe.conditional else 0)
    cost = estimate(recipe, architecture)
    say(summary(cost))
    return cost
