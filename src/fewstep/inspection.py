"""What data look like to a network: moments, quantiles and outliers per channel, in one pass over them.

statistics = Statistics.of(batches)          # x [n, C, H, W] in any cut: the same to rounding
statistics.channels[0]["excess_kurtosis"]
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from fewstep.data import Images
from fewstep.data.prepare import Latents, preparation
from fewstep.noise import permutation
from fewstep.types import FewstepError

QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
BEYOND = (4, 6, 10)  # standard deviations from the mean
IQR = 1.3489795  # of a standard normal
CODES = 1 << 16  # numbers of half precision
Reading: TypeAlias = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, eq=False)
class CentralMoments:
    """n values of each element, their mean and the sums of (x - mean)^k for k = 2, 3, 4: float64, mergeable.

    Sums about the mean cost no digits where the mean is large; groups pool exactly, whether they are batches or
    elements (Pebay 2008, SAND2008-6212).
    """

    n: int
    mean: Float64[Tensor, "*dims"]
    m2: Float64[Tensor, "*dims"]
    m3: Float64[Tensor, "*dims"]
    m4: Float64[Tensor, "*dims"]

    @classmethod
    def of(cls, x: Float[Tensor, " n *dims"]) -> "CentralMoments":
        """Of each element over a batch."""
        x = x.double()
        mean = x.mean(0)
        d = x - mean
        square = d.square()
        return cls(len(x), mean, square.sum(0), (square * d).sum(0), square.square_().sum(0))

    def merge(self, other: "CentralMoments") -> "CentralMoments":
        """Of both batches together."""
        n = torch.tensor([self.n, other.n], dtype=torch.float64).reshape(2, *(1,) * self.mean.ndim)
        pairs = (torch.stack(pair) for pair in zip(self.sums, other.sums, strict=True))
        return CentralMoments(self.n + other.n, *pooled(n, *pairs))

    def flat(self, keep: int) -> "CentralMoments":
        """Of all elements as one, but for the first `keep` axes."""
        rows = [sums.flatten(keep).movedim(-1, 0) for sums in self.sums]
        n = torch.full((len(rows[0]), *(1,) * keep), float(self.n), dtype=torch.float64)
        return CentralMoments(self.n * len(rows[0]), *pooled(n, *rows))

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.mean, self.m2, self.m3, self.m4

    @property
    def std(self) -> Float64[Tensor, "*dims"]:
        """Over n, not n - 1."""
        return (self.m2 / self.n).sqrt()

    @property
    def skewness(self) -> Float64[Tensor, "*dims"]:
        """0 of anything symmetric; nan of a constant."""
        return self.m3 / self.n / (self.m2 / self.n) ** 1.5

    @property
    def excess_kurtosis(self) -> Float64[Tensor, "*dims"]:
        """0 of a normal, -1.2 of a uniform, 6/(v - 4) of Student's t; nan of a constant."""
        return self.m4 / self.n / (self.m2 / self.n).square() - 3


def pooled(n: Tensor, mean: Tensor, m2: Tensor, m3: Tensor, m4: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean and central sums of groups (axis 0) of n values each, taken together."""
    whole = (n * mean).sum(0) / n.sum(0)
    d = mean - whole
    m4 = m4 + 4 * d * m3 + 6 * d**2 * m2 + n * d**4
    return whole, (m2 + n * d**2).sum(0), (m3 + 3 * d * m2 + n * d**3).sum(0), m4.sum(0)


def codes_of(x: Float[Tensor, "*dims"]) -> Int64[Tensor, "*dims"]:
    """The number of the half-precision number nearest to x, in ascending order; beyond +-65504 the last of them."""
    bits = x.float().clamp(-65504, 65504).half().view(torch.int16).long() & 0xFFFF
    return torch.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)


def values_of(codes: Int64[Tensor, " k"]) -> Float64[Tensor, " k"]:
    """The inverse of codes_of."""
    bits = torch.where(codes >= 0x8000, codes - 0x8000, 0xFFFF - codes)
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16).view(torch.half).double()


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many values round to each number of half precision: 0.05 % wide bins, whatever the scale."""

    values: Float64[Tensor, " k"]
    """ascending; those that occur"""
    counts: Int64[Tensor, " k"]

    @classmethod
    def of(cls, counts: Int64[Tensor, " codes"]) -> "Histogram":
        """From the counts of all codes."""
        codes = counts.nonzero()[:, 0]
        return cls(values_of(codes), counts[codes])

    @property
    def n(self) -> int:
        return int(self.counts.sum())

    def quantile(self, q: float) -> float:
        """The least value that a share of at least q does not exceed, as it is rounded."""
        reached = torch.searchsorted(self.counts.cumsum(0), max(1, math.ceil(q * self.n - 1e-9)))
        return float(self.values[reached])

    def beyond(self, mean: float, distance: float) -> float:
        """The share of values further than `distance` from the mean."""
        return int(self.counts[(self.values - mean).abs() > distance].sum()) / self.n


@dataclass(frozen=True, eq=False)
class Statistics:
    """All that one pass over x [n, C, H, W] keeps; the same to rounding in any cut into batches."""

    moments: CentralMoments
    """of each element, [C, H, W]"""
    counts: Int64[Tensor, "c codes"]
    """of each channel's values by half-precision code"""
    low: Float64[Tensor, " c"]
    high: Float64[Tensor, " c"]

    @classmethod
    def of_batch(cls, x: Float[Tensor, "n c h w"]) -> "Statistics":
        channels = x.shape[1]
        codes = codes_of(x) + CODES * torch.arange(channels).reshape(-1, 1, 1)
        counts = torch.bincount(codes.flatten(), minlength=CODES * channels).reshape(channels, CODES)
        wide = x.double()
        return cls(CentralMoments.of(x), counts, wide.amin((0, 2, 3)), wide.amax((0, 2, 3)))

    @classmethod
    def of(cls, batches: Iterable[Float[Tensor, "_ c h w"]]) -> "Statistics":
        """Of a stream of batches."""
        whole: Statistics | None = None
        for x in batches:
            whole = whole.merge(cls.of_batch(x)) if whole else cls.of_batch(x)
        if whole is None:
            raise FewstepError("statistics of no images: give at least one")
        return whole

    def merge(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.moments.merge(other.moments), self.counts + other.counts, torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.moments.mean.shape)

    @cached_property
    def channels(self) -> list[dict[str, Any]]:
        """The summary of each channel."""
        moments, bounds = self.moments.flat(1), zip(self.low.tolist(), self.high.tolist(), strict=True)
        return [summary(moments, c, Histogram.of(self.counts[c]), *ends) for c, ends in enumerate(bounds)]

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The summary of all values as one set."""
        moments, ends = self.moments.flat(0), (float(self.low.min()), float(self.high.max()))
        return summary(moments, (), Histogram.of(self.counts.sum(0)), *ends)

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is undefined (the skewness of a constant) is null."""
        std = self.moments.std
        element = {"std_min": float(std.min()), "std_median": float(std.median()), "std_max": float(std.max())}
        return {"all": self.whole, "channels": self.channels, "elements": element}


def summary(moments: CentralMoments, at: Any, histogram: Histogram, low: float, high: float) -> dict[str, Any]:
    """The numbers of one channel, or of all values; robust_std: the interquartile range over that of a normal."""
    mean, std = float(moments.mean[at]), float(moments.std[at])
    quantiles = {f"{q:g}": histogram.quantile(q) for q in QUANTILES}
    shape = {"skewness": float(moments.skewness[at]), "excess_kurtosis": float(moments.excess_kurtosis[at])}
    return {
        "mean": mean, "std": std, "robust_std": (quantiles["0.75"] - quantiles["0.25"]) / IQR,
        **{name: value if math.isfinite(value) else None for name, value in shape.items()},
        "min": low, "max": high, "quantiles": quantiles,
        "beyond_std": {str(k): histogram.beyond(mean, k * std) for k in BEYOND},
    }  # fmt: skip


def readings(images: Images) -> dict[str, Reading]:
    """Name -> x [m, C, H, W] from the stored rows and how many were seen before them; the last is what is trained on.

    Of latents: the posteriors' means as the VAE puts them out, and normalised samples, a sample for each image.
    """
    prepared = preparation(images)
    if not isinstance(prepared, Latents):
        return {"pixels": lambda stored, nimg: prepared(stored, 0, nimg)}
    return {
        "latents": lambda stored, nimg: prepared.means(stored),
        "normalised": lambda stored, nimg: torch.cat([prepared(r[None], 0, nimg + i) for i, r in enumerate(stored)]),
    }


def inspect(
    images: Images, num: int = 10_000, batch: int | None = None, tick: Callable[[int], object] = lambda n: None
) -> dict[str, Statistics]:
    """The statistics of each reading of `num` images, or of all if there are fewer; which ones is always the same.

    batch: images at a time; changes nothing but memory. tick(n): n more are done. FewstepError for NaN and infinity.
    """
    if num < 1 or (batch is not None and batch < 1):
        raise FewstepError(f"--num must be 1 or more, got {num}")
    chosen = permutation(0, 0, len(images))[:num].sort().values
    size = batch or max(1, (1 << 22) // math.prod(images.shape))
    seen: dict[str, Statistics] = {}
    looks = readings(images)
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        stored = images.pixels(rows)
        for name, read in looks.items():
            x = read(stored, start)
            refuse_nonfinite(x, images, rows, name)
            part = Statistics.of_batch(x)
            seen[name] = seen[name].merge(part) if name in seen else part
        tick(len(rows))
    for name, statistics in seen.items():
        if statistics.whole["std"] == 0:
            raise FewstepError(f"{images.name}: all {name} are {statistics.whole['mean']:g}: is it the right place?")
    return seen


def refuse_nonfinite(x: Tensor, images: Images, rows: Tensor, name: str) -> None:
    """FewstepError that names the first image with a NaN or an infinity."""
    bad = (~x.isfinite()).flatten(2).any(2)
    if bad.any():
        row, channel = bad.nonzero()[0].tolist()
        what = "NaN" if x[row, channel].isnan().any() else "infinity"
        key = images.keys[int(rows[row])]
        raise FewstepError(
            f"{images.name}: {name} of {key} hold {what} in channel {channel}: make it again or remove it"
        )
