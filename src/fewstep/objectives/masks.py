"""Where a term applies. A mask sees only times, so it is known before any network runs."""

import math
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from fewstep.objectives.pairs import KarrasGrid
from fewstep.progress import Progress
from fewstep.types import FewstepError, Times


@runtime_checkable
class Mask(Protocol):
    """The selected samples, Bool [n]."""

    def __call__(self, t: Times, r: Times, progress: Progress, /) -> Bool[Tensor, " n"]: ...


@dataclass(frozen=True)
class Everywhere:
    """Every sample."""

    def __call__(self, t: Times, r: Times, progress: Progress, /) -> Bool[Tensor, " n"]:
        return torch.ones_like(t, dtype=torch.bool)


@dataclass(frozen=True)
class Below:
    """Samples whose noise level is at most sigma."""

    sigma: float = 0.17

    def __call__(self, t: Times, r: Times, progress: Progress, /) -> Bool[Tensor, " n"]:
        return t <= self.sigma


@dataclass(frozen=True)
class Above:
    """Samples whose noise level is greater than sigma."""

    sigma: float = 1.0

    def __call__(self, t: Times, r: Times, progress: Progress, /) -> Bool[Tensor, " n"]:
        return t > self.sigma


@dataclass(frozen=True)
class At:
    """Samples at exactly this noise level (TCM's boundary)."""

    sigma: float = 1.0

    def __call__(self, t: Times, r: Times, progress: Progress, /) -> Bool[Tensor, " n"]:
        return t == self.sigma


@dataclass(frozen=True)
class LowestOf:
    """Samples whose t is in the lowest `share` of the grid's levels: index i < share * N, t = sigma_{i+1} (sLCT)."""

    grid: KarrasGrid = field(default_factory=KarrasGrid)
    """must be the pairs' own"""
    share: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise FewstepError(f"the lowest share of a grid is in (0, 1], got {self.share}")

    def sigma(self, progress: Progress) -> float:
        """The largest noise level selected, in float32 as the pairs have it."""
        sigmas = self.grid(progress)
        return float(sigmas[math.ceil(self.share * (len(sigmas) - 1))].float())

    def __call__(self, t: Times, r: Times, progress: Progress, /) -> Bool[Tensor, " n"]:
        return t <= self.sigma(progress)
