"""Is a model what it is taken for? Its own samples as a picture, and its denoising loss by noise level."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, TypeAlias, get_args

import torch
from torch import Tensor

from fewstep.data import to_uint8
from fewstep.evaluation import GRID_SEED, Generator
from fewstep.latents import decoder
from fewstep.model import Model
from fewstep.networks import Network, Preconditioned, Stock
from fewstep.networks.stock import Prediction, Scaled, VariancePreserving
from fewstep.noise import NoiseStream
from fewstep.pictures import captioned, grid
from fewstep.samplers import Sampler

Tick: TypeAlias = Callable[[int], None]
SIGMAS: Final = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
STEPS: Final = 18  # of Heun's solver: EDM's own for CIFAR-10 (35 evaluations)
COUNT: Final = 16  # images of the picture
OWN: Final = "its own samples"
FLOOR: Final = 0.3  # of the error of a silent network, that a trained one need not go below
CLEARLY: Final = 1 / 3  # of the claimed parametrisation's excess
SLACK: Final = {"diffusion": 1.1, "consistency": 2.5}  # a consistency model draws from what a diffusion model averages


@dataclass(frozen=True)
class Level:
    """Denoising at one noise level."""

    sigma: float
    """EDM noise level"""
    loss: float
    """mean squared error of D(x + sigma n, sigma) per element"""
    silent: float
    """the loss over that of the same parametrisation with a network that says nothing (0)"""
    limit: float
    """what `silent` is at most for a trained model: the best linear denoiser's, but not below FLOOR, with some slack"""

    @property
    def fine(self) -> bool:
        return self.silent <= self.limit  # NaN is not


@dataclass(frozen=True)
class Check:
    """What was seen."""

    of: str
    """what was denoised: a data set, or the model's own samples"""
    n: int
    levels: tuple[Level, ...]
    verdict: str
    """empty: nothing is wrong"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> str:
        """Rows of text."""
        rows = [f"  {'sigma':>8} {'loss':>10} {'of silent':>10} {'limit':>8}"]
        return "\n".join(
            [*rows, *(f"  {at.sigma:8.3g} {at.loss:10.3g} {at.silent:10.3g} {at.limit:8.2g}" for at in self.levels)]
        )


def samplers(model: Model) -> dict[str, Sampler]:
    """The model's own ways of sampling, by caption."""
    if model.info.kind == "diffusion":
        heun = model.info.sampler(STEPS)
        return {f"{heun.nfe} evaluations of Heun's solver": heun}
    return {"1 step": model.info.sampler(1), "2 steps": model.info.sampler(2)}


def picture(model: Model, tick: Tick | None = None) -> tuple[Any, Tensor]:
    """16 images by each of the model's own samplers, and the last sampler's undecoded samples [16, C, H, W]."""
    arch = model.info.architecture
    generator = Generator(model.denoiser, arch.shape, arch.num_classes, model.device, batch=4)
    decode, drawn, samples = decoder(model.info.latents, model.device), {}, torch.empty(0)
    for caption, sampler in samplers(model).items():
        parts = []
        for part in generator(sampler, COUNT, GRID_SEED):
            parts.append(part)
            if tick:
                tick(len(part))
        samples = torch.cat(parts)
        shown = decode(samples) if decode else samples
        drawn[caption] = grid(to_uint8(shown[:, : 3 if shown.shape[1] > 1 else 1]), 4, cell=64)
    return captioned(drawn), samples


class Silent(torch.nn.Module):
    """F of a network of this kind whose output is 0."""

    def __init__(self, network: Network):
        super().__init__()
        self.speaks = getattr(network, "parametrisation", Scaled())

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        return self.speaks.raw(torch.zeros_like(x), x, c_noise)


@torch.inference_mode()
def levels(model: Model, x: Tensor, label: Tensor | None, batch: int = 64) -> tuple[Level, ...]:
    """The denoising loss of clean samples x [n, C, H, W] (with their labels [n]) at the noise levels of SIGMAS that the model
    was trained for."""
    arch, variance = model.info.architecture, float((x - x.mean(0)).double().square().mean())
    silent = Preconditioned(Silent(arch.network), arch.sigma_data, arch.sigma_min)
    stream, found, (low, high) = NoiseStream(GRID_SEED), [], trained_range(model)
    for k, sigma in enumerate(SIGMAS):
        if not low <= sigma <= high:
            continue
        loss = trivial = 0.0
        for rows in torch.arange(len(x)).split(batch):
            clean = x[rows].to(model.device)
            noisy = clean + sigma * stream.normal(rows.tolist(), tuple(x.shape[1:]), k + 1, model.device)
            t, given = clean.new_full((len(clean),), sigma), None if label is None else label[rows].to(model.device)
            loss += float((model(noisy, t, given) - clean).double().square().mean()) * len(rows) / len(x)
            trivial += float((silent(noisy, t) - clean).double().square().mean()) * len(rows) / len(x)
        linear = sigma**2 * variance / (sigma**2 + variance)
        limit = SLACK[model.info.kind] * max(linear / trivial, FLOOR)
        found.append(Level(sigma, loss, loss / trivial, limit))
    return tuple(found)


def trained_range(model: Model) -> tuple[float, float]:
    """The least and the greatest noise level that the network was trained at, as far as it tells."""
    speaks = getattr(model.info.architecture.network, "parametrisation", None)
    return speaks.sigmas if isinstance(speaks, VariancePreserving) else (0.0, math.inf)


def check(model: Model, x: Tensor, label: Tensor | None, of: str = "") -> Check:
    """Denoise x (of: the data set that it is from; empty: the model's own samples) at many levels.

    Where that fails, name the parametrisation under which it would not.
    """
    found = levels(model, x, label)
    if not found:
        return Check(of or OWN, len(x), found, "no noise level of the check is one that the model was trained at")
    if all(at.fine for at in found):
        return Check(of or OWN, len(x), found, "")
    worst = max(found, key=excess)
    verdict = (
        f"at sigma = {worst.sigma:g} the error is {worst.silent:.3g} times that of a network that says nothing (at most "
        f"{worst.limit:.2g} is expected): the model is untrained, or its parametrisation is another one"
    )
    if other := better(model, x if of else None, label, excess(worst)):
        verdict += f"; it denoises {other}"
    return Check(of or OWN, len(x), found, verdict)


def excess(at: Level) -> float:
    """How far beyond its limit a level is; above 1 is too far."""
    return at.silent / at.limit if math.isfinite(at.silent) else math.inf


def better(model: Model, x: Tensor | None, label: Tensor | None, claimed: float) -> str:
    """The prediction type under which the same weights denoise as they should, or CLEARLY better; empty: there is none.

    x: what to denoise; None: the samples that it makes then.
    """
    network = model.info.architecture.network
    if not (isinstance(network, Stock) and isinstance(network.parametrisation, VariancePreserving)):
        return ""
    worst: dict[str, float] = {}
    for name in get_args(Prediction):
        if name != network.parametrisation.prediction:
            speaks = replace(network.parametrisation, prediction=name)
            arch = replace(model.info.architecture, network=replace(network, parametrisation=speaks))
            denoiser = arch.build().eval().requires_grad_(False).to(model.device)
            denoiser.load_state_dict(model.denoiser.state_dict())
            other = replace(model, denoiser=denoiser, info=replace(model.info, architecture=arch))
            worst[name] = max(map(excess, levels(other, picture(other)[1] if x is None else x, label)))
    best = min(worst, key=lambda name: worst[name])
    if worst[best] > max(1, CLEARLY * claimed):
        return ""
    return f"{'well' if worst[best] <= 1 else 'better'} as prediction_type {best!r}"
