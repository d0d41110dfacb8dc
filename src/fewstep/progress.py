"""Progress, and the schedules that are asked about it.

Images are the clock. A schedule is a pure function of Progress: nothing is told to it, so nothing can resume wrong.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fewstep.types import FewstepError


@dataclass(frozen=True)
class Progress:
    """How far a run is: nimg images seen of total_nimg (counted before the step that asks)."""

    nimg: int
    total_nimg: int
    residual: float | None = None
    """what the run has measured of |D(x_t, t) - D(x_r, r)|, where a distance asks for it (objectives.ResidualScale)"""

    @property
    def fraction(self) -> float:
        """In [0, 1): the last step of a run still belongs to its last stage."""
        return min(self.nimg / max(self.total_nimg, 1), math.nextafter(1.0, 0.0))


@runtime_checkable
class Schedule(Protocol):
    """A number for every moment of a run."""

    def __call__(self, progress: Progress, /) -> float: ...


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, progress: Progress, /) -> float:
        return self.value


@dataclass(frozen=True)
class Stages:
    """s = floor(fraction * count): the stage number 0..count-1 of count equal stages (ECT, arXiv:2406.14548, sec. 3)."""

    count: int = 8

    def __post_init__(self) -> None:
        if self.count < 1:
            raise FewstepError(f"the stages' count must be 1 or more, got {self.count}")

    def __call__(self, progress: Progress, /) -> int:
        return math.floor(progress.fraction * self.count)


def check_intervals(s0: int, s1: int) -> None:
    """FewstepError unless a grid can grow from s0 to s1 intervals."""
    if not 1 <= s0 <= s1:
        raise FewstepError(f"a growing grid needs 1 <= s0 <= s1, got s0 = {s0}, s1 = {s1}")


@dataclass(frozen=True)
class Doubling:
    """Number of grid intervals s0 * 2^stage, at most s1, in equal stages (iCT, arXiv:2310.14189, sec. 3.4).

    The paper's N(k) counts grid *points*, one more than the intervals; its stage length
    K' = floor(K / (log2(floor(s1/s0)) + 1)) is fraction * (log2(floor(s1/s0)) + 1) here.
    """

    s0: int = 10
    s1: int = 1280

    def __post_init__(self) -> None:
        check_intervals(self.s0, self.s1)

    @property
    def stages(self) -> float:
        return math.log2(self.s1 // self.s0) + 1

    def __call__(self, progress: Progress, /) -> int:
        return min(self.s0 * 2 ** math.floor(progress.fraction * self.stages), self.s1)


@dataclass(frozen=True)
class SquareRoot:
    """Number of grid intervals ceil(sqrt(k/K ((s1+1)^2 - s0^2) + s0^2) - 1) (CT, arXiv:2303.01469, app. C)."""

    s0: int = 2
    s1: int = 150

    def __post_init__(self) -> None:
        check_intervals(self.s0, self.s1)

    def __call__(self, progress: Progress, /) -> int:
        square = progress.fraction * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2
        return max(math.ceil(math.sqrt(square) - 1), 1)


@dataclass(frozen=True)
class TargetDecay:
    """mu(k) = exp(s0 ln(mu0) / N(k)), the decay per step of CT's EMA target (arXiv:2303.01469, app. C)."""

    grid: SquareRoot = SquareRoot()
    mu0: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.mu0 < 1:
            raise FewstepError(f"--target-decay.mu0 must be between 0 and 1, got {self.mu0}")

    def __call__(self, progress: Progress, /) -> float:
        return math.exp(self.grid.s0 * math.log(self.mu0) / (self.grid(progress) + 1))


@dataclass(frozen=True)
class LearningRate:
    """peak, after a linear warm-up over warmup_nimg images, times 1/sqrt(max(nimg/decay_nimg, 1)) (EDM2, arXiv:2312.02696).

    decay_nimg = 0 keeps it constant (ECT on CIFAR-10).
    """

    peak: float = 1e-4
    warmup_nimg: int = 0
    decay_nimg: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.peak < math.inf:
            raise FewstepError(f"--lr.peak must be positive and finite, got {self.peak}")
        for name in ("warmup_nimg", "decay_nimg"):
            if getattr(self, name) < 0:
                raise FewstepError(f"--lr.{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")

    def __call__(self, progress: Progress, /) -> float:
        rate = self.peak
        if self.warmup_nimg:
            rate *= min(progress.nimg / self.warmup_nimg, 1.0)
        if self.decay_nimg:
            rate /= math.sqrt(max(progress.nimg / self.decay_nimg, 1.0))
        return rate
