"""EDM2's pickles (Karras et al. 2024, arXiv:2312.02696), and ECT's on ImageNet, as an EDM2UNet."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fewstep.hub.edm import brief, check_size, possible
from fewstep.hub.foreign import Foreign, Kind, fit
from fewstep.hub.unpickle import Module, printable
from fewstep.networks import Architecture
from fewstep.networks.edm2_unet import BALANCE, LARGEST, EDM2UNet
from fewstep.types import FewstepError

FIELDS = {
    "model_channels": "channels", "channel_mult": "multipliers", "num_blocks": "blocks", "attn_resolutions": "attention",
    "channels_per_head": "head_dim", "label_balance": "label_balance", "concat_balance": "concat_balance",
    "dropout": "dropout", "dropout_res": "dropout_max_resolution",
}  # fmt: skip
FIXED: dict[str, tuple[Any, ...]] = {
    "resample_filter": ((1, 1),), "res_balance": (BALANCE,), "attn_balance": (BALANCE,), "clip_act": (LARGEST,),
}  # fmt: skip
MULTIPLIERS = ("channel_mult_noise", "channel_mult_emb")  # None: as the configuration has them
OUTER = ("img_resolution", "img_channels", "label_dim", "sigma_data", "use_fp16", "logvar_channels")
LOGVAR = "of the training loss only: its learned uncertainty"
LINEAGE = "EDM2 weights (NVIDIA), CC BY-NC-SA 4.0: non-commercial, share alike"


def from_module(module: Module, path: Path, strict: bool = True, kind: Kind | None = None) -> Foreign:
    """The denoiser of a `Precond`; kind: diffusion unless it is told.

    FewstepError: another class, an argument that is missing or not supported (named), a tensor that does not fit.
    """
    if module.kind != "Precond":
        raise FewstepError(f"{path.name} holds a {module.kind}, not EDM2's Precond: give a network's pickle")
    return convert(module.arguments, module.state(), f"{path.name} (EDM2, Precond)", strict, kind or "diffusion")


def convert(
    arguments: Mapping[str, Any], state: Mapping[str, Tensor], source: str, strict: bool, kind: Kind
) -> Foreign:
    """The model from the constructor's arguments and the tensors under EDM2's names."""
    architecture = architecture_of(arguments, source)
    check_size(architecture, state, source)
    left_out = {name: LOGVAR for name in state if name.startswith("logvar_")}
    found = {}
    for name, tensor in state.items():
        if name not in left_out:
            held = tensor.reshape(()) if name.endswith("_gain") and tensor.numel() == 1 else tensor  # [1] in FastGen's
            found[f"network.{name.removeprefix('unet.')}"] = (name, held)
    tensors, keys = fit(found, architecture, source, strict, left_out)
    latents = (
        "It makes the latents of EDM2's own Stable Diffusion VAE, normalised per channel: it needs EDM2's decoder."
    )
    return Foreign(
        source=source,
        architecture=architecture,
        kind=kind,
        tensors=tensors,
        keys=keys,
        notes=(latents,) if architecture.shape[0] == 4 else (),
        lineage=(LINEAGE,),
    )


def architecture_of(arguments: Mapping[str, Any], source: str) -> Architecture:
    """What the arguments of EDM2's Precond describe; FewstepError naming the first that is missing or not supported."""
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in arguments.items()}
    missing = [name for name in OUTER[:3] if name not in given]
    if missing:
        raise FewstepError(f"{source} tells no {missing[0]}: give a pickle as EDM2's training saves it")
    refuse([name for name in given if name not in MULTIPLIERS and not possible(name, given[name])], given, source)
    given["dropout_res"] = given.get("dropout_res") or None  # 0: in all blocks
    try:
        network = EDM2UNet(**{ours: given[name] for name, ours in FIELDS.items() if given.get(name) is not None})
        noise, emb = network.multipliers[0], max(network.multipliers)
        allowed = FIXED | {"channel_mult_noise": (None, noise), "channel_mult_emb": (None, emb)}
        others = given.keys() - FIELDS.keys() - set(OUTER)
        refuse([name for name in others if given[name] not in allowed.get(name, ())], given, source)
        shape = (given["img_channels"], given["img_resolution"], given["img_resolution"])
        architecture = Architecture(network, shape, given["label_dim"], given.get("sigma_data", 0.5))
        architecture.skeleton()
    except (TypeError, RuntimeError):
        raise FewstepError(f"{source} has arguments of the wrong types: fetch it again") from None
    return architecture


def refuse(names: list[str], given: Mapping[str, Any], source: str) -> None:
    """FewstepError if there are any names of arguments."""
    if names:
        shown = printable(", ".join(f"{name}={brief(given[name])}" for name in sorted(names)))
        raise FewstepError(f"{source} has {shown}: only networks of EDM2's configuration G are supported")
