"""A model of other people as one of ours: its tensors under our names, and what became of every key."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor

from fewstep import codec
from fewstep.data import LatentSpace
from fewstep.networks import Architecture
from fewstep.types import FewstepError

Kind: TypeAlias = Literal["diffusion", "consistency"]
SHOWN = 20  # rows of a table of keys in an error


class UnknownModel(FewstepError):
    """A whole and harmless file that says of no model here what it is: its tensors can still be combined under their names."""


@dataclass(frozen=True)
class Key:
    """What became of one tensor."""

    theirs: str
    """its name in the source; empty: the source has none"""
    ours: str
    """its name in the denoiser's state dict; empty: there is no place for it"""
    shape: tuple[int, ...]
    """of theirs, of ours where they have none"""
    remark: str = ""
    """why it was left out, transposed, split, ...; empty: taken as it is"""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model read from a foreign file, without executing anything in it."""

    source: str
    """what kind of file it is, in a few words: EDM pickle (EDMPrecond, SongUNet)"""
    architecture: Architecture
    kind: Kind
    tensors: dict[str, Tensor]
    """float32, named as in architecture.build().state_dict()"""
    keys: tuple[Key, ...]
    notes: tuple[str, ...] = ()
    """what a user should know of the conversion, a sentence each"""
    lineage: tuple[str, ...] = ()
    """where the weights come from and under which licence, a sentence each; inherited by every student"""
    second_sigma: float | None = None
    """noise level of the second sampling step (EDM sigma); None: it is not told"""
    clip_denoised: bool = False
    """sampled with every estimate of the clean image clipped to [-1, 1]"""
    class_names: tuple[str, ...] = ()
    latents: LatentSpace | None = None
    """what its samples are to be decoded with; None: it makes pixels"""
    described: dict[str, Any] = field(default_factory=dict)
    """of our own exports: the model's description as it stands in a snapshot's header"""

    def header(self) -> dict[str, Any]:
        """The description as a snapshot's header has it."""
        told = {
            "architecture": codec.encode(self.architecture), "kind": self.kind, "weights": "imported",
            "class_names": list(self.class_names), "clip_denoised": self.clip_denoised, "lineage": list(self.lineage),
            "latents": codec.encode(self.latents),
        }  # fmt: skip
        second = {"second_sigma": self.second_sigma} if self.second_sigma else {}
        return {"model": self.described or told | second}


def fit(
    found: Mapping[str, tuple[str, Tensor]], architecture: Architecture, source: str, strict: bool = True,
    left_out: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], tuple[Key, ...]]:  # fmt: skip
    """The state dict of the architecture from `found`, {our name: (their name, tensor)}, and what became of every key.

    left_out: {their name: why} of tensors that the model does not need. FewstepError with a table when a key is missing,
    left over or of another shape; with strict=False those of ours keep their initial values, and theirs are dropped.
    """
    own = architecture.build().state_dict()
    tensors, keys, wrong = {}, [], []
    for name, initial in own.items():
        theirs, tensor = found.get(name, ("", initial))
        if theirs and tensor.shape == initial.shape:
            tensors[name] = tensor.detach().to(initial.dtype).contiguous()
            keys.append(Key(theirs, name, tuple(tensor.shape)))
            continue
        tensors[name] = initial
        remark = f"here {tuple(initial.shape)}" if theirs else "missing in the source"
        wrong.append(Key(theirs, name, tuple(tensor.shape), f"{remark}: initial values"))
    wrong += [
        Key(theirs, "", tuple(tensor.shape), "unknown here: dropped")
        for name, (theirs, tensor) in found.items()
        if name not in own
    ]
    if wrong and strict:
        raise FewstepError(
            f"{source}: {len(wrong)} of {len(own)} tensors do not fit the network that it describes:\n{table(wrong[:SHOWN])}\n"
            + (f"... and {len(wrong) - SHOWN} more\n" if len(wrong) > SHOWN else "")
            + "give the whole file, or import what fits with --no-strict"
        )
    keys += [Key(theirs, "", (), why) for theirs, why in (left_out or {}).items()]
    return tensors, (*keys, *wrong)


def table(keys: list[Key]) -> str:
    """Rows of text: theirs, ours, shape, remark."""
    rows = [(key.theirs or "-", key.ours or "-", "x".join(map(str, key.shape)) or "1", key.remark) for key in keys]
    widths = [max(len(row[i]) for row in rows) for i in range(3)] if rows else []
    return "\n".join(
        "  " + "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )
