"""The order in which images are seen, as a pure function of how many were seen before; and batches in that order."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from fewstep.data.images import Images
from fewstep.noise import permutation
from fewstep.types import FewstepError

T = TypeVar("T")
cached_permutation = lru_cache(maxsize=2)(permutation)  # the epoch we are in and the next


@dataclass(frozen=True)
class BatchOrder:
    """Every epoch visits the n images once, in an order of its own. Image number k ever seen is a function of k."""

    n: int
    seed: int

    def indices(self, start: int, count: int) -> Int64[Tensor, " {count}"]:
        """The data set's indices of the images number start .. start + count - 1 ever seen."""
        parts, stop = [torch.empty(0, dtype=torch.int64)], start + count
        while start < stop:
            epoch, begin = divmod(start, self.n)
            parts.append(cached_permutation(self.seed, epoch, self.n)[begin : begin + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)


def batches(
    images: Images, order: BatchOrder, start: int, batch_size: int, *, rank: int = 0, world: int = 1
) -> Generator[tuple[Tensor, Int64[Tensor, " m"] | None], None, None]:
    """(what `Images.pixels` gives, labels) for ever, from the image number `start` on; each process gets its slice of each."""
    if batch_size < 1 or batch_size % world:
        raise FewstepError(f"a batch of {batch_size} images cannot be shared by {world} processes; give a multiple")
    assert order.n == len(images)
    share = batch_size // world

    def batch(k: int) -> tuple[Tensor, Tensor | None]:
        indices = order.indices(start + k * batch_size + rank * share, share)
        return images.pixels(indices), None if images.labels is None else images.labels[indices]

    return prefetched(batch, ahead=2)


def prefetched(make: Callable[[int], T], ahead: int) -> Generator[T, None, None]:
    """make(0), make(1), ... for ever, made in one background thread while the consumer works on the one before.

    What `make` raises is raised here. Closing the generator ends the thread.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="fewstep-data")
    try:
        pending = deque(thread.submit(make, k) for k in range(ahead))
        for k in count(ahead):
            item = pending.popleft().result()
            pending.append(thread.submit(make, k))
            yield item
    finally:
        thread.shutdown(wait=True, cancel_futures=True)
