"""What many combinations of checkpoints cost: one pass over a bank against loading and adding every file.

    python benchmarks/combine.py --out benchmarks/results/DATE-combine.json
    python benchmarks/combine.py --device cuda --k 400 --p 56000000 --out ...   # generated on the device, no files

On the CPU: K synthetic checkpoints of P float32 parameters are written below --folder and a bank of each storage type is
built from them. Every round then measures, one after the other, (1) a copy of a large tensor, (2) one pass for M
candidates, (3) one candidate the naive way: each safetensors file loaded, c_i * tensors added. Files and bank are in the
page cache (the first round, which warms them, is not counted). Bytes of a pass: deltas and base read, results written.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from safetensors.torch import load_file, save_file

from fewstep.environment import environment
from fewstep.snapshots import Bank, Source, Storage, estimate_bytes
from fewstep.snapshots.products import Deltas

LAYERS = 20


@dataclass(frozen=True)
class Arguments:
    out: Path
    k: int = 100
    p: int = 20_000_000
    m: int = 16
    storage: tuple[Storage, ...] = ("bf16", "fp32", "int8")
    device: str = "cpu"
    folder: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    """where the temporary files go: K x P x 4 bytes, and one bank at a time"""
    rounds: int = 7
    seed: int = 0


def timed(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float | list[float]]:
    return {"median": statistics.median(values), "best": min(values), "values": values}


def checkpoints(a: Arguments, folder: Path) -> list[Path]:
    """K files of P parameters in LAYERS tensors: a random walk from random weights."""
    torch.manual_seed(a.seed)
    need = a.k * a.p * 4 + max(estimate_bytes(a.k, a.p, storage) for storage in a.storage)
    free = shutil.disk_usage(folder).free
    if need > 0.9 * free:
        sys.exit(
            f"{need / 1e9:.0f} GB are needed, {folder} has {free / 1e9:.0f}: another --folder, or smaller --k or --p"
        )
    weights, files = torch.randn(LAYERS, a.p // LAYERS).mul_(0.05), []
    for i in range(a.k):
        weights += torch.randn_like(weights).mul_(0.001)
        files.append(folder / f"step{i}.safetensors")
        save_file({f"layer{j}.weight": layer.clone() for j, layer in enumerate(weights)}, files[-1])
    return files


def naive(files: list[Path], coefficients: torch.Tensor) -> dict[str, torch.Tensor]:
    """sum_i c_i theta_i, file by file."""
    total: dict[str, torch.Tensor] = {}
    for file, c in zip(files, coefficients.tolist(), strict=True):
        for name, tensor in load_file(file).items():
            total[name] = total[name].add_(tensor, alpha=c) if name in total else tensor * c
    return total


def coefficients(m: int, k: int) -> torch.Tensor:
    """Rows of either sign that sum to 1."""
    c = torch.randn(m, k, dtype=torch.float64)
    return c - c.mean(1, keepdim=True) + 1 / k


def copy_rate(source: torch.Tensor, target: torch.Tensor) -> float:
    """Bytes read and written per second."""
    return 2 * source.nbytes / timed(lambda: target.copy_(source), str(source.device))


def peak_flops(device: str) -> float:
    """Of a large square float32 product, the best of five."""
    a = torch.randn(2048, 2048, device=device)
    return max(2 * 2048**3 / timed(lambda: a @ a, device) for _ in range(5))


def measure(a: Arguments, bank: Bank, files: list[Path]) -> dict:
    """One storage type: copy, pass and naive in turn."""
    c, out = coefficients(a.m, a.k), torch.empty(a.m, bank.size, device=a.device)
    source = torch.randn(max(bank.size, 50_000_000), device=a.device)
    target, flops = torch.empty_like(source), 2 * a.m * a.k * bank.size
    moved = bank.deltas.nbytes + bank.base.nbytes + out.nbytes
    copies, passes, naives, peaks = [], [], [], []
    for _ in range(a.rounds + 1):
        copies.append(copy_rate(source, target))
        passes.append(timed(lambda: bank.combine(c, out=out), a.device))
        naives += [timed(lambda: naive(files, c[0]))] if files else []
        peaks.append(peak_flops(a.device))
    copies, passes, naives, peaks = copies[1:], passes[1:], naives[1:], peaks[1:]
    result = {
        "bytes": moved,
        "flops": flops,
        "pass_seconds": spread(passes),
        "seconds_per_candidate": statistics.median(passes) / a.m,
        "gb_per_second": moved / statistics.median(passes) / 1e9,
        "gflops": flops / statistics.median(passes) / 1e9,
        "copy_gb_per_second": {"median": statistics.median(copies) / 1e9, "best": max(copies) / 1e9},
        "ratio_to_copy": statistics.median(moved / p / copy for p, copy in zip(passes, copies, strict=True)),
        "ratio_to_copy_of_bests": moved / min(passes) / max(copies),
        "float32_peak_gflops": max(peaks) / 1e9,
        "least_seconds_by_bytes": moved / max(copies),
        "least_seconds_by_flops": flops / max(peaks),
    }
    if files:
        ratio = statistics.median(n / (p / a.m) for n, p in zip(naives, passes, strict=True))
        result |= {"naive_seconds_per_candidate": spread(naives), "naive_over_bank_per_candidate": ratio}
    return result


def on_disk(a: Arguments) -> dict:
    results = {}
    with tempfile.TemporaryDirectory(dir=a.folder, prefix="combine-") as name:
        folder = Path(name)
        files = checkpoints(a, folder)
        for storage in a.storage:
            seconds = timed(lambda storage=storage: Bank.build(files, folder / "bank.safetensors", storage))
            results[storage] = {"build_seconds": seconds, **measure(a, Bank.open(folder / "bank.safetensors"), files)}
    return results


def on_device(a: Arguments) -> dict:
    """bf16 deltas made on the device."""
    torch.manual_seed(a.seed)
    values = torch.empty(a.k, a.p, dtype=torch.bfloat16, device=a.device)
    for row in values:
        row.normal_(std=0.01)
    sources = tuple(Source("", "", i, "") for i in range(a.k))
    bank = Bank(
        Path(),
        sources,
        "bf16",
        1,
        (),
        {},
        {},
        {},
        torch.randn(a.p, device=a.device),
        Deltas(values, torch.empty(a.k, 0, device=a.device)),
    )
    return {"bf16": measure(a, bank, [])}


def main(a: Arguments) -> None:
    load = os.getloadavg()
    results = on_disk(a) if a.device == "cpu" else on_device(a)
    result = {
        "what": "combinations of checkpoints: one pass over a bank for M candidates, page cache warm",
        "command": "python benchmarks/combine.py " + " ".join(sys.argv[1:]),
        "k": a.k,
        "p": a.p,
        "m": a.m,
        "rounds": a.rounds,
        "seed": a.seed,
        "environment": environment(a.device),
        "load_average": {"before": load, "after": os.getloadavg()},
        **results,
    }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
