"""c of a robust distance: errors well below it count by their square, errors well above it hardly more than c itself.

A scale is asked about Progress, as every schedule is, and about the dimension d = C*H*W.
"""

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from fewstep.progress import Doubling, Progress
from fewstep.types import FewstepError

PER_SQRT_DIM = 0.00054  # iCT, arXiv:2310.14189, sec. 3.3


@dataclass(frozen=True)
class DimensionScale:
    """c = per_sqrt_dim * sqrt(d) throughout (iCT, arXiv:2310.14189, sec. 3.3)."""

    per_sqrt_dim: float = PER_SQRT_DIM

    def __post_init__(self) -> None:
        check_positive(self.per_sqrt_dim)

    def __call__(self, dim: int, progress: Progress) -> float:
        return self.per_sqrt_dim * math.sqrt(dim)


@dataclass(frozen=True)
class IntervalScale:
    """sLCT's closed form (arXiv:2502.01441): c = exp(-power ln N - offset) on a grid of N intervals.

    While N = s0 it is first_per_sqrt_dim * sqrt(d). Fitted by its authors to the standard deviation of the residual
    D(x_t, t) - D(x_r, r) on Stable Diffusion's latents, for a mean over C, H, W; see ResidualScale for other data.
    """

    intervals: Doubling = field(default_factory=lambda: Doubling(10, 640))
    """N: must be the grid's own"""
    power: float = 1.15
    offset: float = 0.85
    first_per_sqrt_dim: float = PER_SQRT_DIM

    def __post_init__(self) -> None:
        check_positive(self.first_per_sqrt_dim)

    def __call__(self, dim: int, progress: Progress) -> float:
        n = self.intervals(progress)
        if n <= self.intervals.s0:
            return self.first_per_sqrt_dim * math.sqrt(dim)
        return math.exp(-self.power * math.log(n) - self.offset)


@dataclass(frozen=True)
class ResidualScale:
    """c = factor * the run's own residual (ours): it follows other data, curricula and learning rates by itself.

    The residual is the geometric mean over the images of the root mean square, over C, H and W, of
    D(x_t, t) - D(x_r, r): a mean of logarithms, which a few outliers hardly move. It is averaged with a half-life, and
    is part of the training state. Until the first step has measured it, c is first_per_sqrt_dim * sqrt(d).
    """

    factor: float = 1.0
    half_life_nimg: int = 6_400
    """images after which a measurement counts half"""
    first_per_sqrt_dim: float = PER_SQRT_DIM

    def __post_init__(self) -> None:
        check_positive(self.factor)
        check_positive(self.first_per_sqrt_dim)
        if self.half_life_nimg < 1:
            raise FewstepError(f"the half-life of the residual must be 1 image or more, got {self.half_life_nimg}")

    def __call__(self, dim: int, progress: Progress) -> float:
        if progress.residual is None:
            return self.first_per_sqrt_dim * math.sqrt(dim)
        return self.factor * max(progress.residual, 1e-12)  # where online and target agree to the bit


Scale: TypeAlias = float | DimensionScale | IntervalScale | ResidualScale


def check_positive(value: float) -> None:
    if not 0 < value < math.inf:
        raise FewstepError(f"the scale c of a distance must be positive and finite, got {value}")


def scale(c: Scale, dim: int, progress: Progress | None) -> float:
    """The number that c is now, for samples of `dim` = C*H*W values."""
    if isinstance(c, int | float):
        return float(c)
    assert progress is not None, "a scale that changes in training needs to know the progress"
    return c(dim, progress)
