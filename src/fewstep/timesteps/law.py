"""What every adaptive law does, and densities on (0, 1) that are constant on K equal bins."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.distributed import rank, sum_over_ranks, world
from fewstep.noise import step_seed
from fewstep.types import PerSample, Sample, Times

LossAt: TypeAlias = Callable[[Times], PerSample]
"""The loss [n] of each image of this rank's batch at the quantiles u [n], with the batch's own noise and dropout. It is not
weighted by importance and needs no gradient."""


class TimestepSampler(ABC):
    """The state of an adaptive law. One optimizer step calls, in this order:

        u, importance = draw(x, seed)
        (the gradient of the loss at u, times importance)
        if due(step): before(loss_at)
        (the optimizer's step)
        if due(step): after(loss_at)
        observe(u, loss, importance)

    x, u, importance and loss are this rank's rows [n] of a batch of world * n. What is measured is summed over the ranks
    before it is used, so all ranks hold the same state, bit for bit. Another world size, or a batch in another order, gives
    the same state up to the rounding of sums; the underlying uniform numbers are the same exactly.
    """

    @abstractmethod
    def draw(self, x: Sample, seed: int) -> tuple[Times, PerSample]:
        """Quantiles u in [0, 1) and importance weights of the batch's rows: a pure function of the state, x and seed.

        Where the law is uniform, u are the uniform numbers of (seed, row) and the importance is 1, exactly.
        """

    @abstractmethod
    def observe(self, u: Times, loss: PerSample, importance: PerSample) -> None:
        """Learn from a step's own loss [n], as it was trained: times importance. Never waits for the device."""

    def due(self, step: int) -> bool:
        """Whether before() and after() are wanted around this optimizer step (counted from 0)."""
        return False

    def before(self, loss_at: LossAt) -> None:
        """Measure the batch that was drawn last, before the model's update."""
        raise AssertionError("due() never asks for it")

    def after(self, loss_at: LossAt) -> None:
        """Measure again after the update, and learn. Without it (the update was skipped), before() leaves no trace."""
        raise AssertionError("due() never asks for it")

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The whole state, for a safetensors file: a resumed run goes on bit for bit."""

    @abstractmethod
    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        """The inverse of tensors()."""


def uniforms(n: int, seed: int, device: torch.device) -> Times:
    """Uniform numbers [n] of this rank's rows of the batch: the same for a row at any world size."""
    generator = torch.Generator(device).manual_seed(step_seed(seed, 0, "times"))
    return torch.rand(n * world(), generator=generator, device=device)[rank() * n : (rank() + 1) * n]


def quantile(density: Float[Tensor, "n bins"], v: Times) -> tuple[Times, PerSample]:
    """Per row, u [n] below which the share v [n] of a piecewise-constant density lies, and the density [n] there.

    density: relative to the uniform one, its mean over the bins is 1. A density of ones and a power of two of bins give
    u = v exactly.
    """
    bins = density.shape[1]
    masses = density / bins
    cumulative = masses.cumsum(1)
    k = torch.searchsorted(cumulative, v[:, None], right=True).clamp(max=bins - 1)
    mass = masses.gather(1, k).clamp(min=torch.finfo(masses.dtype).tiny)
    inside = ((v[:, None] - cumulative.gather(1, k) + mass) / mass).clamp(0, 1 - 2**-24)
    return ((k + inside) / bins)[:, 0].clamp(max=1 - 2**-24), density.gather(1, k)[:, 0]


def importance(density: PerSample, most: float) -> PerSample:
    """1 / density [n], at most `most`, over its mean in the whole batch of all ranks.

    A mean of importance * f(u) with u ~ density estimates the mean of f under the base law: without bias but for the
    clipping, and for O(1/n) of the normalisation, which keeps the size of a gradient from varying with the draw.
    """
    weights = (1 / density).clamp(max=most)
    total = weights.sum()
    sum_over_ranks([total])
    return weights * (len(weights) * world() / total)
