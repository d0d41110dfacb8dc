"""What a search over checkpoints minimises: a metric of generated images, or a function of the user's."""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from fewstep.data import to_uint8
from fewstep.evaluation import Generator
from fewstep.latents import decoder
from fewstep.metrics import Extractor, Moments, Reference, measure
from fewstep.metrics.record import LOWER_IS_BETTER
from fewstep.model import Model
from fewstep.samplers import Sampler
from fewstep.types import FewstepError

MEASURE: Final = {
    "fd": "fd",
    "kid": "kid",
    "precision": "prdc",
    "recall": "prdc",
    "density": "prdc",
    "coverage": "prdc",
}


def generator(model: Model, batch: int = 500) -> Generator:
    """The model as a stream of samples: generator(model)(sampler, num, seed) yields batches of images in [-1, 1]."""
    arch = model.info.architecture
    decode = decoder(model.info.latents, model.device)
    return Generator(model.denoiser, arch.shape, arch.num_classes, model.device, batch, decode)


@runtime_checkable
class Fitness(Protocol):
    """Costs of models; lower is better. A cost that is not finite is a candidate's failure, not an error."""

    @property
    def name(self) -> str: ...

    def features(self, model: Model, first: int, last: int, seed: int, /) -> Tensor | None:
        """Of the images [first, last) of a noise seed, [n, d]; None where the cost is not one of features."""
        ...

    def cost(self, model: Model, features: Tensor | None, seed: int, /) -> float: ...


@dataclass(frozen=True)
class Metric:
    """A metric of `fewstep.metrics` under any sampler: fd, kid, or the negative of precision, recall, density, coverage."""

    name: str
    sampler: Sampler
    extractor: Extractor
    reference: Reference
    batch: int = 500

    def __post_init__(self) -> None:
        if self.name not in MEASURE:
            raise FewstepError(
                f"unknown metric {self.name!r}: choose from {', '.join(MEASURE)}, or give FILE.py:FUNCTION"
            )

    @torch.inference_mode()
    def features(self, model: Model, first: int, last: int, seed: int, /) -> Tensor:
        samples = generator(model, self.batch)(self.sampler, last, seed, first=first)
        return torch.cat([self.extractor(to_uint8(x)) for x in samples])

    def cost(self, model: Model, features: Tensor | None, seed: int, /) -> float:
        assert features is not None
        if not features.isfinite().all():
            return float("nan")
        if self.name == "fd":
            return self.reference.frechet.distance(Moments.of(features))
        value = measure(self.reference, features, [MEASURE[self.name]])[self.name]
        return value if self.name in LOWER_IS_BETTER else -value

    def slope(self) -> Callable[[np.ndarray], tuple[float, np.ndarray]] | None:
        """The cost of features [n, d] and its derivative by each of them, where there is one."""
        slopes = {
            "fd": self.reference.frechet.slope,
            "kid": self.reference.kernel.slope,
        }
        if self.name not in slopes:
            return None

        def slope(features: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = slopes[self.name](torch.from_numpy(features))
            return value, gradient.numpy()

        return slope

    def against(self, reference: Reference) -> "Metric":
        """The same against other real images."""
        return replace(self, reference=reference)


@dataclass(frozen=True)
class Function:
    """The user's own: function(model, seed) -> a number, lower is better.

    `model` is a Model, called as model(x, sigma, label), or the dict of tensors where the files do not say what network
    they are; `seed` (an int) is another for search, re-ranking and report: whatever is random must come from it.
    """

    name: str
    function: Callable[[Any, int], float]

    def features(self, model: Any, first: int, last: int, seed: int, /) -> None:
        return None

    def cost(self, model: Any, features: Tensor | None, seed: int, /) -> float:
        value = self.function(model, seed)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise FewstepError(f"{self.name} returned {value!r}: a cost is one number, lower is better") from None


def load_function(text: str) -> Function:
    """FILE.py:NAME -> the function; FewstepError when there is none."""
    path, _, name = text.rpartition(":")
    file = Path(path)
    if not file.is_file() or not name.isidentifier():
        raise FewstepError(
            f"--metric {text}: give a metric ({', '.join(MEASURE)}) or FILE.py:FUNCTION of an existing file"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise FewstepError(f"--metric {text}: {file} cannot be run ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise FewstepError(f"--metric {text}: {file} has no function {name}(model, seed)")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[
        :8
    ]  # scores of another version must not be taken for its own
    return Function(f"{text}#{digest}", function)
