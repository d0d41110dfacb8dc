"""ECT, Easy Consistency Tuning (Geng et al. 2024, arXiv:2406.14548): a diffusion model tuned into a few-step generator.

    t = exp(P_std n + P_mean),  r = max(0, t (1 - n(t) / q^(s+1))),  n(t) = 1 + k sigmoid(-b t)
    L = mean of w(t, r) * (sqrt(||D(x_t, t) - sg D(x_r, r)||^2 + c^2) - c)      same noise and dropout at t and r

The stage s grows with training, so r approaches t: from denoising (r = 0) to consistency.

    fewstep train ect --init runs/diffusion --data my_photos/ --data.resolution 64 --out runs/ect
"""

from dataclasses import replace

from fewstep.data import DataSpec
from fewstep.ema import AverageLaw, ConstantEMA, PowerEMA
from fewstep.networks import EDM2UNet, EDMUNet, UNet
from fewstep.objectives import (
    EDM,
    Consistency,
    ContinuousSchedule,
    InverseGap,
    LogNormal,
    PairObjective,
    PseudoHuber,
    Weighting,
)
from fewstep.progress import LearningRate, Stages
from fewstep.recipe import Evaluation, Optimizer, Recipe
from fewstep.recipes.edm import on_digits


def objective(
    q: float = 2.0, stages: int = 8, c: float = 0.0, times: LogNormal | None = None, weighting: Weighting | None = None
) -> PairObjective:
    """ECT's loss; c = 0 is the plain norm of CIFAR-10, w = 1/(t - r) unless given."""
    times = times or LogNormal(-1.1, 2.0)
    return PairObjective(
        pairs=ContinuousSchedule(times, q=q, k=8.0, b=1.0, stages=Stages(stages)),
        terms={"consistency": Consistency(distance=PseudoHuber(c=c, over="sum"), weighting=weighting or InverseGap())},
    )


def ect() -> Recipe:
    """For your own images, 32 to 64 pixels, one GPU: 1.28M images from a diffusion model that `train edm` made."""
    return Recipe(
        name="ect",
        objective=objective(),
        network=UNet(dropout=0.1),
        data=DataSpec("", flip=True),
        starts_from="a diffusion model",
        total_nimg=1_280_000,
        batch_size=128,
        optimizer=Optimizer("radam"),
        lr=LearningRate(1e-4),
        averages=(ConstantEMA(0.999), ConstantEMA(0.9999)),
        snapshot_nimg=128_000,
        grid_nimg=128_000,
    )


def digits() -> Recipe:
    """The demo's tuning: bundled 8x8 handwritten digits, class-conditional, a minute on two CPU cores."""
    return on_digits(
        ect(),
        objective=objective(q=2.0, stages=4, c=0.03),
        total_nimg=76_800,
        batch_size=128,
        lr=LearningRate(5e-4),
        averages=(ConstantEMA(0.98), ConstantEMA(0.99)),
        snapshot_nimg=1_536,
        grid_nimg=19_200,
        evaluation=Evaluation(every_nimg=38_400, extractor="digits", num=2000),
    )


def cifar10_200k() -> Recipe:
    """CIFAR-10, 200k iterations of 128 from EDM's unconditional DDPM++ (8 stages of 25k)."""
    return replace(
        ect(),
        objective=objective(q=2.0, stages=8),
        network=EDMUNet(dropout=0.20),
        starts_from="EDM's CIFAR-10 unconditional VP model",
        total_nimg=200_000 * 128,
        averages=(ConstantEMA(0.9999),),
        snapshot_nimg=1_280_000,
        grid_nimg=1_280_000,
        evaluation=Evaluation(extractor="inception"),
        published="FID 1 step / 2 steps: 4.54 / 2.20 at 100k, 3.86 / 2.15 at 200k, 3.60 / 2.11 at 400k iterations",
    )


def cifar10_1hour() -> Recipe:
    """CIFAR-10, 8k iterations of 128 at q = 256 in one stage: an hour of one GPU."""
    return replace(
        cifar10_200k(),
        objective=objective(q=256.0, stages=1),
        total_nimg=8_000 * 128,
        averages=(ConstantEMA(0.9993),),
        snapshot_nimg=128_000,
        grid_nimg=128_000,
        published="FID 2 steps: 2.73 (paper); a replication: 8.14 / 2.77 / 2.70 / 2.45 at 500k / 1M / 1.5M / 1.98M images",
    )


def imagenet64(channels: int, peak: float, dropout: float, published: str, batch_size: int = 128) -> Recipe:
    """ImageNet-64 from EDM2's network, with ECT's dropout at 16x16 and below."""
    powers: tuple[AverageLaw, ...] = (PowerEMA(0.01), PowerEMA(0.05), PowerEMA(0.10))
    return replace(
        ect(),
        objective=objective(q=4.0, stages=4, c=0.06, times=LogNormal(-0.8, 1.6), weighting=EDM(0.5)),
        network=EDM2UNet(channels, dropout=dropout, dropout_max_resolution=16),
        data=DataSpec("", flip=True, resolution=64),
        conditional=True,
        starts_from="an EDM2 ImageNet-64 model",
        second_sigma=1.526,
        total_nimg=100_000 * batch_size,
        batch_size=batch_size,
        optimizer=Optimizer("adam", betas=(0.9, 0.99)),
        lr=LearningRate(peak, decay_nimg=2_000 * batch_size),
        averages=(powers[1], powers[0], powers[2]),
        precision="tf32",
        snapshot_nimg=1_280_000,
        grid_nimg=1_280_000,
        evaluation=Evaluation(extractor="inception"),
        published=f"FID 1 step / 2 steps after 100k iterations: {published} (paper)",
    )


PRESETS = {
    "default": ect,
    "digits": digits,
    "cifar10-200k": cifar10_200k,
    "cifar10-1hour": cifar10_1hour,
    "imagenet64-s": lambda: imagenet64(192, 0.0010, 0.40, "5.51 / 3.18"),
    "imagenet64-m": lambda: imagenet64(256, 0.0009, 0.50, "3.67 / 2.35"),
    "imagenet64-l": lambda: imagenet64(320, 0.0008, 0.50, "3.55 / 2.14"),
    "imagenet64-xl": lambda: imagenet64(384, 0.0007, 0.50, "3.35 / 1.96"),
    "imagenet64-xl-1024": lambda: imagenet64(384, 0.0007, 0.50, "2.49 / 1.67", batch_size=1024),
}
