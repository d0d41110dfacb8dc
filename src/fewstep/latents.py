"""Autoencoders of diffusers: images -> posteriors over latents, and normalised latents -> images."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep.data import LatentSpace
from fewstep.metrics.extractor import full_precision
from fewstep.snapshots import weights_hash
from fewstep.types import FewstepError

DEFAULT_VAE: Final = "stabilityai/sd-vae-ft-ema"  # f8, 4 channels: 256 x 256 images -> [4, 32, 32]
HUB_NAME: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*(/\w[\w.-]*)?")  # OWNER/NAME, or OWNER/NAME/SUBFOLDER
PIXELS_AT_A_TIME: Final = 2**19  # 8 images of 256 x 256
Decoder: TypeAlias = Callable[[Tensor], Tensor]
_one_at_a_time = Lock()


@dataclass(frozen=True, eq=False)
class VAE:
    """A diffusers AutoencoderKL in float32. Its latents are what the encoder puts out, without the scaling factor."""

    name: str
    """hub name or absolute folder"""
    sha256: str
    """of its weights"""
    network: Any
    device: torch.device

    @property
    def factor(self) -> int:
        """Pixels along a side for each latent."""
        return 2 ** (len(self.network.config.block_out_channels) - 1)

    @property
    def channels(self) -> int:
        """Of the images."""
        return int(self.network.config.in_channels)

    @property
    def scaling_factor(self) -> float:
        """By which other programs multiply the latents."""
        return float(self.network.config.scaling_factor)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, H, W) of the latents of square images; FewstepError for a size that it cannot give back."""
        if resolution % self.factor:
            raise FewstepError(
                f"--resolution {resolution}: {self.name} takes multiples of {self.factor} pixels, e.g. "
                f"{-(-resolution // self.factor) * self.factor}"
            )
        side = resolution // self.factor
        return int(self.network.config.latent_channels), side, side

    def encode(self, x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n d i j"], Float[Tensor, "n d i j"]]:
        """Mean and log variance of the posteriors of images in [-1, 1]; grey ones are tripled where it takes RGB."""
        if x.shape[1] not in (1, self.channels):
            raise FewstepError(
                f"{self.name} takes images of {self.channels} channels, not {x.shape[1]}: give another --vae"
            )
        with full_precision(self.device):
            posterior = self.network.encode(x.to(self.device).expand(-1, self.channels, -1, -1)).latent_dist
        return posterior.mean, posterior.logvar

    def decode(self, latents: Float[Tensor, "n d i j"]) -> Float[Tensor, "n c h w"]:
        """Images, in [-1, 1] or nearly."""
        with full_precision(self.device):
            return self.network.decode(latents.to(self.device)).sample


def load_vae(name: str, device: torch.device | str = "cpu") -> VAE:
    """A hub name, OWNER/NAME/SUBFOLDER, or a local folder; kept for the next call. What is on this machine comes first.

    FewstepError when there is none, or no network to get it by.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and not HUB_NAME.fullmatch(name):
        raise FewstepError(
            f"the VAE {name} is neither a folder here nor a name on the Hugging Face hub: put it there, or give another, "
            f"e.g. {DEFAULT_VAE}"
        )
    with _one_at_a_time:
        return loaded(str(path.resolve()) if path.is_dir() else name, torch.device(device))


@lru_cache(maxsize=2)
def loaded(name: str, device: torch.device) -> VAE:
    """The VAE of a folder or hub name, once per process and device."""
    if Path(name).is_dir():
        path = Path(name)
        folder = path / "vae" if not (path / "config.json").exists() and (path / "vae").is_dir() else path
        try:
            network = read(str(folder), None, True)
        except Exception as error:
            raise FewstepError(
                f"{folder} holds no AutoencoderKL in safetensors ({reason(error)}): write one there with save_pretrained"
            ) from error
    else:
        network = from_hub(name)
    with torch.inference_mode(False):
        digest = weights_hash(network.state_dict())
        return VAE(name, digest, network.eval().requires_grad_(False).to(device), device)


def from_hub(name: str) -> Any:
    """The copy in the hub's cache, else the hub's own."""
    owner, repository, *rest = name.split("/")
    where, subfolder = f"{owner}/{repository}", rest[0] if rest else None
    try:
        return read(where, subfolder, True)
    except Exception:  # diffusers raises half a dozen kinds for what is not in the cache
        try:
            return read(where, subfolder, False)
        except Exception as error:
            raise FewstepError(
                f"the VAE {name} is not on this machine, and the hub did not give it ({reason(error)}): where there is a "
                f"network run `hf download {where}` (formerly huggingface-cli download {where}) and copy ~/.cache/huggingface "
                "here; or give --vae a folder written with save_pretrained"
            ) from error


def read(where: str, subfolder: str | None, local: bool) -> Any:
    """An AutoencoderKL with all its weights, from safetensors only."""
    from diffusers import AutoencoderKL

    place = {"subfolder": subfolder, "local_files_only": local}
    kind = AutoencoderKL.load_config(where, **place).get("_class_name")
    if kind != "AutoencoderKL":
        raise FewstepError(f"it is of the class {kind}")
    network, info = AutoencoderKL.from_pretrained(
        where,
        **place,
        use_safetensors=True,
        low_cpu_mem_usage=False,
        torch_dtype=torch.float32,
        output_loading_info=True,
    )
    odd = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if odd:
        raise FewstepError(f"its weights do not fit its config.json: {len(odd)} tensors differ, {odd[0]} for one")
    return network


def reason(error: Exception) -> str:
    """What an exception says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@dataclass(frozen=True, eq=False)
class Decode:
    """Normalised latents [n, C, H, W] -> images in [-1, 1] (nearly: they are not clamped), a few at a time."""

    space: LatentSpace
    vae: VAE

    def __call__(self, latents: Float[Tensor, "n d i j"]) -> Float[Tensor, "n c h w"]:
        few = max(1, PIXELS_AT_A_TIME // self.space.resolution**2)
        images = torch.cat([self.vae.decode(self.space.denormalise(part)) for part in latents.split(few)])
        return images.mean(1, keepdim=True) if self.space.channels == 1 else images


def vae_of(space: LatentSpace, device: torch.device | str = "cpu") -> VAE:
    """The VAE that the latents are of, loaded; FewstepError when the one in its place is another."""
    vae = load_vae(space.vae, device)
    if vae.sha256 != space.vae_sha256:
        raise FewstepError(
            f"the VAE in {vae.name} (SHA-256 {vae.sha256[:12]}...) is not the one that the latents are of "
            f"({space.vae_sha256[:12]}...): put that one there"
        )
    return vae


def decoder(space: LatentSpace | None, device: torch.device | str = "cpu") -> Decoder | None:
    """What makes images of a model's samples; None for a model of pixels. FewstepError unless it is the VAE of the space."""
    return None if space is None else Decode(space, vae_of(space, device))
