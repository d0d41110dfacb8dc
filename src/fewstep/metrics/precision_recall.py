"""Fidelity apart from diversity: four numbers from nearest neighbours."""

import math

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fewstep.metrics.statistics import doubles
from fewstep.types import FewstepError


class RealNeighbours:
    """The real side of the four numbers with its radii cached.

    precision, recall: Kynkaanniemi et al., arXiv:1904.06991, eq. 1-2; density, coverage: Naeem et al., arXiv:2002.09797,
    sec. 3. The ball B_k of a point reaches to its k-th nearest neighbour in its own set, itself not counted, edge included.
    precision: share of fakes in the B_k of some real; recall: share of reals in the B_k of some fake (k = k_pr);
    density: reals whose B_k holds a fake, per fake, over k; coverage: share of reals whose B_k holds one (k = k_dc).
    Distances are exact differences in float64 (no |x|^2 - 2xy + |y|^2), so that copies have distance 0 and no value
    depends on `block`, the rows held at a time.
    """

    def __init__(self, real: Float[Tensor, "n d"], k_pr: int = 3, k_dc: int = 5, block: int = 512) -> None:
        self.real, self.k_pr, self.k_dc, self.block = real, k_pr, k_dc, block
        self._radii: dict[torch.device, Tensor] = {}  # each device rounds in its own way

    def prdc(self, fake: Float[Tensor, "m d"]) -> dict[str, float]:
        """The four numbers of these features, on their device; all NaN where a feature is not finite."""
        k = max(self.k_pr, self.k_dc)
        real, fake = doubles(self.real.to(fake.device)), doubles(fake)
        if min(len(real), len(fake)) <= k:
            raise FewstepError(
                f"{k} neighbours among {len(real)} real and {len(fake)} fake samples: give more than {k}"
            )
        if not (real.isfinite().all() and fake.isfinite().all()):
            return dict.fromkeys(("precision", "recall", "density", "coverage"), math.nan)
        if real.device not in self._radii:
            self._radii[real.device] = _radii(real, k, self.block)
        real_radii, fake_radii = self._radii[real.device], _radii(fake, k, self.block)
        inside, holds = 0, 0  # fakes in some real's ball; pairs (fake, real's ball that holds it)
        recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
        covered = recalled.clone()
        for rows, radii in zip(fake.split(self.block), fake_radii.split(self.block), strict=True):
            distance = _distances(rows, real)
            inside += int((distance <= real_radii[:, self.k_pr]).any(1).sum())
            recalled |= (distance <= radii[:, self.k_pr, None]).any(0)
            held = distance <= real_radii[:, self.k_dc]
            holds += int(held.sum())
            covered |= held.any(0)
        precision, density = inside / len(fake), holds / (self.k_dc * len(fake))
        recall, coverage = float(recalled.double().mean()), float(covered.double().mean())
        return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


def prdc(
    real: Float[Tensor, "n d"], fake: Float[Tensor, "m d"], k_pr: int = 3, k_dc: int = 5, block: int = 512
) -> dict[str, float]:
    """precision, recall, density, coverage of fakes against reals; see RealNeighbours."""
    return RealNeighbours(real, k_pr, k_dc, block).prdc(fake)


def _distances(a: Float64[Tensor, "n d"], b: Float64[Tensor, "m d"]) -> Float64[Tensor, "n m"]:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x: Float64[Tensor, "n d"], k: int, block: int) -> Float64[Tensor, "n radii"]:
    """Distances of each point to its nearest others, column 1 to the nearest and so on to k; column 0 is itself."""
    return torch.cat([_distances(rows, x).topk(k + 1, largest=False).values for rows in x.split(block)])
