"""The one objective and its parts; a method is a value built from them (see fewstep.recipes)."""

from fewstep.objectives.core import Consistency, Denoising, Draw, Networks, Pair, PairObjective, Term
from fewstep.objectives.couplings import Coupling, Independent, MinibatchOT
from fewstep.objectives.distances import Cauchy, Distance, GemanMcClure, PseudoHuber, SquaredL2
from fewstep.objectives.masks import Above, At, Below, Everywhere, LowestOf, Mask
from fewstep.objectives.pairs import (
    ContinuousSchedule,
    Diffusion,
    GridPairs,
    KarrasGrid,
    LogNormal,
    LogStudent,
    PairSampler,
    Truncated,
    UniformIndex,
)
from fewstep.objectives.perceptual import LPIPS
from fewstep.objectives.scales import DimensionScale, IntervalScale, ResidualScale, Scale
from fewstep.objectives.weightings import EDM, InverseGap, Unit, Weighting

__all__ = [
    "EDM", "LPIPS", "Above", "At", "Below", "Cauchy", "Consistency", "ContinuousSchedule", "Coupling", "Denoising", "Diffusion",
    "DimensionScale", "Distance", "Draw", "Everywhere", "GemanMcClure", "GridPairs", "Independent", "IntervalScale",
    "InverseGap", "KarrasGrid", "LogNormal", "LogStudent", "LowestOf", "Mask", "MinibatchOT", "Networks", "Pair",
    "PairObjective", "PairSampler", "PseudoHuber", "ResidualScale", "Scale", "SquaredL2", "Term", "Truncated",
    "UniformIndex", "Unit", "Weighting",
]  # fmt: skip
