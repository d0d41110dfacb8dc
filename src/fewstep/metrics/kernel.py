"""The kernel distance between two sets of features (KID: Binkowski et al., arXiv:1801.01401, sec. 4)."""

import math

from jaxtyping import Float, Float64
from torch import Tensor

from fewstep.metrics.statistics import doubles
from fewstep.types import FewstepError


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"], block: int = 2048) -> float:
    """The unbiased squared maximum mean discrepancy with the kernel k(x, y) = (x.y / d + 1)^3.

    Its expectation is 0 for samples of one distribution at any n and m, so single values may be negative. The mean
    runs over ALL pairs, block by block in float64; the usual KID averages over random subsets of 1000, which adds
    noise and a seed. +inf where a feature is not finite.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise FewstepError(f"a kernel distance between {n} and {m} samples: give at least 2 of each")
    x, y = doubles(x), doubles(y)
    if not (x.isfinite().all() and y.isfinite().all()):
        return math.inf
    d = x.shape[1]

    def total(a: Tensor, b: Tensor) -> float:
        """The sum of k over all pairs."""
        return sum(float((p @ q.T / d + 1).pow(3).sum()) for p in a.split(block) for q in b.split(block))

    def distinct(a: Tensor) -> float:
        """The sum of k over all pairs but those of a point with itself."""
        return total(a, a) - float((a.square().sum(1) / d + 1).pow(3).sum())

    return distinct(x) / (n * (n - 1)) + distinct(y) / (m * (m - 1)) - 2 * total(x, y) / (n * m)


def kernel_slope(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> tuple[float, Float64[Tensor, "m d"]]:
    """kernel_distance(x, y) and its derivative by each y: d k(x, y) / d y = 3 (x.y / d + 1)^2 x / d."""
    x, y = doubles(x), doubles(y)
    n, m, d = len(x), len(y), x.shape[1]
    among = (y @ y.T / d + 1).square().fill_diagonal_(0)
    own = among @ y / (m * (m - 1)) - (y @ x.T / d + 1).square() @ x / (n * m)
    return kernel_distance(x, y), own * (6 / d)
