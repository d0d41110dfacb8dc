"""One random stream per sample: image 137 is the same at any batch size, world size and on any device.

Numbers for *sampling* come from a counter-based generator (Philox) keyed by (seed, sample index, draw), on the CPU.
Numbers for *training* come from one generator per optimizer step, seeded by (seed, images seen): nothing has to be
saved to resume exactly. Every consumer has a PURPOSE, so that no two of them ever share a stream.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fewstep.types import FewstepError

# What a number is drawn for. Part of every stream's key; the values are part of the format, never renumber them.
PURPOSE: Final = {
    "noise": 1,
    "label": 2,
    "order": 3,
    "step": 4,
    "weights": 5,
    "subset": 6,
    "flip": 7,
    "posterior": 8,
    "times": 9,
}


def philox(seed: int, purpose: str, index: int = 0, draw: int = 0) -> np.random.Generator:
    """The generator of the stream (seed, purpose, index, draw); streams with different keys are independent."""
    counter = [0, draw, index, PURPOSE[purpose]]  # the lowest word counts within the stream
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


@dataclass(frozen=True)
class NoiseStream:
    """The random numbers of a set of samples. Disjoint seeds are disjoint streams."""

    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise FewstepError(f"a seed must be 0 or more, got {self.seed}")

    def normal(
        self, indices: Sequence[int], shape: Sequence[int], draw: int = 0, device: torch.device | str = "cpu"
    ) -> Float[Tensor, " n *dims"]:
        """Standard normal noise [n, *shape], float32. `draw` numbers the repeated draws of one sample (its steps)."""
        rows = [philox(self.seed, "noise", i, draw).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
        return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, *shape), np.float32)).to(device)

    def labels(
        self, indices: Sequence[int], num_classes: int, device: torch.device | str = "cpu"
    ) -> Int64[Tensor, " n"]:
        """Class labels [n], uniform over num_classes."""
        rows = [int(philox(self.seed, "label", i).integers(num_classes)) for i in indices]
        return torch.tensor(rows, dtype=torch.int64, device=device)


def step_seed(seed: int, nimg: int, purpose: str = "step") -> int:
    """The 63-bit seed of what chance decides for one purpose in the optimizer step that begins after nimg images."""
    return int(philox(seed, purpose, nimg).integers(2**63 - 1))


def permutation(seed: int, epoch: int, n: int) -> Int64[Tensor, " n"]:
    """The order in which an epoch visits n images: a pure function, so the data position is a number."""
    return torch.from_numpy(philox(seed, "order", epoch).permutation(n))


@contextmanager
def dropout_stream(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, the device's default generator starts from `seed`; outside, its state is what it was before.

    Two network passes inside two such contexts of one seed draw the same dropout masks, on the CPU as on CUDA, without
    a device synchronisation.
    """
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    elif device.type == "mps":
        generator = torch.mps._get_default_mps_generator()
    else:
        generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
