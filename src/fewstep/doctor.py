"""Versions, device, disk and caches; each red line with its remedy."""

import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fewstep._version import __version__
from fewstep.environment import commit, processor, version

EXTRAS = {
    "torch-fidelity": ("inception", "FID with Inception features"),
    "transformers": ("dinov2", "FD with DINOv2 features"),
    "datasets": ("hf", "data sets by their Hugging Face name"),
    "tensorboard": ("tensorboard", "TensorBoard events beside log.jsonl"),
    "onnxruntime": ("onnx", "fewstep export --to onnx"),
    "gradio": ("serve", "fewstep serve"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination."""

    name: str
    state: Literal["ok", "note", "red"]
    text: str
    remedy: str = ""


def examine(folder: Path = Path()) -> list[Finding]:
    """Everything that fewstep needs or can use, as found here."""
    python = sys.version.split()[0]
    old = sys.version_info < (3, 10)
    return [
        Finding("fewstep", "ok", f"{__version__} {(commit() or '')[:9]}".strip()),
        Finding("python", "red" if old else "ok", python, "install Python 3.10 or newer" if old else ""),
        Finding("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads on {processor()}"),
        *devices(),
        torchvision(),
        disk(folder),
        *(extra(package) for package in EXTRAS),
        cache("Hugging Face cache", Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))),
        cache("PyTorch hub cache", Path(os.environ.get("TORCH_HOME", "~/.cache/torch"))),
    ]


def devices() -> list[Finding]:
    """The accelerators PyTorch sees."""
    if torch.cuda.is_available():
        lines = []
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
            lines.append(
                Finding(
                    f"cuda:{i}",
                    "ok",
                    f"{torch.cuda.get_device_name(i)}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free, {bf16}",
                )
            )
        return lines
    if torch.backends.mps.is_available():
        return [Finding("mps", "ok", "Apple GPU: use --device mps")]
    if shutil.which("nvidia-smi"):
        return [
            Finding(
                "cuda",
                "red",
                "an NVIDIA driver is here but this PyTorch cannot use it",
                "install a CUDA build of torch that fits the driver",
            )
        ]
    return [Finding("cuda", "note", "no GPU: everything runs on the CPU, at small sizes")]


def torchvision() -> Finding:
    """A torchvision built for another torch breaks `import diffusers`."""
    if importlib.util.find_spec("torchvision") is None:
        return Finding("torchvision", "ok", "absent (not needed)")
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        return Finding(
            "torchvision",
            "red",
            f"does not fit torch {torch.__version__} ({error})",
            "pip uninstall torchvision, or install the build for this torch",
        )
    return Finding("torchvision", "ok", version("torchvision") or "")


def disk(folder: Path) -> Finding:
    """Room for a run."""
    free = shutil.disk_usage(folder).free
    if free < 2e9:
        return Finding(
            "disk",
            "red",
            f"{free / 1e9:.1f} GB free in {folder.resolve()}",
            "free some space or choose --out on another disk",
        )
    return Finding("disk", "ok", f"{free / 1e9:.0f} GB free in {folder.resolve()}")


def extra(package: str) -> Finding:
    """An optional package."""
    name, use = EXTRAS[package]
    found = version(package)
    return Finding(package, "ok" if found else "note", found or f"absent: for {use}, pip install 'fewstep[{name}]'")


def cache(name: str, path: Path) -> Finding:
    """A cache that other libraries download to."""
    path = path.expanduser()
    if not path.exists():
        return Finding(name, "note", f"{path} (empty)")
    if not os.access(path, os.W_OK):
        return Finding(
            name,
            "red",
            f"{path} is not writable",
            "give yourself the right to write there, or set HF_HOME / TORCH_HOME",
        )
    return Finding(name, "ok", str(path))


def table(findings: list[Finding]) -> str:
    """For a person."""
    marks = {"ok": "  ok ", "note": "   - ", "red": " RED "}
    lines = [
        f"{marks[f.state]} {f.name:20} {f.text}" + (f"\n{'':26} -> {f.remedy}" if f.remedy else "") for f in findings
    ]
    return "\n".join(lines)
