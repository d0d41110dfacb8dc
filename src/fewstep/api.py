"""The Python API: the verbs of the command line as typed functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import UInt8
from torch import Tensor

from fewstep.data import DataSpec, open_images, to_uint8
from fewstep.evaluation import Generator, reference_of
from fewstep.evaluation import evaluate as evaluate_stream
from fewstep.metrics import Extractor, Record, Reference, load_extractor
from fewstep.model import Model
from fewstep.objectives import Networks, PairObjective
from fewstep.progress import Progress
from fewstep.recipes import recipe as get_recipe
from fewstep.run import train
from fewstep.samplers import Sampler
from fewstep.types import FewstepError, Labels, Sample

__all__ = ["evaluate", "generator", "get_recipe", "loss", "measure_against", "sample", "train"]

Which: TypeAlias = Literal["train", "heldout", "all"]


def generator(model: Model, batch: int = 500) -> Generator:
    """The model as a stream of samples: generator(model)(sampler, num, seed) yields batches in [-1, 1]."""
    arch = model.info.architecture
    return Generator(model.denoiser, arch.shape, arch.num_classes, model.device, batch)


def sample(
    model: Model, steps: int = 1, num: int = 64, seed: int = 0, label: int | str | None = None,
    sampler: Sampler | None = None,
) -> UInt8[Tensor, "n c h w"]:  # fmt: skip
    """Images uint8 [num, C, H, W]. label: a class by number or name (None: uniform). sampler: None for the model's own."""
    number = model.info.label(label)
    batches = generator(model)(sampler or model.info.sampler(steps), num, seed, number)
    return torch.cat([to_uint8(samples).cpu() for samples in batches])


def loss(
    model: Model, objective: PairObjective, x: Sample, label: Labels = None, progress: Progress | None = None, seed: int = 0
) -> dict[str, Tensor]:  # fmt: skip
    """The terms of an objective on a batch x [n, C, H, W] in [-1, 1], each a scalar; their sum is the loss.

    For gradients load the model with load(path, trainable=True).
    """
    return objective(Networks(model.denoiser), x, label, progress or Progress(0, 1), seed)


def evaluate(
    model: Model, data: str | DataSpec, steps: int = 1, metrics: Sequence[str] = ("fd",), extractor: str = "digits",
    num: int = 5000, seeds: int = 3, reference: Which = "train", heldout: float | None = None,
    weights: Path | None = None, sampler: Sampler | None = None,
) -> list[Record]:  # fmt: skip
    """Stamped records of a model against a split of a data source: mean and spread over noise seeds 0 .. seeds - 1."""
    features, real = measure_against(model, data, extractor, reference, heldout, weights)
    return evaluate_stream(
        generator(model), sampler or model.info.sampler(steps), real, features, num, range(seeds), metrics,
        model=str(model.path or ""), model_sha256=model.sha256,
    )  # fmt: skip


def measure_against(
    model: Model, data: str | DataSpec, extractor: str = "digits", reference: Which = "train",
    heldout: float | None = None, weights: Path | None = None,
) -> tuple[Extractor, Reference]:  # fmt: skip
    """The features to measure a model with, and the reference: a split of the data at the model's size, held out as it was.

    heldout: another fraction than the model's training held out; refused where it would call training images held out.
    """
    if isinstance(data, str):
        own = model.info.heldout if heldout is None else heldout
        data = DataSpec(data, resolution=model.info.architecture.shape[-1], heldout=own)
    images = open_images(data)
    seen = images.fingerprint == model.info.data_fingerprint and data.heldout > model.info.heldout
    if reference == "heldout" and seen:
        raise FewstepError(
            f"the model was trained with {model.info.heldout:g} held out: at {data.heldout:g} some of its training images "
            "would count as held out; leave out --heldout, or compare with --reference train"
        )
    features = load_extractor(extractor, str(model.device), weights)
    return features, reference_of(images, features, reference, data.heldout)
