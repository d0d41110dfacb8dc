"""Checkpoints of one training run, ours or other people's: finding them in order, and reading them without unpickling.

fewstep snapshots, any safetensors file, a diffusers folder (one file or shards), and PyTorch archives as far as
`torch.load(weights_only=True)` reads them, which builds tensors and plain containers and executes nothing.
"""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.snapshots.format import FORMAT, Stored, mapped, peek, weights_hash
from fewstep.types import FewstepError

ARCHIVES = (".pt", ".pth", ".bin", ".ckpt")
ENDINGS = (".safetensors", ".pt", ".pth")  # what is looked for in a folder


@dataclass(frozen=True)
class Source:
    """One checkpoint of a bank."""

    path: str
    """absolute, of the file or diffusers folder"""
    sha256: str
    """snapshots.format.weights_hash of all its tensors"""
    nimg: int
    """images seen, as a fewstep file says; else its position 0, 1, 2, ... among the sources"""
    weights: str
    """online, ema-0.999, ... as a fewstep file says; empty for a foreign file"""


def checkpoint_files(
    sources: Sequence[str | Path], first_nimg: int = 0, last_nimg: int | None = None, every: int = 1
) -> list[Path]:
    """The checkpoints that the arguments mean, in order: files, diffusers folders, run directories (their snapshots by
    nimg), other folders (their .safetensors, .pt, .pth in natural order: step2 before step10).

    first_nimg, last_nimg: only those between, both included; every: each every-th, counted back from the last.
    FewstepError: a path is missing, a folder holds none, a limit where nimg is unknown, fewer than two are left.
    """
    if every < 1:
        raise FewstepError(f"--every must be 1 or more, got {every}")
    if not sources:
        raise FewstepError("give a run directory, or checkpoint files in the order of training")
    files = [file for source in sources for file in expand(Path(source))]
    if files == sorted(files) != sorted(files, key=natural) and len({file.parent for file in files}) == 1:
        raise FewstepError(
            f"{files[0].name}, {files[1].name}, ... are in the shell's order, not that of training: give their folder, "
            "which is read in the order of its numbers, or list the files in order"
        )
    if first_nimg or last_nimg is not None:
        last = float("inf") if last_nimg is None else last_nimg
        files = [file for file in files if first_nimg <= known_nimg(file) <= last]
    files = files[::-1][::every][::-1]
    if len(files) < 2:
        raise FewstepError(
            f"{len(files)} checkpoint(s) in {', '.join(map(str, sources)) or 'nothing'}: at least 2 are combined; save more "
            "often (--snapshot-nimg) or widen the window"
        )
    return files


def expand(path: Path) -> list[Path]:
    """The checkpoints of one argument."""
    if not path.exists():
        raise FewstepError(f"{path} does not exist: give checkpoint files, a run directory or a folder of checkpoints")
    if path.is_file() or (path / "config.json").is_file():
        return [path]
    folder = path / "snapshots" if (path / "snapshots").is_dir() else path
    files = [file for file in folder.iterdir() if file.suffix in ENDINGS and file.is_file()]
    if not files:
        raise FewstepError(f"{folder} holds no checkpoint ({', '.join(ENDINGS)}): give the folder or files that do")
    return sorted(files, key=natural)


def natural(path: Path) -> list[tuple[int, str]]:
    """The order in which people count: step2 before step10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name) if part]


def known_nimg(path: Path) -> int:
    """The images seen, as a fewstep file says; FewstepError for any other."""
    header = read_foreign_header(path)
    if not header:
        raise FewstepError(f"{path} does not tell its images seen: leave out the limits on nimg, or list the files")
    return header["model"]["nimg"]


def read_checkpoint(path: str | Path) -> Stored:
    """Tensors, header ({} for a foreign file) and the SHA-256 of the tensors, which a fewstep file must match."""
    path = Path(path)
    tensors, header = load_checkpoint(path)
    digest = weights_hash(tensors)
    if header and header["weights_sha256"] != digest:
        raise FewstepError(f"{path} is damaged (its weights do not match their checksum): leave it out or restore it")
    return Stored(tensors, header, digest)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header, unchecked; memory maps wherever the format allows it."""
    if path.suffix in ARCHIVES and path.is_file():
        return load_archive(path), {}
    header = read_foreign_header(path)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors |= mapped(file)
    return tensors, header


def read_foreign_header(path: Path) -> dict[str, Any]:
    """The header of a fewstep snapshot; {} for a foreign checkpoint."""
    if path.suffix in ARCHIVES and path.is_file():
        return {}
    headers = [peek(file, FORMAT) for file in weight_files(path)]
    header = headers[0] or {}
    if header and "model" not in header:
        raise FewstepError(f"{path} holds a training state, not a model: give snapshots")
    return header


def weight_files(path: Path) -> list[Path]:
    """The file itself; of a diffusers folder its weights or their shards."""
    if not path.is_dir():
        return [path]
    indices, files = sorted(path.glob("*.safetensors.index.json")), sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return [path / name for name in sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))]
    if len(files) != 1:
        what = ", ".join(file.name for file in (indices or files)[:4]) or "no .safetensors"
        raise FewstepError(f"{path} holds {what}, one set of weights is needed: give the file itself")
    return files


def load_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch archive that holds them at the top or in one nested dict ("state_dict", "ema", ...)."""
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of before PyTorch 1.6: no zip, cannot be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FewstepError(f"{path} holds more than tensors: convert it to .safetensors where you trust it") from None
    except Exception as error:
        raise FewstepError(f"{path} is no readable PyTorch archive ({type(error).__name__}): use another") from error
    found = {name: held for name, part in candidates(content) if (held := tensors_of(part))}
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise FewstepError(
            f"{path} must hold one dict of tensors, it has {names}: save the one to combine as .safetensors"
        )
    return next(iter(found.values()))


def candidates(content: Any) -> list[tuple[str, Any]]:
    """The content itself if it holds tensors, else what its keys hold."""
    if not isinstance(content, Mapping) or tensors_of(content):
        return [("the top level", content)]
    return [(str(key), part) for key, part in content.items()]


def tensors_of(part: Any) -> dict[str, Tensor]:
    """A state dict's tensors; {} for anything else."""
    if (
        isinstance(part, Mapping)
        and part
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in part.items())
    ):
        return dict(part)
    return {}


__all__ = ["Source", "checkpoint_files", "load_checkpoint", "read_checkpoint"]
