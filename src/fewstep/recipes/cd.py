"""CD, consistency distillation (Song et al. 2023, arXiv:2303.01469, sec. 4): a frozen diffusion model says where x_r lies.

sigma_i on Karras' grid of 18 intervals;  i uniform, t = sigma_{i+1}, r = sigma_i
x_r = one Heun step of the diffusion model's ODE from x_t to r
L = mean of d(D(x_t, t), sg D(x_r, r))

The student starts from the teacher's weights; the run keeps a copy of the teacher.

    fewstep train cd --init runs/diffusion --data my_photos/ --out runs/cd
"""

from dataclasses import replace

from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import EDMUNet, UNet
from fewstep.objectives import Consistency, GridPairs, KarrasGrid, PairObjective, SquaredL2, UniformIndex, Unit
from fewstep.progress import Doubling, LearningRate
from fewstep.recipe import Evaluation, Optimizer, Recipe
from fewstep.recipes.edm import on_digits


def objective(intervals: int = 18) -> PairObjective:
    """CD's loss with squared L2 distance (the paper's best figures use LPIPS) and a Heun step of the teacher."""
    return PairObjective(
        pairs=GridPairs(KarrasGrid(Doubling(intervals, intervals)), density=UniformIndex()),
        terms={"consistency": Consistency(distance=SquaredL2(over="mean"), weighting=Unit())},
    )


def cd() -> Recipe:
    """For your own images, 32 to 64 pixels, one GPU: 12.8M images from a diffusion model that `train edm` made."""
    return Recipe(
        name="cd",
        objective=objective(),
        network=UNet(),
        data=DataSpec("", flip=True),
        sigma_min=0.002,
        teacher=True,
        starts_from="a diffusion model",
        needs_init="diffusion",
        total_nimg=12_800_000,
        batch_size=256,
        optimizer=Optimizer("radam"),
        lr=LearningRate(4e-4),
        averages=(ConstantEMA(0.9999), ConstantEMA(0.999)),
    )


def digits() -> Recipe:
    """Bundled 8x8 handwritten digits, class-conditional, on two CPU cores."""
    return on_digits(
        cd(), total_nimg=76_800, batch_size=128, lr=LearningRate(5e-4), averages=(ConstantEMA(0.99), ConstantEMA(0.98))
    )


def cifar10() -> Recipe:
    """The paper's CIFAR-10: 800k iterations of 512, NCSN++ from EDM (with L2 in LPIPS' place)."""
    return replace(
        cd(),
        network=EDMUNet(style="ncsn++", dropout=0.0),
        starts_from="EDM's CIFAR-10 unconditional VE model",
        total_nimg=800_000 * 512,
        batch_size=512,
        evaluation=Evaluation(extractor="inception"),
        published="FID 1 step / 2 steps with LPIPS: 3.55 / 2.93",
    )


PRESETS = {"default": cd, "digits": digits, "cifar10": cifar10}
