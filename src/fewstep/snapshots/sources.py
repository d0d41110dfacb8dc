"""Checkpoints of one training run, ours or other people's: finding them in order, and reading them without unpickling.

fewstep snapshots; what `fewstep.hub` knows to be a model (EDM pickles, diffusers pipelines, OpenAI's .pt, FastGen's .pth);
any other safetensors file, diffusers folder or PyTorch archive of tensors, under the names that its tensors have there.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep import hub
from fewstep.hub import ARCHIVES, load_archive, mapped, weight_files
from fewstep.snapshots.format import FORMAT, Stored, peek, weights_hash
from fewstep.types import FewstepError

ENDINGS = (".safetensors", ".pt", ".pth", ".pkl")  # what is looked for in a folder


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
    nimg), other folders (their .safetensors, .pt, .pth, .pkl in natural order: step2 before step10).

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
    if path.is_file() or any((path / name).is_file() for name in ("config.json", "model_index.json")):
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
    if "nimg" not in header.get("model", {}):
        raise FewstepError(f"{path} does not tell its images seen: leave out the limits on nimg, or list the files")
    return header["model"]["nimg"]


def read_checkpoint(path: str | Path) -> Stored:
    """Tensors, header ({} where nothing says what network they are of) and the SHA-256 of the tensors, which a fewstep
    file must match."""
    path = Path(path)
    tensors, header = load_checkpoint(path)
    digest = weights_hash(tensors)
    if header.get("weights_sha256", digest) != digest:
        raise FewstepError(f"{path} is damaged (its weights do not match their checksum): leave it out or restore it")
    return Stored(tensors, header, digest)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header, unchecked; memory maps wherever the format allows it."""
    if foreign := known(path):
        return foreign.tensors, foreign.header()
    if path.suffix in ARCHIVES and path.is_file():
        return load_archive(path), {}
    header = read_foreign_header(path)
    tensors: dict[str, Tensor] = {}
    for file in weight_files(path):
        tensors |= mapped(file)
    return tensors, header


def known(path: Path) -> hub.Foreign | None:
    """The foreign model of a file or folder; None where it is ours, or weights that do not say what they are of."""
    try:
        return hub.read(path)
    except hub.UnknownModel:
        return None


def read_foreign_header(path: Path) -> dict[str, Any]:
    """The header of a fewstep snapshot, or one made of what a foreign model says of itself; {} where it says nothing."""
    if foreign := known(path):
        return foreign.header()
    if path.suffix in ARCHIVES and path.is_file():
        return {}
    headers = [peek(file, FORMAT) for file in weight_files(path)]
    header = headers[0] or {}
    if header and "model" not in header:
        raise FewstepError(f"{path} holds a training state, not a model: give snapshots")
    return header


__all__ = ["Source", "checkpoint_files", "load_checkpoint", "read_checkpoint"]
