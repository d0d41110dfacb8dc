"""d(a, b): one number per sample. The reduction over C, H, W is always said: three public codes differ in it silently."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.objectives.scales import DimensionScale, Scale, check_positive, scale
from fewstep.progress import Progress
from fewstep.types import PerSample, Sample

Over: TypeAlias = Literal["sum", "mean"]


def squared_error(a: Float[Tensor, " n *dims"], b: Float[Tensor, " n *dims"], over: Over) -> PerSample:
    """||a - b||^2 per sample: the sum, or the mean, over everything but n. In float32 whatever a and b are in."""
    square = (a.float() - b.float()).square().flatten(1)
    return square.sum(1) if over == "sum" else square.mean(1)


@runtime_checkable
class Distance(Protocol):
    """d(a, b) >= 0, zero for a = b, one value per sample [n]; progress: for those that change in training."""

    def __call__(self, a: Sample, b: Sample, progress: Progress | None = None, /) -> PerSample: ...


@dataclass(frozen=True)
class SquaredL2:
    """||a - b||^2."""

    over: Over = "sum"
    """over C, H, W: the sum, or the mean"""

    def __call__(self, a: Sample, b: Sample, progress: Progress | None = None, /) -> PerSample:
        return squared_error(a, b, self.over)


@dataclass(frozen=True)
class Robust:
    """A distance that is quadratic while sqrt(m) is well below c, m = ||a - b||^2, and counts outliers for less beyond."""

    c: Scale = DimensionScale()
    """in units of sqrt(m)"""
    over: Over = "sum"
    """m is the sum over C, H, W, or the mean"""

    def __post_init__(self) -> None:
        if isinstance(self.c, int | float):
            check_positive(self.c)

    def m_and_c(self, a: Sample, b: Sample, progress: Progress | None) -> tuple[PerSample, float]:
        return squared_error(a, b, self.over), scale(self.c, a[0].numel(), progress)


@dataclass(frozen=True)
class PseudoHuber(Robust):
    """sqrt(m + c^2) - c (iCT, arXiv:2310.14189, sec. 3.3). At c = 0 the plain norm sqrt(m) (ECT)."""

    c: Scale = 0.0

    def __post_init__(self) -> None:
        if self.c != 0:
            super().__post_init__()

    def __call__(self, a: Sample, b: Sample, progress: Progress | None = None, /) -> PerSample:
        if self.c == 0:  # vector_norm has gradient 0 where a = b; the square root has none
            norm = torch.linalg.vector_norm((a.float() - b.float()).flatten(1), dim=1)
            return norm if self.over == "sum" else norm / sqrt(a[0].numel())
        m, c = self.m_and_c(a, b, progress)
        return m / ((m + c * c).sqrt() + c)  # sqrt(m + c^2) - c without the cancellation at small m


@dataclass(frozen=True)
class Cauchy(Robust):
    """ln(1 + m / (2 c^2)): grows with the logarithm of an outlier (sLCT, arXiv:2502.01441, sec. 4.1).

    With m the mean over C, H, W, c is in units of one value; the sum with c_sum = sqrt(C*H*W) c is the same distance.
    """

    over: Over = "mean"

    def __call__(self, a: Sample, b: Sample, progress: Progress | None = None, /) -> PerSample:
        m, c = self.m_and_c(a, b, progress)
        return torch.log1p(m / (2 * c * c))


@dataclass(frozen=True)
class GemanMcClure(Robust):
    """2 m / (m + 4 c^2), at most 2: an outlier's pull vanishes. Cauchy's sibling in arXiv:1701.03077 (alpha = -2 and 0)."""

    over: Over = "mean"

    def __call__(self, a: Sample, b: Sample, progress: Progress | None = None, /) -> PerSample:
        m, c = self.m_and_c(a, b, progress)
        return 2 * m / (m + 4 * c * c)
