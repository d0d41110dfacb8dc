"""The simple baseline: draw a noise level as often as the loss varies there."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.distributed import sum_over_ranks
from fewstep.timesteps.law import TimestepSampler, importance, quantile, uniforms
from fewstep.types import FewstepError, PerSample, Sample, Times

PRIOR = 10.0  # samples of the pooled statistic that every bin starts with
ROUNDING = 1e-5  # of float32 sums: variances below this part of the largest squared loss are none


@dataclass(frozen=True)
class LossVariance:
    """A density over the base law's quantiles, constant on equal bins, in proportion to the loss's standard deviation there.

    p(u) = mix + (1 - mix) s(u), s ~ the running std of the per-sample loss in u's bin: the best allocation of draws to
    strata when the mean of the loss is estimated (Neyman 1934), the loss standing for its gradient. With moment = second,
    s ~ sqrt(E[loss^2 | u]): importance sampling's optimum, as in improved DDPM (arXiv:2102.09672, sec. 3.3).
    """

    bins: int = 32
    """a power of two makes the uniform law exact"""
    decay: float = 0.99
    """of the running statistics, per optimizer step"""
    mix: float = 0.1
    """share of the uniform law in the density; it bounds the importance by 1/mix"""
    moment: Literal["variance", "second"] = "variance"
    weighted: bool = False
    """weight the loss by 1/p(u): the objective stays what it was; otherwise it follows the density"""

    def __post_init__(self) -> None:
        if self.bins < 2 or not 0 <= self.decay < 1 or not 0 < self.mix <= 1:
            raise FewstepError(
                "--timesteps needs bins >= 2, 0 <= decay < 1 and 0 < mix <= 1, "
                f"got bins = {self.bins}, decay = {self.decay}, mix = {self.mix}"
            )

    def build(self, shape: tuple[int, ...], device: torch.device, seed: int) -> TimestepSampler:
        """The sampler with nothing measured yet: the uniform law. Shape and seed do not matter to it."""
        return _Binned(self, device)


class _Binned(TimestepSampler):
    def __init__(self, config: LossVariance, device: torch.device):
        self.config = config
        self.sums = torch.zeros(3, config.bins, device=device)  # per bin: samples, losses, squared losses; decayed

    def draw(self, x: Sample, seed: int) -> tuple[Times, PerSample]:
        density = self.density().expand(len(x), -1)
        u, there = quantile(density, uniforms(len(x), seed, x.device))
        return u, importance(there, 1 / self.config.mix) if self.config.weighted else torch.ones_like(u)

    def density(self) -> Float[Tensor, " bins"]:
        """p(u) in each bin, mean 1; all ones where the statistics are equal up to rounding, or nothing was measured."""
        count, first, second = self.sums
        samples = count.clamp(min=torch.finfo(count.dtype).tiny)
        square = second / samples
        spread = square - (first / samples).square() if self.config.moment == "variance" else square
        spread = spread.clamp(min=0)
        pooled = (count * spread).sum() / samples.sum()
        spread = (count * spread + PRIOR * pooled) / (count + PRIOR)
        s = torch.maximum(spread, ROUNDING * square.amax()).sqrt()
        varies = s.amax() > s.amin() * (1 + ROUNDING)
        relative = s / s.mean().clamp(min=torch.finfo(s.dtype).tiny)
        return torch.where(varies, self.config.mix + (1 - self.config.mix) * relative, torch.ones_like(s))

    @torch.no_grad()
    def observe(self, u: Times, loss: PerSample, importance: PerSample) -> None:
        loss = (loss / importance).float()
        known = loss.isfinite()
        loss = torch.where(known, loss, 0.0)
        rows = torch.stack([known.float(), loss, loss.square()], dim=1)
        bin_of = (u * self.config.bins).long().clamp(max=self.config.bins - 1)
        inside = bin_of[:, None] == torch.arange(self.config.bins, device=u.device)
        new = torch.where(inside[:, None], rows[:, :, None], 0.0).sum(0)  # a sum in a fixed order, unlike index_add_
        sum_over_ranks([new])
        self.sums.mul_(self.config.decay).add_(new)

    def tensors(self) -> dict[str, Tensor]:
        return {"sums": self.sums}

    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        self.sums.copy_(flat["sums"])
