"""diffusers' UNet2DModel as our U-Net: nothing a stock diffusers pipeline could not load."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewstep.networks.limits import check_dropout, check_multipliers, check_positive
from fewstep.networks.norms import Norm, check_norm, replace_group_norms
from fewstep.types import FewstepError

LOW_FREQUENCY = 0.002  # cycles kept by low_frequency_time: at most 0.5 rad per e-fold of sigma


@dataclass(frozen=True)
class UNet:
    """UNet2DModel of diffusers.

    channels 192, multipliers 1 2 3 4, layers 3, attention 32 16 8 is EDM's ADM (295.9M parameters with 1000 classes).
    """

    channels: int = 128
    """width at full resolution"""
    multipliers: tuple[int, ...] = (1, 2, 2)
    """width of each level, in units of channels; each level halves the resolution"""
    layers: int = 2
    """residual blocks per level (the way up has one more)"""
    attention: tuple[int, ...] = (16, 8)
    """resolutions with self-attention"""
    head_dim: int = 64
    dropout: float = 0.0
    dropout_max_resolution: int | None = None
    """dropout only in blocks at this resolution or lower; None: everywhere"""
    norm_groups: int = 32
    low_frequency_time: bool = True
    """keep only the sinusoids of the time embedding that turn at most 0.5 rad per e-fold of sigma (the others, up to 250,
    hurt consistency tuning: see docs/log.md). Only weights are zeroed: the network stays a stock UNet2DModel."""
    time_scale: float = 1000.0
    """what c_noise is multiplied by before the time embedding: 1000 for the consistency models' and diffusers' networks, 1
    for EDM's ADM. Only with 1000 is the network a stock UNet2DModel"""
    middle_norm: bool = False
    """a norm in front of the innermost attention: ADM has it, UNet2DModel leaves it out unless told"""
    norm: Norm = "group"
    """what stands in the place of every group norm; nonscaling-layer is sLCT's, for latents. Only with group is the network
    a stock UNet2DModel"""

    def __post_init__(self) -> None:
        check_positive(self, ("channels", "layers", "head_dim", "norm_groups"))
        check_multipliers(self.multipliers)
        check_dropout(self.dropout)
        check_norm(self.norm)
        if not self.time_scale > 0:
            raise FewstepError(f"--network.time-scale must be positive, got {self.time_scale}")

    def build(self, shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """The module F(x [n, C, H, W], c_noise [n], label [n] | None) -> [n, C, H, W]; shape is (C, H, W)."""
        size = check_image_shape(shape, len(self.multipliers))
        network = _UNet(self, shape[0], size, num_classes)
        replace_group_norms(network, self.norm, shape, num_classes)
        return network


def check_image_shape(shape: tuple[int, ...], levels: int) -> int:
    """The resolution of square images that can be halved levels - 1 times; FewstepError otherwise."""
    halvings = 2 ** (levels - 1)
    if len(shape) != 3 or shape[1] != shape[2] or shape[1] % halvings:
        wanted = f"square images whose size is a multiple of {halvings}"
        raise FewstepError(
            f"this U-Net needs {wanted}, got (C, H, W) = {shape}: pass --data.resolution or fewer levels"
        )
    return shape[1]


class _UNet(nn.Module):
    def __init__(self, config: UNet, image_channels: int, size: int, num_classes: int):
        super().__init__()
        from diffusers import UNet2DModel  # 2-5 s to import

        widths = tuple(config.channels * m for m in config.multipliers)
        down = tuple("Attn" if size >> i in config.attention else "Resnet" for i in range(len(widths)))
        if any(w % config.norm_groups for w in widths):
            raise FewstepError(
                f"network widths {widths} must be multiples of --network.norm-groups {config.norm_groups}"
            )
        narrowest = min([widths[-1], *(w for w, d in zip(widths, down, strict=True) if d == "Attn")])
        if narrowest < config.head_dim:  # the innermost level always has attention
            raise FewstepError(f"attention at width {narrowest} needs --network.head-dim {narrowest} or less")
        self.num_classes, self.time_scale = num_classes, config.time_scale
        unet: Any = UNet2DModel(
            sample_size=size,
            in_channels=image_channels,
            out_channels=image_channels,
            block_out_channels=widths,
            layers_per_block=config.layers,
            down_block_types=tuple("AttnDownBlock2D" if d == "Attn" else "ResnetDownsampleBlock2D" for d in down),
            up_block_types=tuple("AttnUpBlock2D" if d == "Attn" else "ResnetUpsampleBlock2D" for d in reversed(down)),
            downsample_type="resnet",
            upsample_type="resnet",
            resnet_time_scale_shift="scale_shift",
            attention_head_dim=config.head_dim,
            norm_num_groups=config.norm_groups,
            attn_norm_num_groups=config.norm_groups if config.middle_norm else None,
            norm_eps=1e-5,
            dropout=config.dropout,
            time_embedding_type="positional",
            num_class_embeds=num_classes or None,
        )
        if config.dropout_max_resolution is not None:
            keep_dropout_at(unet, size, config.dropout_max_resolution)
        if config.low_frequency_time:
            cut_time_frequencies(unet)
        nn.init.zeros_(unet.conv_out.weight)  # D starts as c_skip x
        self.unet = unet

    def forward(
        self, x: Float[Tensor, "n c h w"], c_noise: Float[Tensor, " n"], label: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n c h w"]:
        if (label is None) == bool(self.num_classes):
            raise FewstepError("a class-conditional network needs labels, an unconditional one takes none")
        return self.unet(x, (self.time_scale * c_noise).to(x.dtype), class_labels=label, return_dict=False)[0]


def keep_dropout_at(unet: Any, size: int, max_resolution: int) -> None:
    """Dropout off in every block whose resolution is above max_resolution (ECT on ImageNet-64 keeps it at 16 and below)."""
    levels = len(unet.down_blocks)
    blocks = [(size >> i, block) for i, block in enumerate(unet.down_blocks)]
    blocks += [(size >> (levels - 1 - i), block) for i, block in enumerate(unet.up_blocks)]
    blocks += [(size >> (levels - 1), unet.mid_block)]
    for resolution, block in blocks:
        for module in block.modules():
            if isinstance(module, nn.Dropout) and resolution > max_resolution:
                module.p = 0.0


def cut_time_frequencies(unet: Any) -> None:
    """Zero, and keep at zero, the columns of time_embedding.linear_1 that read sinusoids above LOW_FREQUENCY.

    The exported timestep is 250 ln sigma, so diffusers' fastest sinusoid turns 250 rad per e-fold of sigma and the
    network's two times of a pair look unrelated to each other.
    """
    projection, linear = unet.time_proj, unet.time_embedding.linear_1
    slow = slow_columns(linear.in_features, projection.downscale_freq_shift)
    if not any(slow):
        raise FewstepError(
            "the network is too narrow for --network.low-frequency-time: give 8 --network.channels or more"
        )
    mask = torch.tensor(slow, dtype=torch.float32)
    unet.register_buffer("time_mask", mask, persistent=False)  # so that it moves with the network
    with torch.no_grad():  # the remaining inputs keep the variance of all of them
        linear.weight.mul_(mask * math.sqrt(len(slow) / sum(slow)))
    linear.weight.register_hook(lambda gradient: gradient * unet.time_mask)


def slow_columns(width: int, freq_shift: float | int = 0) -> list[bool]:
    """Of each input of the time embedding, first all sines, then all cosines: whether low_frequency_time keeps it."""
    half = width // 2
    rate = math.log(10000) / (half - freq_shift)
    return [math.exp(-rate * i) <= LOW_FREQUENCY for i in range(half)] * 2
