"""PyTorch archives (.pt, .pth, .ckpt, .bin) of other people's models, read as tensors and plain containers only.

OpenAI's consistency models (arXiv:2303.01469; github.com/openai/consistency_models, MIT): state dicts of their UNetModel,
which is ADM. FastGen (github.com/NVlabs/FastGen): the networks of EDM and EDM2, flat as its download script converts them,
or several of them under "model" as its trainer saves them.

Neither file holds its network's configuration: it is inferred from the names and shapes, and strictly checked.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from fewstep.hub import edm, edm2
from fewstep.hub.folders import network_of
from fewstep.hub.foreign import Foreign, Key, Kind, UnknownModel, fit
from fewstep.hub.weights import archive_content
from fewstep.networks import Architecture, EDMUNet, Network
from fewstep.networks.stock import Scaled
from fewstep.types import FewstepError

State: TypeAlias = Mapping[str, Tensor]

RESOLUTIONS = {4: 64, 6: 256}  # of OpenAI's networks, by their number of levels
SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
SECOND = {"cd_imagenet64": 22 / 39, "ct_imagenet64": 106 / 200}  # OpenAI's launch.sh: where on Karras' schedule
RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "qkv": "qkv", "proj_out": "to_out.0"}


def read_archive(
    path: Path, strict: bool = True, kind: Kind | None = None, resolution: int | None = None
) -> Foreign | None:
    """The model in the archive; None if its tensors belong to no known family.

    kind: by default as the published files are named (cd_, ct_: consistency; edm: diffusion). resolution: by default 64
    for OpenAI's networks of 4 levels and 256 for 6. Of several networks in a file, the first EMA is taken.
    FewstepError: unreadable, holds more than tensors, kind or resolution unknown, does not fit (see hub.foreign.fit).
    """
    held = states(archive_content(path))
    for known, convert in ((is_openai, from_openai), (is_fastgen, from_fastgen)):
        names = [name for name, state in held.items() if known(state)]
        if names:
            name = next((name for name in names if name.rpartition(".")[2].startswith("ema")), names[0])
            foreign = convert(held[name], path, strict, kind or named_kind(path), resolution)
            others = ", ".join(other for other in names if other != name)
            note = f"The file holds several networks: {name} was taken, not {others}."
            return replace(foreign, notes=(*foreign.notes, note)) if others else foreign
    return None


def states(content: Any, name: str = "", depth: int = 2) -> dict[str, dict[str, Tensor]]:
    """The dicts of tensors in an archive, by their place in it: "", "ema", "model.net", ..."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {key: held for key, held in content.items() if isinstance(key, str) and isinstance(held, Tensor)}
    found = {name: tensors} if tensors else {}
    for key, held in content.items() if depth else ():
        found |= states(held, f"{name}.{key}".removeprefix("."), depth - 1)
    return found


def named_kind(path: Path) -> Kind:
    """cd_imagenet64_lpips.pt, ct_cat256.pt: consistency; edm_..., edm-...: diffusion; FewstepError for other names."""
    known: dict[str, Kind] = {"cd": "consistency", "ct": "consistency", "edm": "diffusion"}
    start = re.split(r"[^a-z]", path.name.lower())[0]
    if start not in known:
        raise UnknownModel(
            f"{path.name} does not say what it is: fewstep import it with --kind diffusion (a teacher) or --kind consistency"
        )
    return known[start]


def size(state: State, name: str, source: str) -> tuple[int, ...]:
    """The shape of a tensor that the configuration is read from."""
    if name not in state:
        raise FewstepError(f"{source} lacks {name}, which tells its configuration: give the whole file")
    return tuple(state[name].shape)


def indices(state: State, pattern: str) -> list[int]:
    """The numbers, ascending, where the pattern matches names from their start."""
    return sorted({int(match[1]) for name in state if (match := re.match(pattern, name))})


# --------------------------------------------------------------------------------------------- OpenAI: UNetModel (ADM)


def is_openai(state: State) -> bool:
    return bool(indices(state, r"output_blocks\.(\d+)\.")) and "time_embed.0.weight" in state


def from_openai(state: State, path: Path, strict: bool, kind: Kind, resolution: int | None) -> Foreign:
    """Their F at c_noise = 250 ln sigma as a UNet2DModel; their consistency models have the shifted boundary."""
    source = f"{path.name} (OpenAI consistency_models, UNetModel)"
    config = openai_config(state, resolution, source)
    network = network_of("UNet2DModel", config, Scaled(1000.0), {})
    shape = (config["in_channels"], config["sample_size"], config["sample_size"])
    sigma_min = SIGMA_MIN if kind == "consistency" else 0.0
    architecture = Architecture(network, shape, config["num_class_embeds"] or 0, 0.5, sigma_min)
    found = openai_tensors(state, openai_names(config, state))
    tensors, keys = fit(found, architecture, source, strict)
    fraction = next((f for start, f in SECOND.items() if path.name.startswith(start)), None)
    return Foreign(
        source=source,
        architecture=architecture,
        kind=kind,
        tensors=tensors,
        keys=tuple(thirds(keys)),
        notes=("The file tells neither its resolution nor its attention heads: 64 channels each, as published.",),
        lineage=("OpenAI consistency models (github.com/openai/consistency_models), MIT licence.",),
        second_sigma=None if fraction is None else karras(fraction),
        clip_denoised=True,
    )


def karras(fraction: float) -> float:
    """Noise level at a fraction of the way from SIGMA_MAX to SIGMA_MIN (arXiv:2206.00364, eq. 5)."""
    first, last = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return (first + fraction * (last - first)) ** RHO


def openai_config(state: State, resolution: int | None, source: str) -> dict[str, Any]:
    """The UNet2DModel that names and shapes tell; FewstepError for what it cannot express."""
    if any(re.match(r"(input|output)_blocks\.\d+\.\d\.(op|conv)\.", name) for name in state):
        raise FewstepError(f"{source} resamples outside of residual blocks (resblock_updown=False): not supported")
    channels = size(state, "input_blocks.0.0.weight", source)[1]
    if size(state, "out.2.weight", source)[0] != channels:
        raise FewstepError(f"{source} predicts a variance too (learn_sigma): not supported, it is no EDM or CM network")
    ups = indices(state, r"output_blocks\.(\d+)\.[12]\.in_layers\.")
    period = 1 + (ups[:1] or indices(state, r"output_blocks\.(\d+)\."))[-1]  # of blocks: residual ones and resampling
    if period > len(state):
        raise FewstepError(f"{source} counts {period} blocks in a level and holds fewer tensors: fetch it again")
    levels = len(ups) + 1
    resolution = resolution or RESOLUTIONS.get(levels)
    if not resolution:
        raise FewstepError(f"{source} does not tell its resolution, and {levels} levels are none of OpenAI's: tell it")
    firsts = [f"input_blocks.{1 + level * period}" for level in range(levels)]
    widths = [size(state, f"{first}.0.out_layers.3.weight", source)[0] for first in firsts]
    attends = [f"{first}.1.qkv.weight" in state for first in firsts]
    scaled = size(state, f"{firsts[0]}.0.emb_layers.1.weight", source)[0] == 2 * widths[0]
    return {
        "sample_size": resolution,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": period - 1,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in attends[::-1]],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift" if scaled else "default",
        "attention_head_dim": 64,
        "norm_num_groups": 32,
        "attn_norm_num_groups": 32,
        "norm_eps": 1e-5,
        "num_class_embeds": state["label_emb.weight"].shape[0] if "label_emb.weight" in state else None,
    }


def openai_names(config: Mapping[str, Any], state: State) -> dict[str, str]:
    """{their module: diffusers'} down to convolutions, linear layers and norms."""
    levels, period = len(config["block_out_channels"]), config["layers_per_block"] + 1
    residual, attention = {}, {"middle_block.1": "mid_block.attentions.0"}
    for level in range(levels):
        down, up = level * period, (levels - 1 - level) * period  # up: the last of their levels comes first
        for i in range(period):
            residual[f"output_blocks.{up + i}.0"] = f"up_blocks.{levels - 1 - level}.resnets.{i}"
            attention[f"output_blocks.{up + i}.1"] = f"up_blocks.{levels - 1 - level}.attentions.{i}"
        for i in range(period - 1):
            residual[f"input_blocks.{1 + down + i}.0"] = f"down_blocks.{level}.resnets.{i}"
            attention[f"input_blocks.{1 + down + i}.1"] = f"down_blocks.{level}.attentions.{i}"
        if level < levels - 1:
            residual[f"input_blocks.{down + period}.0"] = f"down_blocks.{level}.downsamplers.0"
            last = f"output_blocks.{(level + 1) * period - 1}"
            place = 2 if f"{last}.1.qkv.weight" in state else 1  # after the attention, if there is one
            residual[f"{last}.{place}"] = f"up_blocks.{level}.upsamplers.0"
    residual |= {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    return {
        "input_blocks.0.0": "conv_in",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb": "class_embedding",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        **{f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in residual.items() for a, b in RESIDUAL.items()},
        **{f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in attention.items() for a, b in ATTENTION.items()},
    }


def openai_tensors(state: State, names: Mapping[str, str]) -> dict[str, tuple[str, Tensor]]:
    """{our name: (their name, tensor)}: 1x1 convolutions as matrices, [q, k, v] in thirds, the heads in order in each."""
    found = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        ours = f"network.unet.{names.get(module, module)}"
        if ".attentions." in ours and tensor.ndim > 2:
            tensor = tensor.flatten(1)
        if ours.endswith(".qkv"):
            for letter, third in zip("qkv", tensor.chunk(3), strict=False):
                found[f"{ours.removesuffix('qkv')}to_{letter}.{leaf}"] = (name, third)
        else:
            found[f"{ours}.{leaf}"] = (name, tensor)
    return found


def thirds(keys: Iterable[Key]) -> Iterable[Key]:
    """The keys with a remark at the thirds of one tensor."""
    return (replace(key, remark=key.remark or "a third") if ".qkv." in key.theirs else key for key in keys)


# --------------------------------------------------------------------------- FastGen: DDPM++, NCSN++, ADM of EDM, and EDM2


def is_fastgen(state: State) -> bool:
    return bool(indices(state, r"(?:model|unet)\.enc\.(\d+)x"))


def from_fastgen(state: State, path: Path, strict: bool, kind: Kind, resolution: int | None) -> Foreign:
    """EDM's preconditioning for both kinds: FastGen's consistency models have their boundary at t = 0."""
    second = "unet.emb_noise.weight" in state
    source = f"{path.name} (FastGen, {'EDM2' if second else 'EDM'})"
    bare = {name.removeprefix("unet." if second else "model."): tensor for name, tensor in state.items()}
    told = outline(bare, "attn_qkv" if second else "qkv", "conv_res1" if second else "conv1", source)
    if resolution not in (None, told["img_resolution"]):
        raise FewstepError(f"{source} is a network for {told['img_resolution']} pixels: leave out {resolution}")
    if second:
        told |= {"img_channels": told.pop("in_channels") - 1, "label_dim": classes(bare, "emb_label.weight")}
        return noted(edm2.convert(told, state, source, strict, kind))
    labels = classes(bare, "map_label.weight")
    unused = {name: "of the loss only: its learned uncertainty" for name in state if "logvar_" in name}
    kept = {name: tensor for name, tensor in state.items() if name not in unused}
    if "out_conv.weight" in bare:
        told |= {"out_channels": size(bare, "out_conv.weight", source)[0], "dropout": 0.0}
        network: Network = edm.adm_network(told, source)
        found, constant = edm.adm_tensors(kept, told, source)
        unused |= constant
    else:
        network = song_network(bare, told, source)
        found, _ = edm.song_tensors(kept)
    side = told["img_resolution"]
    architecture = Architecture(network, (told["in_channels"], side, side), labels)
    tensors, keys = fit(found, architecture, source, strict, unused)
    return noted(
        Foreign(
            source=source,
            architecture=architecture,
            kind=kind,
            tensors=tensors,
            keys=tuple(edm.remarked(key, state) for key in keys),
            lineage=(edm.LINEAGE["EDMPrecond"],),
        )
    )


def noted(foreign: Foreign) -> Foreign:
    """With what holds for all of FastGen's files."""
    note = "The file tells neither sigma_data nor dropout: 0.5, as published, and none."
    return replace(foreign, notes=(*foreign.notes, note))


def outline(bare: State, qkv: str, conv: str, source: str) -> dict[str, Any]:
    """The arguments of the network's constructor that names and shapes tell."""
    sides = indices(bare, r"enc\.(\d+)x")[::-1]
    levels = [f"enc.{side}x{side}" for side in sides]
    width, channels = size(bare, f"{levels[0]}_conv.weight", source)[:2]
    widths = [size(bare, f"{level}_block0.{conv}.weight", source)[0] for level in levels]
    return {
        "img_resolution": sides[0],
        "in_channels": channels,
        "model_channels": width,
        "channel_mult": tuple(w // width for w in widths),
        "num_blocks": len(indices(bare, rf"enc\.{sides[0]}x{sides[0]}_block(\d+)\.")),
        "attn_resolutions": tuple(s for s in sides if f"enc.{s}x{s}_block0.{qkv}.weight" in bare),
    }


def classes(bare: State, name: str) -> int:
    return bare[name].shape[1] if name in bare else 0


def song_network(bare: State, told: Mapping[str, Any], source: str) -> EDMUNet:
    """DDPM++ or NCSN++; what is neither of them does not fit."""
    fourier = "map_noise.freqs" in bare
    if size(bare, "map_layer0.weight", source)[1] == 2 * told["model_channels"] * (1 + fourier):
        raise FewstepError(f"{source} is told two times (r_timestep, as MeanFlow is): not supported")
    return EDMUNet(
        channels=told["model_channels"],
        multipliers=told["channel_mult"],
        blocks=told["num_blocks"],
        attention=told["attn_resolutions"],
        dropout=0.0,
        style="ncsn++" if fourier else "ddpm++",
        augment_dim=classes(bare, "map_augment.weight"),
    )
