"""The command line. Results are JSON on stdout, progress and messages go to stderr; exit code 2 is bad input.

Nothing heavy is imported before a verb needs it: `fewstep --help` answers within a second.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro

from fewstep._version import __version__
from fewstep.combine_cli import average, combine
from fewstep.compare_cli import compare
from fewstep.encode_cli import encode
from fewstep.export_cli import export
from fewstep.import_cli import import_
from fewstep.inspect_cli import inspect
from fewstep.serve_cli import serve


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
    out: Path = Path("samples.png"), overwrite: bool = False, device: str = "auto", batch: int = 500,
    solver: Literal["heun", "dpm"] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Generate images with a model.

    Args:
        model: A run directory (its best weights; RUN:ema-0.999 or RUN:online by name) or a snapshot file.
        steps: Sampling steps: noise levels visited.
        num: Number of images. Any number with --out DIR: they stream to the disk.
        label: Class, by number or name; none: drawn uniformly for each image.
        seed: Noise seed. Image i of a seed is the same at any --num and --batch.
        out: A .png file for one grid, or a folder for one PNG per image.
        overwrite: Write into a folder that already holds images.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch: Images made at a time; affects memory only.
        solver: Of diffusion models: heun (default; N steps are 2N-1 network evaluations) or dpm (DPM-Solver++ 2M; N).
    """
    from fewstep.api import generator
    from fewstep.console import ProgressLine
    from fewstep.data import to_uint8
    from fewstep.environment import pick_device
    from fewstep.model import load
    from fewstep.pictures import grid, save
    from fewstep.types import FewstepError

    loaded = load(model, pick_device(device))
    sampler, number = loaded.info.sampler(steps, solver), loaded.info.label(label)
    if num < 1 or batch < 1:
        raise FewstepError(f"--num and --batch must be 1 or more, got {num} and {batch}")
    one_file = out.suffix.lower() == ".png"
    if out.suffix and not one_file:
        raise FewstepError(f"--out {out}: give a .png file for a grid, or a folder")
    if one_file and num > 4096:
        raise FewstepError(f"a grid of {num} images is too large: give --out FOLDER and they stream to the disk")
    prepare(out.parent if one_file else out)
    if not one_file and not overwrite and any(out.glob("*.png")):
        raise FewstepError(f"{out} already holds images: choose another --out, or give --overwrite")
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
    num: int = 5000, seeds: int = 3, reference: Literal["train", "heldout", "all"] = "train", heldout: float | None = None,
    search_sigma: bool = False, extractor_weights: Path | None = None, device: str = "auto", batch: int = 500,
    solver: Literal["heun", "dpm"] | None = None,
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
        heldout: Fraction held out; default: as in the model's training.
        search_sigma: First search the second step's noise level (EDM sigma, on other noise) and store it in the model.
        extractor_weights: Local weights of the extractor, for machines without network.
        device: auto, cpu, cuda, cuda:1 or mps.
        batch: Images made at a time; affects memory only.
        solver: Of diffusion models: heun (default; N steps are 2N-1 network evaluations) or dpm (DPM-Solver++ 2M; N).
    """
    from fewstep.api import generator, measure_against
    from fewstep.console import ProgressLine, say
    from fewstep.environment import pick_device
    from fewstep.evaluation import evaluate as stream
    from fewstep.evaluation import search_second_sigma
    from fewstep.model import check_ours, load, store_second_sigma
    from fewstep.samplers import FewStep
    from fewstep.types import FewstepError

    counts = numbers(steps, "--steps")
    names = tuple(name.strip() for name in metrics.split(",") if name.strip())
    if seeds < 1 or num < 2:
        raise FewstepError(f"--seeds must be 1 or more and --num 2 or more, got {seeds} and {num}")
    loaded = load(model, pick_device(device))
    loaded.info.sampler(counts[0], solver)  # refuse before the work begins
    if search_sigma and loaded.info.kind != "consistency":
        raise FewstepError("--search-sigma is for consistency models: a diffusion model has no second step of its own")
    if search_sigma:
        check_ours(loaded)
    features, real = measure_against(loaded, data, extractor, reference, heldout, extractor_weights)
    make = generator(loaded, batch)
    if search_sigma:
        with ProgressLine("search of the second sigma", 13 * num) as line:
            own = loaded.info.sampler(2)
            assert isinstance(own, FewStep)
            sigma, tried = search_second_sigma(make, real, features, num, tick=line.advance, like=own)
        loaded = store_second_sigma(loaded, sigma)
        say("\n".join(f"  sigma {s:8.4f}  fd {value:.4g}" for s, value in tried))
        say(f"second sigma {sigma}, stored in {loaded.path}")
    records = []
    with ProgressLine("evaluate", num * seeds * len(counts)) as line:
        for count in counts:
            records += stream(
                make, loaded.info.sampler(count, solver), real, features, num, range(seeds), names, str(loaded.path),
                loaded.sha256, line.advance,
            )  # fmt: skip
    say("\n".join(map(str, records)))
    return [record.to_json() for record in records]


def prepare(folder: Path) -> None:
    """Make the folder of a result before the work for it begins; FewstepError when it cannot be written to."""
    from fewstep.types import FewstepError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FewstepError(f"--out: {folder} cannot be made ({error.strerror}): choose another place") from None
    if not os.access(folder, os.W_OK):
        raise FewstepError(f"--out: {folder} is not writable: choose another place")


def report(*runs: tyro.conf.Positional[Path], out: Path | None = None, device: str = "auto") -> dict[str, Any]:
    """One self-contained HTML page about one or several runs.

    Args:
        runs: Run directories, and folders of `fewstep combine`; give the diffusion run before the run tuned from it to
            see both from the same noise.
        out: The page; default: report.html in the last of them.
        device: auto, cpu, cuda, cuda:1 or mps; draws the samples.
    """
    from fewstep.environment import pick_device
    from fewstep.report import build
    from fewstep.types import FewstepError

    if not runs:
        raise FewstepError("give at least one run directory: fewstep report RUN...")
    folder = runs[-1] if runs[-1].suffix != ".json" else runs[-1].parent
    path = build(runs, out or folder / "report.html", device=str(pick_device(device)))
    return {"report": str(path)}


def doctor() -> None:
    """Versions, device, disk and caches; each red line with its remedy. Exit code 1 when there is one."""
    from fewstep.console import say
    from fewstep.doctor import examine, table

    findings = examine()
    say(table(findings))
    print(json.dumps([vars(finding) for finding in findings], indent=2))
    raise SystemExit(any(finding.state == "red" for finding in findings))


def numbers(text: str, option: str) -> list[int]:
    """Comma-separated positive integers; FewstepError otherwise."""
    from fewstep.types import FewstepError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or any(not part.isdecimal() or int(part) < 1 for part in parts):
        raise FewstepError(f"{option} {text!r}: give whole numbers from 1 on, separated by commas, e.g. {option} 1,2")
    return [int(part) for part in parts]


def train(args: Sequence[str]) -> dict[str, Any] | None:
    """Train a recipe: fewstep train RECIPE --data SOURCE --out RUN; see fewstep train RECIPE --help for every field."""
    from fewstep.train_cli import train as carry_out_training

    return carry_out_training(args)


VERBS: dict[str, Callable[..., Any]] = {
    "demo": demo, "inspect": inspect, "encode": encode, "train": train, "combine": combine, "average": average,
    "sample": sample, "evaluate": evaluate, "compare": compare, "report": report, "import": import_, "export": export,
    "serve": serve, "doctor": doctor,
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
        print(overview(), file=sys.stdout if args else sys.stderr)
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
        if result is not None and os.environ.get("RANK", "0") == "0":
            print(json.dumps(result, indent=2))
    except FewstepError as error:
        if os.environ.get("RANK", "0") == "0":  # torchrun starts several of us; one speaks
            print(f"fewstep: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"fewstep: error: {what}: check that the path exists and that you may write there", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in ("out of memory", "allocate")):
            raise
        print("fewstep: error: not enough memory: give a smaller --batch (in training --microbatch)", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"fewstep: {error or 'interrupted'}", file=sys.stderr)
        return getattr(error, "exit_code", 130)
    return 0


if __name__ == "__main__":
    sys.exit(main())
