"""Where a term applies. A mask sees only times, so it is known before any network runs."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from fewstep.progress import Progress
from fewstep.types import Times


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
