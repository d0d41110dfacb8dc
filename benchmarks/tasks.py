"""Many runs, several at a time, each in a process of its own: what is finished is in the JSON file at once, and stays."""

import json
import math
import os
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch

from fewstep.console import say
from fewstep.environment import environment
from fewstep.files import write_json
from fewstep.types import FewstepError

Value: TypeAlias = dict[str, Any]
CACHE = Path(os.environ.get("FEWSTEP_BENCHMARKS", "~/.cache/fewstep/benchmarks")).expanduser()


@dataclass(frozen=True)
class Task:
    """`call(*arguments)` in a process of its own, after the tasks named in `needs`; what it returns is kept."""

    call: Callable[..., Value]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()


def carry_out(
    tasks: dict[str, Task], out: Path, header: Value, jobs: int, summary: Callable[[dict[str, Value]], Value]
) -> Value:
    """Run all tasks that `out` does not hold yet, `jobs` at a time, and write `out` after each.

    A task that fails is recorded with its error, with those that need it, and is tried again next time.
    """
    runs: dict[str, Value] = {}
    if out.exists():
        before = json.loads(out.read_text())
        if before.get("settings") != json.loads(json.dumps(header["settings"])):
            raise FewstepError(f"{out} was measured with other settings: choose another --out")
        runs = before["runs"]
    waiting = {name: task for name, task in tasks.items() if name not in runs}
    failures: dict[str, str] = {}
    running: dict[Future[Value], str] = {}
    result: Value = {}
    here = environment()

    def keep() -> None:
        nonlocal result
        result = {**header, "environment": here, **summary(runs), "failures": failures, "runs": runs}
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)

    began = time.monotonic()
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        while waiting or running:
            for name in [n for n, task in waiting.items() if any(need in failures for need in task.needs)]:
                failures[name] = "a run that it needs failed"
                del waiting[name]
            ready = [n for n, task in waiting.items() if all(need in runs for need in task.needs)]
            assert ready or running or not waiting
            for name in ready[: jobs - len(running)]:
                task = waiting.pop(name)
                running[pool.submit(task.call, *task.arguments)] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                name = running.pop(future)
                try:
                    runs[name] = future.result() | {"commit": here["commit"]}
                except Exception as error:
                    failures[name] = "".join(traceback.format_exception_only(error)).strip()
                left = len(waiting) + len(running)
                found = failures[name] if name in failures else brief(runs[name])
                say(f"{time.monotonic() - began:5.0f} s  {name}: {found}  ({left} left)")
                keep()
    keep()
    return result


def brief(run: Value) -> str:
    """One line about a finished run."""
    distances = run.get("fd") or run.get("distance") or {}
    values = ", ".join(f"{key}: {value:.3g}" for key, value in distances.items())
    return f"{values or 'done'} [{run.get('seconds', 0):.0f} + {run.get('measure_seconds', 0):.0f} s]"


def spread(values: list[float]) -> Value:
    return {
        "mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None, "values": values
    }  # fmt: skip


def paired(a: dict[int, float], b: dict[int, float]) -> Value | None:
    """b/a over the seeds that both have: its geometric mean, the 95 % interval of Student's t in ln, and every ratio."""
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return None
    logs = [math.log(b[seed] / a[seed]) for seed in seeds]
    mean, interval = statistics.fmean(logs), None
    if len(logs) > 1:
        from scipy.stats import t

        half = t.ppf(0.975, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
        interval = [math.exp(mean - half), math.exp(mean + half)]
    return {"ratio": math.exp(mean), "interval": interval, "seeds": seeds, "ratios": [math.exp(x) for x in logs]}
