"""The kernel distance between two sets of features (KID: Binkowski et al., arXiv:1801.01401, sec. 4)."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewstep.metrics.statistics import doubles
from fewstep.types import FewstepError


class KernelReference:
    """One side of the distance with the mean of k within it cached: every candidate then costs two of three such means.

    The unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x.y / d + 1)^3. Its expectation is 0 for
    samples of one distribution at any n and m, so single values may be negative. The mean runs over ALL pairs, block by
    block in float64; the usual KID averages over random subsets of 1000, which adds noise and a seed.
    """

    def __init__(self, features: Float[Tensor, "n d"], block: int = 2048) -> None:
        self.features, self.block = features, block
        self._within: dict[torch.device, float] = {}  # each device rounds in its own way

    def distance(self, other: Float[Tensor, "m d"]) -> float:
        """To these features, on their device; +inf where a feature is not finite."""
        x, y = doubles(self.features.to(other.device)), doubles(other)
        if min(len(x), len(y)) < 2:
            raise FewstepError(f"a kernel distance between {len(x)} and {len(y)} samples: give at least 2 of each")
        if not (x.isfinite().all() and y.isfinite().all()):
            return math.inf
        if x.device not in self._within:
            self._within[x.device] = self._distinct(x)
        return self._within[x.device] + self._distinct(y) - 2 * self._total(x, y) / (len(x) * len(y))

    def slope(self, other: Float[Tensor, "m d"]) -> tuple[float, Float64[Tensor, "m d"]]:
        """The distance to these features and its derivative by each y: d k(x, y) / d y = 3 (x.y / d + 1)^2 x / d."""
        x, y = doubles(self.features.to(other.device)), doubles(other)
        n, m, d = len(x), len(y), x.shape[1]
        among = (y @ y.T / d + 1).square().fill_diagonal_(0)
        own = among @ y / (m * (m - 1)) - (y @ x.T / d + 1).square() @ x / (n * m)
        return self.distance(other), own * (6 / d)

    def _total(self, a: Tensor, b: Tensor) -> float:
        """The sum of k over all pairs."""
        d, block = a.shape[1], self.block
        return sum(float((p @ q.T / d + 1).pow(3).sum()) for p in a.split(block) for q in b.split(block))

    def _distinct(self, a: Tensor) -> float:
        """The mean of k over all pairs but those of a point with itself."""
        n, d = a.shape
        return (self._total(a, a) - float((a.square().sum(1) / d + 1).pow(3).sum())) / (n * (n - 1))


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], block: int = 2048) -> float:
    """The distance between x and y; see KernelReference."""
    return KernelReference(x, block).distance(y)


def kernel_slope(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> tuple[float, Float64[Tensor, "m d"]]:
    """The distance between x and y and its derivative by each y."""
    return KernelReference(x).slope(y)
