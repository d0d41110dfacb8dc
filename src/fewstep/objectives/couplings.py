"""Which noise goes with which image. A coupling permutes the noise, never the data, so labels stay attached."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from fewstep.types import Sample


@runtime_checkable
class Coupling(Protocol):
    """The rows of noise [n, *dims], reordered for the rows of x [n, *dims]."""

    def __call__(self, x: Sample, noise: Sample, /) -> Sample: ...


@dataclass(frozen=True)
class Independent:
    """Noise as it comes."""

    def __call__(self, x: Sample, noise: Sample, /) -> Sample:
        return noise
