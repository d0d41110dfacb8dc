"""The DDPM++ and NCSN++ U-Nets of Song et al. 2021 (arXiv:2011.13456), as EDM configures them.

Karras et al. 2022 (arXiv:2206.00364), Tables 7 and 8, fix the widths, the dropout and the embeddings; CT, iCT, ECT and
TCM train one of the two on CIFAR-10. The parameters have the names of the public EDM checkpoints: drop the prefix
`model.` from their keys and `load_state_dict(strict=True)` fits.

    x -- conv -- blocks ----------------- skips ------------------ blocks -- norm, silu, conv -- F(x)
                    down -- blocks -------- skips -------- blocks -- up          (one level per multiplier)

DDPM++ resamples with the filter [1, 1] and embeds the noise level with fixed sinusoids. NCSN++ resamples with
[1, 3, 3, 1], embeds it with random Fourier features, and feeds ever smaller copies of the input into its encoder.

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
from fewstep.networks.norms import Norm, check_norm, replace_group_norms
from fewstep.types import FewstepError, Labels, Times

Resampling: TypeAlias = Literal["up", "down", "fused down"] | None
Taps: TypeAlias = tuple[int, ...]
TAPS: dict[str, Taps] = {"ddpm++": (1, 1), "ncsn++": (1, 3, 3, 1)}


@dataclass(frozen=True)
class EDMUNet:
    """A DDPM++ or NCSN++ U-Net; the defaults are the 55.7M parameters of CIFAR-10 at 32x32, with ECT's dropout.

    EDM's own dropout on CIFAR-10 is 0.13; its FFHQ and AFHQv2 networks at 64x64 have multipliers (1, 2, 2, 2) and
    dropout 0.05 and 0.25.
    """

    channels: int = 128
    """Width that the multipliers multiply; a multiple of 4."""
    multipliers: tuple[int, ...] = (2, 2, 2)
    """Width of each level over `channels`; each further level halves the resolution."""
    blocks: int = 4
    """Residual blocks per level of the encoder; the decoder has one more."""
    attention: tuple[int, ...] = (16,)
    """Resolutions with self-attention. The innermost block always has it."""
    dropout: float = 0.2
    """Probability that a feature is dropped inside a residual block."""
    dropout_max_resolution: int | None = None
    """Dropout only in blocks at this resolution and below (ECT's ImageNet: 16); None: in all."""
    style: Literal["ddpm++", "ncsn++"] = "ddpm++"
    """Filter, noise embedding and input pyramid: see the top of this file."""
    augment_dim: int = 9
    """Length of EDM's augmentation labels: always zero here, but their parameter is kept so that public weights fit."""
    norm: Norm = "group"
    """What stands in the place of every group norm; nonscaling-layer is sLCT's, for latents. Public weights need group."""

    def __post_init__(self) -> None:
        if self.channels < 4 or self.channels % 4:
            raise FewstepError(f"--network.channels must be a positive multiple of 4, got {self.channels}")
        check_positive(self, ("blocks",))
        check_multipliers(self.multipliers)
        check_dropout(self.dropout)
        check_norm(self.norm)
        if self.augment_dim < 0:
            raise FewstepError(f"--network.augment-dim must be 0 or more, got {self.augment_dim}")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The network F for images of `shape` (C, H, W), freshly initialised; num_classes 0 is unconditional."""
        _, height, width = shape
        divisor = 2 ** (len(self.multipliers) - 1)
        if height != width:
            raise FewstepError(f"the EDM U-Net takes square images, not {height}x{width}: crop or resize them first")
        if height % divisor:
            fix = f"resize the images to a multiple of {divisor} or shorten multipliers={self.multipliers}"
            raise FewstepError(f"the U-Net cannot halve {height} that often: {fix}")
        network = _EDMUNet(self, shape, num_classes)
        replace_group_norms(network, self.norm, shape, num_classes)
        return network

    def dropout_at(self, resolution: int) -> float:
        """The dropout probability of the blocks at `resolution`."""
        highest = self.dropout_max_resolution
        return self.dropout if highest is None or resolution <= highest else 0.0

    def block(self, r: int, cin: int, cout: int, attention: bool = False, resample: Resampling = None) -> "Block":
        """A residual block of this network whose output is at resolution r."""
        return Block(cin, cout, 4 * self.channels, self.dropout_at(r), attention, resample, TAPS[self.style])


class _EDMUNet(nn.Module):
    """F(x [n,C,H,W], c_noise [n], label [n] | None) -> [n,C,H,W], with c_noise = ln(sigma) / 4."""

    def __init__(self, config: EDMUNet, shape: tuple[int, ...], num_classes: int):
        super().__init__()
        width = config.channels
        fourier = config.style == "ncsn++"
        noise_channels = 2 * width if fourier else width

        self.num_classes = num_classes
        self.map_noise = FourierEmbedding(width) if fourier else PositionalEmbedding(width)
        if num_classes:
            self.map_label = linear(num_classes, noise_channels)
        if config.augment_dim:  # never used (zero labels, no bias), so kept out of optimizers' and DDP's way
            self.map_augment = linear(config.augment_dim, noise_channels, bias=False).requires_grad_(False)
        self.map_layer0 = linear(noise_channels, 4 * width)
        self.map_layer1 = linear(4 * width, 4 * width)
        self.enc, skips = encoder(config, shape)
        self.dec = decoder(config, shape, skips)

    def forward(self, x: Float[Tensor, "n c h w"], c_noise: Times, label: Labels = None) -> Float[Tensor, "n c h w"]:
        emb = self.embed(c_noise, label, x.dtype)

        skips: list[Tensor] = []
        aux = x
        for name, layer in self.enc.items():
            if name.endswith("aux_residual"):  # NCSN++: the input pyramid joins in
                x = skips[-1] = aux = (x + layer(aux)) * math.sqrt(0.5)
            else:
                x = layer(x, emb) if isinstance(layer, Block) else layer(x)
                skips.append(x)

        *blocks, (_, aux_norm), (_, aux_conv) = self.dec.items()
        for name, block in blocks:
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return aux_conv(F.silu(aux_norm(x)))

    def embed(self, c_noise: Times, label: Labels, dtype: torch.dtype) -> Float[Tensor, "n e"]:
        """What the blocks are told about noise level and class, [n, 4 * channels]."""
        if self.num_classes and label is None:
            raise FewstepError(f"this network has {self.num_classes} classes: pass a label [n] for each image")
        emb = self.map_noise(c_noise).to(dtype)
        if label is not None:
            if not self.num_classes:
                raise FewstepError("this network is unconditional: pass no labels, or build it with num_classes > 0")
            onehot = F.one_hot(label.long(), self.num_classes).to(dtype)
            emb = emb + self.map_label(onehot * math.sqrt(self.num_classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))


def encoder(config: EDMUNet, shape: tuple[int, ...]) -> tuple[nn.ModuleDict, list[int]]:
    """The layers of the encoder, in order, and the widths of the skips they leave for the decoder."""
    enc, skips = nn.ModuleDict(), []
    aux_width, width = shape[0], config.channels
    for level, multiplier in enumerate(config.multipliers):
        r = shape[1] >> level
        if level == 0:
            enc[f"{r}x{r}_conv"] = Conv(shape[0], width, 3)
        else:
            enc[f"{r}x{r}_down"] = config.block(r, width, width, resample="down")
            if config.style == "ncsn++":
                enc[f"{r}x{r}_aux_residual"] = Conv(aux_width, width, 3, "fused down", TAPS["ncsn++"])
                aux_width = width
        skips.append(width)
        for i in range(config.blocks):
            cin, width = width, config.channels * multiplier
            enc[f"{r}x{r}_block{i}"] = config.block(r, cin, width, attention=r in config.attention)
            skips.append(width)
    return enc, skips


def decoder(config: EDMUNet, shape: tuple[int, ...], skips: list[int]) -> nn.ModuleDict:
    """The layers of the decoder, in order; its blocks take the skips of the encoder, last one first."""
    dec, skips = nn.ModuleDict(), list(skips)
    width, innermost = skips[-1], len(config.multipliers) - 1
    for level, multiplier in reversed(list(enumerate(config.multipliers))):
        r = shape[1] >> level
        if level == innermost:
            dec[f"{r}x{r}_in0"] = config.block(r, width, width, attention=True)
            dec[f"{r}x{r}_in1"] = config.block(r, width, width)
        else:
            dec[f"{r}x{r}_up"] = config.block(r, width, width, resample="up")
        for i in range(config.blocks + 1):
            cin, width = width + skips.pop(), config.channels * multiplier
            last = i == config.blocks
            dec[f"{r}x{r}_block{i}"] = config.block(r, cin, width, attention=last and r in config.attention)
    dec[f"{r}x{r}_aux_norm"] = group_norm(width)
    dec[f"{r}x{r}_aux_conv"] = Conv(width, shape[0], 3, gain=1e-5)
    return dec


class Block(nn.Module):
    """Residual block [n,cin,h,w] -> [n,cout,h',w'] told the embedding, then self-attention with one head if asked.

    BigGAN's block as Song et al. use it (arXiv:2011.13456, appendix H): it resamples inside, and every sum of two
    branches is divided by sqrt(2) so that the variance stays.
    """

    def __init__(
        self, cin: int, cout: int, emb_width: int, dropout: float, attention: bool, resample: Resampling, taps: Taps
    ):
        super().__init__()
        self.norm0 = group_norm(cin)
        self.conv0 = Conv(cin, cout, 3, resample, taps)
        self.affine = linear(emb_width, cout)
        self.norm1 = group_norm(cout)
        self.dropout = nn.Dropout(dropout)
        self.conv1 = Conv(cout, cout, 3, gain=1e-5)
        self.skip = Conv(cin, cout, 1, resample, taps) if cin != cout or resample else nn.Identity()
        self.attention = attention
        if attention:
            self.norm2 = group_norm(cout)
            self.qkv = Conv(cout, 3 * cout, 1, gain=math.sqrt(0.2))
            self.proj = Conv(cout, cout, 1, gain=1e-5)

    def forward(self, x: Float[Tensor, "n cin h w"], emb: Float[Tensor, "n e"]) -> Float[Tensor, "n cout h2 w2"]:
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        x = (h + self.skip(x)) * math.sqrt(0.5)
        return (self.attend(x) + x) * math.sqrt(0.5) if self.attention else x

    def attend(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        """proj(softmax(q^T k / sqrt(c)) v) over all pixels; q, k, v of channel c are outputs 3c, 3c+1, 3c+2 of qkv."""
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm2(x)).reshape(n, 1, c, 3, h * w).permute(3, 0, 1, 4, 2)
        q, k, v = qkv.contiguous().unbind()  # each [n, 1, h*w, c], dense as the fast kernels want it
        a = F.scaled_dot_product_attention(q, k, v)
        return self.proj(a.transpose(-1, -2).reshape(n, c, h, w))


class Conv(nn.Conv2d):
    """Convolution that keeps the resolution, with resampling by 2 built in if asked.

    "up" and "down" filter first and convolve then. "fused down" convolves first, keeping the margin the filter needs.
    """

    resample_filter: Float[Tensor, "1 1 f f"]  # a buffer, of resampling convolutions only

    def __init__(
        self, cin: int, cout: int, kernel: int, resample: Resampling = None, taps: Taps = (1, 1), gain: float = 1.0
    ):
        margin = (len(taps) - 1) // 2 if resample == "fused down" else 0
        super().__init__(cin, cout, kernel, padding=kernel // 2 + margin)
        xavier(self, gain)
        self.resample = resample
        if resample:
            self.register_buffer("resample_filter", low_pass(taps))

    def forward(self, x: Float[Tensor, "n cin h w"]) -> Float[Tensor, "n cout h2 w2"]:
        if self.resample == "up":
            x = upsample(x, self.resample_filter)
        elif self.resample == "down":
            x = downsample(x, self.resample_filter)
        x = super().forward(x)
        return downsample(x, self.resample_filter, padded=False) if self.resample == "fused down" else x


def low_pass(taps: Taps) -> Float[Tensor, "1 1 f f"]:
    """The separable filter with these taps along either axis, of sum 1."""
    f = torch.tensor(taps, dtype=torch.float32) / sum(taps)
    return (f[:, None] * f[None, :])[None, None]


def upsample(x: Float[Tensor, "n c h w"], f: Float[Tensor, "1 1 f f"]) -> Float[Tensor, "n c h2 w2"]:
    """x at twice the resolution: zeros put between the pixels, then filtered with 4f; [1, 1] repeats each pixel."""
    c, pad = x.shape[1], (f.shape[-1] - 1) // 2
    return F.conv_transpose2d(x, (4 * f).to(x.dtype).expand(c, 1, -1, -1), stride=2, padding=pad, groups=c)


def downsample(
    x: Float[Tensor, "n c h w"], f: Float[Tensor, "1 1 f f"], padded: bool = True
) -> Float[Tensor, "n c h2 w2"]:
    """x at half the resolution: filtered with f, then every other pixel; [1, 1] averages 2x2 pixels."""
    c, pad = x.shape[1], (f.shape[-1] - 1) // 2 if padded else 0
    return F.conv2d(x, f.to(x.dtype).expand(c, 1, -1, -1), stride=2, padding=pad, groups=c)


class PositionalEmbedding(nn.Module):
    """[sin(f c), cos(f c)], frequencies f geometric from 1 down to 1/10000 (arXiv:1706.03762, section 3.5)."""

    def __init__(self, channels: int):
        super().__init__()
        self.count = channels // 2

    def forward(self, c_noise: Times) -> Float[Tensor, "n e"]:
        i = torch.arange(self.count, dtype=torch.float32, device=c_noise.device)
        angle = c_noise[:, None] * (1 / 10000) ** (i / (self.count - 1))
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class FourierEmbedding(nn.Module):
    """[sin(2 pi f c), cos(2 pi f c)], frequencies f ~ N(0, 16^2) drawn once and kept (arXiv:2006.10739)."""

    freqs: Float[Tensor, " e"]

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels) * 16)

    def forward(self, c_noise: Times) -> Float[Tensor, "n e"]:
        angle = 2 * math.pi * c_noise[:, None] * self.freqs
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    groups = min(32, channels // 4)
    if channels % groups:
        raise FewstepError(f"width {channels} has no {groups} equal groups: give --network.channels a multiple of 32")
    return nn.GroupNorm(groups, channels, eps=1e-6)


def linear(cin: int, cout: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(cin, cout, bias)
    xavier(layer)
    return layer


def xavier(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """Glorot's uniform weights times `gain`, zero bias."""
    nn.init.xavier_uniform_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
