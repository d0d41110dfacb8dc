"""iCT, improved consistency training (Song & Dhariwal 2023, arXiv:2310.14189): from scratch, without a diffusion model.

sigma_i on Karras' grid of N(k) intervals, N doubling from 10 to 1280;  t = sigma_{i+1}, r = sigma_i
p(i) ~ erf((ln sigma_{i+1} - P_mean)/(sqrt2 P_std)) - erf((ln sigma_i - P_mean)/(sqrt2 P_std))
L = mean of 1/(t - r) * (sqrt(||D(x_t, t) - sg D(x_r, r)||^2 + c^2) - c),  c = 0.00054 sqrt(C H W)

fewstep train ict --data my_photos/ --data.resolution 32 --out runs/ict
"""

from dataclasses import replace

from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import EDMUNet, UNet
from fewstep.objectives import (
    Consistency,
    DimensionScale,
    GridPairs,
    InverseGap,
    KarrasGrid,
    LogNormal,
    PairObjective,
    PseudoHuber,
)
from fewstep.progress import Doubling, LearningRate
from fewstep.recipe import Evaluation, Optimizer, Recipe
from fewstep.recipes.edm import on_digits


def objective(s0: int = 10, s1: int = 1280) -> PairObjective:
    """iCT's loss: pseudo-Huber over the sum, log-normal indices, a doubling grid, no EMA teacher."""
    return PairObjective(
        pairs=GridPairs(KarrasGrid(Doubling(s0, s1)), density=LogNormal(-1.1, 2.0)),
        terms={
            "consistency": Consistency(
                distance=PseudoHuber(DimensionScale(0.00054), over="sum"), weighting=InverseGap()
            )
        },
    )


def ict() -> Recipe:
    """For your own images, 32 to 64 pixels: 51.2M images from random weights."""
    return Recipe(
        name="ict",
        objective=objective(),
        network=UNet(dropout=0.3),
        data=DataSpec("", flip=True),
        sigma_min=0.002,
        total_nimg=51_200_000,
        batch_size=256,
        optimizer=Optimizer("radam"),
        lr=LearningRate(1e-4),
        averages=(ConstantEMA(0.99993),),
    )


def digits() -> Recipe:
    """Bundled 8x8 handwritten digits, class-conditional, on two CPU cores."""
    return on_digits(
        ict(),
        objective=objective(s0=10, s1=160),
        total_nimg=128_000,
        batch_size=128,
        lr=LearningRate(5e-4),
        averages=(ConstantEMA(0.99),),
    )


def cifar10() -> Recipe:
    """The paper's CIFAR-10: 400k iterations of 1024, NCSN++ 56M."""
    return replace(
        ict(),
        network=EDMUNet(style="ncsn++", dropout=0.3),
        total_nimg=400_000 * 1024,
        batch_size=1024,
        evaluation=Evaluation(extractor="inception"),
        published="FID 1 step / 2 steps: 2.83 / 2.46 (a network twice as deep: 2.51 / 2.24)",
    )


PRESETS = {"default": ict, "digits": digits, "cifar10": cifar10}
