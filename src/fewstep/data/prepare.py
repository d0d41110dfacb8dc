"""From what a data set stores to what a network is trained on: x [n, *dims] of standard deviation sigma_data.

What chance decides here (flips, posterior samples) depends on the seed and on an image's number in the run only.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fewstep.data.decode import to_float
from fewstep.data.images import DataSpec, Images
from fewstep.data.latent_space import LatentSpace
from fewstep.noise import step_seed
from fewstep.types import FewstepError, Sample


@runtime_checkable
class Prepare(Protocol):
    """This rank's stored rows of a batch of world * n, which begins after nimg images -> x [n, *dims]."""

    def __call__(self, stored: Tensor, seed: int, nimg: int, rank: int = 0, world: int = 1) -> Sample: ...


def preparation(images: Images, spec: DataSpec | None = None) -> Prepare:
    """How rows of these images become x: pixels are scaled to [-1, 1], latents are drawn and normalised."""
    flip = spec is not None and spec.flip
    return Pixels(flip) if images.space is None else Latents(images.space, flip)


def flips(n: int, seed: int, nimg: int, rank: int = 0, world: int = 1) -> Bool[Tensor, " {n}"]:
    """Which of this rank's n images are mirrored, each with probability 1/2: on the CPU."""
    generator = torch.Generator().manual_seed(step_seed(seed, nimg, "flip"))
    return torch.rand(n * world, generator=generator)[rank * n : (rank + 1) * n] < 0.5


@dataclass(frozen=True)
class Pixels:
    """uint8 [n, c, h, w] -> [-1, 1]; flip: mirror half of them."""

    flip: bool = False

    def __call__(self, stored: Tensor, seed: int, nimg: int, rank: int = 0, world: int = 1) -> Sample:
        x = to_float(stored)
        if not self.flip:
            return x
        mirrored = flips(len(x), seed, nimg, rank, world).to(x.device)
        return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


@dataclass(frozen=True)
class Latents:
    """Stored rows [n, F, P, H, W] -> normalised latents [n, C, H, W].

    F = 2: as it is, and mirrored before it was encoded. P = 2C: mean and log variance of the posterior, of which each
    visit draws a fresh sample; P = C: one sample, drawn once and for all.
    """

    space: LatentSpace
    flip: bool = False

    def __call__(self, stored: Tensor, seed: int, nimg: int, rank: int = 0, world: int = 1) -> Sample:
        n, channels = len(stored), self.space.shape[0]
        if self.flip and stored.shape[1] == 1:
            raise FewstepError(
                "these latents were encoded without flips: leave out --data.flip, or fewstep encode --flip"
            )
        row = stored[:, 0]
        if self.flip:
            mirrored = flips(n, seed, nimg, rank, world).to(stored.device)
            row = torch.where(mirrored[:, None, None, None], stored[:, 1], row)
        mean, rest = row[:, :channels].float(), row[:, channels:].float()
        if rest.shape[1]:
            generator = torch.Generator(mean.device).manual_seed(step_seed(seed, nimg, "posterior"))
            noise = torch.randn(n * world, *mean.shape[1:], generator=generator, device=mean.device)
            mean = mean + (rest / 2).exp() * noise[rank * n : (rank + 1) * n]
        return self.space.normalise(mean)

    def means(self, stored: Tensor) -> Float[Tensor, "n c h w"]:
        """The posteriors' means (or the one sample), not flipped and not normalised."""
        return stored[:, 0, : self.space.shape[0]].float()
