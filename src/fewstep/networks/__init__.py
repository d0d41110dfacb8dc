"""Networks behind the Denoiser protocol. A network's configuration is a frozen dataclass whose build() makes the module."""

from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import nn

from fewstep.networks.edm_unet import EDMUNet
from fewstep.networks.mlp import MLP
from fewstep.networks.preconditioning import Preconditioned, coefficients
from fewstep.networks.unet import UNet
from fewstep.noise import dropout_stream, philox

__all__ = ["MLP", "Architecture", "EDMUNet", "Network", "Preconditioned", "UNet", "coefficients"]


@runtime_checkable
class Network(Protocol):
    """A raw network's configuration."""

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module: ...


AnyNetwork: TypeAlias = UNet | EDMUNet | MLP


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
