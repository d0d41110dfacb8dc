"""diffusers folders: pipelines of a UNet2DModel or a DiTTransformer2DModel, and what their scheduler says of the noise."""

import inspect
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from fewstep import codec
from fewstep.data import LatentSpace
from fewstep.hub.foreign import Foreign, Kind, UnknownModel, fit
from fewstep.hub.weights import folder_tensors, weights_hash
from fewstep.networks import Architecture, Network, UNet
from fewstep.networks.stock import (
    MODELS,
    AnyParametrisation,
    Flow,
    Prediction,
    Scaled,
    Stock,
    StockModel,
    VariancePreserving,
    classes,
    sample_shape,
)
from fewstep.networks.unet import slow_columns
from fewstep.types import FewstepError

OLD_ATTENTION = re.compile(r"(.*attentions?\.\d+\.)(query|key|value|proj_attn)(\.(?:weight|bias))")
NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
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

    FewstepError for what is not exactly representable, for components that need remote code, for damaged files;
    UnknownModel for a network or a scheduler that is none of those known here.
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
        return ours(folder, network, strict, kind)
    places = (folder / "scheduler", folder, folder.parent / "scheduler")
    files = [place / "scheduler_config.json" for place in places]
    scheduler = next((file for file in files if file.is_file()), None)
    if scheduler is None:
        return None
    model, config, dropped = stock_config(read_config(network / "config.json"), network)
    noise = noise_of(read_config(scheduler), folder)
    tensors = renamed(folder_tensors(network))
    arch = Architecture(
        network_of(model, config, noise.parametrisation, tensors), sample_shape(config), classes(config),
        noise.sigma_data, noise.sigma_min,
    )  # fmt: skip
    named = {f"network.unet.{name}": (name, tensor) for name, tensor in tensors.items()}
    held, keys = fit(named, arch, str(network), strict)
    vae = next((part for part in ("vae", "vqvae") if index.get(part)), "")
    notes = (
        *noise.notes,
        *([f"left out of its config.json, as diffusers does: {', '.join(dropped)}"] if dropped else []),
    )
    space = space_of(folder / vae, arch) if vae and index[vae][1] == "AutoencoderKL" else None
    if vae and not space:
        notes = (*notes, f"its samples are latents of a {index[vae][1]}, which fewstep cannot decode")
    return Foreign(
        source=f"diffusers {index.get('_class_name', model)} ({model}, {read_config(scheduler)['_class_name']})",
        architecture=arch, kind=kind or noise.kind, tensors=held, keys=keys, notes=notes, latents=space,
        second_sigma=noise.second_sigma, clip_denoised=noise.clip_denoised, class_names=class_names(index, classes(config)),
        lineage=(f"{index.get('_name_or_path') or folder.name}, a diffusers folder: its licence is that of its page",),
    )  # fmt: skip


def stock_config(config: dict[str, Any], network: Path) -> tuple[StockModel, dict[str, Any], list[str]]:
    """The class, its configuration, and the names in it that the class does not know; UnknownModel for other classes."""
    import diffusers

    model = str(config.get("_class_name"))
    if model == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        model = "DiTTransformer2DModel"  # as it was called
    if model not in MODELS:
        raise UnknownModel(f"{network} is a {model}: {' and '.join(MODELS)} can be imported")
    known = inspect.signature(getattr(diffusers, model).__init__).parameters
    plain = {key: value for key, value in config.items() if not key.startswith("_")}
    kept = {key: value for key, value in plain.items() if key in known}
    return cast(StockModel, model), kept, [key for key in plain if key not in known and plain[key] not in (None, False)]


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Attention's tensors under the names that they have had since 2023, as diffusers renames them."""

    def new(name: str) -> str:
        found = OLD_ATTENTION.fullmatch(name)
        return f"{found[1]}{NEW_ATTENTION[found[2]]}{found[3]}" if found else name

    return {new(name): tensor for name, tensor in tensors.items()}


def space_of(vae: Path, arch: Architecture) -> LatentSpace:
    """The latents of a pipeline's AutoencoderKL as diffusers scales them: times its scaling factor, no mean taken off."""
    config = read_config(vae / "config.json")
    digest = weights_hash({name: tensor.float() for name, tensor in renamed(folder_tensors(vae)).items()})
    factor, (channels, height, width) = 2 ** (len(config["block_out_channels"]) - 1), arch.shape
    spread = (arch.sigma_data / float(config.get("scaling_factor", 0.18215)),) * channels
    return LatentSpace(
        str(vae.resolve()), digest, height * factor, (channels, height, width), (0.0,) * channels, spread, arch.sigma_data,
    )  # fmt: skip


def ours(folder: Path, network: Path, strict: bool, kind: Kind | None) -> Foreign:
    """A folder that `fewstep export` wrote: the description says everything, the weights are where diffusers wants them."""
    told = read_config(folder / DESCRIPTION)
    try:
        found = codec.decode(told)
        arch, space = found["architecture"], found.get("latents")
        fine = isinstance(arch, Architecture) and found["kind"] in get_args(Kind)
        fine &= isinstance(space, LatentSpace | None) and isinstance(found.get("second_sigma", 1.0), int | float)
        if not fine:
            raise FewstepError("a part of it has another type")
    except (KeyError, TypeError, FewstepError) as error:
        raise FewstepError(
            f"{folder / DESCRIPTION} does not fit this version of fewstep ({error}): remove it to read the folder like others"
        ) from None
    if space and (folder / space.vae).is_dir():  # it came along
        told["latents"] = codec.encode(replace(space, vae=str((folder / space.vae).resolve())))
    named = {own_name(name, arch.network): (name, tensor) for name, tensor in folder_tensors(network).items()}
    held, keys = fit(named, arch, str(network), strict)
    return Foreign(
        source="fewstep's own export", architecture=arch, kind=kind or found["kind"], tensors=held, keys=keys,
        described=told | ({"kind": kind} if kind else {}), lineage=tuple(told.get("lineage", ())),
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
    odd = [flag for flag in ("use_dynamic_shifting", "invert_sigmas") if config.get(flag)]
    odd += ["timestep_type"] * (config.get("timestep_type", "discrete") != "discrete")
    if odd:
        raise FewstepError(
            f"{folder}: {name} with {odd[0]}={config[odd[0]]!r} tells the network another time: not supported"
        )
    if name == "FlowMatchEulerDiscreteScheduler":
        steps = int(config.get("num_train_timesteps", 1000))
        return Noise(Flow(steps), "diffusion")
    if name not in DISCRETE:
        raise UnknownModel(f"{folder}: the scheduler {name} is unknown here: its noise cannot be converted exactly")
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
    import diffusers

    if prediction not in get_args(Prediction):
        known = ", ".join(get_args(Prediction))
        raise FewstepError(f"unknown prediction type {prediction!r}: {known} and flow_prediction can be converted")
    signature = inspect.signature(getattr(diffusers, config["_class_name"]).__init__).parameters

    def told(name: str) -> Any:
        return config.get(name, signature[name].default if name in signature else None)

    return VariancePreserving(
        prediction=cast(Prediction, prediction), schedule=told("beta_schedule"), beta_start=float(told("beta_start")),
        beta_end=float(told("beta_end")), steps=int(told("num_train_timesteps")),
        zero_snr=bool(told("rescale_betas_zero_snr")), betas=tuple(told("trained_betas") or ()),
    )  # fmt: skip


def of_consistency(config: dict[str, Any]) -> Noise:
    """OpenAI's consistency models: the second of two steps is at the middle of the scheduler's own grid."""
    from diffusers import CMStochasticIterativeScheduler

    scheduler: Any = CMStochasticIterativeScheduler.from_config(config)
    own = scheduler.config
    if own.sigma_max != 80 or not 0 <= own.sigma_min < 1 or own.s_noise != 1:
        raise FewstepError(
            f"the scheduler has sigma_max {own.sigma_max}, sigma_min {own.sigma_min}, s_noise {own.s_noise}: only "
            "sigma_max 80, sigma_min below 1 and s_noise 1 can be converted"
        )
    scheduler.set_timesteps(2)
    return Noise(
        Scaled(), "consistency", own.sigma_data, own.sigma_min, float(scheduler.sigmas[1]), bool(own.clip_denoised),
    )  # fmt: skip


def network_of(
    model: StockModel, config: dict[str, Any], speaks: AnyParametrisation,
    tensors: dict[str, Tensor],
) -> Network:  # fmt: skip
    """Our own configuration where it builds exactly this network, else the published one as it stands."""
    stock = Stock(model, json.dumps(config), speaks)
    if model != "UNet2DModel" or not isinstance(speaks, Scaled):
        return stock
    try:
        own = as_unet(config, tensors)
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
