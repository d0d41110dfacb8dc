"""iLCT: iCT (arXiv:2310.14189) on latents, the baseline of sLCT (arXiv:2502.01441, sec. 5).

sigma_i on Karras' grid of N(k) intervals, N doubling from 10 to 640;  t = sigma_{i+1}, r = sigma_i, log-normal index
L = mean of 1/(t - r) * (sqrt(m + c^2) - c),  c = 0.00054 sqrt(C H W)

m = ||D(x_t, t) - sg D(x_r, r)||^2 is a sum in iCT. sLCT's authors apply the same c to a *mean*, which makes their baseline
nearly plain L2: the presets `mean` and `digits-mean`. Say which one a comparison used.

    fewstep train ilct --data latents/ --out runs/ilct
"""

from dataclasses import replace

from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import UNet
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
from fewstep.objectives.distances import Over
from fewstep.progress import Doubling, LearningRate
from fewstep.recipe import Optimizer, Recipe
from fewstep.recipes.edm import on_digits


def objective(over: Over = "sum", s0: int = 10, s1: int = 640) -> PairObjective:
    """iCT's loss on sLCT's grid; over: what c is compared with, the sum (iCT) or the mean (sLCT's baseline)."""
    distance = PseudoHuber(c=DimensionScale(), over=over)
    return PairObjective(
        pairs=GridPairs(KarrasGrid(Doubling(s0, s1)), density=LogNormal(-1.1, 2.0)),
        terms={"consistency": Consistency(distance=distance, weighting=InverseGap())},
    )


def ilct(over: Over = "sum") -> Recipe:
    """For your own images as latents (fewstep encode), one GPU: 12.8M images, an ADM of 128 channels."""
    return Recipe(
        name="ilct",
        objective=objective(over),
        network=UNet(128, (1, 2, 3, 4), layers=2, attention=(16, 8)),
        data=DataSpec("", flip=True),
        sigma_min=0.002,
        total_nimg=12_800_000,
        batch_size=128,
        optimizer=Optimizer("radam", weight_decay=1e-4),
        lr=LearningRate(1e-4),
        averages=(ConstantEMA(0.9999), ConstantEMA(0.99993)),
        on_nonfinite="skip",
    )


def celebahq256() -> Recipe:
    """sLCT's baseline on CelebA-HQ at 256x256: latents [4, 32, 32], c applied to the mean."""
    return replace(
        ilct("mean"),
        network=UNet(128, (1, 2, 3, 4), layers=4, attention=(16, 8)),
        total_nimg=294_000 * 128,
        averages=(ConstantEMA(0.99993),),
        precision="tf32",
        published="FID 1 step / 2 steps: 37.15 / 16.84",
    )


def digits(over: Over = "sum") -> Recipe:
    """Bundled 8x8 handwritten digits as pixels, class-conditional, on two CPU cores."""
    return on_digits(
        ilct(over),
        objective=objective(over, s0=10, s1=160),
        total_nimg=128_000,
        batch_size=128,
        lr=LearningRate(5e-4),
        averages=(ConstantEMA(0.99),),
    )


PRESETS = {
    "default": ilct, "mean": lambda: ilct("mean"), "celebahq256": celebahq256, "digits": digits,
    "digits-mean": lambda: digits("mean"),
}  # fmt: skip
