"""Pickles of EDM (arXiv:2206.00364), ECT (2406.14548) and TCM (2410.14895): DDPM++, NCSN++ and ADM networks.

DDPM++ and NCSN++ become our EDMUNet, name by name. ADM becomes diffusers' UNet2DModel: its blocks are renamed, and the
1x1 convolution of an attention, whose channels 3i, 3i+1, 3i+2 are query, key and value of i = (head, channel), becomes
three matrices. All have the preconditioning of EDM's Table 1 with c_noise = ln(sigma) / 4.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor

from fewstep.hub.foreign import Foreign, Key, Kind, fit
from fewstep.hub.unpickle import Module, printable, read_pickle
from fewstep.networks import Architecture, EDMUNet, UNet
from fewstep.types import FewstepError

Found: TypeAlias = dict[str, tuple[str, Tensor]]

KEYS: Final = ("ema", "net", "model", "G_ema", "G")  # where a network is looked for, in this order
KINDS: Final[dict[str, Kind]] = {"EDMPrecond": "diffusion", "ECMPrecond": "consistency"}
SUPPORTED: Final = (
    "EDMPrecond (EDM), ECMPrecond (ECT, TCM) with a SongUNet or DhariwalUNet inside, and EDM2's Precond with its UNet"
)
LINEAGE: Final[dict[str, str]] = {
    "EDMPrecond": "EDM weights (NVIDIA), CC BY-NC-SA 4.0: non-commercial, share alike.",
    "ECMPrecond": "ECT or TCM weights: unless they were trained from scratch they descend from NVIDIA's EDM weights; their "
    "licence is to be assumed: CC BY-NC-SA 4.0, non-commercial, share alike.",
}

# constructors' arguments in order, with their defaults; ... has none
PRECOND: Final[dict[str, Any]] = {
    "img_resolution": ..., "img_channels": ..., "label_dim": 0, "use_fp16": False, "sigma_min": 0,
    "sigma_max": float("inf"), "sigma_data": 0.5, "model_type": "DhariwalUNet",
}  # fmt: skip
SONG: Final[dict[str, Any]] = {
    "img_resolution": ..., "in_channels": ..., "out_channels": ..., "label_dim": 0, "augment_dim": 0,
    "model_channels": 128, "channel_mult": (1, 2, 2, 2), "channel_mult_emb": 4, "num_blocks": 4,
    "attn_resolutions": (16,), "dropout": 0.10, "label_dropout": 0, "embedding_type": "positional",
    "channel_mult_noise": 1, "encoder_type": "standard", "decoder_type": "standard", "resample_filter": (1, 1),
    "attn_type": "dot", "emb_norm": False,
}  # fmt: skip  # the last two: TCM's
DHARIWAL: Final[dict[str, Any]] = {
    "img_resolution": ..., "in_channels": ..., "out_channels": ..., "label_dim": 0, "augment_dim": 0,
    "model_channels": 192, "channel_mult": (1, 2, 3, 4), "channel_mult_emb": 4, "num_blocks": 3,
    "attn_resolutions": (32, 16, 8), "dropout": 0.10, "label_dropout": 0,
}  # fmt: skip
LISTS: Final = {
    "channel_mult": 64,
    "attn_resolutions": 4096,
    "resample_filter": 64,
}  # the most that a number in it may be
LIMITS: Final = {
    "img_resolution": (1, 4096), "in_channels": (1, 64), "out_channels": (1, 64), "label_dim": (0, 100_000),
    "augment_dim": (0, 256), "model_channels": (1, 4096), "num_blocks": (1, 64), "channel_mult_noise": (1, 64),
}  # fmt: skip
FIXED: Final = {"channel_mult_emb": 4, "decoder_type": "standard", "attn_type": "dot", "emb_norm": False}
STYLES: Final[dict[tuple[Any, ...], Literal["ddpm++", "ncsn++"]]] = {
    ("positional", "standard", 1, (1, 1)): "ddpm++",
    ("fourier", "residual", 2, (1, 3, 3, 1)): "ncsn++",
}  # embedding_type, encoder_type, channel_mult_noise, resample_filter
RESIDUAL: Final = {
    "norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2",
    "skip": "conv_shortcut",
}  # fmt: skip
ATTENTION: Final = {"norm2": "group_norm", "qkv": "qkv", "proj": "to_out.0"}


def read_edm(path: Path, strict: bool = True, kind: Kind | None = None) -> Foreign:
    """The network of a pickle of EDM, EDM2, ECT or TCM; an exponential moving average where it holds one.

    kind: None for what the class of the network says: EDMPrecond is diffusion, ECMPrecond consistency. FewstepError: not
    a pickle of these, dangerous, damaged, a network that cannot be expressed here exactly, or (strict) keys do not fit.
    """
    key, precond = chosen(read_pickle(path), path)
    taken = (f"The network under {key!r} was taken.",) if key else ()
    if precond.kind == "Precond" and "unet" in precond.children:
        from fewstep.hub.edm2 import from_module

        foreign = from_module(precond, path, strict)
        return replace(foreign, kind=kind or foreign.kind, notes=(*taken, *foreign.notes))
    model = precond.children.get("model")
    if precond.kind not in KINDS or model is None or model.kind not in ("SongUNet", "DhariwalUNet"):
        holds = f"{precond.kind} with a {model.kind}" if model else precond.kind
        raise FewstepError(f"{path} holds a {holds}: supported are {SUPPORTED}; use one of these")

    source = f"{path.name} (EDM pickle: {precond.kind}, {model.kind})"
    song = model.kind == "SongUNet"
    signature = SONG if song else DHARIWAL
    given = arguments(model, signature, source)
    sigma_data = arguments(precond, PRECOND, source, passed_on=signature)["sigma_data"]
    network = song_network(given, source) if song else adm_network(given, source)
    shape = (given["in_channels"], given["img_resolution"], given["img_resolution"])
    architecture = Architecture(network, shape, given["label_dim"], float(sigma_data))
    state = precond.state()
    check_size(architecture, state, source)
    found, left_out = song_tensors(state) if song else adm_tensors(state, given, source)
    tensors, keys = fit(found, architecture, source, strict, left_out)
    return Foreign(
        source=source,
        architecture=architecture,
        kind=kind or KINDS[precond.kind],
        tensors=tensors,
        keys=tuple(remarked(key, state) for key in keys),
        notes=(*taken, *notes(precond, given)),
        lineage=(LINEAGE[precond.kind],),
    )


def chosen(content: Any, path: Path) -> tuple[str, Module]:
    """The key that the network is under ("" if the file is nothing else), and the network."""
    if isinstance(content, Module):
        return "", content
    held = content if isinstance(content, dict) else {}
    for key in KEYS:
        if isinstance(held.get(key), Module):
            return key, held[key]
    there = ", ".join(printable(brief(key)) for key in list(held)[:10]) or "none"
    raise FewstepError(f"{path} holds no network under {', '.join(KEYS)} (its keys: {there}): give a network snapshot")


def notes(precond: Module, given: Mapping[str, Any]) -> tuple[str, ...]:
    told = []
    if given["augment_dim"]:
        told.append("Its augmentation labels are zero here.")
    if precond.kind == "ECMPrecond":
        told.append(
            "D(x, sigma) = x at sigma = 0 here, as in the training of ECT and TCM and in TCM's evaluation; ECT's own "
            "evaluation moves that to sigma = 0.003, which changes c_out by 0.004 % at sigma 80 and 0.4 % at 0.8."
        )
    return tuple(told)


def remarked(key: Key, state: Mapping[str, Tensor]) -> Key:
    """The key with the shape of their tensor, and what was done to it."""
    remark = key.remark
    if not remark and key.ours.startswith("network.unet."):
        split, turned = ".qkv." in key.theirs, key.theirs == "model.map_label.weight"
        remark = "every third channel" if split else "transposed" if turned else ""
    return replace(key, shape=tuple(state[key.theirs].shape) if key.theirs else key.shape, remark=remark)


# --------------------------------------------------------------------------------------------------------- the arguments


def arguments(
    module: Module, signature: Mapping[str, Any], source: str, passed_on: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The constructor's arguments by name, lists as tuples, defaults filled in.

    passed_on: what it may have beside them, for a module inside. FewstepError for what is unknown or impossible.
    """
    names = list(signature)
    given = {
        names[int(name)] if name.isdecimal() and int(name) < len(names) else name: tuple(v) if type(v) is list else v
        for name, v in module.arguments.items()
    }
    told = {**signature, **given}
    wrong = [name for name in told if name not in signature and name not in (passed_on or {})]
    wrong += [f"{name}={brief(told[name])}" for name in names if not possible(name, told[name])]
    if wrong:
        shown = printable(", ".join(wrong))
        raise FewstepError(
            f"{source}: its {module.kind} has {shown}: only networks as EDM publishes them are supported"
        )
    return told


def brief(value: Any) -> str:
    """A file's value in a message, whatever it is."""
    if value is ...:
        return "(not told)"
    short = isinstance(value, str | float | bool) or (type(value) is int and abs(value) < 2**63)
    return str(value) if short else f"{type(value)}"


def possible(name: str, value: Any) -> bool:
    """Whether an argument may have the value: nothing that would build a monster, or another network."""
    if name in FIXED:
        return type(value) is type(FIXED[name]) and value == FIXED[name]
    if name in LISTS:
        return (
            type(value) is tuple and len(value) <= 16 and all(type(v) is int and 0 <= v <= LISTS[name] for v in value)
        )
    if name in LIMITS:
        least, most = LIMITS[name]
        return type(value) is int and least <= value <= most
    if name in ("dropout", "sigma_data"):
        return type(value) in (int, float) and 0 <= value < 1000 and (value > 0 or name == "dropout")
    return name not in ("embedding_type", "encoder_type") or type(value) is str


def same_channels(given: Mapping[str, Any], source: str) -> None:
    if given["in_channels"] != given["out_channels"]:
        raise FewstepError(
            f"{source} predicts {given['out_channels']} channels from {given['in_channels']}: not supported"
        )


def check_size(architecture: Architecture, state: Mapping[str, Tensor], source: str) -> None:
    """Before memory is taken for the network that the arguments describe."""
    needed = sum(tensor.numel() for tensor in architecture.skeleton().state_dict().values())
    held = sum(tensor.numel() for tensor in state.values())
    if needed > 4 * held:
        raise FewstepError(
            f"{source} describes a network of {needed:,} numbers and holds {held:,}: give a whole snapshot"
        )


# ------------------------------------------------------------------------------------------------------ DDPM++ and NCSN++


def song_network(given: Mapping[str, Any], source: str) -> EDMUNet:
    told = {name: given[name] for name in ("embedding_type", "encoder_type", "channel_mult_noise", "resample_filter")}
    style = STYLES.get(tuple(told.values()))
    if style is None:
        shown = printable(", ".join(f"{name}={value}" for name, value in told.items()))
        raise FewstepError(f"{source} is neither DDPM++ nor NCSN++ ({shown}): only these are supported")
    same_channels(given, source)
    return EDMUNet(
        channels=given["model_channels"],
        multipliers=given["channel_mult"],
        blocks=given["num_blocks"],
        attention=given["attn_resolutions"],
        dropout=float(given["dropout"]),
        style=style,
        augment_dim=given["augment_dim"],
    )


def song_tensors(state: Mapping[str, Tensor]) -> tuple[Found, dict[str, str]]:
    return {f"network.{name.removeprefix('model.')}": (name, tensor) for name, tensor in state.items()}, {}


# --------------------------------------------------------------------------------------------------------------------- ADM


def adm_network(given: Mapping[str, Any], source: str) -> UNet:
    """FewstepError for widths at which UNet2DModel would have other norm groups, heads or embeddings than ADM here.

    A norm of c channels has min(32, c // 4) groups in EDM, an attention c // 64 heads; the embeddings are 4 times as wide
    as model_channels there, and as the first level in diffusers.
    """
    widths = [given["model_channels"] * multiplier for multiplier in given["channel_mult"]]
    if any(w < 128 or w % 64 for w in widths) or given["channel_mult"][:1] != (1,):
        raise FewstepError(
            f"{source} has levels of {widths} channels: the first must be 1, all 128 or more in steps of 64"
        )
    same_channels(given, source)
    return UNet(
        channels=given["model_channels"],
        multipliers=given["channel_mult"],
        layers=given["num_blocks"],
        attention=given["attn_resolutions"],
        head_dim=64,
        dropout=float(given["dropout"]),
        norm_groups=32,
        low_frequency_time=False,
        time_scale=1.0,
        middle_norm=True,
    )


def adm_names(given: Mapping[str, Any]) -> dict[str, str]:
    """{their module: ours} of everything with parameters."""
    sides = [f"{given['img_resolution'] >> level}" for level in range(len(given["channel_mult"]))]
    sides, last = [f"{side}x{side}" for side in sides], len(sides) - 1
    blocks = {f"dec.{sides[last]}_in{i}": f"mid_block.resnets.{i}" for i in range(2)}
    for level, side in enumerate(sides):
        for i in range(given["num_blocks"]):
            blocks[f"enc.{side}_block{i}"] = f"down_blocks.{level}.resnets.{i}"
        for i in range(given["num_blocks"] + 1):
            blocks[f"dec.{side}_block{i}"] = f"up_blocks.{last - level}.resnets.{i}"
        if level > 0:
            blocks[f"enc.{side}_down"] = f"down_blocks.{level - 1}.downsamplers.0"
        if level < last:
            blocks[f"dec.{side}_up"] = f"up_blocks.{last - level - 1}.upsamplers.0"
    attentions = {theirs: ours.replace(".resnets.", ".attentions.") for theirs, ours in blocks.items()}
    return {
        "map_layer0": "time_embedding.linear_1",
        "map_layer1": "time_embedding.linear_2",
        "map_label": "class_embedding",
        f"enc.{sides[0]}_conv": "conv_in",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
        **{f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in blocks.items() for a, b in RESIDUAL.items()},
        **{f"{theirs}.{a}": f"{ours}.{b}" for theirs, ours in attentions.items() for a, b in ATTENTION.items()},
    }


def adm_tensors(state: Mapping[str, Tensor], given: Mapping[str, Any], source: str) -> tuple[Found, dict[str, str]]:
    """{our name: (theirs, tensor)}, and {their name: why} of those without a place in diffusers' network."""
    names, found, left_out = adm_names(given), {}, {}
    for name, tensor in state.items():
        module, _, leaf = name.removeprefix("model.").rpartition(".")
        ours = f"network.unet.{names.get(module, module)}"
        if leaf == "resample_filter":
            if not torch.equal(tensor.float(), torch.full((1, 1, 2, 2), 0.25)):
                raise FewstepError(f"{source} resamples with other filters than [1, 1] ({name}): not supported")
            left_out[name] = "constant: the mean of 2x2 pixels"
        elif module == "map_augment":
            left_out[name] = "of augmentation labels, which are zero here"
        elif module == "map_label" and tensor.ndim == 2:
            found[f"{ours}.{leaf}"] = (name, tensor.T)
        elif ours.endswith(".qkv") and tensor.ndim:
            for i, letter in enumerate("qkv"):
                found[f"{ours.removesuffix('qkv')}to_{letter}.{leaf}"] = (name, matrix(tensor)[i::3])
        else:
            found[f"{ours}.{leaf}"] = (name, matrix(tensor) if ours.endswith(".to_out.0") else tensor)
    return found, left_out


def matrix(weight: Tensor) -> Tensor:
    """A 1x1 convolution's weight [c', c, 1, 1] as [c', c]; a bias stays."""
    return weight.flatten(1) if weight.ndim > 1 else weight
