"""What a network's configuration can do."""

from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class Network(Protocol):
    """A raw network's configuration."""

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module: ...
