"""LCSC's figures on digits, as docs/combining.md quotes them: everything held out, over training and search seeds.

    for s in 0 1 2; do
      fewstep train edm --preset digits --seed $s --snapshot-nimg 640 --out runs/edm$s
      fewstep train ect --preset digits --seed $s --init runs/edm$s --out runs/ect$s \\
          --lr.peak 2e-3 --total-nimg 64000 --snapshot-nimg 640 --evaluation.every-nimg 0
    done
    python benchmarks/lcsc.py seeds --runs runs/ect0 runs/ect1 runs/ect2 --out benchmarks/results/DATE-lcsc-seeds.json

Parts: `seeds` (3 search seeds on each run, all baselines at equal evaluations), `evaluations` (evolution's 400 candidates
against the span search's few), `training` (windows that end earlier), `steps` (1 step after against 2 before), `diffusion`
(solver steps before and after), `storage` (what a bank's rounding does to the weights and to the metric).
"""

import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import fewstep
from fewstep.api import Plan, halves, write_combination
from fewstep.environment import environment
from fewstep.evaluation import Generator, evaluate, search_second_sigma
from fewstep.fitness import Metric
from fewstep.metrics import load_extractor
from fewstep.model import Model, load
from fewstep.samplers import FewStep
from fewstep.snapshots import read_header

Part = Literal["seeds", "evaluations", "training", "steps", "diffusion", "storage"]


def held(result: dict[str, Any], name: str = "lcsc", metric: str = "fd") -> float:
    """A held-out value of a result."""
    return next(r["value"] for r in result["records"][name] if r["metric"] == metric)


def search(run: Path, plan: Plan, **options: Any) -> dict[str, Any]:
    """One `fewstep combine` in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return fewstep.combine(run, folder, plan, quiet=True, **options)


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a result: held-out values, search costs, how many evaluations, the seeds' spread."""
    metrics = [r["metric"] for r in result["records"]["lcsc"]]
    return {
        "held_out": {n: {m: held(result, n, m) for m in metrics} for n in result["records"]},
        "by_search_seed": {
            name: {r["metric"]: r["value"] for r in s["records"]} | {"search": s["search_score"], "n": s["evaluations"]}
            for name, s in result["searches"].items()
        },
        "gains": {name: gain["fraction"] for name, gain in result["gains"].items()},
        "within_noise": [name for name, gain in result["gains"].items() if gain["within_noise"]],
        "evaluations": {name: trace[-1][0] for name, trace in result["traces"].items()},
        "seed_spread": result["seed_spread"], "cost": result["cost"],
    }  # fmt: skip


def seeds(runs: list[Path]) -> dict[str, Any]:
    """Every baseline at the span search's budget; KID and precision/recall beside the searched distance."""
    plan = Plan(search="span", budget=60, search_seeds=3, rerank=3)
    found = {str(run): brief(search(run, plan)) for run in runs}
    lcsc = [v["fd"] for f in found.values() for v in f["by_search_seed"].values()]
    gain = {
        rival: [1 - v["fd"] / f["held_out"][rival]["fd"] for f in found.values() for v in f["by_search_seed"].values()]
        for rival in ("ema", "last", "power", "random", "uniform")
    }
    return {"runs": found, "lcsc_fd": spread(lcsc), "gain": {rival: spread(values) for rival, values in gain.items()}}


def evaluations(runs: list[Path]) -> dict[str, Any]:
    """Held-out distance of evolution with 400 candidates and 40, CMA-ES with 120, and span with 40 and 60."""
    found: dict[str, Any] = {}
    for run in runs:
        rows = {}
        for name, budget in (("evolution", 400), ("evolution", 40), ("cmaes", 120), ("span", 40), ("span", 60)):
            began = time.monotonic()
            result = search(
                run, Plan(search=name, budget=budget, rerank=3, num=1000, second=("kid",), baselines=("ema",))
            )
            rows[f"{name} {budget}"] = {
                "fd": held(result), "kid": held(result, metric="kid"), "search": result["candidates"]["lcsc"]["search"],
                "evaluations": result["traces"][f"{name}/0"][-1][0], "raced_out": result["cost"]["raced_out"],
                "ema": held(result, "ema"), "seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
        found[str(run)] = rows
    means = {name: spread([rows[name]["fd"] for rows in found.values()]) for name in next(iter(found.values()))}
    return {"runs": found, "fd": means}


def training(runs: list[Path]) -> dict[str, Any]:
    """Windows of one run that end earlier and earlier: LCSC against the best EMA over the same snapshots."""
    plan = Plan(
        search="span", budget=40, rerank=2, num=1000, rerank_num=2000, report_num=3000, second=(), baselines=("ema",)
    )
    found: dict[str, Any] = {}
    for run in runs:
        total = fewstep.load(run).info.nimg
        for share in (0.3, 0.45, 0.6, 0.8, 1.0):
            result = search(run, plan, last_nimg=int(total * share))
            last = result["snapshots"][-1]["nimg"]
            found.setdefault(str(run), {})[last] = {name: held(result, name) for name in ("lcsc", "ema", "last")}
    return {"runs": found, "reduction": {run: reduction(rows) for run, rows in found.items()}}


def reduction(rows: dict[int, dict[str, float]]) -> dict[str, float]:
    """Images after which the best EMA of the whole run is matched by LCSC (interpolated), and the ratio."""
    seen, goal = sorted(rows), min(row["ema"] for row in rows.values())
    at = min((n for n in seen if rows[n]["ema"] == goal), default=seen[-1])
    for a, b in itertools.pairwise(seen):
        x, y = rows[a]["lcsc"], rows[b]["lcsc"]
        if y <= goal:
            needed = a + (b - a) * max(0.0, (x - goal) / (x - y)) if x > goal else a
            return {"goal": goal, "ema_images": at, "lcsc_images": needed, "ratio": at / needed}
    return {"goal": goal, "ema_images": at, "lcsc_images": math.inf, "ratio": 0.0}


def steps(runs: list[Path]) -> dict[str, Any]:
    """One step after LCSC against two steps before: of the EMA that is best in two, its second noise level searched too."""
    found = {}
    for run in runs:
        plan = Plan(search="span", budget=60, rerank=3, second=("kid",), baselines=("ema",))
        result = search(run, plan)
        with tempfile.TemporaryDirectory() as folder:
            sigma = fewstep.load(run).info.second_sigma
            for _ in range(2):  # rate and noise level in turn
                two = search(run, replace(plan, search="ema", baselines=()), steps=2, second_sigma=sigma)
                ema = Path(folder, "ema.safetensors")
                rebuilt(two, ema)
                sigma, before = two_steps(ema)
            lcsc = Path(folder, "lcsc.safetensors")
            rebuilt(result, lcsc)
            found[str(run)] = {
                "lcsc 1": held(result), "ema 1": held(result, "ema"), "ema 2": before, "sigma": sigma,
                "lcsc 2": two_steps(lcsc)[1],
            }  # fmt: skip
    return {"runs": found}


def rebuilt(told: dict[str, Any], out: Path) -> None:
    """The weights of these coefficients."""
    files, hashes = zip(*((Path(s["path"]), s["sha256"]) for s in told["snapshots"]), strict=True)
    write_combination(out, files, hashes, told["coefficients"], out.stem)


def two_steps(path: Path) -> tuple[float, float]:
    """The second noise level searched on the search half, and the distance with it, held out."""
    model, features = load(path), load_extractor("digits")
    searched, reported = halves(model, "digits", features, 0.5)
    arch = model.info.architecture
    make = Generator(model.denoiser, arch.shape, arch.num_classes)
    sigma, _ = search_second_sigma(make, searched, features, 2000)
    return sigma, evaluate(make, FewStep((80.0, sigma)), reported, features, 5000, (0, 1, 2))[0].value


def diffusion(runs: list[Path]) -> dict[str, Any]:
    """Held-out distance by solver and steps: best EMA and LCSC, both searched at those steps; the EMA at more steps too."""
    plan = Plan(
        search="span", budget=34, rerank=2, num=1000, rerank_num=2000, report_num=3000, second=(), baselines=("ema",)
    )
    found: dict[str, Any] = {}
    for run in runs:
        rows = found.setdefault(str(run), {})
        for solver, counts, more in (("dpm", (4, 5), (6, 8)), ("heun", (5,), (6, 7))):
            for count in counts:
                result = search(run, plan, steps=count, solver=solver)
                row = {name: held(result, name) for name in ("lcsc", "ema", "last")}
                rows[f"{solver} {count}"] = {**row, "nfe": result["sampler"]["nfe"]}
            for count in more:
                result = search(run, replace(plan, search="ema", baselines=()), steps=count, solver=solver)
                rows[f"{solver} {count}"] = {"ema": held(result), "nfe": result["sampler"]["nfe"]}
    return {"runs": found}


def storage(runs: list[Path]) -> dict[str, Any]:
    """Combinations made by each kind of bank against float64, the largest relative error of 5 vectors of each size: of the
    weights, ||theta - truth|| / ||truth||, and of the Frechet distance of their images.

    Vectors: normal coefficients around an EMA, scaled so that the largest is 0.5, 2 and 6, divided to sum 1; size 0 is the
    EMA (decay 0.98 a step of 128 images) and the uniform average.
    """
    import numpy as np

    from fewstep.snapshots import Bank, checkpoint_files, read_checkpoint
    from fewstep.snapshots.profiles import ema

    found: dict[str, Any] = {}
    for run in runs:
        model, features = fewstep.load(f"{run}:online"), load_extractor("digits")
        _, reference = halves(model, "digits", features, 0.5)
        metric = Metric("fd", model.info.sampler(1), features, reference)
        files = checkpoint_files([run])
        start = ema([read_header(file)["model"]["nimg"] for file in files], 0.98, 128)
        vectors = [("0", start), ("0", np.full(len(files), 1 / len(files)))]
        rng = np.random.default_rng(0)
        for size in (0.5, 2.0, 6.0):
            for _ in range(5):
                step = rng.standard_normal(len(files))
                step -= step.mean()
                vectors.append((f"{size:g}", start + step * (size / np.abs(step).max())))

        def distance(weights: dict[str, torch.Tensor], model: Model = model, metric: Metric = metric) -> float:
            model.denoiser.load_state_dict(weights)
            return metric.cost(model, metric.features(model, 0, 2000, 7), 7)

        truth: dict[int, tuple[torch.Tensor, float]] = {}
        for kind in ("fp32", "bf16", "int8"):
            with tempfile.TemporaryDirectory() as folder:
                bank = Bank.build(files, Path(folder, "bank"), kind, quiet=True)
                rows = found.setdefault(str(run), {}).setdefault(kind, {"weights": {}, "fd": {}})
                for k, (size, vector) in enumerate(vectors):
                    c = torch.from_numpy(vector)
                    if k not in truth:
                        weights = sum(c[i] * flat(read_checkpoint(f).tensors, bank) for i, f in enumerate(files))
                        truth[k] = weights, distance(bank.exact(c))
                    (right, fd), made = truth[k], bank.combine(c[None])[0]
                    errors = {
                        "weights": float((made.double() - right).norm() / right.norm()),
                        "fd": abs(distance(bank.tensors(made)) / fd - 1),
                    }
                    for name, error in errors.items():
                        rows[name][size] = max(rows[name].get(size, 0.0), error)
    return {"runs": found}


def flat(tensors: dict[str, torch.Tensor], bank: Any) -> torch.Tensor:
    """What a bank combines of a checkpoint, as one vector [P] in float64."""
    return torch.cat([tensors[entry.name].flatten().double() for entry in bank.entries])


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values), "max": max(values), "values": values,
    }  # fmt: skip


PARTS: dict[str, Callable[[list[Path]], dict[str, Any]]] = {
    "seeds": seeds, "evaluations": evaluations, "training": training, "steps": steps, "diffusion": diffusion,
    "storage": storage,
}  # fmt: skip


def main(part: tyro.conf.Positional[Part], runs: list[Path], out: Path) -> None:
    """Measure one part over these runs (ECT runs; for `diffusion`, EDM runs) and write it to a JSON file."""
    torch.set_num_threads(1)
    began = time.monotonic()
    found = PARTS[part](runs)
    command = f"python benchmarks/lcsc.py {part} --runs {' '.join(map(str, runs))}"
    result = {
        "what": PARTS[part].__doc__,
        "command": command,
        "seconds": round(time.monotonic() - began),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**result, "environment": environment(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
