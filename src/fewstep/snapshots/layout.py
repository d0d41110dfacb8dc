"""Which tensors of a checkpoint are combined, where each lies in the flat vector, and whether checkpoints are alike."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from fewstep.snapshots.sources import load_checkpoint
from fewstep.types import FewstepError

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SHOWN = 8  # rows of a table of differences


@dataclass(frozen=True)
class Entry:
    """One combined tensor in the flat vector of P float32."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def place(self) -> slice:
        """Its elements in the flat vector."""
        return slice(self.offset, self.offset + torch.Size(self.shape).numel())


def is_combined(name: str, tensor: Tensor) -> bool:
    """Floating tensors are combined, but for statistics of batch normalisation: variances would come out negative."""
    return tensor.is_floating_point() and not name.endswith(STATISTICS)


def entries_of(tensors: Mapping[str, Tensor]) -> tuple[Entry, ...]:
    """The combined tensors in the order of their names."""
    entries, offset = [], 0
    for name in sorted(name for name, tensor in tensors.items() if is_combined(name, tensor)):
        tensor = tensors[name]
        entries.append(Entry(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), offset))
        offset += tensor.numel()
    return tuple(entries)


@torch.no_grad()
def flatten(tensors: Mapping[str, Tensor], entries: Iterable[Entry], out: Float32[Tensor, " p"], path: Path) -> None:
    """Fill out with the combined tensors; FewstepError for what is not finite, with the file and tensor."""
    for entry in entries:
        part = out[entry.place].copy_(tensors[entry.name].reshape(-1))
        if not part.isfinite().all():
            raise FewstepError(f"{path}: {entry.name} is not finite in float32: leave that checkpoint out")


def check_alike(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The headers of checkpoints with the same tensors; FewstepError with a table of what differs from the first."""
    if len(files) < 2:
        raise FewstepError(f"{len(files)} checkpoint(s): at least 2 are combined")
    first: dict[str, str] = {}
    headers, rows = [], []
    for file in files:
        tensors, header = load_checkpoint(file)
        headers.append(header)
        here = {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()}
        first = first or here
        rows += [
            f"{file.name}  {name}  {here.get(name, 'missing')}  {first.get(name, 'missing')}"
            for name in sorted(here.keys() | first.keys())
            if here.get(name) != first.get(name)
        ]
    if rows:
        more = [f"and {len(rows) - SHOWN} more"] * (len(rows) > SHOWN)
        table = "\n  ".join(["file  tensor  here  in the first", *rows[:SHOWN], *more])
        raise FewstepError(f"the checkpoints are not of one network, leave out those that differ:\n  {table}")
    return headers
