"""What stock diffusers lacks: our networks as diffusers models, and a pipeline for latents and diffusion models.

    import fewstep.component            # diffusers loads only what is already imported: no remote code
    pipe = diffusers.ConsistencyModelPipeline.from_pretrained(OUT)

A folder whose network is a stock UNet2DModel needs none of this.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from fewstep import codec
from fewstep.model import read_info
from fewstep.networks import Architecture, Preconditioned

TIME = 1000.0  # CMStochasticIterativeScheduler's timestep is 1000 c_noise


class FewstepModel(ModelMixin, ConfigMixin):
    """The raw network F of any fewstep architecture, called as a UNet2DModel is."""

    @register_to_config
    def __init__(self, architecture: str = "", sample_size: int = 32, in_channels: int = 3, out_channels: int = 3,
                 num_class_embeds: int | None = None):  # fmt: skip
        super().__init__()
        self.network: nn.Module = described(architecture).build().network

    @classmethod
    def of(cls, architecture: Architecture, network: nn.Module) -> "FewstepModel":
        """With the weights of `network`."""
        channels, size, _ = architecture.shape
        text = json.dumps(codec.encode(architecture))
        model = cls(text, size, channels, channels, architecture.num_classes or None)
        model.network.load_state_dict(network.state_dict())
        return model.eval()

    def forward(
        self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """F(sample [n, C, H, W], timestep / 1000 [n] or one for all, class_labels [n])."""
        time = torch.as_tensor(timestep, device=sample.device)
        time = time if time.is_floating_point() else time.float()
        label = None if class_labels is None else class_labels.long()
        out = self.network(sample, (time / TIME).expand(len(sample)), label)
        return SimpleNamespace(sample=out) if return_dict else (out,)


def described(architecture: str) -> Architecture:
    """The architecture of a config.json; it decodes nothing but fewstep's own components."""
    found = codec.decode(json.loads(architecture))
    assert isinstance(found, Architecture)
    return found


class RawNetwork(nn.Module):
    """A diffusers network as the raw F(x, c_noise, label) of our Preconditioned."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.inner = network

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.inner(x, TIME * c_noise, class_labels=label, return_dict=False)[0]


class FewstepPipeline(DiffusionPipeline):
    """Samples of any fewstep model: diffusion or consistency, pixels or latents, conditional or not.

    model: the model's description, as `fewstep export` wrote it.
    """

    _optional_components = ["vae"]  # noqa: RUF012 (diffusers')

    def __init__(self, unet: UNet2DModel | FewstepModel, vae: AutoencoderKL | None = None, model: str = "{}"):
        super().__init__()
        itself: Any = self
        itself.register_modules(unet=unet, vae=vae)
        itself.register_to_config(model=model)

    @torch.no_grad()
    def __call__(
        self, batch_size: int = 1, class_labels: Tensor | list[int] | int | None = None, num_inference_steps: int = 1,
        generator: torch.Generator | None = None, sigmas: list[float] | None = None, output_type: str = "pil",
    ) -> Any:  # fmt: skip
        """Images (.images): "pil", "np" [n, H, W, C] in [0, 1], "pt" [n, C, H, W] in [0, 1], or "latent" as sampled.

        num_inference_steps: of a consistency model its steps, of a diffusion model the noise levels of Heun's solver.
        sigmas: EDM noise levels in place of them. class_labels: none: drawn uniformly.
        """
        itself: Any = self
        info = read_info({"model": json.loads(itself.config.model)}, Path("the pipeline"))
        arch, sampler = info.architecture, info.sampler(num_inference_steps)
        if sigmas:
            sampler = replace(sampler, sigmas=tuple(sigmas))  # type: ignore[type-var]
        denoiser = Preconditioned(RawNetwork(itself.unet), arch.sigma_data, arch.sigma_min)
        device, shape = itself._execution_device, (batch_size, *arch.shape)
        drawn: list[Tensor] = []

        def noise(k: int) -> Tensor:
            while len(drawn) <= k:  # in the order of the steps, as ConsistencyModelPipeline draws it
                drawn.append(randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))
            return drawn[k]

        x = sampler(denoiser, noise, self.labels(class_labels, arch.num_classes, batch_size, device))
        if output_type != "latent":
            x = self.decoded(x, info.latents)
        if output_type in ("latent", "pt"):
            return SimpleNamespace(images=x)
        images = x.permute(0, 2, 3, 1).cpu().float().numpy()
        return SimpleNamespace(images=itself.numpy_to_pil(images) if output_type == "pil" else images)

    def labels(self, given: Any, classes: int, batch_size: int, device: torch.device) -> Tensor | None:
        """Class labels [n], drawn by the global generator where none are given; None for unconditional models."""
        if not classes:
            return None
        if given is None:
            return torch.randint(0, classes, (batch_size,)).to(device)
        return torch.as_tensor(np.broadcast_to(np.asarray(given), (batch_size,)).copy(), dtype=torch.int64).to(device)

    def decoded(self, x: Tensor, space: Any) -> Tensor:
        """Samples to images in [0, 1]."""
        if space is not None:
            itself: Any = self
            x = itself.vae.decode(space.denormalise(x)).sample
            x = x.mean(1, keepdim=True) if space.channels == 1 else x
        return (x / 2 + 0.5).clamp(0, 1)
