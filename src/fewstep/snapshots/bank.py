"""A bank: all checkpoints of a run in one file, so that one pass over it makes many combinations (arXiv:2404.02241).

theta(c) = theta_K + sum_i c_i (theta_i - theta_K), sum c = 1. Entries may be negative or exceed 1. What is stored are the
differences to the LAST checkpoint: coefficients lie mostly on late ones, whose differences, and what storage loses of
them, are the smallest; and the last checkpoint itself is exact to the bit. EMA, power-function EMA, uniform average, soup
and LCSC are all such vectors c; the rows of a matrix of them are made together by one matrix product per column chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from fewstep.files import atomic_write
from fewstep.snapshots.bankfile import FORMAT, estimate_bytes, sha256, write
from fewstep.snapshots.combination import check_coefficients, exact
from fewstep.snapshots.format import mapped, peek, weights_hash
from fewstep.snapshots.layout import Entry, check_alike
from fewstep.snapshots.products import DTYPES, Deltas, ReadAhead, Storage, in_parallel, multiply
from fewstep.snapshots.sources import Source, read_checkpoint
from fewstep.types import FewstepError

REMEDY = "build the bank again from its checkpoints"


@dataclass(frozen=True, eq=False)
class Bank:
    """K checkpoints of one run, P combined parameters each."""

    path: Path
    sources: tuple[Source, ...]
    storage: Storage
    batch: int
    """images per optimizer step of the run: averages are defined by steps"""
    entries: tuple[Entry, ...]
    copied: dict[str, Tensor]
    """what is not combined (integers, batch statistics), of the last source"""
    header: dict[str, Any]
    """of the last source; {} for a foreign file"""
    hashes: dict[str, Any]
    base: Float32[Tensor, " p"]
    deltas: Deltas

    @classmethod
    def build(
        cls,
        files: Sequence[str | Path],
        path: str | Path,
        storage: Storage = "bf16",
        batch: int = 1,
        quiet: bool = False,
    ) -> "Bank":
        """Write the bank of checkpoints in the order of training, in a stream: two of them are in memory at a time.

        float16, bfloat16 and float64 tensors are combined in float32. FewstepError: fewer than two, different tensors,
        something not finite, too little space on the disk.
        """
        path, absolute = Path(path).absolute(), [Path(file).absolute() for file in files]
        headers = check_alike(absolute)
        atomic_write(path, lambda new: write(new, absolute, headers, storage, batch, quiet))
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path) -> "Bank":
        """A bank on disk, mapped into memory: read where it is used. Its sums are checked by `check`."""
        path = Path(path)
        header = peek(path, FORMAT, REMEDY)
        if header is None:
            raise FewstepError(f"{path} is not a bank: give a file that Bank.build wrote")
        tensors, storage = mapped(path, REMEDY), header["storage"]
        expected = {"base": torch.float32, "deltas": DTYPES[storage], "scales": torch.float32}
        tensors.setdefault("scales", torch.empty(len(header["sources"]), 0))
        if any(name not in tensors or tensors[name].dtype != dtype for name, dtype in expected.items()):
            raise FewstepError(f"{path} is damaged (not the tensors that its header tells): {REMEDY}")
        return cls(
            path.absolute(),
            tuple(Source(**source) for source in header["sources"]),
            storage,
            header["batch"],
            tuple(Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in header["entries"]),
            {name.removeprefix("copied."): t for name, t in tensors.items() if name.startswith("copied.")},
            header["last"],
            header["hashes"],
            tensors["base"],
            Deltas(tensors["deltas"], tensors["scales"]),
        )

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def size(self) -> int:
        """P, the combined parameters of one checkpoint."""
        return len(self.base)

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    @property
    def nimg(self) -> tuple[int, ...]:
        """Images seen by each source."""
        return tuple(source.nimg for source in self.sources)

    def check(self) -> None:
        """FewstepError unless every stored byte is what was written; reads the whole bank."""
        found = {
            "base": sha256(self.base),
            "copied": weights_hash(self.copied),
            "rows": [sha256(*row) for row in zip(self.deltas.values, self.deltas.scales, strict=True)],
        }
        wrong = [name for name, value in found.items() if value != self.hashes[name]]
        if wrong:
            raise FewstepError(f"{self.path} is damaged ({', '.join(wrong)} do not match their checksums): {REMEDY}")

    def verify(self) -> None:
        """FewstepError with the sources that are gone or not what the bank was built from; reads them all."""
        problems = []
        for source in self.sources:
            try:
                if read_checkpoint(source.path).weights_sha256 != source.sha256:
                    problems.append(f"{source.path} was altered")
            except FewstepError as error:
                problems.append(str(error))
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise FewstepError(
                f"{len(problems)} of {len(self)} sources are not what {self.path} was built from: restore them, or {REMEDY} "
                f"({'; '.join(problems[:8])}{more})"
            )

    @torch.no_grad()
    def combine(
        self, coefficients: Float64[Tensor, "m k"], rows: Sequence[int] | None = None, out: Tensor | None = None
    ) -> Float32[Tensor, "n p"]:
        """theta(c) [P] float32 for each row c of coefficients, in one pass; products and sums in float32.

        rows: which of them to keep, [len(rows), P]; all are multiplied, so a row has the same bits whoever asks for which.
        out: where to write; give the same again, for new memory costs a third more time (K 100, M 16). A tensor equal in all
        sources comes out as it is, to the bit. Same bits for any number of threads of one machine.
        """
        check_coefficients(coefficients, len(self))
        m, device = len(coefficients), self.base.device
        kept = None if rows is None else torch.tensor(list(rows), dtype=torch.long, device=device)
        shape = (m if kept is None else len(kept), self.size)
        out = torch.empty(shape, device=device) if out is None else out
        if out.shape != shape or out.dtype != torch.float32 or out.device != device:
            raise FewstepError(f"out must be float32 {list(shape)} on {device}")
        minus, step = -coefficients.float().to(device), self.deltas.step(device)
        ahead = ReadAhead(self.path, self.deltas.values)

        def work(starts: Iterator[int]) -> None:
            room, sums = self.deltas.room(device), torch.empty(m * step, device=device)
            for first in starts:
                last = min(first + step, self.size)
                ahead(first)
                product = sums[: m * (last - first)].view(m, -1)
                multiply(minus, self.deltas.chunk(first, last, room), product)
                # theta - (-sum) keeps the sign of a zero that is equal in all sources, which theta + sum would lose
                product = product if kept is None else product[kept]
                torch.sub(self.base[first:last], product, out=out[:, first:last])

        starts = range(0, self.size, step)
        in_parallel(work, starts) if device.type == "cpu" else work(iter(starts))
        return out

    def exact(self, coefficients: Float64[Tensor, " k"]) -> dict[str, Tensor]:
        """theta(c) from the checkpoints themselves, checked, in float64, each tensor in its own dtype: see `exact`."""
        return exact([source.path for source in self.sources], [source.sha256 for source in self.sources], coefficients)

    def tensors(self, flat: Float32[Tensor, " p"]) -> dict[str, Tensor]:
        """The parts of a flat vector under their names, as views, with what is copied: a state dict."""
        return {entry.name: flat[entry.place].view(entry.shape) for entry in self.entries} | self.copied

    @torch.no_grad()
    def gram(self) -> Float64[Tensor, "k k"]:
        """Inner products of theta_i - theta_K as stored, in one pass: products in float32, sums over chunks in float64."""
        device = self.base.device
        room, step = self.deltas.room(device), self.deltas.step(device)
        gram = torch.zeros(len(self), len(self), dtype=torch.float64)  # on the CPU: MPS has no float64
        for first in range(0, self.size, step):
            chunk = self.deltas.chunk(first, min(first + step, self.size), room)
            gram += (chunk @ chunk.T).cpu()
        return gram

    def to(self, device: torch.device | str) -> "Bank":
        """The bank for results on that device: there itself if it leaves a quarter of the free memory, else in a stream."""
        device = torch.device(device)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
        fits = device.type == "cpu" or self.deltas.nbytes + self.base.nbytes < 0.75 * free
        return replace(self, base=self.base.to(device), deltas=self.deltas.to(device) if fits else self.deltas)


__all__ = ["Bank", "Entry", "Storage", "estimate_bytes", "exact"]
