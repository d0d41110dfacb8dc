"""EDM preconditioning: the only home of c_skip, c_out, c_in and c_noise."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewstep.types import Times, like


class Coefficients(NamedTuple):
    """D(x, t) = c_skip x + c_out F(x / scale_in, c_noise), each [n]."""

    c_skip: Times
    c_out: Times
    scale_in: Times
    """1 / c_in: dividing by it is the operation order of diffusers' CMStochasticIterativeScheduler"""
    c_noise: Times


def coefficients(t: Times, sigma_data: float, sigma_min: float = 0.0) -> Coefficients:
    """EDM (arXiv:2206.00364, table 1); with sigma_min > 0 the consistency models' shifted form (arXiv:2303.01469, app. C).

    The shift moves the boundary D(x, t) = x from t = 0 to t = sigma_min. c_noise = ln(t)/4 is computed in float64.
    """
    total = (t.square() + sigma_data**2) ** 0.5
    shifted = t - sigma_min
    c_skip = sigma_data**2 / (shifted.square() + sigma_data**2)
    c_out = shifted * sigma_data / total
    wide = t if t.device.type == "mps" else t.double()
    return Coefficients(c_skip, c_out, total, 0.25 * torch.log(wide + 1e-44))


class Preconditioned(nn.Module):
    """A Denoiser from a raw network F(x, c_noise, label). x [n, *dims] has standard deviation sigma_data at t = 0."""

    def __init__(self, network: nn.Module, sigma_data: float = 0.5, sigma_min: float = 0.0):
        super().__init__()
        self.network, self.sigma_data, self.sigma_min = network, sigma_data, sigma_min

    def forward(
        self, x: Float[Tensor, " n *dims"], t: Float[Tensor, " n"], label: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n *dims"]:
        """The estimate of clean x [n, *dims] at noise level t [n] (EDM sigma > 0), in the dtype of x under autocast too."""
        c_skip, c_out, scale_in, c_noise = coefficients(t, self.sigma_data, self.sigma_min)
        raw = self.network(x / like(scale_in, x), c_noise, label).to(x.dtype)
        return like(c_out, x) * raw + like(c_skip, x) * x
