"""A small network for vectors (2-D toys, tests)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewstep.networks.limits import check_dropout, check_positive
from fewstep.types import FewstepError


@dataclass(frozen=True)
class MLP:
    """Fully connected network on vectors: depth hidden layers of SiLU units, the noise level as a few sinusoids."""

    width: int = 128
    depth: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, ("width", "depth"))
        check_dropout(self.dropout)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The module F(x [n, *shape], c_noise [n], label [n] | None) -> [n, *shape]."""
        return _MLP(self, math.prod(shape), num_classes)


class _MLP(nn.Module):
    def __init__(self, config: MLP, dim: int, num_classes: int):
        super().__init__()
        self.label = nn.Embedding(num_classes, config.width) if num_classes else None
        self.first = nn.Linear(dim + 9, config.width)
        hidden = []
        for _ in range(config.depth - 1):
            hidden += [nn.SiLU(), nn.Dropout(config.dropout), nn.Linear(config.width, config.width)]
        last = nn.Linear(config.width, dim)
        self.rest = nn.Sequential(*hidden, nn.SiLU(), last)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.tensor([0.5, 1.0, 2.0, 4.0]), persistent=False)
        nn.init.zeros_(last.weight)

    def forward(
        self, x: Float[Tensor, " n *dims"], c_noise: Float[Tensor, " n"], label: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, " n *dims"]:
        if (label is None) != (self.label is None):
            raise FewstepError("a class-conditional network needs labels, an unconditional one takes none")
        c = c_noise.to(x.dtype)[:, None]
        angles = c * self.frequencies
        hidden = self.first(torch.cat([x.flatten(1), c, angles.sin(), angles.cos()], dim=1))
        if self.label is not None:
            hidden = hidden + self.label(label)
        return self.rest(hidden).reshape(x.shape)
