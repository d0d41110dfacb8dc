"""DiT, the diffusion transformer with AdaLN-zero of Peebles and Xie 2023 (arXiv:2212.09748), behind our protocol.

    x -- patches -- linear + position -- blocks -- norm, scale, shift, linear -- pixels -- F(x)
    block:  h + gate * attention(scale, shift(norm(h))),  then  h + gate * mlp(scale, shift(norm(h)))
    scale, shift, gate = linear(silu(noise embedding + class embedding)): zero at the start, so every block is identity

Against the paper: no learned variance (half of the output channels), no null class for classifier-free guidance, and
a noise embedding of slow sinusoids (see NoiseFeatures). DiT-S/2 of 1000 classes at 4x32x32 has 32.86M parameters, the
paper's 33M.

Our own text and not diffusers' DiTTransformer2DModel: that one was no faster in a trial on a CPU, embeds time and label anew
in every block (39.8M parameters), needs labels, drops them at random in training, and no stock pipeline samples from it in two
steps.
"""

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fewstep.networks.limits import check_dropout, check_positive
from fewstep.networks.norms import LayerNorm, RMSNorm, SampleNorm, check_norm
from fewstep.types import FewstepError, Labels, Times

TokenNorm: TypeAlias = Literal["plain", "layer", "nonscaling-layer", "rms"]
NOISE_FEATURES = 256
FASTEST, SLOWEST = 2.0, 0.02  # radians per unit of c_noise = ln(sigma)/4: 0.5 and 0.005 per e-fold of sigma


@dataclass(frozen=True)
class DiT:
    """A diffusion transformer; the defaults are DiT-S/2, for latents of 32x32.

    The paper's B: width 768, depth 12, heads 12. L: 1024, 24, 16. XL: 1152, 28, 16.
    """

    patch: int = 2
    """Pixels along a side of the squares that become tokens."""
    width: int = 384
    """Size of a token; a multiple of 4 and of `heads`."""
    depth: int = 12
    """Blocks."""
    heads: int = 6
    """Attention heads per block."""
    mlp_ratio: float = 4.0
    """Hidden size of the blocks' MLPs over `width`."""
    dropout: float = 0.0
    """Probability that a feature is dropped after attention and inside the MLP (the paper: 0)."""
    norm: TokenNorm = "plain"
    """What normalises each token: the paper's LayerNorm with no parameters of its own (plain), with weight and bias
    (layer), with a bias only (nonscaling-layer, sLCT's NsLN), or RMSNorm (rms)."""

    def __post_init__(self) -> None:
        check_positive(self, ("patch", "width", "depth", "heads"))
        check_dropout(self.dropout)
        check_norm(self.norm, TokenNorm)
        if self.width % 4 or self.width % self.heads:
            raise FewstepError(
                f"--network.width {self.width} must be a multiple of 4 and of --network.heads {self.heads}"
            )
        if not self.mlp_ratio * self.width >= 1:
            raise FewstepError(f"--network.mlp-ratio {self.mlp_ratio} leaves the MLPs without units: give 4")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The module F(x [n, C, H, W], c_noise [n], label [n] | None) -> [n, C, H, W]; shape is (C, H, W)."""
        if len(shape) != 3 or shape[1] != shape[2]:
            raise FewstepError(f"a DiT needs square images, got (C, H, W) = {shape}: crop or resize them first")
        if shape[1] % self.patch:
            raise FewstepError(f"--network.patch {self.patch} must divide the size of the images, {shape[1]}")
        return _DiT(self, shape[0], shape[1], num_classes)

    def token_norm(self) -> SampleNorm:
        """A normalisation of h [n, tokens, width], token by token."""
        if self.norm == "rms":
            return RMSNorm((self.width,))
        own = self.norm != "plain"
        return LayerNorm((self.width,), scales=self.norm == "layer", shifts=own, eps=1e-5 if own else 1e-6)


class _DiT(nn.Module):
    def __init__(self, config: DiT, channels: int, size: int, num_classes: int):
        super().__init__()
        width, pixels = config.width, channels * config.patch**2
        self.patch, self.num_classes = config.patch, num_classes
        self.position: Tensor
        self.register_buffer("position", positions(size // config.patch, width), persistent=False)
        self.embed = linear(pixels, width)
        self.noise = nn.Sequential(NoiseFeatures(), linear(NOISE_FEATURES, width), nn.SiLU(), linear(width, width))
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.norm = config.token_norm()
        self.modulation = linear(width, 2 * width, zero=True)
        self.last = linear(width, pixels, zero=True)  # D starts as c_skip x
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.02)

    def forward(self, x: Float[Tensor, "n c h w"], c_noise: Times, label: Labels = None) -> Float[Tensor, "n c h w"]:
        if (label is None) != (self.label is None):
            raise FewstepError("a class-conditional network needs labels, an unconditional one takes none")
        told = self.noise(c_noise.to(x.dtype))
        if self.label is not None:
            told = told + self.label(label)
        told = F.silu(told)

        h = self.embed(F.pixel_unshuffle(x, self.patch).flatten(2).mT) + self.position
        for block in self.blocks:
            h = block(h, told)
        shift, scale = self.modulation(told)[:, None].chunk(2, dim=-1)
        out = self.last(self.norm(h) * (1 + scale) + shift)
        side = x.shape[-1] // self.patch
        return F.pixel_shuffle(out.mT.unflatten(2, (side, side)), self.patch)


class Block(nn.Module):
    """Attention and MLP on h [n, tokens, width], each scaled, shifted and gated by what the block is told [n, width]."""

    def __init__(self, config: DiT):
        super().__init__()
        width, hidden = config.width, int(config.mlp_ratio * config.width)
        self.heads = config.heads
        self.norm0, self.norm1 = config.token_norm(), config.token_norm()
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = nn.Sequential(
            linear(width, hidden), nn.GELU("tanh"), nn.Dropout(config.dropout), linear(hidden, width)
        )
        self.modulation = linear(width, 6 * width, zero=True)

    def forward(self, h: Float[Tensor, "n k d"], told: Float[Tensor, "n d"]) -> Float[Tensor, "n k d"]:
        shift0, scale0, gate0, shift1, scale1, gate1 = self.modulation(told)[:, None].chunk(6, dim=-1)
        h = h + gate0 * self.attend(self.norm0(h) * (1 + scale0) + shift0)
        return h + gate1 * self.mlp(self.norm1(h) * (1 + scale1) + shift1)

    def attend(self, h: Float[Tensor, "n k d"]) -> Float[Tensor, "n k d"]:
        """Multi-head self-attention over all tokens."""
        q, k, v = self.qkv(h).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [n, heads, k, d / heads]
        return self.dropout(self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class NoiseFeatures(nn.Module):
    """[sin(f c), cos(f c)] of c_noise [n], frequencies f geometric from FASTEST to SLOWEST.

    DiT's own, made for steps 0 to 999, would turn 250 rad per e-fold of sigma when fed EDM's time, and the two noise
    levels of a pair would look unrelated (see LOW_FREQUENCY in unet.py).
    """

    frequencies: Float[Tensor, " f"]

    def __init__(self) -> None:
        super().__init__()
        exponents = torch.linspace(math.log(FASTEST), math.log(SLOWEST), NOISE_FEATURES // 2)
        self.register_buffer("frequencies", exponents.exp(), persistent=False)

    def forward(self, c_noise: Times) -> Float[Tensor, "n e"]:
        angle = c_noise[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)


def positions(side: int, width: int) -> Float[Tensor, "k d"]:
    """Sinusoids of each token's row in the first half of its features, of its column in the second.

    Frequencies geometric from 1 to 1/10000, for each half as in arXiv:1706.03762, section 3.5.
    """
    quarter = width // 4
    angle = torch.arange(side)[:, None] * 10000 ** -(torch.arange(quarter) / quarter)
    along = torch.cat([angle.sin(), angle.cos()], dim=1)  # [side, width / 2]
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=2).flatten(0, 1)


def linear(cin: int, cout: int, zero: bool = False) -> nn.Linear:
    """Glorot's uniform weights, or zeros; zero bias."""
    layer = nn.Linear(cin, cout)
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
