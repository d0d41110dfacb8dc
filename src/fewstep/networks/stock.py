"""Networks of diffusers with whatever configuration they were published with, as raw networks F under EDM preconditioning.

What they predict is converted exactly: in float64 coefficients, without a change of any weight.

    x_in = x / sqrt(sigma^2 + sigma_data^2),   D = c_skip x + c_out F,   c_noise = ln(sigma) / 4

A model of variance-preserving noise or of a flow has sigma_data = 1 here, whatever the data's own standard deviation is:
then x_in is the x_t of the former.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewstep.networks.limits import check_dropout
from fewstep.types import FewstepError, Labels, Times, like

StockModel: TypeAlias = Literal["UNet2DModel", "DiTTransformer2DModel"]
MODELS = get_args(StockModel)
PLAIN: dict[str, Any] = {"time_embedding_type": "positional", "class_embed_type": None}  # others tell it other things
Prediction: TypeAlias = Literal["epsilon", "v_prediction", "sample"]


@runtime_checkable
class Parametrisation(Protocol):
    """How a network is told the noise level, and what it predicts."""

    def inputs(self, x_in: Tensor, c_noise: Times) -> tuple[Tensor, Times]:
        """What the network takes: the scaled sample and the time [n]."""
        ...

    def raw(self, out: Tensor, x_in: Tensor, c_noise: Times) -> Tensor:
        """F from what the network puts out."""
        ...


@dataclass(frozen=True)
class Scaled:
    """F itself, told scale * c_noise: the consistency models of OpenAI (arXiv:2303.01469, their code) have 1000."""

    scale: float = 1000.0

    def inputs(self, x_in: Tensor, c_noise: Times) -> tuple[Tensor, Times]:
        return x_in, self.scale * c_noise

    def raw(self, out: Tensor, x_in: Tensor, c_noise: Times) -> Tensor:
        return out


@dataclass(frozen=True)
class VariancePreserving:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps at t = 0 .. steps - 1 (DDPM, arXiv:2006.11239), sigma_data = 1.

    sigma_t = sqrt((1 - abar_t) / abar_t); between two steps t is linear in ln sigma, and below the first and above the
    last it stays there. v = sqrt(abar) eps - sqrt(1 - abar) x_0 (arXiv:2202.00512, appendix D) is -F.
    """

    prediction: Prediction = "epsilon"
    schedule: str = "linear"
    """beta_schedule of diffusers' DDPMScheduler"""
    beta_start: float = 1e-4
    beta_end: float = 0.02
    steps: int = 1000
    zero_snr: bool = False
    """betas rescaled so that the last step is noise alone (arXiv:2305.08891, alg. 1)"""
    betas: tuple[float, ...] = ()
    """the betas themselves in place of a schedule"""
    bound: float | None = None
    """of epsilon: the largest factor, sqrt(sigma^2 + 1), by which F is to be larger than the network's output; beyond it D goes
    over to c_skip x as sigma grows. None: exact. Tuning in one step asks for it: at sigma = 80 an error of the output is 80
    times as large in D (docs/log.md)"""

    @property
    def sigmas(self) -> tuple[float, float]:
        """The least and the greatest noise level (EDM sigma) that it was trained at."""
        levels = log_sigmas(self)
        return float(levels[0].exp()), float(levels[-1].exp())

    def inputs(self, x_in: Tensor, c_noise: Times) -> tuple[Tensor, Times]:
        levels = log_sigmas(self).to(wide(c_noise))
        wanted = 4 * wide(c_noise)
        above = torch.bucketize(wanted, levels).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        return x_in, above - 1 + ((wanted - low) / (high - low)).clamp(0, 1)

    def raw(self, out: Tensor, x_in: Tensor, c_noise: Times) -> Tensor:
        if self.prediction == "v_prediction":
            return -out
        sigma = (4 * wide(c_noise)).exp()
        root = like((sigma.square() + 1).sqrt(), x_in)
        if self.prediction == "epsilon":
            kept = 1.0 if self.bound is None else (like(self.bound / (sigma.square() + 1).sqrt(), x_in)).clamp(max=1)
            return kept * (like(sigma, x_in) * x_in - root * out)
        return (root * out - x_in) / like(sigma, x_in)


@dataclass(frozen=True)
class Flow:
    """x_t = (1 - t) x_0 + t eps, the network predicts eps - x_0 at `steps` * t (SiT, arXiv:2401.08740), sigma_data = 1.

    t = sigma / (1 + sigma), and D = x_t - t v with x_t = x / (1 + sigma).
    """

    steps: int = 1000

    def inputs(self, x_in: Tensor, c_noise: Times) -> tuple[Tensor, Times]:
        sigma = (4 * wide(c_noise)).exp()
        return like((sigma.square() + 1).sqrt() / (1 + sigma), x_in) * x_in, self.steps * sigma / (1 + sigma)

    def raw(self, out: Tensor, x_in: Tensor, c_noise: Times) -> Tensor:
        sigma = (4 * wide(c_noise)).exp()
        return (
            like((sigma - 1) / (1 + sigma), x_in) * x_in - like((sigma.square() + 1).sqrt() / (1 + sigma), x_in) * out
        )


def wide(t: Tensor) -> Tensor:
    """t in float64, where the device has it."""
    return t if t.device.type == "mps" else t.double()


@lru_cache(maxsize=8)
def log_sigmas(noise: VariancePreserving) -> Float[Tensor, " t"]:
    """ln sigma_t of every step, float64, on the CPU; steps of infinite sigma (zero_snr) are left out."""
    from diffusers import DDPMScheduler

    with torch.device("cpu"), torch.inference_mode(False):
        try:
            scheduler: Any = DDPMScheduler(
                num_train_timesteps=noise.steps, beta_start=noise.beta_start, beta_end=noise.beta_end,
                beta_schedule=noise.schedule, trained_betas=list(noise.betas) or None,
                rescale_betas_zero_snr=noise.zero_snr,
            )  # fmt: skip
        except NotImplementedError:
            raise FewstepError(f"unknown noise schedule {noise.schedule!r}: it cannot be converted") from None
        kept = (1 - scheduler.betas.double()).cumprod(0)
        levels = (((1 - kept) / kept).log() / 2)[kept > 1e-12]
    if len(levels) < 2 or not (levels.diff() > 0).all():
        raise FewstepError("the noise levels of the scheduler do not grow with its steps: it cannot be converted")
    return levels


AnyParametrisation: TypeAlias = Scaled | VariancePreserving | Flow


@dataclass(frozen=True)
class Stock:
    """A UNet2DModel or DiTTransformer2DModel as its config.json describes it."""

    model: StockModel = "UNet2DModel"
    """class of diffusers"""
    config: str = "{}"
    """its config.json, on one line"""
    parametrisation: AnyParametrisation = Scaled()
    dropout: float | None = None
    """probability in residual blocks; None: as published"""

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise FewstepError(f"unknown network {self.model!r}: {' and '.join(MODELS)} are known")
        if self.dropout is not None:
            check_dropout(self.dropout)

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The module F(x [n, C, H, W], c_noise [n], label [n] | None) -> [n, C, H, W]; shape is (C, H, W)."""
        config = json.loads(self.config)
        own = (*sample_shape(config), classes(config))
        if own != (*shape, num_classes):
            raise FewstepError(
                f"this {self.model} makes images of {' x '.join(map(str, own[:3]))} and {own[3]} classes, not "
                f"{' x '.join(map(str, shape))} and {num_classes}: give data of its size"
            )
        out = config.get("out_channels") or shape[0]
        if out not in (shape[0], 2 * shape[0]):
            raise FewstepError(
                f"this {self.model} makes {out} channels of {shape[0]}: only images, or images and variances, fit"
            )
        for name, plain in PLAIN.items():
            if config.get(name, plain) != plain:
                raise FewstepError(f"this {self.model} has {name}={config[name]!r}: only {plain!r} can be converted")
        return _Stock(self, config, num_classes)


def sample_shape(config: dict[str, Any]) -> tuple[int, ...]:
    """(C, H, W) of a diffusers network's samples; FewstepError when its config.json does not tell."""
    size = config.get("sample_size")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if not all(isinstance(value, int) and value > 0 for value in (config.get("in_channels"), height, width)):
        raise FewstepError("config.json tells no sample_size or in_channels: write the size of the images there")
    return config["in_channels"], height, width


def classes(config: dict[str, Any]) -> int:
    """The number of classes of a diffusers network, 0 for an unconditional one."""
    return config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0


class _Stock(nn.Module):
    def __init__(self, stock: Stock, config: dict[str, Any], num_classes: int):
        super().__init__()
        import diffusers

        known = {key: value for key, value in config.items() if not key.startswith("_")}
        if stock.dropout is not None:
            known["dropout"] = stock.dropout
        try:
            self.unet: Any = getattr(diffusers, stock.model)(**known)
        except (TypeError, ValueError, NotImplementedError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise FewstepError(f"this diffusers cannot build the {stock.model} of its config.json ({error})") from None
        for module in self.unet.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0  # of labels, for classifier-free guidance: x_t and x_r must have the same
        self.num_classes, self.speaks, self.transformer = num_classes, stock.parametrisation, stock.model[:3] == "DiT"

    def forward(self, x: Float[Tensor, "n c h w"], c_noise: Times, label: Labels = None) -> Float[Tensor, "n c h w"]:
        if (label is None) == bool(self.num_classes):
            raise FewstepError("a class-conditional network needs labels, an unconditional one takes none")
        given, time = self.speaks.inputs(x, c_noise)
        time = time.to(x.dtype)
        if self.transformer:
            out = self.unet(given, timestep=time, class_labels=label, return_dict=False)[0]
        else:
            out = self.unet(given, time, class_labels=label, return_dict=False)[0]
        return self.speaks.raw(out[:, : x.shape[1]], x, c_noise)  # a DiT's learned variances come after
