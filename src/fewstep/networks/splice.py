"""Two copies of a network, one for each side of a noise level: truncated consistency models (TCM, arXiv:2410.14895).

    f(x, t) = f_theta(x, t) for t >= t',  f_0(x, t) for t < t'

f_0 is the model of stage 1 and never changes again; f_theta starts as f_0 and is trained on [t', 80] alone.
"""

import copy
import math
from dataclasses import dataclass, field, fields, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewstep.networks.protocol import Network
from fewstep.networks.unet import UNet
from fewstep.ode import SIGMA_MAX
from fewstep.types import FewstepError, Labels, Times

ROUNDING = 1e-5  # a t that arithmetic left this far below t', relatively, is t'


@dataclass(frozen=True)
class Spliced:
    """Stage 2 of TCM: from noise level `boundary` upwards a network that is trained, below it a frozen one."""

    network: Network = field(default_factory=UNet)
    """Each of the two."""
    boundary: float = 1.0
    """t', the EDM noise level from which the trained network answers."""

    def __post_init__(self) -> None:
        if not 0 < self.boundary < SIGMA_MAX:
            raise FewstepError(f"--network.boundary must be between 0 and {SIGMA_MAX:g}, got {self.boundary}")
        if isinstance(self.network, Spliced):
            raise FewstepError("a truncated model cannot be truncated again: give the network of its stage 1")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The module F(x [n, C, H, W], c_noise [n], label [n] | None) -> [n, C, H, W]; its two networks start alike."""
        return _Spliced(self.network.build(shape, num_classes), self.boundary)

    def start_from(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The state dict that makes both networks of the spliced denoiser what the denoiser with these tensors has.

        The state dict of a spliced denoiser is returned as it is.
        """
        if all(name.startswith(("network.trained.", "network.frozen.")) for name in tensors):
            return tensors
        return {
            f"network.{part}.{name.removeprefix('network.')}": tensor
            for part in ("trained", "frozen")
            for name, tensor in tensors.items()
        }


def inherited(own: Network, init: Network) -> Network:
    """The network of a run whose recipe has `own` and whose weights are those of a model with `init`.

    It is init, with the dropout of `own`; spliced if `own` is.
    """
    if isinstance(own, Spliced):
        inner = init.network if isinstance(init, Spliced) else init
        return replace(own, network=with_dropout(inner, own.network))
    if isinstance(init, Spliced):
        raise FewstepError(
            "the model to start from is a truncated one, with a frozen half: only the recipe that made it can go on "
            "with it; start from the model of its stage 1"
        )
    return with_dropout(init, own)


def with_dropout(network: Network, like: Network) -> Network:
    """The network with those of the other's fields dropout... that it has too."""
    names = {f.name for f in fields(network) if f.name.startswith("dropout")}  # type: ignore[arg-type]
    return replace(network, **{name: getattr(like, name) for name in names if hasattr(like, name)})  # type: ignore[type-var]


class _Spliced(nn.Module):
    """The parameters are those of `trained`; the weights of `frozen` are buffers, which nothing trains."""

    def __init__(self, network: nn.Module, boundary: float):
        super().__init__()
        self.trained, self.frozen = network, freeze(copy.deepcopy(network))
        self.lowest = math.log(boundary * (1 - ROUNDING)) / 4  # c_noise from which `trained` answers
        self.drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in network.modules())

    def train(self, mode: bool = True) -> "_Spliced":
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x: Float[Tensor, " n *dims"], c_noise: Times, label: Labels = None) -> Float[Tensor, " n *dims"]:
        """Each row through its own network only; it waits for the device once, to count the rows."""
        above = c_noise >= self.lowest
        count = len(x) if x.is_meta else int(above.sum())  # on the meta device there are shapes, no noise levels
        if count == len(x):
            return self.trained(x, c_noise, label)
        if count == 0:
            return self.frozen(x, c_noise, label)

        order = above.int().argsort(descending=True, stable=True)
        top, bottom = order[:count], order[count:]
        low = self.frozen(x[bottom], c_noise[bottom], None if label is None else label[bottom])
        if self.training and self.drops:  # x_t and x_r share masks by row, so a row must keep its place in the batch
            high = self.trained(x, c_noise, label)[top]
        else:
            high = self.trained(x[top], c_noise[top], None if label is None else label[top])
        return torch.cat([high, low])[order.argsort()]


def freeze(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, every parameter turned into a buffer of the same name."""
    for module in network.eval().modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return network
