"""LCSC's figures on digits, as docs/combining.md quotes them: everything held out, over training and search seeds.

    for s in 0 1 2; do
      fewstep train edm --preset digits --seed $s --snapshot-nimg 640 --out runs/edm$s
      fewstep train ect --preset digits --seed $s --init runs/edm$s --out runs/ect$s
    done
    python benchmarks/lcsc.py seeds --runs runs/ect0 runs/ect1 runs/ect2 --out benchmarks/results/DATE-lcsc-seeds.json

Parts: `seeds` (3 search seeds on each run, all baselines at equal evaluations), `evaluations` (evolution's 400 candidates
against the span search's few), `training` (windows that end earlier), `steps` (1 step after against 2 before), `diffusion`
(solver steps before and after).
"""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

import fewstep
from fewstep.api import Plan, halves
from fewstep.environment import environment
from fewstep.evaluation import Generator, evaluate, search_second_sigma
from fewstep.metrics import load_extractor
from fewstep.model import load

Part = Literal["seeds", "evaluations", "training", "steps", "diffusion"]


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
    """Held-out distance of evolution with 400 candidates and 40, CMA-ES with 120, and span with 30 and 50."""
    found: dict[str, Any] = {}
    for run in runs:
        rows = {}
        for name, budget in (("evolution", 400), ("evolution", 40), ("cmaes", 120), ("span", 30), ("span", 50)):
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
    plan = Plan(search="span", budget=40, rerank=3, num=1000, second=("kid",), baselines=("ema",))
    found: dict[str, Any] = {}
    for run in runs:
        total = fewstep.load(run).info.nimg
        for share in (0.3, 0.45, 0.6, 0.8, 1.0):
            result = search(run, plan, last_nimg=int(total * share))
            last = result["snapshots"][-1]["nimg"]
            found.setdefault(str(run), {})[last] = {name: held(result, name) for name in ("lcsc", "ema", "last")}
    return {"runs": found}


def steps(runs: list[Path]) -> dict[str, Any]:
    """One step after LCSC against one and two steps of the best EMA, the second step's noise level searched for each."""
    found = {}
    for run in runs:
        with tempfile.TemporaryDirectory() as folder:
            plan = Plan(search="span", budget=60, rerank=3, second=("kid",), baselines=("ema",))
            result = fewstep.combine(run, folder, plan, quiet=True)
            ema = Path(folder, "ema.safetensors")
            told = json.loads(Path(folder, "result.json").read_text())
            told |= {"coefficients": told["candidates"]["ema"]["coefficients"]}
            rebuilt(told, ema)
            rows: dict[str, Any] = {"lcsc 1": held(result), "ema 1": held(result, "ema")}
            for name, path in (("ema", ema), ("lcsc", Path(folder, "combined.safetensors"))):
                rows |= {f"{name} 2": two_steps(path, run)}
        found[str(run)] = rows
    return {"runs": found}


def rebuilt(told: dict[str, Any], out: Path) -> None:
    """The weights of these coefficients."""
    from fewstep.api import write_combination

    files, hashes = zip(*((Path(s["path"]), s["sha256"]) for s in told["snapshots"]), strict=True)
    write_combination(out, files, hashes, told["coefficients"], out.stem)


def two_steps(path: Path, run: Path) -> dict[str, float]:
    """Second noise level searched on the search half, the distance held out."""
    model, recipe = load(path), fewstep.load(run).info
    features = load_extractor("digits")
    searched, reported = halves(model, "digits", features, 0.5)
    arch = recipe.architecture
    make = Generator(model.denoiser, arch.shape, arch.num_classes)
    sigma, _ = search_second_sigma(make, searched, features, 2000)
    sampler = fewstep.samplers.FewStep((80.0, sigma))
    return {"sigma": sigma, "fd": evaluate(make, sampler, reported, features, 5000, (0, 1, 2))[0].value}


def diffusion(runs: list[Path]) -> dict[str, Any]:
    """Held-out distance by solver and steps: best EMA (searched at those steps) and LCSC (searched at those steps)."""
    plan = Plan(
        search="span",
        budget=34,
        rerank=3,
        num=1000,
        rerank_num=2000,
        report_num=3000,
        second=("kid",),
        baselines=("ema",),
    )
    found: dict[str, Any] = {}
    for run in runs:
        for solver, counts in (("dpm", (4, 5, 6, 8)), ("heun", (4, 5, 6))):
            for count in counts:
                result = search(run, plan, steps=count, solver=solver)
                row = {name: held(result, name) for name in ("lcsc", "ema", "last")}
                found.setdefault(str(run), {})[f"{solver} {count}"] = {**row, "nfe": result["sampler"]["nfe"]}
    return {"runs": found}


def spread(values: list[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values), "max": max(values), "values": values,
    }  # fmt: skip


PARTS: dict[str, Callable[[list[Path]], dict[str, Any]]] = {
    "seeds": seeds, "evaluations": evaluations, "training": training, "steps": steps, "diffusion": diffusion,
}  # fmt: skip


def main(part: tyro.conf.Positional[Part], runs: list[Path], out: Path) -> None:
    """Measure one part over these runs (ECT runs; for `diffusion`, EDM runs) and write it to a JSON file."""
    torch.set_num_threads(1)
    began = time.monotonic()
    found = PARTS[part](runs)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    command = f"python benchmarks/lcsc.py {part} --runs {' '.join(map(str, runs))}"
    result = {
        "what": PARTS[part].__doc__,
        "command": command,
        "commit": commit,
        "seconds": round(time.monotonic() - began),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**result, "environment": environment(), **found}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
