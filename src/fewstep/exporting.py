"""Our models out: folders that diffusers loads, an ONNX file, a model card, the Hugging Face hub."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from fewstep import codec
from fewstep.card import card
from fewstep.console import say
from fewstep.files import whole_folder, write_json
from fewstep.hub.folders import DESCRIPTION
from fewstep.latents import vae_of
from fewstep.model import Model, ModelInfo, load
from fewstep.networks import Architecture, Stock, UNet
from fewstep.networks.stock import Scaled
from fewstep.ode import SIGMA_MAX
from fewstep.types import FewstepError

Pipeline = Literal["ConsistencyModelPipeline", "LDMPipeline", "FewstepPipeline"]
GRIDS: Final = (40, 6, 4)  # sizes of the scheduler's grid, of which the entry N // 2 is the second step
VAE: Final = "vae"
SAMPLES: Final = "samples.png"
WRITTEN: Final = ("README.md", "model_index.json", DESCRIPTION, SAMPLES, "scheduler", "unet", "vae", "vqvae")


@dataclass(frozen=True)
class Form:
    """How diffusers can hold a model."""

    pipeline: Pipeline
    stock: bool
    """whether the network is a UNet2DModel, or our own component"""
    rho: float = 7.0
    grid: int = 40
    because: str = ""
    """why it is not a stock pipeline of stock parts"""

    @property
    def needs(self) -> str:
        """What must be imported before from_pretrained; empty: diffusers alone."""
        return "" if self.stock and self.pipeline != "FewstepPipeline" else "fewstep.component"


def is_stock(arch: Architecture) -> bool:
    """Whether the raw network is a UNet2DModel told 1000 c_noise, as the scheduler of consistency models tells it."""
    network = arch.network
    if isinstance(network, UNet):
        return network.norm == "group" and network.time_scale == 1000
    return isinstance(network, Stock) and network.model == "UNet2DModel" and network.parametrisation == Scaled()


def form_of(info: ModelInfo) -> Form:
    """The most ordinary pipeline that gives exactly our samples; FewstepError for what makes no images."""
    arch, space = info.architecture, info.latents
    if len(arch.shape) != 3 or arch.shape[1] != arch.shape[2]:
        raise FewstepError(f"samples of shape {arch.shape} are no square images: diffusers has no pipeline for them")
    stock = is_stock(arch)
    why = [] if stock else [f"stock diffusers has no {type(arch.network).__name__} with these options"]
    if info.kind == "diffusion":
        return Form(
            "FewstepPipeline", stock, because="stock diffusers has no pipeline for a diffusion model with EDM's noise"
        )
    grid, rho = grid_of(info.second_sigma, arch.sigma_min)
    if rho is None:
        return Form(
            "FewstepPipeline", stock, because=f"no grid of the stock scheduler holds sigma = {info.second_sigma:g}"
        )
    if space is None:
        return Form("ConsistencyModelPipeline", stock, rho, grid, *why)
    if arch.num_classes:
        why.append("LDMPipeline, the stock one for latents, takes no labels")
    if len(space.mean) != space.shape[0]:
        why.append("statistics of each element do not fit into the VAE")
    if space.channels != 3:
        why.append("its images are grey")
    return Form("LDMPipeline" if not why else "FewstepPipeline", stock, rho, grid, "; ".join(why))


def grid_of(second_sigma: float, sigma_min: float) -> tuple[int, float | None]:
    """N and rho of CMStochasticIterativeScheduler so that its entry N // 2, the second of two steps, is second_sigma.

    sigma_k = (max^(1/rho) + k / (N - 1) (min^(1/rho) - max^(1/rho)))^rho; with sigma_min = 0 in closed form. rho is None
    where no grid holds it.
    """
    if sigma_min == 0:
        n = GRIDS[0]
        return n, math.log(second_sigma / SIGMA_MAX) / math.log(1 - (n // 2) / (n - 1))
    from scipy.optimize import brentq

    for n in GRIDS:
        position = (n // 2) / (n - 1)

        def off(rho: float, position: float = position) -> float:
            low, high = sigma_min ** (1 / rho), SIGMA_MAX ** (1 / rho)
            return rho * math.log(high + position * (low - high)) - math.log(second_sigma)

        if off(0.5) * off(1e3) < 0:
            return n, float(brentq(off, 0.5, 1e3, xtol=1e-14, rtol=1e-14))
    return GRIDS[0], None


def export(
    model: Model | str | Path, out: str | Path, to: Literal["diffusers", "onnx"] = "diffusers", *,
    records: Sequence[str | Path] = (), licence: str = "", title: str = "", push_to_hub: str = "", private: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write a model for other programs.

    diffusers: the folder `out` with the pipeline, a model card (README.md), samples.png and the model's whole description
    (fewstep.json); onnx: the file `out` with the one-step generator. records: files of what `fewstep evaluate` printed, for
    the card. push_to_hub: OWNER/NAME to upload the folder to. Returns what was written. FewstepError for what cannot be.
    """
    model = model if isinstance(model, Model) else load(model)
    out = Path(out).resolve() if str(out) in (".", "..") else Path(out)
    if to == "onnx":
        from fewstep.onnx_file import write_onnx

        if push_to_hub:
            raise FewstepError("--push-to-hub uploads a diffusers folder: leave it out, or give --to diffusers")
        return write_onnx(model, out, overwrite)
    form = form_of(model.info)
    repo = push_to_hub or out.name
    text = card(model, form.pipeline, form.needs, form.because, repo, records, licence, title)

    def fill(folder: Path) -> None:
        write_pipeline(model, form, folder)
        write_json(folder / DESCRIPTION, described(model.info))
        (folder / "README.md").write_text(text)
        draw(model, folder / SAMPLES)

    whole_folder(out, WRITTEN, DESCRIPTION, overwrite, fill)
    for line in model.info.lineage:
        say(f"note: {line}")
    if push_to_hub:
        push(out, push_to_hub, private)
    return {
        "out": str(out), "pipeline": form.pipeline, "network": "UNet2DModel" if form.stock else "FewstepModel",
        "needs": form.needs, "because": form.because, "sigmas": model.info.sampler(2).sigmas if form.needs == "" else None,
        "lineage": list(model.info.lineage), "pushed_to": push_to_hub, "weights_sha256": model.sha256,
    }  # fmt: skip


def write_pipeline(model: Model, form: Form, folder: Path) -> None:
    """The pipeline's own files, by diffusers' save_pretrained."""
    import diffusers

    info, arch = model.info, model.info.architecture
    raw: Any = model.denoiser.network
    if form.stock:
        unet = raw.unet
    else:
        from fewstep.component import FewstepModel

        unet = FewstepModel.of(arch, raw)
    scheduler: Any = diffusers.CMStochasticIterativeScheduler(
        num_train_timesteps=form.grid, sigma_min=arch.sigma_min, sigma_max=SIGMA_MAX, sigma_data=arch.sigma_data,
        rho=form.rho, clip_denoised=info.clip_denoised,
    )  # fmt: skip
    pipeline: Any
    if form.pipeline == "ConsistencyModelPipeline":
        pipeline = diffusers.ConsistencyModelPipeline(unet=unet, scheduler=scheduler)
    elif form.pipeline == "LDMPipeline":
        pipeline = diffusers.LDMPipeline(vqvae=folded_vae(info), unet=unet, scheduler=scheduler)
    else:
        from fewstep.component import FewstepPipeline

        vae = vae_of(info.latents).network if info.latents else None
        pipeline = FewstepPipeline(unet=unet, vae=vae, model=json.dumps(described(info)))
    pipeline.save_pretrained(folder, safe_serialization=True)
    if form.pipeline == "LDMPipeline" and info.latents and is_local(info):  # the VAE as it is, for fewstep
        vae_of(info.latents).network.save_pretrained(folder / VAE, safe_serialization=True)


def is_local(info: ModelInfo) -> bool:
    """Whether its latents' VAE is a folder here, which must come along, and not a name on the hub."""
    return info.latents is not None and Path(info.latents.vae).is_dir()


def described(info: ModelInfo) -> dict[str, Any]:
    """The description for the folder; the VAE of a folder here is the one beside it."""
    if info.latents and is_local(info):
        info = replace(info, latents=replace(info.latents, vae=VAE))
    return {f: codec.encode(v) for f, v in vars(info).items() if f != "best"}


def folded_vae(info: ModelInfo) -> Any:
    """The VAE with the latents' statistics of each channel folded into its first convolution: it decodes what we sample.

    post_quant_conv(z * scale + mean) is post_quant_conv' (z) with W' = W scale and b' = b + W mean; in float64, rounded once.
    """
    import copy

    assert info.latents is not None
    space = info.latents
    vae: Any = copy.deepcopy(vae_of(space).network)
    mean, scale = (torch.tensor(v, dtype=torch.float64) for v in (space.mean, space.std))
    scale = scale / space.sigma_data
    layer: Any = vae.post_quant_conv
    if layer is None:
        layer = vae.post_quant_conv = torch.nn.Conv2d(len(mean), len(mean), 1)
        vae.register_to_config(use_post_quant_conv=True)
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    weight = layer.weight.double()
    with torch.no_grad():
        layer.bias.copy_(layer.bias.double() + (weight[:, :, 0, 0] @ mean))
        layer.weight.copy_(weight * scale[None, :, None, None])
    vae.register_to_config(scaling_factor=1.0)
    return vae


def draw(model: Model, path: Path) -> None:
    """A few samples for the card."""
    from fewstep.pictures import save
    from fewstep.selfcheck import picture

    save(path, picture(model)[0])


def push(folder: Path, repo: str, private: bool) -> None:
    """Upload the folder to the Hugging Face hub; FewstepError when it does not take it."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=str(folder), commit_message="Exported by fewstep")
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise FewstepError(
            f"the hub did not take {repo} ({said}): log in with `hf auth login`, check the name and the network; {folder} is "
            "complete and can be uploaded later with `hf upload`"
        ) from error
