"""The probability-flow ODE dx/dt = (x - D(x, t)) / t: its time grid and its steps. Objectives and samplers share it."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float64
from torch import Tensor

from fewstep.types import Denoiser, FewstepError, Labels, Sample, Times, like

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def karras_sigmas(
    points: int, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Float64[Tensor, " points"]:
    """Increasing noise levels sigma_0 = sigma_min ... sigma_{points-1} = sigma_max (EDM, arXiv:2206.00364, eq. 5)."""
    if points < 2 or not 0 < sigma_min < sigma_max:
        raise FewstepError(f"a sigma grid needs 2 or more points and 0 < sigma_min < sigma_max, got {points} points")
    ramp = torch.linspace(0, 1, points, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + ramp * (high - low)) ** rho


@runtime_checkable
class Solver(Protocol):
    """One step of the ODE from x at t [n] to r [n], r > 0."""

    def __call__(self, denoiser: Denoiser, x: Sample, t: Times, r: Times, label: Labels = None, /) -> Sample: ...


@dataclass(frozen=True)
class Euler:
    """x_r = D + (r/t) (x_t - D): one evaluation. Exact where D is constant along the step; r = 0 is allowed."""

    def __call__(self, denoiser: Denoiser, x: Sample, t: Times, r: Times, label: Labels = None, /) -> Sample:
        denoised = denoiser(x, t, label)
        return denoised + like(r / t, x) * (x - denoised)


@dataclass(frozen=True)
class Heun:
    """The trapezoidal step of EDM (arXiv:2206.00364, alg. 1): two evaluations, second order."""

    def __call__(self, denoiser: Denoiser, x: Sample, t: Times, r: Times, label: Labels = None, /) -> Sample:
        slope = (x - denoiser(x, t, label)) / like(t, x)
        euler = x + like(r - t, x) * slope
        slope_r = (euler - denoiser(euler, r, label)) / like(r, x)
        return x + like(r - t, x) * (slope + slope_r) / 2


def check_sigmas(sigmas: Sequence[float]) -> None:
    """FewstepError unless the noise levels are positive and strictly decreasing (EDM units, 80 is pure noise)."""
    if not sigmas:
        raise FewstepError("at least one step is needed (--steps 1 or more)")
    if not all(s > 0 for s in sigmas) or any(a <= b for a, b in pairwise(sigmas)):
        raise FewstepError(f"noise levels must be positive and strictly decreasing, e.g. 80 0.821; got {list(sigmas)}")
