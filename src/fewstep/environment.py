"""Versions, commit and hardware: what a number needs beside it to be trusted."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fewstep._version import __version__
from fewstep.types import FewstepError

PACKAGES = ("torch", "numpy", "diffusers", "safetensors", "scikit-learn", "pyarrow", "tyro")


def version(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The git commit of the fewstep that runs, with + when its tree is changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        head = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5)
        tracked = subprocess.run(
            ["git", "-C", here, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=5
        )
        changed = subprocess.run(["git", "-C", here, "diff", "--quiet", "HEAD"], capture_output=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or tracked.returncode:
        return None
    return head.stdout.strip() + "+" * bool(changed.returncode)


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows what it can
    return platform.processor() or platform.machine()


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What this process runs on, JSON-able."""
    device = torch.device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "fewstep": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": gpu,
    }


def workers() -> int:
    """How many threads can compute at once without sharing a core, each with as many as PyTorch uses inside an operation,
    beside the other processes that torchrun has on this machine."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux: the cores that this process may use
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    # without torchrun nobody says how many of all processes are here: at most all
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return max(cores // (torch.get_num_threads() * processes), 1)


def pick_device(name: str = "auto") -> torch.device:
    """The device called auto (CUDA if there is one, else the CPU), cpu, cuda, cuda:1 or mps; FewstepError if absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise FewstepError(f"unknown device {name!r}: use auto, cpu, cuda, cuda:1 or mps") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise FewstepError(
            f"--device {name}: PyTorch sees no CUDA GPU here; use --device cpu (fewstep doctor says more)"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FewstepError(f"--device {name}: this machine has {torch.cuda.device_count()} GPU(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise FewstepError("--device mps: PyTorch sees no Apple GPU here; use --device cpu")
    return device
