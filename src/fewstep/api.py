"""The Python API: the verbs of the command line as typed functions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from fewstep.data import DataSpec, open_images, to_uint8
from fewstep.evaluation import Generator, reference_of
from fewstep.evaluation import evaluate as evaluate_stream
from fewstep.metrics import Record, load_extractor
from fewstep.model import Model
from fewstep.objectives import Networks, PairObjective
from fewstep.progress import Progress
from fewstep.recipes import recipe as get_recipe
from fewstep.run import train
from fewstep.samplers import Sampler
from fewstep.types import Labels, Sample

__all__ = ["evaluate", "generator", "get_recipe", "loss", "sample", "train"]


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
    model: Model,
    objective: PairObjective,
    x: Sample,
    label: Labels = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The terms of an objective on a batch x [n, C, H, W] in [-1, 1] (each a scalar; their sum is the loss)."""
    return objective(Networks(model.denoiser), x, label, progress or Progress(0, 1), seed)


def evaluate(
    model: Model, data: str | DataSpec, steps: int = 1, metrics: Sequence[str] = ("fd",), extractor: str = "digits",
    num: int = 5000, seeds: int = 3, reference: Literal["train", "heldout", "all"] = "train",
    weights: Path | None = None, sampler: Sampler | None = None,
) -> list[Record]:  # fmt: skip
    """Stamped records of a model against a split of a data source: mean and spread over noise seeds 0 .. seeds - 1."""
    spec = DataSpec(data) if isinstance(data, str) else data
    features = load_extractor(extractor, str(model.device), weights)
    real = reference_of(open_images(spec), features, reference, spec.heldout)
    return evaluate_stream(
        generator(model), sampler or model.info.sampler(steps), real, features, num, range(seeds), metrics,
        model=str(model.path or ""), model_sha256=model.sha256,
    )  # fmt: skip
