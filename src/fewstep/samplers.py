"""Samplers: values that turn noise into samples through a Denoiser. `noise(k)` is the k-th standard normal [n, *dims]."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias, TypeVar, runtime_checkable

from fewstep import ode
from fewstep.ode import SIGMA_MAX, check_sigmas, karras_sigmas
from fewstep.types import Denoiser, FewstepError, Labels, Sample

Noise: TypeAlias = Callable[[int], Sample]
SECOND_SIGMA = 0.821  # ECT and iCT on CIFAR-10: found by search, not theory


@runtime_checkable
class Sampler(Protocol):
    """Noise levels and what to do at them. nfe is the number of network evaluations per sample."""

    @property
    def sigmas(self) -> tuple[float, ...]: ...

    @property
    def nfe(self) -> int: ...

    def __call__(self, denoiser: Denoiser, noise: Noise, label: Labels = None, /) -> Sample: ...


@dataclass(frozen=True)
class FewStep:
    """Consistency sampling: x = D(sigma_0 z_0, sigma_0), then x = D(x + sqrt(sigma_k^2 - sigma_min^2) z_k, sigma_k)
    (arXiv:2303.01469, alg. 1)."""

    sigmas: tuple[float, ...] = (SIGMA_MAX, SECOND_SIGMA)
    """EDM noise levels, decreasing; one step each"""
    clip: bool = False
    """clamp every D to [-1, 1], as OpenAI's consistency models are sampled"""
    sigma_min: float = 0.0
    """where D(x, sigma_min) = x: 0 (ECT), or the shifted boundary of CT, CD and iCT"""

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas)

    @property
    def nfe(self) -> int:
        return len(self.sigmas)

    def __call__(self, denoiser: Denoiser, noise: Noise, label: Labels = None, /) -> Sample:
        first, *rest = self.sigmas
        x = self.denoised(denoiser, first * noise(0), first, label)
        for k, sigma in enumerate(rest, 1):
            x = self.again(denoiser, x, sigma, noise(k), label)
        return x

    def again(self, denoiser: Denoiser, x: Sample, sigma: float, noise: Sample, label: Labels) -> Sample:
        """A later step: the estimate x taken back to sigma, and denoised."""
        added = math.sqrt(max(sigma**2 - self.sigma_min**2, 0))
        return self.denoised(denoiser, x + added * noise, sigma, label)

    def denoised(self, denoiser: Denoiser, x: Sample, sigma: float, label: Labels) -> Sample:
        """D(x, sigma), clamped if it is to be."""
        x = denoiser(x, x.new_full((len(x),), sigma), label)
        return x.clamp(-1, 1) if self.clip else x


S = TypeVar("S", bound="Levels")


@dataclass(frozen=True)
class Levels:
    """The noise levels that a solver of the ODE visits."""

    sigmas: tuple[float, ...]
    """EDM noise levels, decreasing; the last step goes to 0"""

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas)

    @classmethod
    def karras(cls: type[S], steps: int) -> S:
        """EDM's `steps` noise levels from 80 to 0.002 (rho = 7); a single one is 80."""
        return cls(tuple(karras_sigmas(steps).flip(0).tolist()) if steps > 1 else (SIGMA_MAX,) * steps)

    @property
    def nfe(self) -> int:
        return len(self.sigmas)


@dataclass(frozen=True)
class Heun(Levels):
    """EDM's deterministic second-order sampler of diffusion models (arXiv:2206.00364, alg. 1), 2N - 1 evaluations."""

    @property
    def nfe(self) -> int:
        return 2 * len(self.sigmas) - 1

    def __call__(self, denoiser: Denoiser, noise: Noise, label: Labels = None, /) -> Sample:
        x = self.sigmas[0] * noise(0)
        times = [x.new_full((len(x),), sigma) for sigma in self.sigmas]
        step = ode.Heun()
        for t, r in pairwise(times):
            x = step(denoiser, x, t, r, label)
        return denoiser(x, times[-1], label)  # the Euler step to 0


@dataclass(frozen=True)
class DPMSolver(Levels):
    """DPM-Solver++(2M) of diffusion models (arXiv:2211.01095, alg. 2) where alpha = 1, lambda = -ln sigma: N evaluations.

    Each step goes straight to D, extrapolated in lambda from its last two values to the step's middle; the first step
    has one value only, and the step to 0 ends at D itself.
    """

    def __call__(self, denoiser: Denoiser, noise: Noise, label: Labels = None, /) -> Sample:
        x = self.sigmas[0] * noise(0)
        before, gap = x, math.inf  # no slope yet
        for t, r in pairwise(self.sigmas):
            denoised, h = denoiser(x, x.new_full((len(x),), t), label), math.log(t / r)
            ahead = denoised + h / (2 * gap) * (denoised - before)
            x = ahead + r / t * (x - ahead)
            before, gap = denoised, h
        return denoiser(x, x.new_full((len(x),), self.sigmas[-1]), label)


def few_step(steps: int, second_sigma: float = SECOND_SIGMA, clip: bool = False, sigma_min: float = 0.0) -> FewStep:
    """Consistency sampling in `steps` steps: 80, then geometrically from 80 to second_sigma, which is the last of them."""
    if steps < 1:
        raise FewstepError(f"--steps must be 1 or more, got {steps}")
    check_sigmas((SIGMA_MAX, second_sigma))
    ratio = math.log(second_sigma / SIGMA_MAX) / max(steps - 1, 1)
    inner = [SIGMA_MAX * math.exp(ratio * k) for k in range(steps - 1)]
    return FewStep((SIGMA_MAX,) if steps == 1 else (*inner, second_sigma), clip, sigma_min)
