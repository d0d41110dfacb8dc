"""Normalisations to put in place of group normalisation: the ablation of sLCT (arXiv:2502.01441).

    y = weight * (x - mean) / sqrt(variance + eps) + bias          x [n, C, *spatial], every sample for itself

    norm              mean and variance over                   weight        bias
    group             a group of channels, all positions       [C]           [C]          PyTorch's own, untouched
    nonscaling-group  a group of channels, all positions       1             [C]
    instance          one channel, all positions               [C]           [C]
    layer             all of the sample                        [C,H,W]       [C,H,W]
    nonscaling-layer  all of the sample                        1             [C,H,W]      sLCT's NsLN
    rms               all of the sample, mean taken as 0       [C,H,W]       0

A weight of 1 is no parameter and no tensor in a file: there is nothing that could be trained. sLCT's reason for NsLN:
it captures the statistics of all features, and outliers, which latents have many of, weigh less.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.types import FewstepError

Norm: TypeAlias = Literal["group", "layer", "nonscaling-layer", "rms", "instance", "nonscaling-group"]
Shape: TypeAlias = Sequence[int] | None
EPS = 1e-5


class SampleNorm(nn.Module, ABC):
    """weight * standardise(x) + bias, computed in float32 or wider under autocast too, in the dtype of x.

    The shapes of weight and bias broadcast against x [n, ...]; None: there is none.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: Shape, bias: Shape, eps: float = EPS):
        super().__init__()
        self.eps = eps
        self.register_parameter("weight", None if weight is None else nn.Parameter(torch.ones(*weight)))
        self.register_parameter("bias", None if bias is None else nn.Parameter(torch.zeros(*bias)))

    @abstractmethod
    def standardise(self, x: Tensor) -> Tensor:
        """x [n, ...] without its scale."""

    def forward(self, x: Float[Tensor, " n *dims"]) -> Float[Tensor, " n *dims"]:
        y = self.standardise(x.to(torch.promote_types(x.dtype, torch.float32)))
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype)


class LayerNorm(SampleNorm):
    """Mean 0 and variance 1 over the last axes, those of `shape`."""

    def __init__(self, shape: Sequence[int], scales: bool = True, shifts: bool = True, eps: float = EPS):
        super().__init__(shape if scales else None, shape if shifts else None, eps)
        self.shape = tuple(shape)

    def standardise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, eps=self.eps)


class RMSNorm(SampleNorm):
    """Mean square 1 over the last axes, those of `shape` (arXiv:1910.07467)."""

    def __init__(self, shape: Sequence[int], eps: float = EPS):
        super().__init__(shape, None, eps)
        self.shape = tuple(shape)

    def standardise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.shape, eps=self.eps)


class ChannelNorm(SampleNorm):
    """Mean 0 and variance 1 over each of `groups` groups of channels of x [n, C, *spatial]; weight and bias per channel."""

    def __init__(self, shape: Sequence[int], groups: int, scales: bool, eps: float = EPS):
        per_channel = (shape[0], *(1 for _ in shape[1:]))
        super().__init__(per_channel if scales else None, per_channel, eps)
        self.groups = groups

    def standardise(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.groups, eps=self.eps)


def in_place_of(old: nn.GroupNorm, norm: str, shape: Sequence[int]) -> SampleNorm:
    """The normalisation called `norm` where `old` sees x [n, *shape], shape (C, *spatial)."""
    if norm == "layer":
        return LayerNorm(shape)
    if norm == "nonscaling-layer":
        return LayerNorm(shape, scales=False)
    if norm == "rms":
        return RMSNorm(shape)
    if norm == "nonscaling-group":
        return ChannelNorm(shape, old.num_groups, scales=False, eps=old.eps)
    assert norm == "instance", norm
    if shape[1:].count(1) == len(shape) - 1:
        raise FewstepError(
            "instance normalisation of a single pixel is always zero: give fewer --network.multipliers, or another "
            "--network.norm"
        )
    return ChannelNorm(shape, shape[0], scales=True)


def replace_group_norms(network: nn.Module, norm: str, shape: tuple[int, ...], num_classes: int) -> None:
    """Put `norm` in the place of every nn.GroupNorm of F(x [n, *shape], c_noise, label), those of attention included.

    All other weights stay as they are. "group" changes nothing.
    """
    if norm == "group":
        return
    for name, seen in group_norm_inputs(network, shape, num_classes).items():
        parent, _, child = name.rpartition(".")
        old = network.get_submodule(name)
        assert isinstance(old, nn.GroupNorm)
        setattr(network.get_submodule(parent), child, in_place_of(old, norm, seen))


def group_norm_inputs(network: nn.Module, shape: tuple[int, ...], num_classes: int) -> dict[str, tuple[int, ...]]:
    """The shape (C, *spatial) that each nn.GroupNorm normalises, by its name: from one pass on the meta device, which
    computes nothing."""
    seen: dict[str, tuple[int, ...]] = {}
    names: dict[nn.Module, str] = {
        module: name for name, module in network.named_modules() if isinstance(module, nn.GroupNorm)
    }

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert seen.setdefault(names[module], tuple(inputs[0].shape[1:])) == inputs[0].shape[1:]

    hooks = [module.register_forward_pre_hook(note) for module in names]
    tensors = {name: t.to("meta") for name, t in chain(network.named_parameters(), network.named_buffers())}
    training = network.training
    with torch.device("meta"), torch.no_grad():
        label = torch.zeros(1, dtype=torch.int64) if num_classes else None
        functional_call(network.eval(), tensors, (torch.zeros(1, *shape), torch.zeros(1), label))
    network.train(training)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == set(names.values())
    return seen


def check_norm(norm: str, known: object = Norm) -> None:
    """FewstepError unless it is one of the names that the type `known` lists."""
    if norm not in get_args(known):
        raise FewstepError(f"unknown --network.norm {norm!r}: choose from {', '.join(get_args(known))}")
