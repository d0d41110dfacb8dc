"""The demo: real handwritten digits, a diffusion model tuned into a one-step generator, its snapshots combined, a report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewstep.api import Plan, average, combine, generator, halves
from fewstep.console import ProgressLine, say
from fewstep.data import open_images, to_uint8
from fewstep.environment import environment
from fewstep.evaluation import evaluate, reference_of, search_second_sigma
from fewstep.files import write_json
from fewstep.metrics import Extractor, Record, Reference, load_extractor
from fewstep.model import Model, load, store_second_sigma
from fewstep.pictures import captioned, grid, save
from fewstep.recipe import Recipe
from fewstep.recipes import recipe
from fewstep.report import build
from fewstep.run import train
from fewstep.samplers import Sampler, few_step
from fewstep.types import FewstepError

NUM, SEEDS = 2000, (0, 1, 2)  # images per noise seed of every reported distance
SOLVER_STEPS = 9  # of DPM-Solver++, so many network evaluations
SIGMA_NUM = 2000  # images for each noise level tried
SEARCH = Plan(
    search="span", budget=34, num=1000, rerank=2, rerank_num=2000, report_num=2000, second=("kid",), baselines=("ema",)
)


@dataclass
class Phases:
    """Seconds of each part of the demo."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)


def run_demo(out: Path, *, seed: int = 0, overwrite: bool = False, quick: bool = False) -> dict[str, Any]:
    """Carry out the demo in a folder; returns what summary.json holds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is so small that a second thread costs more than it brings
    try:
        return carry_out(out, seed, overwrite, quick)
    finally:
        torch.set_num_threads(threads)


def carry_out(out: Path, seed: int, overwrite: bool, quick: bool) -> dict[str, Any]:
    """The demo's phases in order."""
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise FewstepError(f"{out} is not empty: choose another --out, or replace what is there with --overwrite")
    began, phase = time.monotonic(), Phases()
    say(f"fewstep demo in {out}: 1797 real handwritten digits (8x8), class-conditional, on the CPU")
    num, sigma_num = (NUM // 20, SIGMA_NUM // 20) if quick else (NUM, SIGMA_NUM)
    with phase("diffusion model"):
        train(shortened(recipe("edm", "digits"), seed, quick), out / "diffusion", overwrite=overwrite, device="cpu")
    diffusion = load(out / "diffusion")
    with phase("consistency tuning"):
        plan = shortened(recipe("ect", "digits"), seed, quick)
        train(plan, out / "ect", init=diffusion, overwrite=overwrite, device="cpu")
    tuned = load(out / "ect")
    images, extractor = open_images(plan.data), load_extractor("digits")
    reference = reference_of(images, extractor, "train", plan.data.heldout)
    with phase("second sigma"), ProgressLine("search of the second sigma", 13 * sigma_num) as line:
        sigma, _ = search_second_sigma(generator(tuned), reference, extractor, sigma_num, tick=line.advance)
        tuned = store_second_sigma(tuned, sigma)
    with phase("metrics"):
        records = measure_all(trials(diffusion, tuned), reference, extractor, num)
    with phase("checkpoint combination"):
        search = replace(SEARCH, num=num // 3, rerank_num=num // 2, report_num=num) if quick else SEARCH
        found = combine(out / "ect", out / "lcsc", search, second_sigma=sigma, device="cpu", overwrite=overwrite)
        say(found["verdict"])
        combined = load(out / "lcsc")
        _, heldout = halves(combined, plan.data, extractor, 0.5)
        records |= {
            f"{name}_1": Record.from_json(found["records"][source][0])
            for name, source in (("lcsc", "lcsc"), ("best_ema", "ema"), ("last", "last"))
        }
        ema = average(out / "ect", found["candidates"]["ema"]["profile"])
        say(f"best EMA over the same snapshots: {ema['profile']}, in {ema['out']}")
        records |= measure_all({"lcsc_2": (combined, combined.info.sampler(2))}, heldout, extractor, search.report_num)
    with phase("pictures and report"):
        save(out / "samples.png", panels(diffusion, tuned, combined))
        build(
            [out / "diffusion", out / "ect"], out / "report.html", records=records, timings=phase.seconds,
            results=[out / "lcsc"], title="fewstep demo: handwritten digits",
            lead="A small diffusion model is trained on 8x8 handwritten digits, tuned into a one-step generator by ECT, "
            "and the snapshots of the tuning are combined by LCSC. Every grid starts from the same noise.",
        )  # fmt: skip
    phase.seconds["total"] = round(time.monotonic() - began, 1)
    baseline = records["diffusion_1"].value
    summary = {
        "seconds": phase.seconds,
        **{name: record.to_json() for name, record in records.items()},
        "ratio_to_diffusion_1": {
            name: record.value / baseline
            for name, record in records.items()
            if record.stamp() == records["ect_1"].stamp()
        },
        "gain": found["gains"],
        "verdict": found["verdict"],
        "second_sigma": sigma,
        "weights": tuned.info.weights,
        "report": str(out / "report.html"),
        "environment": environment(),
    }
    write_json(out / "summary.json", summary)
    say("\n".join(f"  {name:15} {record}" for name, record in records.items()))
    say(f"done in {phase.seconds['total']:.0f} s: open {out / 'report.html'}")
    return summary


def shortened(plan: Recipe, seed: int, quick: bool) -> Recipe:
    """The recipe with this seed; quick: a sixtieth of its length."""
    plan = replace(plan, seed=seed)
    if not quick:
        return plan
    total = max(plan.total_nimg // 60 // plan.batch_size, 1) * plan.batch_size
    often = replace(plan.evaluation, every_nimg=total if plan.evaluation.every_nimg else 0, num=100)
    return replace(
        plan, total_nimg=total, snapshot_nimg=total // 2, grid_nimg=total // 2, log_nimg=total // 4, evaluation=often
    )  # fmt: skip


def trials(diffusion: Model, tuned: Model) -> dict[str, tuple[Model, Sampler]]:
    """What is compared, by the names of summary.json."""
    return {
        "diffusion_many": (diffusion, diffusion.info.sampler(SOLVER_STEPS, "dpm")),
        "diffusion_1": (diffusion, few_step(1)),
        "ect_1": (tuned, tuned.info.sampler(1)),
        "ect_2": (tuned, tuned.info.sampler(2)),
    }


def measure_all(
    compared: dict[str, tuple[Model, Sampler]], reference: Reference, extractor: Extractor, num: int
) -> dict[str, Record]:
    """One stamped Frechet distance for each trial, on the same noise seeds."""
    records = {}
    with ProgressLine("metrics", num * len(SEEDS) * len(compared)) as line:
        for name, (model, sampler) in compared.items():
            records[name] = evaluate(
                generator(model), sampler, reference, extractor, num, SEEDS, ("fd",), str(model.path), model.sha256,
                line.advance,
            )[0]  # fmt: skip
    return records


def panels(diffusion: Model, tuned: Model, combined: Model, rows: int = 5) -> Any:
    """The README's picture: what is compared, on the same noise, a class per column."""
    captions = {
        "diffusion_many": "diffusion, {nfe} evaluations", "diffusion_1": "diffusion, 1 step",
        "ect_1": "ECT, 1 step", "ect_2": "ECT, 2 steps", "lcsc_1": "ECT + LCSC, 1 step",
    }  # fmt: skip
    shown = {}
    compared = {**trials(diffusion, tuned), "lcsc_1": (combined, combined.info.sampler(1))}
    for name, (model, sampler) in compared.items():
        samples = torch.cat(list(generator(model)(sampler, 10 * rows, seed=0, label=range(10))))
        shown[captions[name].format(nfe=sampler.nfe)] = grid(to_uint8(samples), 10, gap=1, cell=32)
    return captioned(shown)
