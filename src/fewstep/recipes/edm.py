"""EDM diffusion (Karras et al. 2022, arXiv:2206.00364): the model that few-step methods start from.

ln t ~ N(-1.2, 1.2^2),  r = 0,  L = mean of (1/t^2 + 1/sigma_data^2) * ||D(x + t z, t) - x||^2

fewstep train edm --data my_photos/ --data.resolution 64 --out runs/diffusion
"""

from dataclasses import replace
from typing import Any

from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import EDMUNet, Network, UNet
from fewstep.objectives import EDM, Denoising, Diffusion, LogNormal, PairObjective, SquaredL2
from fewstep.progress import LearningRate
from fewstep.recipe import Evaluation, Optimizer, Recipe

DIGITS_NETWORK = UNet(channels=16, multipliers=(1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8)


def objective(sigma_data: float = 0.5) -> PairObjective:
    """Denoising score matching with EDM's noise law and weighting (table 1)."""
    return PairObjective(
        pairs=Diffusion(LogNormal(-1.2, 1.2)),
        terms={"denoising": Denoising(distance=SquaredL2(over="mean"), weighting=EDM(sigma_data))},
    )


def on_digits(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe for the bundled 8x8 handwritten digits, class-conditional, on two CPU cores; then `changes`."""
    small = replace(
        recipe,
        network=DIGITS_NETWORK,
        data=DataSpec("digits"),
        conditional=True,
        log_nimg=1_280,
        snapshot_nimg=12_800,
        grid_nimg=12_800,
        evaluation=Evaluation(every_nimg=12_800, extractor="digits", num=2000),
    )
    return replace(small, **changes)


def edm(network: Network | None = None) -> Recipe:
    """For your own images, 32 to 64 pixels, one GPU: 12.8M images through a U-Net of 32M parameters at 32x32."""
    return Recipe(
        name="edm",
        kind="diffusion",
        objective=objective(),
        network=network or UNet(dropout=0.1),
        data=DataSpec("", flip=True),
        total_nimg=12_800_000,
        batch_size=128,
        optimizer=Optimizer("adam"),
        lr=LearningRate(2e-4, warmup_nimg=128_000),
        averages=(ConstantEMA(0.9995),),
    )


def digits() -> Recipe:
    """The demo's diffusion model: bundled 8x8 handwritten digits, class-conditional, a minute on two CPU cores."""
    return replace(
        edm(DIGITS_NETWORK),
        data=DataSpec("digits"),
        conditional=True,
        total_nimg=38_400,
        batch_size=64,
        lr=LearningRate(2e-3, warmup_nimg=3_200),
        averages=(ConstantEMA(0.99),),
        log_nimg=640,
        snapshot_nimg=19_200,
        grid_nimg=9_600,
    )


def cifar10() -> Recipe:
    """EDM's CIFAR-10 model: DDPM++ 55.7M, 200M images (without its augmentation pipeline)."""
    return replace(
        edm(EDMUNet(dropout=0.13)),
        total_nimg=200_000_000,
        batch_size=512,
        lr=LearningRate(1e-3, warmup_nimg=10_000_000),
        averages=(ConstantEMA(0.5 ** (512 / 500_000)),),
        evaluation=Evaluation(extractor="inception"),
        published="FID 1.97 unconditional at 35 evaluations, with EDM's augmentation (arXiv:2206.00364, table 2)",
    )


PRESETS = {"default": edm, "digits": digits, "cifar10": cifar10}
