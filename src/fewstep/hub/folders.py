"""diffusers folders: pipelines of a UNet2DModel or a DiTTransformer2DModel, and what their scheduler says of the noise."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor

from fewstep import codec
from fewstep.hub.foreign import Foreign, fit
from fewstep.hub.weights import folder_tensors
from fewstep.networks import Architecture, Network, UNet
from fewstep.networks.stock import (
    AnyParametrisation,
    Flow,
    Prediction,
    Scaled,
    Stock,
    VariancePreserving,
    classes,
    sample_shape,
)
from fewstep.networks.unet import slow_columns
from fewstep.types import FewstepError

Kind: TypeAlias = Literal["diffusion", "consistency"]
MODELS: tuple[Literal["UNet2DModel", "DiTTransformer2DModel"], ...] = ("UNet2DModel", "DiTTransformer2DModel")
COMPONENTS = ("unet", "transformer")
OURS = "fewstep.component"  # library of the networks that we export and stock diffusers does not have
LIBRARIES = ("diffusers", "transformers", OURS, None)
DISCRETE = {
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "DDPMParallelScheduler",
    "DDIMParallelScheduler", "DDIMInverseScheduler",
}  # fmt: skip
DESCRIPTION = "fewstep.json"  # beside our own exports: the model's whole description


@dataclass(frozen=True)
class Noise:
    """What a scheduler says of the model it comes with."""

    parametrisation: AnyParametrisation
    kind: Kind
    sigma_data: float = 1.0
    sigma_min: float = 0.0
    second_sigma: float | None = None
    clip_denoised: bool = False
    notes: tuple[str, ...] = ()


def read_folder(folder: Path, strict: bool = True, kind: Kind | None = None) -> Foreign | None:
    """The model of a pipeline's folder, or of a network's folder beside its scheduler; None where no scheduler is.

    FewstepError for what is not exactly representable, for components that need remote code, for damaged files.
    """
    index = {}
    if (folder / "model_index.json").is_file():
        index = read_config(folder / "model_index.json")
        check_libraries(folder, index)
    name = next((name for name in COMPONENTS if index.get(name)), "unet")
    network = folder / name if (folder / name / "config.json").is_file() else folder
    if not (network / "config.json").is_file():
        raise FewstepError(f"{folder} holds no unet and no transformer: only pipelines of one network can be imported")
    if (folder / DESCRIPTION).is_file():
        return ours(folder, network, strict)
    places = (folder / "scheduler", folder, folder.parent / "scheduler")
    files = [place / "scheduler_config.json" for place in places]
    scheduler = next((file for file in files if file.is_file()), None)
    if scheduler is None:
        return None
    config = read_config(network / "config.json")
    model = config.get("_class_name")
    if model not in MODELS:
        raise FewstepError(f"{network} is a {model}: {' and '.join(MODELS)} can be imported")
    noise = noise_of(read_config(scheduler), folder)
    tensors = folder_tensors(network)
    arch = Architecture(
        network_of(model, config, noise.parametrisation, tensors), sample_shape(config), classes(config),
        noise.sigma_data, noise.sigma_min,
    )  # fmt: skip
    named = {f"network.unet.{name}": (name, tensor) for name, tensor in tensors.items()}
    held, keys = fit(named, arch, str(network), strict)
    vae = next((folder / part for part in ("vae", "vqvae") if index.get(part)), None)
    return Foreign(
        source=f"diffusers {index.get('_class_name', model)} ({model}, {read_config(scheduler)['_class_name']})",
        architecture=arch, kind=kind or noise.kind, tensors=held, keys=keys, notes=noise.notes, second_sigma=noise.second_sigma,
        clip_denoised=noise.clip_denoised, class_names=class_names(index, classes(config)), vae=str(vae or ""),
        lineage=(f"{index.get('_name_or_path') or folder.name}, a diffusers folder: its licence is that of its page",),
    )  # fmt: skip


def ours(folder: Path, network: Path, strict: bool) -> Foreign:
    """A folder that `fewstep export` wrote: the description says everything, the weights are where diffusers wants them."""
    told = read_config(folder / DESCRIPTION)
    try:
        arch = codec.decode(told["architecture"])
        kind = told["kind"]
    except (KeyError, FewstepError) as error:
        raise FewstepError(
            f"{folder / DESCRIPTION} does not fit this version of fewstep ({error}): remove it to read the folder like others"
        ) from None
    named = {own_name(name, arch.network): (name, tensor) for name, tensor in folder_tensors(network).items()}
    held, keys = fit(named, arch, str(network), strict)
    return Foreign(
        source="fewstep's own export", architecture=arch, kind=kind, tensors=held, keys=keys, described=told,
        second_sigma=told.get("second_sigma"), clip_denoised=told.get("clip_denoised", False),
        lineage=tuple(told.get("lineage", ())),
    )  # fmt: skip


def own_name(name: str, network: Network) -> str:
    """Our name of an exported tensor: stock networks lie under `unet`, our own under the name that they have here."""
    return name if name.startswith("network.") else f"network.unet.{name}"


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object; FewstepError for anything else."""
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise FewstepError(f"{file} does not exist: copy the whole folder") from None
    except ValueError as error:
        raise FewstepError(f"{file} is no valid JSON ({error}): copy the folder again") from None
    if not isinstance(content, dict):
        raise FewstepError(f"{file} is no diffusers configuration: copy the folder again")
    return content


def check_libraries(folder: Path, index: dict[str, Any]) -> None:
    """FewstepError when the pipeline or a component is code that comes with the folder: nothing of it is ever run."""
    if not isinstance(index.get("_class_name"), str):
        raise FewstepError(f"{folder} needs code of its own ({index.get('_class_name')}): such pipelines are refused")
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and not name.startswith("_") and value[0] not in LIBRARIES:
            raise FewstepError(
                f"{folder} needs code of its own for its {name} ({value[0]}.{value[1]}): such folders are refused; "
                "if the weights are a UNet2DModel's, give the folder of the network with a stock config.json"
            )


def noise_of(config: dict[str, Any], folder: Path) -> Noise:
    """How the network is told the noise and what it predicts, from scheduler_config.json."""
    name = str(config.get("_class_name"))
    if name == "CMStochasticIterativeScheduler":
        return of_consistency(config)
    if name == "FlowMatchEulerDiscreteScheduler":
        steps = int(config.get("num_train_timesteps", 1000))
        if config.get("use_dynamic_shifting"):
            raise FewstepError(f"{folder}: a flow whose times are shifted by the image's size cannot be converted")
        return Noise(Flow(steps), "diffusion")
    if name not in DISCRETE:
        raise FewstepError(f"{folder}: the scheduler {name} is unknown here: its noise cannot be converted exactly")
    prediction = config.get("prediction_type", "epsilon")
    if config.get("use_flow_sigmas") or prediction == "flow_prediction":
        return Noise(Flow(int(config.get("num_train_timesteps", 1000))), "diffusion")
    noise = of_betas(config, prediction)
    low, high = noise.sigmas
    notes = [
        f"variance-preserving noise of {noise.steps} steps from sigma = {low:.4g} to {high:.4g}; between two steps t is linear "
        "in ln sigma"
    ]
    if high < 80:
        notes.append(f"the model never saw noise above sigma = {high:.4g}: at higher levels it is told the last step")
    if config.get("clip_sample"):
        notes.append("its own samplers clip every estimate of the image to [-1, 1]; ours do not")
    return Noise(noise, "diffusion", notes=tuple(notes))


def of_betas(config: dict[str, Any], prediction: str) -> VariancePreserving:
    """A discrete variance-preserving scheduler's noise, with diffusers' defaults for what it leaves out."""
    if prediction not in get_args(Prediction):
        known = ", ".join(get_args(Prediction))
        raise FewstepError(f"unknown prediction type {prediction!r}: {known} and flow_prediction can be converted")
    return VariancePreserving(
        prediction=cast(Prediction, prediction),
        schedule=config.get("beta_schedule", "linear"),
        beta_start=config.get("beta_start", 1e-4),
        beta_end=config.get("beta_end", 0.02),
        steps=int(config.get("num_train_timesteps", 1000)),
        zero_snr=bool(config.get("rescale_betas_zero_snr")),
        betas=tuple(config.get("trained_betas") or ()),
    )


def of_consistency(config: dict[str, Any]) -> Noise:
    """OpenAI's consistency models: the second of two steps is at the middle of the scheduler's own grid."""
    from diffusers import CMStochasticIterativeScheduler

    scheduler: Any = CMStochasticIterativeScheduler.from_config(config)
    if scheduler.config.sigma_max != 80:
        raise FewstepError(
            f"the scheduler begins at sigma_max = {scheduler.config.sigma_max}: only 80 can be converted"
        )
    scheduler.set_timesteps(2)
    return Noise(
        Scaled(), "consistency", scheduler.config.sigma_data, scheduler.config.sigma_min,
        float(scheduler.sigmas[1]), bool(scheduler.config.clip_denoised),
    )  # fmt: skip


def network_of(
    model: Literal["UNet2DModel", "DiTTransformer2DModel"], config: dict[str, Any], speaks: AnyParametrisation,
    tensors: dict[str, Tensor],
) -> Network:  # fmt: skip
    """Our own configuration where it builds exactly this network, else the published one as it stands."""
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    stock = Stock(model, json.dumps(plain), speaks)
    if model != "UNet2DModel" or not isinstance(speaks, Scaled):
        return stock
    try:
        own = as_unet(plain, tensors)
        with torch.device("meta"):
            built: Any = own.build(sample_shape(config), classes(config))
            theirs: Any = stock.build(sample_shape(config), classes(config))
    except (FewstepError, KeyError, TypeError, IndexError):
        return stock
    same = configuration(built.unet) == configuration(theirs.unet)
    return replace(own, time_scale=speaks.scale) if same else stock


def configuration(network: Any) -> dict[str, Any]:
    """A diffusers network's configuration, for comparisons."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in network.config.items()
        if not key.startswith("_")
    }


def as_unet(config: dict[str, Any], tensors: dict[str, Tensor]) -> UNet:
    """The UNet that a UNet2DModel's configuration may be; whether it is, its caller must see."""
    widths, size = config["block_out_channels"], config["sample_size"]
    attention = tuple(size >> i for i, kind in enumerate(config["down_block_types"]) if kind.startswith("Attn"))
    weight = tensors.get("time_embedding.linear_1.weight")
    slow = slow_columns(widths[0], config.get("freq_shift", 0))
    cut = weight is not None and any(slow) and not weight[:, [not kept for kept in slow]].any()
    return UNet(
        channels=widths[0], multipliers=tuple(width // widths[0] for width in widths),
        layers=config.get("layers_per_block", 2), attention=attention, head_dim=config.get("attention_head_dim", 8),
        dropout=config.get("dropout", 0.0), norm_groups=config.get("norm_num_groups", 32), low_frequency_time=bool(cut),
        middle_norm=config.get("attn_norm_num_groups") is not None,
    )  # fmt: skip


def class_names(index: dict[str, Any], count: int) -> tuple[str, ...]:
    """The names of the classes as DiTPipeline keeps them in its index."""
    told = index.get("id2label") or {}
    names = tuple(str(told[str(i)]).split(",")[0] for i in range(count) if str(i) in told)
    return names if len(names) == count else ()
