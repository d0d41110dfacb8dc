"""Averages of the weights along training, each with the law of its decay."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fewstep.types import FewstepError


@runtime_checkable
class AverageLaw(Protocol):
    """average <- beta * average + (1 - beta) * weights after every optimizer step."""

    @property
    def name(self) -> str: ...

    def beta(self, nimg: int, batch: int, /) -> float:
        """The decay of the step of `batch` images that ends at nimg images seen."""
        ...


@dataclass(frozen=True)
class ConstantEMA:
    """beta per optimizer step, as the consistency papers count it (ECT: 0.9999 on CIFAR-10, 0.9993 in one hour)."""

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise FewstepError(f"an EMA's decay must be in [0, 1), got {self.decay}")

    @property
    def name(self) -> str:
        return f"ema-{self.decay:g}"

    def beta(self, nimg: int, batch: int, /) -> float:
        return self.decay


@dataclass(frozen=True)
class PowerEMA:
    """Power-function average of relative width std: beta = (1 - 1/step)^(gamma + 1) (EDM2, arXiv:2312.02696, sec. 3.1)."""

    std: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.std < 0.28:
            raise FewstepError(f"a power-function average's std must be in (0, 0.28), got {self.std}")

    @property
    def name(self) -> str:
        return f"power-{self.std:g}"

    @property
    def gamma(self) -> float:
        """The exponent whose profile has this std: the real root of (g+2)^2 (g+3) = (g+1) / std^2."""
        precision = self.std**-2
        return float(np.roots([1, 7, 16 - precision, 12 - precision]).real.max())

    def beta(self, nimg: int, batch: int, /) -> float:
        return (1 - min(batch / nimg, 1.0)) ** (self.gamma + 1)


def average_law(name: str) -> AverageLaw:
    """The law of that name: ema-0.9999 (a decay per step) or power-0.1 (a relative width); FewstepError otherwise."""
    kind, _, number = name.partition("-")
    kinds: dict[str, type[ConstantEMA] | type[PowerEMA]] = {"ema": ConstantEMA, "power": PowerEMA}
    try:
        return kinds[kind](float(number))
    except (KeyError, ValueError) as error:
        if isinstance(error, FewstepError):
            raise
        raise FewstepError(f"unknown average {name!r}: use ema-DECAY or power-STD, e.g. ema-0.9999 power-0.1") from None


class Average:
    """A running average of a network's parameters."""

    def __init__(self, law: AverageLaw, parameters: Mapping[str, Tensor]):
        self.law = law
        self.weights = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], nimg: int, batch: int) -> None:
        """Move towards the parameters by 1 - beta; nimg counts the images seen including this step's."""
        beta = self.law.beta(nimg, batch)
        lerp(self.weights, parameters, 1 - beta)


@torch.no_grad()
def lerp(average: Mapping[str, Tensor], towards: Mapping[str, Tensor], weight: float) -> None:
    """average += weight * (towards - average), in place, in one fused call."""
    torch._foreach_lerp_(list(average.values()), [towards[name].detach() for name in average], weight)
