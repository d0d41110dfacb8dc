"""Mean and covariance of a stream of features: the only sums the Frechet distance needs."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewstep.types import FewstepError


def doubles(x: Float[Tensor, "n d"]) -> Float64[Tensor, "n d"]:
    """x in float64 where it lies; on the CPU if its device has no float64 (MPS)."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean [d] and scatter [d, d] = sum (x - mean)(x - mean)^T: a value in float64 on the CPU, mergeable.

    The scatter is kept about the mean, so that a large mean costs the covariance no digits; parts merge by the
    pairwise formula of Chan, Golub, LeVeque (1979), in any cut and any order, to rounding.

        moments = Moments.empty(64)
        for features in batches:
            moments = moments.add(features)     # a new value
    """

    n: int
    mean: Float64[Tensor, " d"]
    scatter: Float64[Tensor, "d d"]

    @classmethod
    def empty(cls, dim: int) -> "Moments":
        """Of no features: the neutral element of merge."""
        return cls(0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64))

    @classmethod
    def of(cls, features: Float[Tensor, "n d"]) -> "Moments":
        """Of one batch; the products are formed on the features' device."""
        if len(features) == 0:
            return cls.empty(features.shape[1])
        x = doubles(features)
        mean = x.mean(0)
        x = x - mean
        return cls(len(x), mean.cpu(), (x.T @ x).cpu())

    def add(self, features: Float[Tensor, "n d"]) -> "Moments":
        """Of the features so far and these."""
        return self.merge(Moments.of(features))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets of features together."""
        self.require_same_dim(other)
        n = self.n + other.n
        if not (self.n and other.n):
            return self if self.n else other
        gap = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(gap, gap) * (self.n * other.n / n)
        return Moments(n, self.mean + gap * (other.n / n), scatter)

    __add__ = merge

    @property
    def cov(self) -> Float64[Tensor, "d d"]:
        """The unbiased covariance (n - 1)."""
        if self.n < 2:
            raise FewstepError(f"a covariance of {self.n} sample(s): give at least 2")
        return self.scatter / (self.n - 1)

    @property
    def finite(self) -> bool:
        """False once a feature was infinite or not a number."""
        return bool(self.mean.isfinite().all() and self.scatter.isfinite().all())

    def require_same_dim(self, other: "Moments") -> None:
        a, b = len(self.mean), len(other.mean)
        if a != b:
            raise FewstepError(f"features of {a} and of {b} dimensions: use one extractor for both")
