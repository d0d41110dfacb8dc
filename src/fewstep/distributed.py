"""Rank, world size and the few collectives; no-ops in one process. Start several with torchrun."""

import json
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fewstep.types import FewstepError

TIMEOUT = timedelta(hours=2)  # the others wait while rank 0 evaluates, which takes longer than PyTorch's 10 minutes


def start(device: torch.device) -> torch.device:
    """Join the process group that torchrun announces, if any; returns this rank's device."""
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return device


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over all ranks, in place; one message for all of them."""
    if world() == 1:
        return
    tensors = list(tensors)
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.reshape(tensor.shape))


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [n, ...] of every rank, in the order of ranks: [world * n, ...]."""
    if world() == 1:
        return rows
    whole = rows.new_zeros(world() * len(rows), *rows.shape[1:])
    whole[rank() * len(rows) : (rank() + 1) * len(rows)] = rows
    dist.all_reduce(whole)
    return whole


def gather(value: Any) -> list[Any]:
    """The JSON-able value of every rank, in their order, on all of them. As JSON: PyTorch's own way would unpickle."""
    if world() == 1:
        return [value]
    device = "cuda" if dist_is_nccl() else "cpu"
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = torch.zeros(world(), dtype=torch.int64, device=device)
    sizes[rank()] = len(text)
    sum_over_ranks([sizes])
    texts = torch.zeros(world(), int(sizes.max()), dtype=torch.uint8, device=device)
    texts[rank(), : len(text)] = text.to(device)
    sum_over_ranks([texts])
    return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(texts.cpu(), sizes.tolist(), strict=True)]


def on_first_rank(action: Callable[[], object]) -> None:
    """The first process acts while the others wait; when it fails, all of them do."""
    problem: Exception | None = None
    if rank() == 0:
        try:
            action()
        except Exception as error:
            problem = error
    failed = torch.tensor([float(problem is not None)], device="cuda" if dist_is_nccl() else "cpu")
    sum_over_ranks([failed])
    if problem:
        raise problem
    if failed.item():
        raise FewstepError("the first process could not go on, see its message")


def dist_is_nccl() -> bool:
    """Whether the processes exchange CUDA tensors."""
    return dist.is_initialized() and dist.get_backend() == "nccl"


def barrier() -> None:
    """Wait for every rank."""
    if world() > 1:
        dist.barrier()
