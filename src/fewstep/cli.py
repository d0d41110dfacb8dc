"""The command line. Results are JSON on stdout, progress and messages go to stderr; exit code 2 is bad input.

Nothing heavy is imported before a verb needs it: `fewstep --help` answers within a second.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fewstep._version import __version__

if TYPE_CHECKING:
    from fewstep.model import Model
    from fewstep.recipe import Recipe


def demo(
    out: Path = Path("fewstep-demo"), *, seed: int = 0, overwrite: bool = False, quick: bool = False
) -> dict[str, Any]:  # fmt: skip
    """Real handwritten digits, offline, in about three minutes: diffusion -> ECT -> metrics, pictures, report.html.

    Args:
        out: Folder for the two runs, the pictures, report.html and summary.json.
        seed: Seed of the weights, the data order and the noise.
        overwrite: Replace what an earlier demo left in that folder.
        quick: A sixtieth of the training: shows that everything works, not what it reaches.
    """
    from fewstep.demo import run_demo

    return run_demo(out, seed=seed, overwrite=overwrite, quick=quick)


def sample(
    model: tyro.conf.Positional[str], *, steps: int = 1, num: int = 64, label: str | None = None, seed: int = 0,
    out: Path = Path("samples.png"), device: str = "auto", batch: int = 500,
) -> dict[str, Any]:  # fmt: skip
    """Generate images with a model.

    Args:
        model: A run directory (its best weights; RUN:ema-0.999 or RUN:online by name) or a snapshot file.
        steps: Sampling steps: noise levels visited. A diffusion model spends 2 steps - 1 network evaluations (Heun).
        num: Number of images. Any number with --out DIR: they stream to the disk.
        label: Class, by number or name; none: every class equally often.
        seed: Noise seed. Image i of a seed is the same at any --num and --batch.
        out: A .png file for one grid, or a folder for one PNG per image.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch: Images made at a time; affects memory only.
    """
    from fewstep.api import generator
    from fewstep.console import ProgressLine
    from fewstep.data import to_uint8
    from fewstep.environment import pick_device
    from fewstep.model import load
    from fewstep.pictures import grid, save
    from fewstep.types import FewstepError

    loaded = load(model, pick_device(device))
    sampler, number = loaded.info.sampler(steps), loaded.info.label(label)
    if num < 1 or batch < 1:
        raise FewstepError(f"--num and --batch must be 1 or more, got {num} and {batch}")
    one_file = out.suffix.lower() == ".png"
    if out.suffix and not one_file:
        raise FewstepError(f"--out {out}: give a .png file for a grid, or a folder")
    if one_file and num > 4096:
        raise FewstepError(f"a grid of {num} images is too large: give --out FOLDER and they stream to the disk")
    began, kept = time.monotonic(), []
    with ProgressLine("sample", num) as line:
        for k, samples in enumerate(generator(loaded, batch)(sampler, num, seed, number)):
            images = to_uint8(samples).cpu()
            if one_file:
                kept.append(images)
            else:
                for i, image in enumerate(images):
                    save(out / f"{k * batch + i:06d}.png", grid(image[None], 1, cell=1))
            line.advance(len(images))
    if one_file:
        import torch

        columns = 8 if num <= 64 else round(num**0.5)
        save(out, grid(torch.cat(kept), min(columns, num)))
    seconds = time.monotonic() - began
    return {
        "out": str(out), "num": num, "sampler": type(sampler).__name__, "sigmas": sampler.sigmas, "nfe": sampler.nfe,
        "seed": seed, "label": number, "model": str(loaded.path), "weights": loaded.info.weights,
        "model_sha256": loaded.sha256, "seconds": round(seconds, 3),
    }  # fmt: skip


def evaluate(
    model: tyro.conf.Positional[str], *, data: str, steps: str = "1,2", metrics: str = "fd", extractor: str = "digits",
    num: int = 5000, seeds: int = 3, reference: Literal["train", "heldout", "all"] = "train", heldout: float = 0.1,
    search_sigma: bool = False, extractor_weights: Path | None = None, device: str = "auto", batch: int = 500,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure a model: stamped records with mean and spread over noise seeds.

    Args:
        model: A run directory (its best weights; RUN:ema-0.999 or RUN:online by name) or a snapshot file.
        data: Images to compare with: digits, a folder, FILE.zip, FILE.parquet, FILE.npz or hf:NAME.
        steps: Numbers of sampling steps, separated by commas.
        metrics: Of fd (Frechet distance; FID with inception), kid, prdc (precision, recall, density, coverage).
        extractor: Features: digits (bundled), pixels, inception (fewstep[inception]), dinov2 (fewstep[dinov2]).
        num: Generated images per seed.
        seeds: Noise seeds 0 .. seeds - 1; the record's std is over them.
        reference: Which split to compare with: train, heldout or all.
        heldout: Fraction held out, as in training.
        search_sigma: First search the second step's noise level (EDM sigma, on other noise) and store it in the model.
        extractor_weights: Local weights of the extractor, for machines without network.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch: Images made at a time; affects memory only.
    """
    from fewstep.api import generator
    from fewstep.console import ProgressLine, say
    from fewstep.data import DataSpec, open_images
    from fewstep.environment import pick_device
    from fewstep.evaluation import evaluate as stream
    from fewstep.evaluation import reference_of, search_second_sigma
    from fewstep.metrics import load_extractor
    from fewstep.model import load, store_second_sigma
    from fewstep.types import FewstepError

    counts = numbers(steps, "--steps")
    names = tuple(name.strip() for name in metrics.split(",") if name.strip())
    if seeds < 1:
        raise FewstepError(f"--seeds must be 1 or more, got {seeds}")
    loaded = load(model, pick_device(device))
    samplers = [loaded.info.sampler(count) for count in counts]
    features = load_extractor(extractor, str(loaded.device), extractor_weights)
    images = open_images(DataSpec(data, resolution=loaded.info.architecture.shape[-1], heldout=heldout))
    real = reference_of(images, features, reference, heldout)
    make = generator(loaded, batch)
    if search_sigma:
        if loaded.info.kind != "consistency":
            raise FewstepError(
                "--search-sigma is for consistency models: a diffusion model has no second step of its own"
            )
        with ProgressLine("search of the second sigma", 13 * num) as line:
            sigma, tried = search_second_sigma(make, real, features, num, tick=line.advance)
        loaded = store_second_sigma(loaded, sigma)
        say(
            "\n".join(f"  sigma {s:8.4f}  fd {value:.4g}" for s, value in tried) + f"\nstored in {loaded.path}: {sigma}"
        )
        samplers = [loaded.info.sampler(count) for count in counts]
    records = []
    with ProgressLine("evaluate", num * seeds * len(samplers)) as line:
        for sampler in samplers:
            found = stream(
                make, sampler, real, features, num, range(seeds), names, str(loaded.path), loaded.sha256, line.advance
            )
            records += found
    for record in records:
        say(str(record))
    return [record.to_json() for record in records]


def report(*runs: tyro.conf.Positional[Path], out: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """One self-contained HTML page about one or several runs.

    Args:
        runs: Run directories; give the diffusion run before the run tuned from it to see both from the same noise.
        out: The page; default: report.html in the last run.
        device: auto, cpu, cuda, cuda:1 or mps; draws the samples.
    """
    from fewstep.environment import pick_device
    from fewstep.report import build
    from fewstep.types import FewstepError

    if not runs:
        raise FewstepError("give at least one run directory: fewstep report RUN...")
    path = build(runs, out or runs[-1] / "report.html", device=str(pick_device(device)))
    return {"report": str(path)}


def doctor() -> list[dict[str, str]]:
    """Versions, device, disk and caches; each red line with its remedy. Exit code 1 when there is one."""
    from fewstep.console import say
    from fewstep.doctor import as_json, examine, table

    findings = examine()
    say(table(findings))
    if any(finding.state == "red" for finding in findings):
        print(json.dumps(as_json(findings), indent=2))
        raise SystemExit(1)
    return as_json(findings)


def numbers(text: str, option: str) -> list[int]:
    """Comma-separated positive integers; FewstepError otherwise."""
    from fewstep.types import FewstepError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdecimal() or int(part) < 1 for part in parts):
        raise FewstepError(f"{option} {text!r}: give whole numbers from 1 on, separated by commas, e.g. {option} 1,2")
    return [int(part) for part in parts]


def train(args: Sequence[str]) -> dict[str, Any] | None:
    """Train a recipe: fewstep train RECIPE --data SOURCE --out RUN; see fewstep train RECIPE --help for every field."""
    from fewstep import distributed, recipes
    from fewstep.console import say
    from fewstep.model import load

    if not args or args[0].startswith("-"):
        return train_overview(args)
    name, rest = args[0], [f"--data.source{a[6:]}" if a.partition("=")[0] == "--data" else a for a in args[1:]]
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False, prog=f"fewstep train {name}")
    peek.add_argument("--preset")
    peek.add_argument("--init")
    peek.add_argument("--out", type=Path)
    peek.add_argument("--resume", action="store_true")
    early, _ = peek.parse_known_args(rest)
    recipe = recipes.recipe(name, early.preset)
    init = load(early.init) if early.init else None
    if early.resume and early.out:
        recipe = stored_recipe(early.out, name)
    elif init:
        recipe = inherit(recipe, init)
    options, recipe = parse_train(name, rest, recipe)
    if options.dry_run:
        return dry_run(recipe, init)
    check_train(options, recipe)
    first = os.environ.get("RANK", "0") == "0"  # torchrun starts several of us; one speaks
    if recipe.starts_from and not init and not options.resume and first:
        say(
            f"note: {name} usually starts from {recipe.starts_from} (--init RUN; `fewstep train edm` makes one); "
            "this run starts from random weights"
        )
    from fewstep.run import train as run_train

    began = time.monotonic()
    assert options.out is not None
    run = run_train(
        recipe, options.out, init=init, resume=options.resume, overwrite=options.overwrite, device=options.device
    )
    distributed.stop()
    if not first:
        return None
    return {
        "run": str(run.path), "nimg": recipe.total_nimg, "seconds": round(time.monotonic() - began, 1),
        "losses": run.log()[-1]["losses"], "images_per_second": run.log()[-1]["images_per_second"],
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
    dry_run: bool = False
    """print the resolved recipe and its cost, and stop"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""


def parse_train(name: str, args: Sequence[str], recipe: "Recipe") -> tuple[TrainOptions, "Recipe"]:
    """Options and recipe from the command line, every field of the recipe being an option."""
    from fewstep import recipes
    from fewstep.recipe import Recipe

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
    from fewstep.ema import AverageLaw, average_law

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
    from fewstep import recipes
    from fewstep.types import FewstepError

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
    print("\n".join(lines))
    raise SystemExit(0 if args else 2)


def stored_recipe(out: Path, name: str) -> "Recipe":
    """The recipe of the run to resume; its method must be the one named."""
    from fewstep.rundir import RunDir
    from fewstep.types import FewstepError

    recipe = RunDir(out).recipe()
    if recipe.name != name:
        raise FewstepError(
            f"{out} is a run of {recipe.name}, not of {name}: fewstep train {recipe.name} --resume --out {out}"
        )
    return recipe


def inherit(recipe: "Recipe", init: "Model") -> "Recipe":
    """The recipe with the network, classes and image size of the model it starts from, and its own dropout."""
    arch = init.info.architecture
    own = {f.name: getattr(recipe.network, f.name) for f in fields(recipe.network) if f.name.startswith("dropout")}  # type: ignore[arg-type]
    network = replace(arch.network, **{k: v for k, v in own.items() if hasattr(arch.network, k)})  # type: ignore[type-var]
    data = replace(recipe.data, resolution=recipe.data.resolution or arch.shape[-1])
    return replace(
        recipe, network=network, data=data, conditional=arch.num_classes > 0, sigma_data=arch.sigma_data
    )  # fmt: skip


def check_train(options: TrainOptions, recipe: "Recipe") -> None:
    """FewstepError for what is missing or contradictory."""
    from fewstep.types import FewstepError

    if not recipe.data.source:
        raise FewstepError(
            "say where the images are: --data digits, a folder, FILE.zip, FILE.parquet, FILE.npz or hf:NAME"
        )
    if options.out is None:
        raise FewstepError("say where the run goes: --out runs/NAME")
    if options.resume and options.overwrite:
        raise FewstepError("--resume continues a run and --overwrite replaces it: give one of them")


def dry_run(recipe: "Recipe", init: "Model | None") -> dict[str, Any]:
    """The resolved recipe and what it will cost; without --data for 3 x 32 x 32 images."""
    from fewstep.console import say
    from fewstep.data import open_images
    from fewstep.estimate import estimate, summary
    from fewstep.networks import Architecture
    from fewstep.run import architecture_for

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


VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo, "train": train, "sample": sample, "evaluate": evaluate, "report": report, "doctor": doctor,
}  # fmt: skip


def overview() -> str:
    """`fewstep --help`."""
    lines = [
        "fewstep turns a diffusion model into a one- or two-step image generator.",
        "",
        "usage: fewstep VERB [options]",
        "",
    ]
    lines += [f"  {name:9} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join([*lines, "", "fewstep VERB --help tells a verb's options, with units and defaults."])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code: 0 done, 1 something is wrong here, 2 bad input, 130/143 interrupted and saved."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return 0 if args else 2
    if args[0] == "--version":
        print(__version__)
        return 0
    if args[0] not in VERBS:
        print(f"fewstep: error: unknown verb {args[0]!r}: use one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return carry_out(args[0], args[1:])


def carry_out(verb: str, args: list[str]) -> int:
    """Run a verb, print its result, and turn what goes wrong into one line and an exit code."""
    from fewstep.types import FewstepError

    try:
        result = train(args) if verb == "train" else tyro.cli(VERBS[verb], args=args, prog=f"fewstep {verb}")
        if result is not None:
            print(json.dumps(result, indent=2))
    except FewstepError as error:
        print(f"fewstep: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"fewstep: error: {error.filename or ''} {error.strerror or error}".replace("  ", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"fewstep: {error or 'interrupted'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    return 0
