"""The deltas of a bank as they are stored, and products with them in column chunks, each on one thread."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

Storage = Literal["bf16", "fp32", "int8"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "int8": torch.int8}
BLOCK = 1024  # parameters that share an int8 scale
CPU_CHUNK, GPU_CHUNK = 2**20, 2**28  # elements of a chunk: 4 MiB of float32 in a core's cache, 1 GiB of a GPU
AHEAD = 2**18  # columns to ask the disk for at once
SMALL = 10**6  # multiplications up to which OpenBLAS does not pack, which costs a third of the speed at m = 16


@dataclass(frozen=True, eq=False)
class Deltas:
    """theta_i - theta_K of every checkpoint."""

    values: Tensor
    """[K, P] of the storage's dtype"""
    scales: Float32[Tensor, "k blocks"]
    """[K, P/1024 rounded up] for int8, else [K, 0]"""

    def step(self, device: torch.device) -> int:
        """Columns that are worked on at once on that device, a multiple of 1024."""
        elements = CPU_CHUNK if device.type == "cpu" else GPU_CHUNK
        return max(elements // len(self.values) // BLOCK, 1) * BLOCK

    def room(self, device: torch.device) -> Float32[Tensor, " n"]:
        """Scratch for `chunk`."""
        return torch.empty(len(self.values) * self.step(device), device=device)

    def chunk(self, first: int, last: int, room: Float32[Tensor, " n"]) -> Float32[Tensor, "k w"]:
        """Columns first (a multiple of 1024) to last as float32, copied into room (into cache, float32 too)."""
        blocks = -(-(last - first) // BLOCK)
        wide = room[: len(self.values) * blocks * BLOCK].view(-1, blocks, BLOCK)
        chunk = wide.flatten(1)[:, : last - first].copy_(self.values[:, first:last])
        if self.scales.numel():
            wide *= self.scales[:, first // BLOCK : first // BLOCK + blocks, None].to(room.device)
        return chunk

    def to(self, device: torch.device) -> "Deltas":
        return Deltas(self.values.to(device), self.scales.to(device))

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def encode(row: Float32[Tensor, " p"], storage: Storage) -> tuple[Tensor, Tensor]:
    """The row as stored, and for int8 its scales: per block of 1024 the largest magnitude / 127."""
    if storage != "int8":
        return row.to(DTYPES[storage]), row[:0]
    blocks = -(-len(row) // BLOCK)
    padded = torch.nn.functional.pad(row, (0, blocks * BLOCK - len(row))).view(blocks, BLOCK)
    scales = (padded.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (padded / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8).view(-1)[: len(row)], scales


def multiply(rows: Float32[Tensor, "m k"], chunk: Float32[Tensor, "k w"], out: Float32[Tensor, "m w"]) -> None:
    """out = rows @ chunk; on a CPU in blocks of so few columns that NumPy's OpenBLAS takes them as they lie."""
    columns = min(SMALL // max(rows.numel(), 1) // 64 * 64, 512)
    whole = chunk.shape[1] // columns * columns if columns and out.device.type == "cpu" else 0
    if whole:
        blocks, made = (t[:, :whole].unflatten(1, (-1, columns)).transpose(0, 1).numpy() for t in (chunk, out))
        np.matmul(rows.numpy(), blocks, out=made)
    if whole < chunk.shape[1]:
        torch.mm(rows, chunk[:, whole:], out=out[:, whole:])


class ReadAhead:
    """Asks the disk for the next columns of every row while the present ones are worked on: the kernel's own read-ahead
    sees no order in so many rows. Costs nothing that could be measured where they are in the page cache."""

    def __init__(self, path: Path, values: Tensor):
        self.path, self.values, self.asked, self.lock = path, values, 0, Lock()
        self.of_use = hasattr(os, "posix_fadvise") and values.device.type == "cpu" and path.is_file()

    def __call__(self, column: int) -> None:
        """Columns are read up to `column` now. The deltas are the last tensor of the file."""
        with self.lock:
            begin, end = self.asked, min(column + 2 * AHEAD, self.values.shape[1])
            if not self.of_use or end - begin < min(AHEAD, self.values.shape[1] - begin) or begin == end:
                return
            self.asked = end
        row, width = self.values[0].nbytes, self.values.itemsize
        with self.path.open("rb") as file:
            start = file.seek(0, os.SEEK_END) - self.values.nbytes + begin * width
            for i in range(len(self.values)):
                os.posix_fadvise(file.fileno(), start + i * row, (end - begin) * width, os.POSIX_FADV_WILLNEED)


def in_parallel(work: Callable[[Iterator[int]], None], starts: range) -> None:
    """work(iterator over starts), by as many threads as PyTorch uses, which share the iterator.

    Each thread computes alone (no OpenMP team inside), so that bits do not depend on their number and a busy core delays
    one chunk, not all.
    """
    threads, queue = torch.get_num_threads(), iter(starts)
    if threads == 1:
        return work(queue)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work, queue) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # what the workers set is also the default of threads to come
