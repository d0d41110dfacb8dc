"""p(t, r): the joint law of the two times of a pair, t > r >= 0 (EDM sigma units)."""

import math
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float64
from scipy import stats
from torch import Tensor

from fewstep.ode import RHO, SIGMA_MAX, SIGMA_MIN, karras_sigmas
from fewstep.progress import Doubling, Progress, Schedule, Stages
from fewstep.types import FewstepError, Times

Zero: TypeAlias = Literal["never", "sometimes", "always"]
Device: TypeAlias = torch.device | str


@runtime_checkable
class PairSampler(Protocol):
    """A law p(t, r | progress)."""

    def __call__(
        self, n: int, progress: Progress, generator: torch.Generator, /, u: Times | None = None
    ) -> tuple[Times, Times]:
        """t [n] and r [n], on the generator's device. Given u [n] in [0, 1], t is the law's quantile there: uniform u are
        the law itself, any other law of u is a law of t on top of it (fewstep.timesteps)."""
        ...

    def zero(self, progress: Progress, /) -> Zero:
        """Whether r = 0 can occur now. Known without drawing, so no step waits for the device to find out."""
        ...

    def stage(self, progress: Progress, /) -> int:
        """Where the curriculum stands: a stage's number, or the number of intervals of the grid."""
        ...


@dataclass(frozen=True)
class LogNormal:
    """ln t ~ N(mean, std^2): P_mean and P_std of EDM, iCT and ECT. On a grid, the mass between neighbouring sigmas."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise FewstepError(
                f"a log-normal law needs a finite mean and a positive std, got mean = {self.mean}, std = {self.std}"
            )

    def __call__(self, n: int, generator: torch.Generator, u: Times | None = None) -> Times:
        if u is not None:
            return self.quantile(u)
        return torch.exp(self.mean + self.std * torch.randn(n, generator=generator, device=generator.device))

    def quantile(self, u: Times) -> Times:
        """The t [n] below which the share u [n] of the law lies; finite and positive at 0 and 1 too."""
        return torch.exp(self.mean + self.std * torch.special.ndtri(u.clamp(2**-24, 1 - 2**-24)))

    def masses(self, sigmas: Float64[Tensor, " points"]) -> Float64[Tensor, " intervals"]:
        """p(i) ~ erf((ln s_{i+1} - mean)/(sqrt2 std)) - erf((ln s_i - mean)/(sqrt2 std)) (iCT, arXiv:2310.14189, sec. 3.5)."""
        erf = torch.erf((sigmas.log() - self.mean) / (math.sqrt(2) * self.std))
        return (erf[1:] - erf[:-1]) / (erf[-1] - erf[0])


@dataclass(frozen=True)
class UniformIndex:
    """Every interval of the grid equally often (CT, CD)."""

    def masses(self, sigmas: Float64[Tensor, " points"]) -> Float64[Tensor, " intervals"]:
        return torch.full((len(sigmas) - 1,), 1 / (len(sigmas) - 1), dtype=torch.float64)


@dataclass(frozen=True)
class Diffusion:
    """r = 0 always: the pair of denoising score matching, whose target is the data itself."""

    times: LogNormal = LogNormal()
    """the law of t"""

    def __call__(
        self, n: int, progress: Progress, generator: torch.Generator, /, u: Times | None = None
    ) -> tuple[Times, Times]:
        t = self.times(n, generator, u)
        return t, torch.zeros_like(t)

    def zero(self, progress: Progress, /) -> Zero:
        return "always"

    def stage(self, progress: Progress, /) -> int:
        return 0


@dataclass(frozen=True)
class ContinuousSchedule:
    """ECT's mapping r = max(0, t (1 - n(t) / q^(s+1))), n(t) = 1 + k sigmoid(-b t) (arXiv:2406.14548, sec. 3).

    The stage s goes from 0; the paper counts the exponent from 0 and calls q^0 (r = 0) the diffusion stage, which a
    pretrained start skips. k = 0 is the mapping n = 1 ("const").
    """

    times: LogNormal = LogNormal(-1.1, 2.0)
    """the law of t"""
    q: float = 2.0
    """how fast the gap shrinks: by 1/q a stage"""
    k: float = 8.0
    b: float = 1.0
    stages: Stages = Stages(8)
    first_stage: int = 0
    """the number of the first stage, for a run that goes on with another's curriculum (TCM's second stage)"""
    max_ratio: float = 1.0
    """r / t at most (TCM on CIFAR-10: 0.999)"""

    def __post_init__(self) -> None:
        if self.first_stage < 0 or not 0 < self.max_ratio <= 1:
            raise FewstepError(
                f"ECT's mapping needs first_stage >= 0 and 0 < max_ratio <= 1, got {self.first_stage}, {self.max_ratio}"
            )
        if self.q <= 1 or self.k < 0 or self.b < 0:
            raise FewstepError(
                f"ECT's mapping needs q > 1, k >= 0, b >= 0, got q = {self.q}, k = {self.k}, b = {self.b}"
            )
        stages = self.first_stage + self.stages.count
        if self.q**stages > 1e6 and self.max_ratio > 1 - 1e-6:  # float32 could no longer tell t from r
            raise FewstepError(f"q^stages = {self.q:g}^{stages} is too fine: give fewer stages or a smaller q")

    def __call__(
        self, n: int, progress: Progress, generator: torch.Generator, /, u: Times | None = None
    ) -> tuple[Times, Times]:
        t = self.times(n, generator, u)
        return t, self.r(t, progress)

    def r(self, t: Times, progress: Progress) -> Times:
        """The second time [n] that belongs to t [n]."""
        gap = (1 + self.k * torch.sigmoid(-self.b * t)) / self.q ** (self.stage(progress) + 1)
        return t * (1 - gap).clamp(min=0, max=self.max_ratio)

    def zero(self, progress: Progress, /) -> Zero:
        largest = (1 + self.k / 2) * (1 + 1e-6)  # n(t) <= n(0) for every t > 0, and r() rounds in float32
        return "sometimes" if largest >= self.q ** (self.stage(progress) + 1) else "never"

    def stage(self, progress: Progress, /) -> int:
        return self.first_stage + self.stages(progress)


@dataclass(frozen=True)
class KarrasGrid:
    """Noise levels sigma_0 < ... < sigma_N with N asked of a schedule (EDM, arXiv:2206.00364, eq. 5)."""

    intervals: Schedule = field(default_factory=Doubling)
    sigma_min: float = SIGMA_MIN
    sigma_max: float = SIGMA_MAX
    rho: float = RHO

    def __post_init__(self) -> None:
        low, high, rho = self.sigma_min, self.sigma_max, self.rho
        if not (0 < low < high < math.inf and 0 < rho < math.inf):
            found = f"sigma_min = {low}, sigma_max = {high}, rho = {rho}"
            raise FewstepError(f"a sigma grid needs 0 < sigma_min < sigma_max and rho > 0, got {found}")

    def __call__(self, progress: Progress) -> Float64[Tensor, " points"]:
        return karras_sigmas(int(self.intervals(progress)) + 1, self.sigma_min, self.sigma_max, self.rho)


@dataclass(frozen=True)
class GridPairs:
    """Neighbours of a grid: t = sigma_{i+1}, r = sigma_i with i ~ density (CT, CD, iCT)."""

    grid: KarrasGrid = field(default_factory=KarrasGrid)
    density: LogNormal | UniformIndex = field(default_factory=UniformIndex)
    """the law of the index i"""

    def __call__(
        self, n: int, progress: Progress, generator: torch.Generator, /, u: Times | None = None
    ) -> tuple[Times, Times]:
        sigmas = self.grid(progress)
        cumulative = self.density.masses(sigmas).cumsum(0).float().to(generator.device)
        uniform = torch.rand(n, generator=generator, device=generator.device) if u is None else u
        i = torch.searchsorted(cumulative, uniform, right=True).clamp(max=len(sigmas) - 2)
        levels = sigmas.float().to(generator.device)
        return levels[i + 1], levels[i]

    def zero(self, progress: Progress, /) -> Zero:
        return "never"

    def stage(self, progress: Progress, /) -> int:
        return int(self.grid.intervals(progress))


@dataclass(frozen=True)
class LogStudent:
    """ln t ~ scale * Student-t(df), truncated to (ln low, ln high): TCM's law (arXiv:2410.14895, sec. 4)."""

    scale: float = 0.2
    df: float = 0.01

    def __post_init__(self) -> None:
        if not (0 < self.scale < math.inf and 0 < self.df < math.inf):
            raise FewstepError(f"a Student-t law needs scale > 0 and df > 0, got {self.scale} and {self.df}")

    def quantile(self, u: Times, low: float, high: float) -> Times:
        """The t [n] in (low, high] below which the share u [n] of the truncated law lies."""
        law = stats.t(self.df, scale=self.scale)
        first, last = law.cdf(math.log(low)), law.cdf(math.log(high))
        inside = first + u.clamp(2**-24, 1 - 2**-24).double().cpu().numpy() * (last - first)
        t = torch.from_numpy(law.ppf(inside)).exp().float().to(u.device)
        return t.clamp(low * (1 + 1e-6), high)  # above the boundary in float32 too


@dataclass(frozen=True)
class Truncated:
    """TCM's second stage (arXiv:2410.14895): a share of the batch at t = boundary, the rest above it; r by ECT's mapping.

    Below the boundary the frozen network of the first stage is the consistency function (networks.Spliced), so the
    samples at the boundary tie the trained one to it.
    """

    schedule: ContinuousSchedule = ContinuousSchedule(max_ratio=0.999)
    """r for a t; its own law of t is not used"""
    times: LogStudent = LogStudent()
    """the law of t above the boundary"""
    boundary: float = 1.0
    """t', EDM sigma: must be the spliced network's"""
    share: float = 0.25
    """of the batch, on average, at the boundary"""
    sigma_max: float = SIGMA_MAX

    def __post_init__(self) -> None:
        if not (0 < self.boundary < self.sigma_max < math.inf and 0 < self.share < 1):
            raise FewstepError(
                f"a truncated law needs 0 < boundary < sigma_max and 0 < share < 1, got {self.boundary}, {self.share}"
            )

    def __call__(
        self, n: int, progress: Progress, generator: torch.Generator, /, u: Times | None = None
    ) -> tuple[Times, Times]:
        coin, own = torch.rand(2, n, generator=generator, device=generator.device)
        t = self.times.quantile(own if u is None else u, self.boundary, self.sigma_max)
        t = torch.where(coin < self.share, self.boundary, t)
        return t, self.schedule.r(t, progress)

    def zero(self, progress: Progress, /) -> Zero:
        return self.schedule.zero(progress)

    def stage(self, progress: Progress, /) -> int:
        return self.schedule.stage(progress)
