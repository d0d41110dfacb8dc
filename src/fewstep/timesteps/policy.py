"""The small network that gives every clean image its own Beta law over the quantiles."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewstep.types import PerSample, Sample, Times

BINS = 1024  # the paper's law lives on the 1000 steps of a DDPM
CONCENTRATION = 64.0  # alpha and beta stay between 1/64 and 64: no law shrinks to a point


class Policy(nn.Module):
    """x [n, *dims] -> the log density [n, BINS] over u of mix + (1 - mix) Beta(alpha, beta), with functions of x.

    Convolutions of stride 2, their mean over the image, one hidden layer; vectors go to the hidden layer directly. The last
    layer starts at 0, where alpha = beta = 1 and the density is uniform exactly.
    """

    def __init__(self, shape: tuple[int, ...], channels: tuple[int, ...], hidden: int, mix: float):
        super().__init__()
        self.mix = mix
        image = len(shape) == 3
        layers: list[nn.Module] = []
        width = shape[0] if image else math.prod(shape)
        for out in channels if image else ():
            layers += [nn.Conv2d(width, out, 3, stride=2, padding=1), nn.ReLU()]
            width = out
        self.features = nn.Sequential(*layers)
        last = nn.Linear(hidden, 2)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), last)
        middles = (torch.arange(BINS) + 0.5) / BINS
        self.logs: Tensor
        self.register_buffer("logs", torch.stack([middles.log(), (-middles).log1p()]), persistent=False)

    def parameters_of(self, x: Sample) -> Float[Tensor, "n 2"]:
        """alpha and beta of every image."""
        features = self.features(x) if len(self.features) else x
        features = features.flatten(2).mean(2) if x.ndim == 4 else features.flatten(1)
        limit = math.log(CONCENTRATION)
        return torch.exp(limit * torch.tanh(self.head(features) / limit))

    def forward(self, x: Sample) -> Float[Tensor, "n bins"]:
        # One by one, in float32: where alpha = beta = 1 every step is exact, so that the law is exactly uniform.
        alpha, beta = self.parameters_of(x).unbind(1)
        energy = (alpha - 1)[:, None] * self.logs[0] + (beta - 1)[:, None] * self.logs[1]
        energy = energy - energy.detach().amax(1, keepdim=True)
        log_beta = energy - energy.exp().mean(1, keepdim=True).log()
        return torch.log1p((1 - self.mix) * torch.expm1(log_beta)) if self.mix else log_beta


def log_density_at(log_density: Float[Tensor, "n bins"], u: Times) -> PerSample:
    """Of each row, the value [n] in the bin of u [n]."""
    bins = log_density.shape[1]
    return log_density.gather(1, (u * bins).long().clamp(max=bins - 1)[:, None])[:, 0]


def entropy(log_density: Float[Tensor, "n bins"]) -> PerSample:
    """Differential entropy [n] of each row's density on (0, 1): 0 for the uniform one, negative for any other.

    Its gradient is written so that it is 0 exactly where the density is uniform (the masses' changes sum to 0).
    """
    masses = log_density.exp() / log_density.shape[1]
    exact = -(masses * log_density).sum(1)
    slope = -(masses * log_density.detach()).sum(1)
    return exact.detach() + slope - slope.detach()
