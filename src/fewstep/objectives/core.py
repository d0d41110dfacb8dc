"""One objective: every method here compares two points (x_t, x_r) of one trajectory.

    L = sum over terms of  scale * mean over {where} of  w(t, r) * d(D(x_t, t), target),   x_t = x + t * noise

The target of a consistency term is sg[D(x_r, r)] at the nearer point, that of a denoising term the data x.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fewstep.noise import dropout_stream
from fewstep.objectives.couplings import Coupling, Independent
from fewstep.objectives.distances import Distance
from fewstep.objectives.masks import Everywhere, Mask
from fewstep.objectives.pairs import PairSampler
from fewstep.objectives.scales import ResidualScale
from fewstep.objectives.weightings import Weighting
from fewstep.ode import Heun, Solver
from fewstep.progress import Progress
from fewstep.types import Denoiser, Labels, PerSample, Sample, Times, like


@dataclass(frozen=True)
class Networks:
    """The three networks of arXiv:2303.01469."""

    online: Denoiser
    target: Denoiser | None = None
    """None: the online network, gradient stopped"""
    teacher: Denoiser | None = None
    """None: the data itself (consistency training); otherwise a diffusion model (consistency distillation)"""


@dataclass(frozen=True)
class Draw:
    """What chance decides about a batch before any network runs."""

    t: Times
    r: Times
    noise: Sample
    share: dict[str, PerSample]
    """per term: n/|selected| where it applies and 0 elsewhere, over the whole batch of all ranks. The mean of share * loss
    is then the mean over the selected samples, and microbatches and ranks add up to the large batch exactly."""
    dropout_seed: int

    def rows(self, start: int, stop: int) -> "Draw":
        """The draw of a microbatch."""
        share = {name: s[start:stop] for name, s in self.share.items()}
        return Draw(self.t[start:stop], self.r[start:stop], self.noise[start:stop], share, self.dropout_seed + start)


@dataclass(frozen=True)
class Pair:
    """One trajectory seen at two times: the data x [n, *dims], t and r [n], and the two estimates of x."""

    x: Sample
    t: Times
    r: Times
    denoised_t: Sample
    denoised_r: Sample

    def log_residual(self) -> PerSample:
        """ln of the root mean square of D(x_t, t) - D(x_r, r) over C, H, W, [n]; no gradient."""
        difference = (self.denoised_t.detach().float() - self.denoised_r.float()).flatten(1)
        return difference.square().mean(1).clamp(min=1e-24).log() / 2


@dataclass(frozen=True, kw_only=True)
class Term(ABC):
    """One summand of the loss: scale * mean over {where} of w(t, r) * d(D(x_t, t), target)."""

    distance: Distance
    weighting: Weighting
    where: Mask = field(default_factory=Everywhere)
    scale: float = 1.0

    @abstractmethod
    def target(self, pair: Pair) -> Sample:
        """What D(x_t, t) is compared with, [n, *dims]; no gradient flows into it."""


@dataclass(frozen=True, kw_only=True)
class Consistency(Term):
    """D(x_t, t) against sg[D(x_r, r)]: self-consistency along the trajectory (arXiv:2303.01469, sec. 3)."""

    def target(self, pair: Pair) -> Sample:
        return pair.denoised_r


@dataclass(frozen=True, kw_only=True)
class Denoising(Term):
    """D(x_t, t) against x: the diffusion loss (arXiv:2206.00364, eq. 2)."""

    def target(self, pair: Pair) -> Sample:
        return pair.x


@dataclass(frozen=True, kw_only=True)
class PairObjective:
    """A method as a value: a law p(t, r), a noise coupling, a few terms."""

    pairs: PairSampler
    terms: dict[str, Term]
    coupling: Coupling = field(default_factory=Independent)
    solver: Solver = field(default_factory=Heun)
    """how a teacher steps from x_t to x_r; unused without one"""

    def __call__(self, nets: Networks, x: Sample, label: Labels, progress: Progress, seed: int) -> dict[str, Tensor]:
        """The terms of the loss on a batch x [n, *dims] (data scaled to sigma_data), each a scalar; their sum is the loss."""
        draw = self.draw(x, progress, seed)
        return {name: loss.mean() for name, loss in self.losses(nets, x, label, draw, progress).items()}

    def draw(
        self, x: Sample, progress: Progress, seed: int, rank: int = 0, world: int = 1, label: Labels = None
    ) -> Draw:
        """Times and noise for this rank's rows x of a batch of world * n; the same rows at any world size.

        (A coupling sees the rows it is given: this rank's, or, for one over the world, the whole batch as rank 0 of 1.)
        """
        n, generator = len(x), torch.Generator(x.device).manual_seed(seed)
        t, r = self.pairs(n * world, progress, generator)
        noise = torch.randn(n * world, *x.shape[1:], generator=generator, device=x.device, dtype=x.dtype)
        mine = Draw(t, r, noise, self.shares(t, r, progress), seed + 1).rows(rank * n, (rank + 1) * n)
        return replace(mine, noise=self.coupling(x, mine.noise, label))

    def shares(
        self, t: Times, r: Times, progress: Progress, importance: PerSample | None = None
    ) -> dict[str, PerSample]:
        """What each sample of a whole batch counts in each term, [n]; its mean is 1, or 0 where a term applies nowhere."""
        return {name: normalised(term.where(t, r, progress), importance) for name, term in self.terms.items()}

    def retimed(
        self, draw: Draw, u: Times, importance: PerSample, progress: Progress, seed: int, rank: int = 0
    ) -> Draw:
        """The draw with times at the quantiles u of the pairs' law, for an adaptive law of u; the noise stays.

        u, importance: of the whole batch [world * n]. A term is then the mean over its samples weighted by importance.
        """
        t, r = self.pairs(len(u), progress, torch.Generator(u.device).manual_seed(seed), u)
        share = self.shares(t, r, progress, importance)
        n = len(draw.t)
        new = Draw(t, r, t, share, draw.dropout_seed - rank * n).rows(rank * n, (rank + 1) * n)
        return replace(new, noise=draw.noise)

    def losses(self, nets: Networks, x: Sample, label: Labels, draw: Draw, progress: Progress) -> dict[str, PerSample]:
        """Per term, one value per sample [n] whose mean over the whole batch is the term."""
        return self.weigh(self.pair(nets, x, label, draw, progress), draw, progress)

    def pair(self, nets: Networks, x: Sample, label: Labels, draw: Draw, progress: Progress) -> Pair:
        """The two estimates of every sample: all that the terms see of the networks."""
        t, r = draw.t, draw.r
        x_t = x + like(t, x) * draw.noise
        with dropout_stream(draw.dropout_seed, x.device):
            denoised_t = nets.online(x_t, t, label)
        with torch.no_grad(), dropout_stream(draw.dropout_seed, x.device):
            denoised_r = self.denoise_r(nets, x, x_t, label, draw, progress)
        return Pair(x, t, r, denoised_t, denoised_r)

    def weigh(self, pair: Pair, draw: Draw, progress: Progress) -> dict[str, PerSample]:
        """Per term, one value per sample [n] whose mean over the whole batch is the term."""
        weights = {
            name: draw.share[name] * term.scale * term.weighting(pair.t, pair.r) for name, term in self.terms.items()
        }
        return {
            name: weights[name] * term.distance(pair.denoised_t, term.target(pair), progress)
            for name, term in self.terms.items()
        }

    @property
    def residual_scale(self) -> ResidualScale | None:
        """The scale that follows the measured residual, if a term's distance has one."""
        scales = [getattr(term.distance, "c", None) for term in self.terms.values()]
        return next((c for c in scales if isinstance(c, ResidualScale)), None)

    def denoise_r(
        self, nets: Networks, x: Sample, x_t: Sample, label: Labels, draw: Draw, progress: Progress
    ) -> Sample:
        """D(x_r, r), with the boundary D(x, 0) = x: the network is never evaluated at r = 0."""
        zero = self.pairs.zero(progress)
        if zero == "always":
            return x
        r = torch.where(draw.r > 0, draw.r, draw.t) if zero == "sometimes" else draw.r
        if nets.teacher is None:
            x_r = x + like(r, x) * draw.noise  # the Euler form x_t + (r - t) noise loses digits at small gaps
        else:
            x_r = self.solver(nets.teacher, x_t, draw.t, r, label)
        denoised_r = (nets.target or nets.online)(x_r, r, label)
        return torch.where(like(draw.r, x) > 0, denoised_r, x) if zero == "sometimes" else denoised_r


def normalised(selected: Tensor, importance: PerSample | None = None) -> PerSample:
    """Bool [n] -> n/|selected| where selected, else 0, weighted by importance; all zero when nothing is selected."""
    weights = selected.float() if importance is None else selected * importance
    return weights * (len(weights) / weights.sum().clamp(min=1 if importance is None else 1e-12))
