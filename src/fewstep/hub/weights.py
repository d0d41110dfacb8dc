"""Tensors from foreign files, without unpickling: safetensors, whole or in shards, and archives of tensors alone."""

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.types import FewstepError

ARCHIVES = (".pt", ".pth", ".bin", ".ckpt")


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    """The one set of weights in a diffusers folder, one file or shards; archives only where there is no safetensors."""
    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        tensors |= load_archive(file) if file.suffix in ARCHIVES else mapped(file)
    return tensors


def weight_files(path: Path) -> list[Path]:
    """The file itself; of a diffusers folder its weights or their shards: in full rather than a variant (fp16)."""
    if not path.is_dir():
        return [path]
    for kind in ("safetensors", "bin"):
        files = sorted([*path.glob(f"*.{kind}"), *path.glob(f"*.{kind}.index*.json")])
        files = [file for file in files if kind == "safetensors" or file.name.startswith("diffusion_pytorch_model")]
        whole = [
            f
            for f in files
            if f.name in (f"diffusion_pytorch_model.{kind}", f"diffusion_pytorch_model.{kind}.index.json")
        ]
        shards = {shard for f in files if f.suffix == ".json" for shard in shards_of(f)}
        singles = whole or [file for file in files if file not in shards]
        if len(singles) == 1:
            return shards_of(singles[0]) if singles[0].suffix == ".json" else singles
        if singles:
            what = ", ".join(file.name for file in singles[:4])
            raise FewstepError(f"{path} holds {what}: leave one set of weights there")
    raise FewstepError(f"{path} holds no weights (.safetensors): copy the whole folder")


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, beside it."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("files elsewhere")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FewstepError(f"{index} names no shards beside it ({error}): copy the folder again") from None
    return [index.parent / name for name in names]


def mapped(path: Path, remedy: str = "use another copy") -> dict[str, Tensor]:
    """The tensors of a safetensors file, unchecked: private memory maps, read from the disk where they are used."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise FewstepError(f"{path} is missing, truncated or damaged ({error}): {remedy}") from None


def load_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch archive that holds them at the top or in one nested dict ("state_dict", "ema", ...)."""
    content = archive_content(path)
    found = {name: held for name, part in candidates(content) if (held := tensors_of(part))}
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise FewstepError(
            f"{path} must hold one dict of tensors, it has {names}: save the one to combine as .safetensors"
        )
    return next(iter(found.values()))


def archive_content(path: Path) -> Any:
    """What a PyTorch archive holds, as far as `torch.load(weights_only=True)` builds it; that executes nothing."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # of before PyTorch 1.6: no zip, cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise FewstepError(f"{path} holds more than tensors: convert it to .safetensors where you trust it") from None
    except Exception as error:
        raise FewstepError(f"{path} is no readable PyTorch archive ({type(error).__name__}): use another") from error


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


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
