"""The one objective and its parts; a method is a value built from them (see fewstep.recipes)."""

from fewstep.objectives.core import Consistency, Denoising, Draw, Networks, Pair, PairObjective, Term
from fewstep.objectives.couplings import Coupling, Independent
from fewstep.objectives.distances import Distance, PseudoHuber, SquaredL2
from fewstep.objectives.masks import Below, Everywhere, Mask
from fewstep.objectives.pairs import (
    ContinuousSchedule,
    Diffusion,
    GridPairs,
    KarrasGrid,
    LogNormal,
    PairSampler,
    UniformIndex,
)
from fewstep.objectives.weightings import EDM, InverseGap, Unit, Weighting

__all__ = [
    "EDM", "Below", "Consistency", "ContinuousSchedule", "Coupling", "Denoising", "Diffusion", "Distance", "Draw",
    "Everywhere", "GridPairs", "Independent", "InverseGap", "KarrasGrid", "LogNormal", "Mask", "Networks", "Pair",
    "PairObjective", "PairSampler", "PseudoHuber", "SquaredL2", "Term", "UniformIndex", "Unit", "Weighting",
]  # fmt: skip
