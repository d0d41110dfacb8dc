"""Adaptive laws of the noise level: any law of t, on top of which training learns where to look.

A law of t is a law of u = its own quantile: u uniform on (0, 1) is the law itself (objectives.PairSampler's `u`). An
adaptive law is a density p(u | x) with respect to it, so that it is the same for a log-normal as for a grid. There are two:
LossVariance counts, Learned is trained. Each has an importance-free form, which changes what is minimised (more of the
loss where the density is high), and an importance-weighted one, which changes the noise of the gradient only.
"""

from typing import TypeAlias

from fewstep.timesteps.law import LossAt, TimestepSampler, importance
from fewstep.timesteps.learned import Learned
from fewstep.timesteps.loss_variance import LossVariance

Adaptive: TypeAlias = LossVariance | Learned

__all__ = ["Adaptive", "Learned", "LossAt", "LossVariance", "TimestepSampler", "importance"]
