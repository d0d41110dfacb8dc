"""CT, consistency training (Song et al. 2023, arXiv:2303.01469): the first of the family, with an EMA target network.

sigma_i on Karras' grid of N(k) intervals growing like a square root;  i uniform, t = sigma_{i+1}, r = sigma_i
L = mean of d(D(x_t, t), D_target(x_r, r)),  x_r = x + r z,  target <- mu(k) target + (1 - mu(k)) online

fewstep train ct --data my_photos/ --data.resolution 32 --out runs/ct
"""

from dataclasses import replace

from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import EDMUNet, UNet
from fewstep.objectives import Consistency, GridPairs, KarrasGrid, PairObjective, SquaredL2, UniformIndex, Unit
from fewstep.progress import LearningRate, SquareRoot, TargetDecay
from fewstep.recipe import Evaluation, Optimizer, Recipe
from fewstep.recipes.edm import on_digits


def objective(s0: int = 2, s1: int = 150) -> PairObjective:
    """CT's loss with squared L2 distance (the paper's best figures use LPIPS)."""
    return PairObjective(
        pairs=GridPairs(KarrasGrid(SquareRoot(s0, s1)), density=UniformIndex()),
        terms={"consistency": Consistency(distance=SquaredL2(over="mean"), weighting=Unit())},
    )


def ct() -> Recipe:
    """For your own images, 32 to 64 pixels: 51.2M images from random weights."""
    return Recipe(
        name="ct",
        objective=objective(),
        network=UNet(),
        data=DataSpec("", flip=True),
        sigma_min=0.002,
        target_decay=TargetDecay(SquareRoot(2, 150), mu0=0.9),
        total_nimg=51_200_000,
        batch_size=256,
        optimizer=Optimizer("radam"),
        lr=LearningRate(4e-4),
        averages=(ConstantEMA(0.9999),),
    )


def digits() -> Recipe:
    """Bundled 8x8 handwritten digits, class-conditional, on two CPU cores; a coarse grid, for mu(k) -> 1 lags (docs/log.md)."""
    return on_digits(
        ct(),
        objective=objective(s0=2, s1=18),
        target_decay=TargetDecay(SquareRoot(2, 18), mu0=0.9),
        total_nimg=128_000,
        batch_size=128,
        lr=LearningRate(1e-3),
        averages=(ConstantEMA(0.99),),
    )


def cifar10() -> Recipe:
    """The paper's CIFAR-10: 800k iterations of 512, NCSN++ (with L2 in LPIPS' place)."""
    return replace(
        ct(),
        network=EDMUNet(style="ncsn++", dropout=0.0),
        total_nimg=800_000 * 512,
        batch_size=512,
        evaluation=Evaluation(extractor="inception"),
        published="FID 1 step / 2 steps with LPIPS: 8.70 / 5.83",
    )


PRESETS = {"default": ct, "digits": digits, "cifar10": cifar10}
