"""w(t, r): how much a pair counts."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from fewstep.types import Times


@runtime_checkable
class Weighting(Protocol):
    """w(t, r) [n], positive."""

    def __call__(self, t: Times, r: Times, /) -> Times: ...


@dataclass(frozen=True)
class Unit:
    """w = 1 (CT and CD, arXiv:2303.01469)."""

    def __call__(self, t: Times, r: Times, /) -> Times:
        return torch.ones_like(t)


@dataclass(frozen=True)
class InverseGap:
    """w = 1 / (t - r) (iCT, arXiv:2310.14189, sec. 3.1; ECT on CIFAR-10)."""

    def __call__(self, t: Times, r: Times, /) -> Times:
        return 1 / (t - r)


@dataclass(frozen=True)
class EDM:
    """w = 1/t^2 + 1/sigma_data^2 = (t^2 + sigma_data^2) / (t sigma_data)^2 = 1/c_out^2 (EDM, arXiv:2206.00364, table 1)."""

    sigma_data: float = 0.5

    def __call__(self, t: Times, r: Times, /) -> Times:
        return 1 / t.square() + 1 / self.sigma_data**2
