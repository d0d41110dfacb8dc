"""TCM, truncated consistency models (Lee et al. 2024, arXiv:2410.14895): a second stage that learns only what one step needs.

Stage 1 is a consistency model f0 over all times (`train ect`). Stage 2 trains f on t >= t' = 1 only; below t' the frozen f0
stands in for it, so f(x, t) = f for t >= t', f0 for t < t' (networks.Spliced).

a quarter of the batch: t = t' exactly, whose target f0(x_r, r) is the boundary condition
the rest: ln t ~ 0.2 Student-t(0.01), truncated to (t', 80);  r by ECT's mapping, r/t <= 0.999
L = mean over t > t' of l + 0.1 * mean over t = t' of l,   l = (sqrt(||D(x_t, t) - sg D(x_r, r)||^2 + c^2) - c)/(t - r)

    fewstep train ect --init runs/diffusion --data my_photos/ --out runs/ect
    fewstep train tcm --init runs/ect --data my_photos/ --out runs/tcm
"""

from dataclasses import replace

from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import EDMUNet, Spliced, UNet
from fewstep.objectives import (
    Above,
    At,
    Consistency,
    ContinuousSchedule,
    InverseGap,
    LogNormal,
    LogStudent,
    PairObjective,
    PseudoHuber,
    Truncated,
    Weighting,
)
from fewstep.progress import LearningRate, Stages
from fewstep.recipe import Evaluation, Optimizer, Recipe
from fewstep.recipes.edm import DIGITS_NETWORK, on_digits


def objective(
    q: float = 2.0, stages: int = 8, first_stage: int = 8, c: float = 1e-8, boundary: float = 1.0,
    weighting: Weighting | None = None,
) -> PairObjective:  # fmt: skip
    """TCM's loss; ECT's curriculum goes on at first_stage."""
    schedule = ContinuousSchedule(
        LogNormal(-1.1, 2.0), q=q, stages=Stages(stages), first_stage=first_stage, max_ratio=0.999
    )
    distance, weighting = PseudoHuber(c=c, over="sum"), weighting or InverseGap()
    return PairObjective(
        pairs=Truncated(schedule, LogStudent(0.2, 0.01), boundary, share=0.25),
        terms={
            "consistency": Consistency(distance=distance, weighting=weighting, where=Above(boundary)),
            "boundary": Consistency(distance=distance, weighting=weighting, where=At(boundary), scale=0.1),
        },
    )


def tcm() -> Recipe:
    """For your own images, 32 to 64 pixels, one GPU: 1.28M images from a consistency model that `train ect` made."""
    return Recipe(
        name="tcm",
        objective=objective(),
        network=Spliced(UNet(dropout=0.1)),
        data=DataSpec("", flip=True),
        starts_from="the consistency model of stage 1 (fewstep train ect)",
        needs_init="consistency",
        total_nimg=1_280_000,
        batch_size=128,
        optimizer=Optimizer("radam"),
        lr=LearningRate(5e-5),
        averages=(ConstantEMA(0.9999), ConstantEMA(0.999)),
        snapshot_nimg=128_000,
        grid_nimg=128_000,
    )


def digits() -> Recipe:
    """Bundled 8x8 handwritten digits, class-conditional, on two CPU cores."""
    return on_digits(
        tcm(),
        network=Spliced(DIGITS_NETWORK),
        objective=objective(stages=2, first_stage=4, c=0.03),
        total_nimg=38_400,
        batch_size=128,
        lr=LearningRate(2.5e-4),
        averages=(ConstantEMA(0.98), ConstantEMA(0.99)),
    )


def cifar10() -> Recipe:
    """The paper's CIFAR-10: batches of 1024 from an ECT model of batches of 512, DDPM++ 55.7M."""
    return replace(
        tcm(),
        network=Spliced(EDMUNet(dropout=0.2)),
        total_nimg=200_000 * 1024,
        batch_size=1024,
        averages=(ConstantEMA(0.9999),),
        second_sigma=0.821,
        evaluation=Evaluation(extractor="inception"),
        published="FID 1 step / 2 steps: 2.46 / 2.05",
    )


PRESETS = {"default": tcm, "digits": digits, "cifar10": cifar10}
