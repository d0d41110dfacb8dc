"""The Frechet distance between two sets of features, taken as Gaussians (FID: Heusel et al., arXiv:1706.08500, eq. 6).

    d^2 = |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr (C1 C2)^(1/2)        in units of squared features

It is biased upwards in small samples, and differently at every n: compare at one n only.
"""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewstep.metrics.statistics import Moments, doubles


class FrechetReference:
    """One side of the distance with its half of the work cached: every candidate then costs one eigvalsh.

    C1 C2 has the eigenvalues of the symmetric C1^(1/2) C2 C1^(1/2), so no general matrix square root is needed; those
    that rounding (or n < d) leaves below 0 count as 0. All in float64.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments, self._root = moments, moments.cov
        if moments.finite:
            values, vectors = torch.linalg.eigh(moments.cov)
            self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T

    def distance(self, other: Moments) -> float:
        """d^2 to other; +inf where anything is not finite, so that a broken candidate ranks last."""
        self.moments.require_same_dim(other)
        product = self._root @ other.cov @ self._root
        if not (self.moments.finite and other.finite and product.isfinite().all()):
            return math.inf
        cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
        shift = (self.moments.mean - other.mean).square().sum()
        return max(float(shift + self.moments.cov.trace() + other.cov.trace() - 2 * cross), 0.0)

    def slope(self, features: Float[Tensor, "n d"]) -> tuple[float, Float64[Tensor, "n d"]]:
        """d^2 to these features and its derivative by each: with C = C2, R = C1^(1/2),

        d d^2 / d mu2 = 2 (mu2 - mu1),    d d^2 / d C = 1 - R (R C R)^(-1/2) R    (0 in place of the inverse of a 0).
        """
        x = doubles(features)
        mean, n = x.mean(0), len(x)
        centred, root = x - mean, self._root.to(x.device)
        values, vectors = torch.linalg.eigh(root @ (centred.T @ centred / (n - 1)) @ root)
        roots = values.clamp(min=0).sqrt()
        inverse = torch.where(roots > 1e-7 * roots.max(), 1 / roots, 0)
        half = root @ vectors
        by_cov = torch.eye(len(mean), dtype=x.dtype, device=x.device) - (half * inverse) @ half.T
        shift = mean - self.moments.mean.to(x.device)
        distance = shift.square().sum() + self.moments.cov.trace() + centred.square().sum() / (n - 1) - 2 * roots.sum()
        return float(distance), 2 * shift / n + centred @ by_cov * (2 / (n - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """d^2 between a and b; 0 for equal moments, +inf where anything is not finite."""
    return FrechetReference(a).distance(b)
