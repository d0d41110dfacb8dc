"""A trained model: a denoiser and what one must know to use it. Loading, saving and finding it in a run directory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep import codec, hub
from fewstep.data import Images, LatentSpace
from fewstep.files import read_json
from fewstep.networks import Architecture, Preconditioned
from fewstep.samplers import SECOND_SIGMA, DPMSolver, Heun, Sampler, few_step
from fewstep.snapshots import format as snapshot
from fewstep.snapshots import read_checkpoint
from fewstep.types import FewstepError

Kind = Literal["diffusion", "consistency"]
SOLVERS: dict[str, type[Heun] | type[DPMSolver]] = {"heun": Heun, "dpm": DPMSolver}


@dataclass(frozen=True)
class ModelInfo:
    """What a snapshot says about itself."""

    architecture: Architecture
    kind: Kind
    """diffusion: sample with many steps of an ODE solver; consistency: with one or a few"""
    weights: str = "online"
    """online, or the name of an average such as ema-0.9999"""
    nimg: int = 0
    """images seen in training"""
    recipe: str = ""
    data: str = ""
    heldout: float = 0.0
    """the fraction of the data kept out of training"""
    data_fingerprint: str = ""
    """of the images' names and labels, see fewstep.data.Images"""
    class_names: tuple[str, ...] = ()
    second_sigma: float = SECOND_SIGMA
    """EDM noise level of the second step; a search on this model replaces the papers' value"""
    initialised_from: str = ""
    """SHA-256 of the weights that training started from"""
    clip_denoised: bool = False
    """sampled with every estimate of the clean image clamped to [-1, 1] (OpenAI's consistency models)"""
    lineage: tuple[str, ...] = ()
    """where its weights come from and under which licence, for every foreign model that it descends from"""
    best: dict[str, Any] = field(default_factory=dict)
    """the stamped record that made these weights a run's best, if they are"""
    latents: LatentSpace | None = None
    """what its samples are to be decoded with; None: it makes pixels"""

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Of the images it makes, (C, H, W): of a latent model those that are decoded."""
        return self.latents.image_shape if self.latents else self.architecture.shape

    def trained_on(self, images: Images) -> bool:
        """Whether these are, by their names and labels, the images that training drew from, as pixels or as latents."""
        if self.latents:
            images = replace(images, shape=self.latents.shape, space=self.latents)
        return images.fingerprint == self.data_fingerprint

    def sampler(self, steps: int, solver: str | None = None) -> Sampler:
        """The model's own way of sampling in `steps` steps; a diffusion model's solver may be chosen: heun (its own), dpm."""
        if steps < 1:
            raise FewstepError(f"--steps must be 1 or more, got {steps}")
        if solver and self.kind != "diffusion":
            raise FewstepError("--solver is for diffusion models: a consistency model jumps to the image; leave it out")
        if solver and solver not in SOLVERS:
            raise FewstepError(f"unknown solver {solver!r}: use {' or '.join(SOLVERS)}")
        if self.kind == "diffusion":
            return SOLVERS[solver or "heun"].karras(steps)
        return few_step(steps, self.second_sigma, self.clip_denoised, self.architecture.sigma_min)

    def label(self, name: str | int | None) -> int | None:
        """The number of a class given by number or name; FewstepError when the model has no such class."""
        if name is None:
            return None
        classes = self.architecture.num_classes
        if not classes:
            raise FewstepError("this model is unconditional: leave out --label")
        if str(name) in self.class_names:
            return self.class_names.index(str(name))
        if str(name).isdecimal() and int(name) < classes:
            return int(name)
        known = ", ".join(self.class_names[:20]) or f"0 to {classes - 1}"
        raise FewstepError(f"unknown label {name!r}: this model knows {known}")


@dataclass(frozen=True)
class Model:
    """A denoiser in evaluation mode with its description; call it as D(x, sigma, label)."""

    denoiser: Preconditioned
    info: ModelInfo
    sha256: str = ""
    path: Path | None = None

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.denoiser(x, t, label)

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device


def save_model(path: Path, tensors: Mapping[str, Tensor], info: ModelInfo) -> str:
    """Write weights and description; returns the weights' SHA-256."""
    header = {f: codec.encode(v) for f, v in vars(info).items() if f != "best"}
    return snapshot.write(path, tensors, {"model": header, "best": info.best})


def read_info(header: Mapping[str, Any], path: Path) -> ModelInfo:
    """The description from a snapshot's header."""
    if "model" not in header:
        raise FewstepError(f"{path} holds a training state, not a model: give the run directory or a snapshot")
    try:
        return ModelInfo(**codec.decode(dict(header["model"])), best=header.get("best", {}))
    except TypeError as error:
        raise FewstepError(
            f"{path} does not fit this version of fewstep ({error}): use the version that made it"
        ) from None


def load(path: str | Path, device: torch.device | str = "cpu", trainable: bool = False) -> Model:
    """The model of a run directory (RUN: its best, else its first average, else the last weights; RUN:ema-0.999 or
    RUN:online by name), of a search's folder, of a snapshot file, or other people's: an EDM, ECT, TCM or EDM2 pickle, a
    diffusers folder or hub name, OpenAI's .pt, FastGen's .pth. trainable: in training mode, with gradients.

    FewstepError for anything unreadable.
    """
    file = find(path)
    stored = snapshot.read(file) if file.suffix == ".safetensors" or not file.exists() else read_checkpoint(file)
    if not stored.header:
        raise FewstepError(
            f"{file} does not say what network its weights are of: give a snapshot of fewstep's, a diffusers pipeline's folder "
            "with its scheduler, an EDM pickle, or OpenAI's or FastGen's archive"
        )
    info = read_info(stored.header, file)
    denoiser = info.architecture.build()
    load_weights(denoiser, stored.tensors, str(file))
    return Model(denoiser.to(device).train(trainable).requires_grad_(trainable), info, stored.weights_sha256, file)


def load_weights(denoiser: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a network; FewstepError with what differs when they are another architecture's."""
    own = denoiser.state_dict()
    differences = [f"{name} missing" for name in own.keys() - tensors.keys()]
    differences += [f"{name} unexpected" for name in tensors.keys() - own.keys()]
    differences += [
        f"{name} is {tuple(tensors[name].shape)}, needed {tuple(own[name].shape)}"
        for name in own.keys() & tensors.keys()
        if own[name].shape != tensors[name].shape
    ]
    if differences:
        some = "; ".join(sorted(differences)[:4])
        raise FewstepError(
            f"{source} is another architecture ({len(differences)} of {len(own)} tensors differ: {some}): "
            "match --network.* and the data's size and classes to it, or leave them out to inherit them"
        )
    denoiser.load_state_dict(dict(tensors))


def find(path: str | Path) -> Path:
    """The snapshot file that a MODEL argument means."""
    text = str(path)
    base, _, name = text.rpartition(":") if not Path(text).exists() and ":" in text else (text, "", "")
    folder = Path(base) if name else hub.resolve(base)
    if not folder.is_dir():
        return folder if not name else Path(text)
    if not name and any((folder / file).is_file() for file in ("model_index.json", "config.json")):
        return folder  # of diffusers
    averages, snapshots = folder / "averages", sorted((folder / "snapshots").glob("*.safetensors"))
    named = in_order(sorted(averages.glob("*.safetensors")), folder / "recipe.json")
    if name == "online" and snapshots:
        return snapshots[-1]
    candidates = (
        [averages / f"{name}.safetensors"]
        if name
        else [
            folder / "model.safetensors",  # of `fewstep import`
            folder / "combined.safetensors",
            averages / "best.safetensors",
            *named,
            *snapshots[-1:],
        ]
    )
    for candidate in candidates:
        if candidate.exists():
            return candidate
    known = ", ".join([p.stem for p in named] + ["online"] * bool(snapshots))
    if known:
        raise FewstepError(f"{folder} has no weights called {name!r}: it has {known}")
    raise FewstepError(
        f"{folder} holds no model: give a run directory that has saved at least once, or a snapshot file"
    )


def in_order(files: list[Path], recipe: Path) -> list[Path]:
    """The averages' files, those of the recipe first and in its order."""
    laws = codec.decode(read_json(recipe).get("averages", [])) if recipe.exists() else ()
    names = [law.name for law in laws]
    return sorted(files, key=lambda file: names.index(file.stem) if file.stem in names else len(names))


def check_latents(images: Images, sigma_data: float, init: ModelInfo | None = None) -> None:
    """FewstepError unless a recipe's sigma_data, and the model that it starts from, go with the latents to train on.

    (Models from elsewhere do not say which latents they are of.)
    """
    space = images.space
    if space and space.sigma_data != sigma_data:
        raise FewstepError(
            f"the latents of {images.name} are normalised to a standard deviation of {space.sigma_data}, the recipe has "
            f"sigma-data {sigma_data}: give --sigma-data {space.sigma_data}, or repeat their `fewstep encode` with "
            f"--sigma-data {sigma_data} (nothing is encoded again)"
        )
    if init and init.latents and not (space and init.latents.same_as(space)):
        other = "are of another VAE, size or statistics" if space else "are images"
        raise FewstepError(
            f"the model of --init was trained on latents of {init.latents.vae}, these data {other}: give the latents that it "
            "was trained on, or start without --init"
        )


def check_ours(model: Model) -> None:
    """FewstepError unless the model lies in a snapshot of ours, in which something can be stored."""
    if model.path is None or model.path.suffix != ".safetensors":
        raise FewstepError(
            f"{model.path} is another program's: `fewstep import` it first, then its second sigma can be stored"
        )


def store_second_sigma(model: Model, sigma: float) -> Model:
    """Write the second step's noise level into the model's file and its copies beside it; the weights stay the same."""
    assert model.path is not None
    check_ours(model)
    for file in model.path.parent.glob("*.safetensors"):
        header = snapshot.peek(file, snapshot.FORMAT) or {}
        if header.get("weights_sha256") == model.sha256 and "model" in header:
            info = replace(read_info(header, file), second_sigma=sigma)
            save_model(file, model.denoiser.state_dict(), info)
    return replace(model, info=replace(model.info, second_sigma=sigma))


__all__ = [
    "Model",
    "ModelInfo",
    "check_latents",
    "check_ours",
    "find",
    "load",
    "load_weights",
    "save_model",
    "store_second_sigma",
]
