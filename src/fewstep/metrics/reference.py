"""The data set that samples are measured against, and the measuring."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from fewstep.metrics.extractor import Extractor
from fewstep.metrics.frechet import FrechetReference
from fewstep.metrics.kernel import KernelReference
from fewstep.metrics.precision_recall import RealNeighbours
from fewstep.metrics.statistics import Moments
from fewstep.types import FewstepError


@dataclass(frozen=True, eq=False)
class Reference:
    """The features [n, d] of a set of real images, on the CPU, and whose they are.

    sha256 is of the set of images (shapes and pixels), not of the features: it knows no order, batch or device.
    """

    features: Float32[Tensor, "n d"]
    moments: Moments
    name: str
    sha256: str
    extractor: str = ""
    extractor_sha256: str = ""

    @classmethod
    def of(cls, extractor: Extractor, pixel_batches: Iterable[UInt8[Tensor, "_ c h w"]], name: str) -> "Reference":
        """The reference of all the images in these batches."""
        parts: list[Tensor] = []
        digests: list[bytes] = []
        for images in pixel_batches:
            parts.append(extractor(images).cpu())
            digests += [_digest(image) for image in images.cpu()]
        if not digests:
            raise FewstepError(f"the reference {name} holds no images: check where it reads them from")
        features, sha256 = torch.cat(parts), hashlib.sha256(b"".join(sorted(digests))).hexdigest()
        return cls(features, Moments.of(features), name, sha256, extractor.name, extractor.sha256)

    @property
    def n(self) -> int:
        return len(self.features)

    @cached_property
    def frechet(self) -> FrechetReference:
        """The reference's half of the Frechet distance, worked out once."""
        return FrechetReference(self.moments)

    @cached_property
    def kernel(self) -> KernelReference:
        """The reference's part of the kernel distance, worked out once."""
        return KernelReference(self.features)

    @cached_property
    def neighbours(self) -> RealNeighbours:
        """The reference's radii for precision, recall, density and coverage, worked out once."""
        return RealNeighbours(self.features)


METRICS: Final[dict[str, Callable[[Reference, Tensor], dict[str, float]]]] = {
    "fd": lambda reference, fake: {"fd": reference.frechet.distance(Moments.of(fake))},
    "kid": lambda reference, fake: {"kid": reference.kernel.distance(fake)},
    "prdc": lambda reference, fake: reference.neighbours.prdc(fake),
}


def measure(reference: Reference, features: Float[Tensor, "n d"], metrics: Sequence[str]) -> dict[str, float]:
    """The values of these metrics, of "fd", "kid" and "prdc" (which is precision, recall, density and coverage)."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown:
        raise FewstepError(f"unknown metric {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    ours, theirs = features.shape[1], reference.features.shape[1]
    if ours != theirs:
        raise FewstepError(f"features of {ours} dimensions, {theirs} in {reference.name}: use one extractor for both")
    return {key: value for name in metrics for key, value in METRICS[name](reference, features).items()}


def _digest(image: UInt8[Tensor, "c h w"]) -> bytes:
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.contiguous().numpy().tobytes()).digest()
