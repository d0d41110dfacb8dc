"""The space of normalised latents that a network is trained in, and the check that latents and statistics agree.

    normalised = (latent - mean) / std * sigma_data          # sLCT, arXiv:2502.01441: latents to sigma_data = 0.5

A latent here is what the VAE's encoder puts out, not multiplied by the VAE's scaling factor. Nothing is ever clamped:
latents have heavy tails.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.types import FewstepError

TOLERANCE: Final = 0.2  # of the normalised latents' standard deviation, over a few hundred images
OFFSET: Final = 0.5  # of their channels' means, in standard deviations
SCALING_FACTORS: Final = {0.18215: "Stable Diffusion's", 0.13025: "SDXL's"}


@dataclass(frozen=True)
class LatentSpace:
    """Latents of which VAE, of images of what size, and how they are normalised."""

    vae: str
    """hub name or local folder of a diffusers AutoencoderKL"""
    vae_sha256: str
    """of its weights"""
    resolution: int
    """pixels along a side of the images"""
    shape: tuple[int, int, int]
    """of a latent, (C, H, W)"""
    mean: tuple[float, ...]
    """of the latents: C values (of the channels) or C*H*W (of the elements)"""
    std: tuple[float, ...]
    """their standard deviation, as many values"""
    sigma_data: float = 0.5
    """standard deviation of the normalised latents"""
    channels: int = 3
    """of the images: 1 are shown to the VAE as grey RGB, and what it decodes is made grey again"""

    def __post_init__(self) -> None:
        allowed = (self.shape[0], math.prod(self.shape))
        if len(self.mean) != len(self.std) or len(self.mean) not in allowed:
            raise FewstepError(
                f"{len(self.mean)} means and {len(self.std)} standard deviations do not fit latents of "
                f"{' x '.join(map(str, self.shape))}: give {allowed[0]} of each (of channels) or {allowed[1]} (of elements)"
            )
        if not (all(map(math.isfinite, self.mean)) and all(0 < s < math.inf for s in self.std)):
            raise FewstepError(
                "the statistics hold a standard deviation that is not positive, or a value that is not finite: what never "
                "changes cannot be normalised; use those of the channels (--statistics channel)"
            )
        if not 0 < self.sigma_data < math.inf:
            raise FewstepError(f"sigma-data is {self.sigma_data}: give a positive number, e.g. 0.5")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of an image, (C, H, W)."""
        return (self.channels, self.resolution, self.resolution)

    def normalise(self, latents: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """What the VAE's encoder puts out -> what the network sees: mean 0, standard deviation sigma_data."""
        mean, scale = constants(self, latents.device)
        return (latents - mean) / scale

    def denormalise(self, normalised: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """The inverse: what the VAE's decoder takes."""
        mean, scale = constants(self, normalised.device)
        return normalised * scale + mean

    def same_as(self, other: "LatentSpace") -> bool:
        """Whether both are one space; the VAE may lie in another place."""
        return replace(self, vae="") == replace(other, vae="")


@lru_cache(maxsize=16)
def constants(space: LatentSpace, device: torch.device) -> tuple[Tensor, Tensor]:
    """mean and std / sigma_data, [C, H or 1, W or 1], on the device."""
    shape = space.shape if len(space.mean) == math.prod(space.shape) else (space.shape[0], 1, 1)
    with torch.inference_mode(False):
        mean = torch.tensor(space.mean, dtype=torch.float32, device=device).reshape(shape)
        std = torch.tensor(space.std, dtype=torch.float32, device=device).reshape(shape)
    return mean, std / space.sigma_data


def check_scale(space: LatentSpace, means: Float[Tensor, "n c h w"], variances: Tensor | None, what: str) -> None:
    """FewstepError unless a few hundred latents, normalised, have standard deviation sigma_data and mean 0, or nearly.

    means, variances: of the posteriors; None: `means` are samples. The published FFHQ statistics of sLCT are of latents
    multiplied by Stable Diffusion's scaling factor, which those they came with were not: that is told by name.
    """
    values = space.normalise(means.float()).double() / space.sigma_data
    _, scale = constants(space, means.device)
    spread = values.var((0, 2, 3), correction=0).mean()
    if variances is not None:
        spread = spread + (variances.double() / (scale * space.sigma_data).double().square()).mean()
    factor, offset = float(spread.sqrt()), float(values.mean((0, 2, 3)).square().mean().sqrt())
    if not (math.isfinite(factor) and factor > 0):
        raise FewstepError(f"{what}: the latents are not finite, or all the same: encode them again")
    remedy = "give the statistics of these latents: fewstep encode without a file for --statistics measures them"
    if abs(factor - 1) > TOLERANCE:
        raise FewstepError(
            f"{what}: normalised, the latents' standard deviation is {factor:.4g} times what it should be"
            f"{cause(factor)}; {remedy}"
        )
    if offset > OFFSET:
        raise FewstepError(
            f"{what}: normalised, the latents' mean is {offset:.2g} standard deviations from 0: the statistics are of other "
            f"latents; {remedy}"
        )


def cause(factor: float) -> str:
    """A VAE's scaling factor that explains a standard deviation so many times too large."""
    for known, whose in SCALING_FACTORS.items():
        named = f"multiplied by the VAE's scaling factor ({whose} {known})"
        if abs(factor * known - 1) <= TOLERANCE:
            return f": the statistics are of latents {named}, these latents are not"
        if abs(factor / known - 1) <= TOLERANCE:
            return f": these latents are {named}, the statistics are of latents that are not"
    return ": they are not of one scale"
