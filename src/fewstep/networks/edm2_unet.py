"""EDM2's U-Net, configuration G of Karras et al. 2024 (arXiv:2312.02696): every layer preserves magnitudes.

    x, 1 -- conv -- blocks ---------------- skips ----------------- blocks -- conv, gain -- F(x)
                      down -- blocks -------- skips ------- blocks -- up           (one level per multiplier)

No biases, no group norms: what goes in with variance 1 comes out with variance 1, since the rows of all weights have
norm 1 (sections 2.3-2.4, appendix B). While training, the weights are themselves set to unit magnitude before each step,
which fixes their effective learning rate (section 2.5, algorithm 1). The parameters have the names of the public EDM2
checkpoints under `unet.`: drop that prefix and `load_state_dict(strict=True)` fits.

This is the raw network F; the preconditioning that makes it a denoiser, c_noise included, is in preconditioning.py.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewstep.networks.limits import check_dropout, check_multipliers, check_positive
from fewstep.networks.unet import check_image_shape
from fewstep.types import FewstepError, Labels, Times

Resampling: TypeAlias = Literal["up", "down"] | None

EPS = 1e-4  # added to magnitudes before dividing by them
DRIFT = 1e-5  # of a trained row's magnitude, up to which it is left alone
BALANCE = 0.3  # weight of a residual branch, and of attention, in their sums with the main path
LARGEST = 256.0  # activations are clipped to +-LARGEST after each block
SILU_MAGNITUDE = 0.596  # root mean square of silu(x) for x ~ N(0, 1) (eq. 81)


@dataclass(frozen=True)
class EDM2UNet:
    """A magnitude-preserving U-Net; the defaults are EDM2-S, the 280M parameters of ImageNet.

    The paper's XS: channels 128, M: 256, L: 320, XL: 384, XXL: 448. ECT on ImageNet has dropout at 16x16 and below.
    """

    channels: int = 192
    """Width that the multipliers multiply."""
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    """Width of each level over `channels`; each further level halves the resolution."""
    blocks: int = 3
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention: tuple[int, ...] = (16, 8)
    """Resolutions with self-attention. The innermost block always has it."""
    head_dim: int = 64
    """Channels of an attention head; divides the width where there is attention."""
    label_balance: float = 0.5
    """Weight of the class in its sum with the noise level, which has the rest."""
    concat_balance: float = 0.5
    """Weight of a skip in its concatenation with the main path, which has the rest."""
    dropout: float = 0.0
    """Probability that a feature is dropped inside a residual block."""
    dropout_max_resolution: int | None = None
    """Dropout only in blocks at this resolution and below (ECT's ImageNet: 16); None: in all."""

    def __post_init__(self) -> None:
        check_positive(self, ("channels", "blocks", "head_dim"))
        check_multipliers(self.multipliers)
        check_dropout(self.dropout)
        for name in ("label_balance", "concat_balance"):
            if not 0 <= getattr(self, name) <= 1:
                option = f"--network.{name.replace('_', '-')}"
                raise FewstepError(f"{option} must be from 0 to 1, got {getattr(self, name)}")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The module F(x [n, C, H, W], c_noise [n], label [n] | None) -> [n, C, H, W]; shape is (C, H, W)."""
        size = check_image_shape(shape, len(self.multipliers))
        return _EDM2UNet(self, shape[0], size, num_classes)

    def dropout_at(self, resolution: int) -> float:
        """The dropout probability of the blocks at `resolution`."""
        highest = self.dropout_max_resolution
        return self.dropout if highest is None or resolution <= highest else 0.0

    def heads(self, width: int) -> int:
        """Attention heads at `width`; FewstepError if they do not fill it."""
        if width % self.head_dim:
            raise FewstepError(f"attention at width {width} needs a --network.head-dim that divides it")
        return width // self.head_dim


class _EDM2UNet(nn.Module):
    """F(x [n,C,H,W], c_noise [n], label [n] | None) -> [n,C,H,W], with c_noise = ln(sigma) / 4; zero at the start."""

    def __init__(self, config: EDM2UNet, image_channels: int, size: int, num_classes: int):
        super().__init__()
        widths = tuple(config.channels * m for m in config.multipliers)
        self.config, self.num_classes = config, num_classes
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], max(widths))
        if num_classes:
            self.emb_label = MPConv(num_classes, max(widths))
        self.enc, skips = encoder(config, image_channels, size)
        self.dec = decoder(config, size, skips)
        self.out_conv = MPConv(widths[0], image_channels, 3)
        self.out_gain = nn.Parameter(torch.zeros([]))

    def forward(self, x: Float[Tensor, "n c h w"], c_noise: Times, label: Labels = None) -> Float[Tensor, "n c h w"]:
        if self.training and torch.is_grad_enabled():
            self.normalise_weights()
        emb = self.embed(c_noise, label, x.dtype)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        skips: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, Block) else layer(x)
            skips.append(x)
        for name, block in self.dec.items():
            if "_block" in name:
                x = mp_cat(x, skips.pop(), self.config.concat_balance)
            x = block(x, emb)
        return self.out_conv(x, self.out_gain)

    def embed(self, c_noise: Times, label: Labels, dtype: torch.dtype) -> Float[Tensor, "n e"]:
        """What the blocks are told about noise level and class, [n, max width]."""
        if (label is None) == bool(self.num_classes):
            raise FewstepError("a class-conditional network needs labels, an unconditional one takes none")
        emb = self.emb_noise(self.emb_fourier(c_noise).to(dtype))
        if label is not None:
            onehot = F.one_hot(label.long(), self.num_classes).to(dtype)
            emb = mp_sum(emb, self.emb_label(onehot * math.sqrt(self.num_classes)), self.config.label_balance)
        return mp_silu(emb)

    @torch.compiler.disable
    @torch.no_grad()
    def normalise_weights(self) -> None:
        """Set the rows of the trained weights to the magnitude that normalise() keeps (algorithm 1).

        A step may have several passes before its backward pass. Hence unnoticed by autograd, and rows of that magnitude
        stay as they are to the last bit: only the first pass after a change of the weights writes.
        """
        for module in self.modules():
            if isinstance(module, MPConv) and module.weight.requires_grad:
                weight = module.weight.data
                size = magnitude(weight, tuple(range(1, weight.ndim)))
                kept = (size - (1 - EPS)).abs() < DRIFT
                weight.copy_(weight.where(kept, weight * ((1 - EPS) / size.clamp(min=EPS))))


def encoder(config: EDM2UNet, image_channels: int, size: int) -> tuple[nn.ModuleDict, list[int]]:
    """The layers of the encoder, in order, and the widths of the skips they leave for the decoder."""
    enc, skips, width = nn.ModuleDict(), [], config.channels * config.multipliers[0]
    for level, multiplier in enumerate(config.multipliers):
        r = size >> level
        if level == 0:
            enc[f"{r}x{r}_conv"] = MPConv(image_channels + 1, width, 3)
        else:
            enc[f"{r}x{r}_down"] = Block(config, r, width, width, "down", encodes=True)
        skips.append(width)
        for i in range(config.blocks):
            cin, width = width, config.channels * multiplier
            enc[f"{r}x{r}_block{i}"] = Block(config, r, cin, width, attention=r in config.attention, encodes=True)
            skips.append(width)
    return enc, skips


def decoder(config: EDM2UNet, size: int, skips: list[int]) -> nn.ModuleDict:
    """The layers of the decoder, in order; its blocks take the skips of the encoder, last one first."""
    dec, skips = nn.ModuleDict(), list(skips)
    width, innermost = skips[-1], len(config.multipliers) - 1
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        r = size >> level
        if level == innermost:
            dec[f"{r}x{r}_in0"] = Block(config, r, width, width, attention=True)
            dec[f"{r}x{r}_in1"] = Block(config, r, width, width)
        else:
            dec[f"{r}x{r}_up"] = Block(config, r, width, width, "up")
        for i in range(config.blocks + 1):
            cin, width = width + skips.pop(), config.channels * multiplier
            dec[f"{r}x{r}_block{i}"] = Block(config, r, cin, width, attention=r in config.attention)
    return dec


class Block(nn.Module):
    """Residual block [n,cin,h,w] -> [n,cout,r,r] told the embedding, then self-attention if asked (figure 21).

    In the encoder the main path is resampled, brought to cout and set to unit magnitude in each pixel before it branches;
    in the decoder it is brought to cout after that, and keeps its magnitude.
    """

    def __init__(
        self, config: EDM2UNet, r: int, cin: int, cout: int, resample: Resampling = None, attention: bool = False,
        encodes: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.resample, self.encodes = resample, encodes
        self.heads = config.heads(cout) if attention else 0
        self.conv_res0 = MPConv(cout if encodes else cin, cout, 3)
        self.emb_linear = MPConv(config.channels * max(config.multipliers), cout)
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.dropout = nn.Dropout(config.dropout_at(r))
        self.conv_res1 = MPConv(cout, cout, 3)
        self.conv_skip = MPConv(cin, cout, 1) if cin != cout else None
        if attention:
            self.attn_qkv = MPConv(cout, 3 * cout, 1)
            self.attn_proj = MPConv(cout, cout, 1)

    def forward(self, x: Float[Tensor, "n cin h w"], emb: Float[Tensor, "n e"]) -> Float[Tensor, "n cout r r"]:
        if self.resample == "down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        narrow = x if self.conv_skip is None else self.conv_skip(x)
        if self.encodes:
            x = narrow = normalise(narrow, (1,))
        scale = 1 + self.emb_linear(emb, self.emb_gain)[:, :, None, None]
        y = self.conv_res0(mp_silu(x))
        y = self.conv_res1(self.dropout(mp_silu(y * scale.to(y.dtype))))
        x = mp_sum(narrow, y, BALANCE)
        if self.heads:
            x = mp_sum(x, self.attend(x), BALANCE)
        return x.clamp(-LARGEST, LARGEST)

    def attend(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """Cosine attention: q, k and v of unit magnitude in each head and pixel.

        q, k, v of channel c of head i are the outputs 3 (i head_dim + c) + 0, 1, 2 of qkv.
        """
        n, c, h, w = x.shape
        qkv = self.attn_qkv(x).reshape(n, self.heads, c // self.heads, 3, h * w)
        q, k, v = normalise(qkv, (2,)).permute(3, 0, 1, 4, 2).contiguous().unbind()  # each [n, heads, h*w, head_dim]
        a = F.scaled_dot_product_attention(q, k, v)
        return self.attn_proj(a.transpose(-1, -2).reshape(n, c, h, w))


class MPConv(nn.Module):
    """Convolution that keeps the resolution, or (kernel 0) a linear layer, with rows of norm 1 (eq. 47)."""

    def __init__(self, cin: int, cout: int, kernel: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((cout, cin, kernel, kernel) if kernel else (cout, cin)))

    def forward(self, x: Float[Tensor, "n cin *hw"], gain: float | Tensor = 1.0) -> Float[Tensor, "n cout *hw"]:
        dims = tuple(range(1, self.weight.ndim))
        w = normalise(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        w = w.to(x.dtype)
        return F.linear(x, w) if w.ndim == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


class MPFourier(nn.Module):
    """sqrt(2) cos(f c + phase), f ~ N(0, (2 pi)^2) and phases uniform, drawn once and kept (eq. 75)."""

    freqs: Float[Tensor, " e"]
    phases: Float[Tensor, " e"]

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, c_noise: Times) -> Float[Tensor, "n e"]:
        return math.sqrt(2) * (c_noise[:, None] * self.freqs + self.phases).cos()


def magnitude(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Root mean square of x along dims, which stay with length one; float32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=wide)
    return norm / math.sqrt(x.numel() // norm.numel())


def normalise(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """x over EPS plus its magnitude along dims, in the dtype of x. A magnitude of 1 - EPS stays."""
    return x / (EPS + magnitude(x, dims)).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """silu of unit magnitude for x ~ N(0, 1) (eq. 81)."""
    return F.silu(x) / SILU_MAGNITUDE


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of unit magnitude for independent a and b of unit magnitude (eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Float[Tensor, "n ca h w"], b: Float[Tensor, "n cb h w"], t: float) -> Float[Tensor, "n cab h w"]:
    """[a, b] along the channels, contributing (1 - t) : t to what follows whatever their widths are (eq. 103)."""
    whole = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat([whole * (1 - t) / math.sqrt(a.shape[1]) * a, whole * t / math.sqrt(b.shape[1]) * b], dim=1)
