"""What a feature extractor is, and how its features stay the same everywhere."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor


@runtime_checkable
class Extractor(Protocol):
    """Images uint8 [n, c, h, w] to features float32 [n, dim], on the extractor's device.

    Deterministic, and the features of an image do not depend on the others in its batch. Callers choose the batch.
    """

    name: str
    sha256: str  # of the weights; with the name, all that decides the features
    dim: int

    def __call__(self, images: UInt8[Tensor, "n c h w"], /) -> Float32[Tensor, "n d"]: ...


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The hash of names, dtypes, shapes and bytes, in the order of the names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 convolutions without TF32, autocast, autotuning or gradients: one number on every device."""
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), cudnn:
        yield
