"""Every method's step time relative to ECT's on the same network, and what sLCT's optimal transport costs: paired medians.

    python benchmarks/step_time.py --out benchmarks/results/DATE-step-time.json          # about five minutes, idle machine

All methods live in one process and take one optimizer step each per round, in an order drawn anew for every round, so that
what disturbs the machine disturbs all alike. A method's figure is the median over rounds of its time over ECT's in the same
round, with the quartiles of that ratio; `cpu` is the same with the process' CPU time, in which work that overlaps in another
thread (the assignment of the next batch) counts in full. Parts:

    digits, cifar16   all methods at batch 128; sLCT with its own norm, and without it (the same network as ECT's)
    ot                sLCT with and without optimal transport at batch 256, on the digits network, where a step is
                      shortest and the assignment's share largest, on the latents network of benchmarks/slct.py, and
                      on the cifar16 network

Data are random pixels; every run stands at half of its length (grids and gaps are those of mid-training).
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from fewstep.console import say
from fewstep.environment import environment
from fewstep.files import write_json
from fewstep.networks import Architecture, UNet
from fewstep.recipe import Recipe
from fewstep.recipes import names
from fewstep.recipes import recipe as get_recipe
from fewstep.training import TrainState, training_steps

Part = Literal["digits", "cifar16", "ot"]
NETWORKS: dict[str, tuple[UNet, tuple[int, ...]]] = {
    "digits": (UNet(16, (1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8), (1, 8, 8)),
    "latents": (UNet(24, (1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8), (4, 8, 8)),
    "cifar16": (UNet(16, (1, 2, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8), (3, 16, 16)),
}
METHODS = ("ect", "edm", "ct", "ict", "ilct", "slct", "slct without nsln", "cd", "tcm")


def on(name: str, network: UNet, batch_size: int) -> Recipe:
    """A method's digits preset, "slct without PART PART" included, on this network."""
    method, *parts = name.replace("without ", "").split()
    base: Recipe = get_recipe(method, "digits")
    for part in parts:
        from fewstep.recipes.slct import without

        base = without(base, part)
    own: Any = base.network
    like: Any = replace(network, norm=own.norm) if hasattr(own, "norm") else network
    whole = replace(own, network=like) if hasattr(own, "network") else like  # TCM's has the network twice
    return replace(base, network=whole, batch_size=batch_size, microbatch=None)


def stepping(recipe: Recipe, shape: tuple[int, ...]) -> Iterator[Any]:
    """Optimizer steps without end, from the middle of the run on, over a few batches of random pixels with labels."""
    architecture = Architecture(recipe.network, shape, 10, recipe.sigma_data, recipe.sigma_min)
    state = TrainState.create(recipe, architecture, torch.device("cpu"))
    state.nimg = recipe.total_nimg // 2 // recipe.batch_size * recipe.batch_size
    teacher = None
    if getattr(recipe, "teacher", False):
        teacher = architecture.build(1).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    pool = [
        (
            torch.randint(0, 256, (recipe.batch_size, *shape), generator=generator, dtype=torch.uint8),
            torch.randint(0, 10, (recipe.batch_size,), generator=generator),
        )
        for _ in range(4)
    ]

    def feed() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from pool

    return training_steps(state, recipe, feed(), teacher)


def contest(
    recipes: dict[str, Recipe], shape: tuple[int, ...], base: str, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """`rounds` rounds of one step each, after three that do not count; times and ratios to `base`."""
    runners = {name: stepping(recipe, shape) for name, recipe in recipes.items()}
    order, times = random.Random(seed), {name: ([], []) for name in runners}
    for k in range(-3, rounds):
        turn = list(runners)
        order.shuffle(turn)
        for name in turn:
            wall, cpu = time.perf_counter(), time.process_time()
            step = next(runners[name])
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            assert not step.problem, f"{name}: {step.problem}"
            if k >= 0:
                times[name][0].append(wall)
                times[name][1].append(cpu)
    for runner in runners.values():
        runner.close()  # type: ignore[attr-defined]
    return {
        name: {
            "ms": round(1000 * statistics.median(wall), 2), "cpu_ms": round(1000 * statistics.median(cpu), 2),
            "ratio": ratio(wall, times[base][0]), "ratio_cpu": ratio(cpu, times[base][1]),
        }
        for name, (wall, cpu) in times.items()
    }  # fmt: skip


def ratio(mine: list[float], others: list[float]) -> dict[str, float]:
    """Median and quartiles over rounds of mine / others."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(mine, others, strict=True)], n=4)
    return {"median": round(median, 4), "low": round(low, 4), "high": round(high, 4)}


def measure(part: Part, methods: tuple[str, ...], rounds: int) -> dict[str, Any]:
    """One part; a method that this version of fewstep does not have is left out and named."""
    if part == "ot":
        variants = ("slct without ot", "slct")
        return {
            name: contest({v: on(v, network, 256) for v in variants}, shape, variants[0], rounds)
            for name, (network, shape) in NETWORKS.items()
        }
    network, shape = NETWORKS[part]
    there = [m for m in methods if m.split()[0] in names()]
    found = contest({m: on(m, network, 128) for m in there}, shape, "ect", rounds)
    return {part: found, "absent": [m for m in methods if m not in there]}


@dataclass(frozen=True)
class Arguments:
    out: Path
    """the JSON file; parts that it holds are not measured again"""
    parts: tuple[Part, ...] = ("digits", "ot", "cifar16")
    methods: tuple[str, ...] = METHODS
    """what `digits` and `cifar16` compare with ect"""
    rounds: int = 30
    ot_rounds: int = 60
    again: bool = False
    """measure the parts again"""


def main(arguments: Arguments) -> None:
    """Measure what is missing; print one line per method."""
    torch.set_num_threads(1)
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() and not arguments.again else {}
    parts: dict[str, Any] = before.get("parts", {})
    methods = tuple(dict.fromkeys(("ect", *arguments.methods)))
    for part in arguments.parts:
        if part in parts:
            continue
        say(f"{part} ...")
        rounds, load, began = (
            arguments.ot_rounds if part == "ot" else arguments.rounds,
            os.getloadavg(),
            time.monotonic(),
        )
        found = measure(part, methods, rounds)
        parts[part] = {
            "rounds": rounds, "seconds": round(time.monotonic() - began), "load_before_after": [load[0], os.getloadavg()[0]],
            **found,
        }  # fmt: skip
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            arguments.out,
            {
                "what": "Step times, paired medians of ratios (digits, cifar16: to ect; ot: to sLCT without it)",
                "command": "python benchmarks/step_time.py " + " ".join(sys.argv[1:]),
                "environment": environment(),
                "parts": parts,
            },
        )
    for part, found in parts.items():
        for network, rows in found.items():
            for name, row in rows.items() if isinstance(rows, dict) else ():
                r, c = row["ratio"], row["ratio_cpu"]["median"]
                spread = f"x {r['median']:.3f} ({r['low']:.3f} .. {r['high']:.3f})  cpu x {c:.3f}"
                print(f"{part:8} {network:8} {name:20} {row['ms']:8.1f} ms  {spread}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
