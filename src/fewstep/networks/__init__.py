"""Networks behind the Denoiser protocol. A network's configuration is a frozen dataclass whose build() makes the module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from fewstep.networks.dit import DiT
from fewstep.networks.edm2_unet import EDM2UNet
from fewstep.networks.edm_unet import EDMUNet
from fewstep.networks.mlp import MLP
from fewstep.networks.norms import Norm
from fewstep.networks.preconditioning import Preconditioned, coefficients
from fewstep.networks.protocol import Network
from fewstep.networks.splice import Spliced, inherited
from fewstep.networks.stock import Stock
from fewstep.networks.unet import UNet
from fewstep.noise import dropout_stream, philox
from fewstep.types import FewstepError

__all__ = [
    "MLP",
    "NAMED",
    "AnyNetwork",
    "Architecture",
    "DiT",
    "EDM2UNet",
    "EDMUNet",
    "Network",
    "Norm",
    "Preconditioned",
    "Spliced",
    "Stock",
    "UNet",
    "coefficients",
    "inherited",
    "named",
]

AnyNetwork: TypeAlias = UNet | EDMUNet | EDM2UNet | DiT | MLP | Spliced | Stock

NAMED: dict[str, Callable[[], Network]] = {
    "unet": UNet,
    "ddpm++": EDMUNet,
    "ncsn++": lambda: EDMUNet(style="ncsn++"),
    "edm2-xs": lambda: EDM2UNet(channels=128),
    "edm2-s": EDM2UNet,
    "edm2-m": lambda: EDM2UNet(channels=256),
    "edm2-l": lambda: EDM2UNet(channels=320),
    "dit-s": DiT,
    "dit-b": lambda: DiT(width=768, depth=12, heads=12),
    "dit-l": lambda: DiT(width=1024, depth=24, heads=16),
    "dit-xl": lambda: DiT(width=1152, depth=28, heads=16),
}


def named(name: str) -> Network:
    """The network with the default constants called `name`; FewstepError listing the known ones."""
    if name not in NAMED:
        raise FewstepError(f"unknown network {name!r}: choose from {', '.join(NAMED)}")
    return NAMED[name]()


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a denoiser again; stored with its weights."""

    network: Network
    shape: tuple[int, ...]
    """(C, H, W) of a sample"""
    num_classes: int = 0
    """0: unconditional"""
    sigma_data: float = 0.5
    sigma_min: float = 0.0
    """> 0: the shifted boundary form of CT, CD and iCT"""

    def build(self, seed: int = 0) -> Preconditioned:
        """A freshly initialised denoiser: the same weights for a seed whatever was drawn before."""
        with dropout_stream(int(philox(seed, "weights").integers(2**63 - 1)), torch.device("cpu")):
            return Preconditioned(self.network.build(self.shape, self.num_classes), self.sigma_data, self.sigma_min)

    def skeleton(self) -> Preconditioned:
        """The denoiser on the meta device: shapes and names without memory."""
        with torch.device("meta"):
            return Preconditioned(self.network.build(self.shape, self.num_classes), self.sigma_data, self.sigma_min)
