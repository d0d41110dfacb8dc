"""Generate -> features -> numbers, as one stream, and the search of the second sampling step's noise level."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from fewstep.data import Images, originals, to_uint8
from fewstep.environment import workers
from fewstep.metrics import Extractor, Moments, Record, Reference, measure
from fewstep.metrics.reference import METRICS
from fewstep.noise import NoiseStream
from fewstep.ode import SIGMA_MAX, check_sigmas
from fewstep.samplers import FewStep, Noise, Sampler
from fewstep.types import Denoiser, FewstepError, Labels, Sample

Tick = Callable[[int], None]  # called with the number of images just made
KEPT_BYTES = 2 * 2**30  # of first steps that the search of the second sigma holds


@dataclass
class Draws:
    """The noise of the images numbered `indices`: draws(k) is the k-th standard normal [n, *shape], made once."""

    stream: NoiseStream
    indices: range
    shape: tuple[int, ...]
    device: torch.device | str
    made: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, draw: int) -> Sample:
        if draw not in self.made:
            self.made[draw] = self.stream.normal(self.indices, self.shape, draw, self.device)
        return self.made[draw]


@dataclass(frozen=True)
class Generator:
    """A denoiser that makes images: image i of seed s is the same at any batch size, on any device.

    On a CPU, threads make as many batches at once as PyTorch leaves cores idle (see `workers`), with the same bits.
    """

    denoiser: Denoiser
    shape: tuple[int, ...]
    """of one sample, (C, H, W)"""
    num_classes: int = 0
    device: torch.device | str = "cpu"
    batch: int = 500
    decode: Callable[[Tensor], Tensor] | None = None
    """makes images of samples that are latents"""

    def __call__(
        self, sampler: Sampler, num: int, seed: int = 0, label: int | Sequence[int] | None = None, first: int = 0
    ) -> Iterator[Sample]:
        """Batches of the samples [n, *shape] in [-1, 1] numbered from `first` to `num`; labels are uniform unless given."""
        if num < 1:
            raise FewstepError(f"--num must be 1 or more, got {num}")
        stream, starts = NoiseStream(seed), range(first, num, self.batch)

        def make(start: int) -> Sample:
            noise = Draws(stream, range(start, min(start + self.batch, num)), self.shape, self.device)
            with torch.inference_mode():  # a thread's own
                samples = sampler(self.denoiser, noise, self.labels(stream, noise.indices, label))
                return self.decode(samples) if self.decode else samples

        yield from in_order(make, starts, workers() if torch.device(self.device).type == "cpu" else 1)

    def labels(self, stream: NoiseStream, indices: range, label: int | Sequence[int] | None) -> Tensor | None:
        """The labels [n] of the images numbered `indices`."""
        if not self.num_classes:
            return None
        if label is None:
            return stream.labels(indices, self.num_classes, self.device)
        given = [label if isinstance(label, int) else label[i % len(label)] for i in indices]
        return torch.tensor(given, dtype=torch.int64, device=self.device)


def in_order(make: Callable[[int], Sample], starts: range, threads: int) -> Iterator[Sample]:
    """make(start) for each of them in turn, so many at a time; who stops early waits for those that are being made."""
    if min(threads, len(starts)) < 2:
        yield from map(make, starts)
        return
    inside = torch.get_num_threads()  # in a thread of its own PyTorch would start with the default
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(inside,)) as pool:
        ahead: deque[Future[Sample]] = deque()
        for start in starts:
            ahead.append(pool.submit(make, start))
            if len(ahead) == threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def reference_of(
    images: Images, extractor: Extractor, which: Literal["train", "heldout", "all"], heldout: float, batch: int = 500
) -> Reference:
    """The features of a split of the data; its name says which, e.g. digits[train]."""
    return reference_to(images.split(which, heldout), extractor, f"{images.name}[{which}]", batch)


def reference_to(images: Images, extractor: Extractor, name: str, batch: int = 500) -> Reference:
    """The features of these images (of latents: of the images they are of), under a name that says which they are."""
    images = originals(images)
    cuts = (images.pixels(range(i, min(i + batch, len(images)))) for i in range(0, len(images), batch))
    return Reference.of(extractor, cuts, name)


def evaluate(
    generator: Generator,
    sampler: Sampler,
    reference: Reference,
    extractor: Extractor,
    num: int,
    seeds: Sequence[int] = (0, 1, 2),
    metrics: Sequence[str] = ("fd",),
    model: str = "",
    model_sha256: str = "",
    tick: Tick | None = None,
) -> list[Record]:
    """One stamped record per metric ("fd", "kid", "prdc": four) over `num` samples for each noise seed.

    The Frechet distance alone keeps only sums, whatever `num` is; the others keep the features.
    """
    if num < 2 or not seeds:
        raise FewstepError("a metric needs --num 2 or more and at least one seed")
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise FewstepError(f"unknown metric {', '.join(unknown) or 'none'}: choose from {', '.join(METRICS)}")
    if "prdc" in metrics and min(num, reference.n) < 10:
        raise FewstepError("prdc needs 10 images or more on both sides: raise --num")
    values: dict[str, list[float]] = {}
    for seed in seeds:
        parts, moments = [], Moments.empty(reference.features.shape[1])
        for samples in generator(sampler, num, seed):
            features = extractor(to_uint8(samples))
            if list(metrics) == ["fd"]:
                moments = moments.add(features)
            else:
                parts.append(features.cpu())
            if tick:
                tick(len(samples))
        found = measure(reference, torch.cat(parts), metrics) if parts else {"fd": reference.frechet.distance(moments)}
        for name, value in found.items():
            values.setdefault(name, []).append(value)
    return [
        Record.of(
            name, numbers, seeds, n=num, extractor=extractor.name, extractor_sha256=extractor.sha256,
            reference=reference.name, reference_n=reference.n, reference_sha256=reference.sha256,
            sampler=type(sampler).__name__, sigmas=sampler.sigmas, nfe=sampler.nfe,
            model=model, model_sha256=model_sha256,
        )
        for name, numbers in values.items()
    ]  # fmt: skip


# Reports use the noise seeds 0, 1, 2, ...; what is chosen by a number is chosen on noise that no report will quote.
SEARCH_SEED, EVALUATION_SEED, CANDIDATE_SEED, RERANK_SEED = 10_000, 20_000, 30_000, 40_000
GRID_SEED = 777  # sample grids use the same noise throughout a run, and in every run


@dataclass
class SecondStep:
    """FewStep((80, sigma)) for one sigma after another over the same noise: the first step is taken once, for all of them,
    of as many images as KEPT_BYTES hold. Its noise must be a Generator's."""

    sigma: float
    kept: dict[range, Sample]
    """the first step's images by their numbers"""
    like: FewStep = FewStep()
    """how a step is taken: its clipping and its sigma_min"""
    nfe = 2

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas)

    @property
    def sigmas(self) -> tuple[float, ...]:
        return (SIGMA_MAX, self.sigma)

    def __call__(self, denoiser: Denoiser, noise: Noise, label: Labels = None, /) -> Sample:
        assert isinstance(noise, Draws)
        x = self.kept.get(noise.indices)
        if x is None:
            x = replace(self.like, sigmas=(SIGMA_MAX,))(denoiser, noise, label)
            if noise.indices.stop * x[0].nbytes <= KEPT_BYTES:
                self.kept[noise.indices] = x
        return self.like.again(denoiser, x, self.sigma, noise(1), label)


def search_second_sigma(
    generator: Generator,
    reference: Reference,
    extractor: Extractor,
    num: int,
    low: float = 0.1,
    high: float = 6.0,
    coarse: int = 9,
    tick: Tick | None = None,
    like: FewStep = FewStep(),
) -> tuple[float, list[tuple[float, float]]]:
    """The second step's noise level (EDM sigma) of least Frechet distance, and every (sigma, distance) tried.

    A geometric grid from low to high, then its best interval halved twice on both sides; every candidate meets the same
    noise, so their common first step is taken once. like: the model's own sampler. The distance is smooth in ln sigma and flat
    at its minimum (sLCT's own search: 6.93 to 6.96 from 0.37 to 0.58).
    """
    tried: dict[float, float] = {}
    kept: dict[range, Sample] = {}

    def score(log_sigma: float) -> float:
        sigma = round(math.exp(log_sigma), 4)
        if sigma not in tried:
            step = SecondStep(sigma, kept, like)
            records = evaluate(generator, step, reference, extractor, num, (SEARCH_SEED,), ("fd",), tick=tick)
            tried[sigma] = records[0].value
        return tried[sigma]

    gap = math.log(high / low) / (coarse - 1)
    best = min((math.log(low) + gap * k for k in range(coarse)), key=score)
    for _ in range(2):
        gap /= 2
        best = min((best, best - gap, best + gap), key=score)
    return round(math.exp(best), 4), sorted(tried.items())
