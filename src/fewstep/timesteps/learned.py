"""Adaptive non-uniform timestep sampling: a policy learns which times lower the loss at all times (arXiv:2411.09998)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewstep.distributed import rank, sum_over_ranks, world
from fewstep.noise import dropout_stream, philox
from fewstep.timesteps.law import LossAt, TimestepSampler, importance, quantile, uniforms
from fewstep.timesteps.policy import Policy, entropy, log_density_at
from fewstep.types import FewstepError, PerSample, Sample, Times

PICKED = 3  # times in the reward
BASELINE_DECAY = 0.9  # of the running mean of the reward, per update of the policy
EQUAL = 1e-5  # rewards that differ by less than this part of their size are equal
ROUNDING = 1e-6  # a loss that changes by less than this part of it has not changed


@dataclass(frozen=True)
class Learned:
    """u ~ Beta(alpha(x), beta(x)), a small convolutional network of the clean image, trained by REINFORCE (arXiv:2411.09998).

    Every `interval` steps the loss is measured before and after the model's update. An image's reward is by how much its
    loss fell, summed over three times: those whose fall goes best with the fall over all times, by the F-test of a
    univariate regression on the last `memory` measurements (before three of them: evenly spaced times).

    Where the paper is silent or has DDPM's 1000 steps: the fall over all times is measured at `candidates` quantiles, the
    batch's images spread over them; the Beta density is constant on 1024 bins, so that its quantiles and importance are
    exact, and has a uniform share; a reward is a part of the batch's mean loss at its three times, since losses here differ
    in scale by orders of magnitude; a running mean is its baseline, so that equal rewards teach nothing, and the entropy
    draws the law back to the uniform one.

    An update costs 2 * (3 + ceil(candidates / batch)) evaluations of a batch's loss, without gradient.
    """

    interval: int = 40
    """optimizer steps between two updates of the policy"""
    memory: int = 20
    """measured decreases that the regression sees"""
    candidates: int = 32
    """quantiles at which the decrease over all times is measured"""
    lr: float = 1e-2
    """of the policy's Adam"""
    entropy: float = 0.01
    """coefficient of the entropy bonus: a fall larger by this part of the loss is worth e times the draws"""
    clip: float = 1.0
    """norm to which the policy's gradient is clipped"""
    channels: tuple[int, ...] = (32, 64, 128)
    """widths of the policy's convolutions"""
    hidden: int = 256
    """width of the policy's hidden layer"""
    mix: float = 0.1
    """share of the uniform law in the density (the paper: 0); it bounds the importance by 1/mix"""
    weighted: bool = False
    """weight the loss by 1/p(u | x): the objective stays what it was; otherwise it follows the density (the paper)"""

    def __post_init__(self) -> None:
        if min(self.interval, self.hidden, *self.channels) < 1 or self.memory < 3 or self.candidates < PICKED:
            raise FewstepError(
                "--timesteps needs interval, channels and hidden >= 1, memory >= 3 and candidates >= 3, got "
                f"{self.interval}, {self.channels}, {self.hidden}, {self.memory}, {self.candidates}"
            )
        if min(self.lr, self.clip) <= 0 or self.entropy < 0 or not 0 <= self.mix < 1:
            raise FewstepError(
                "--timesteps needs lr > 0, clip > 0, entropy >= 0 and 0 <= mix < 1, got "
                f"{self.lr}, {self.clip}, {self.entropy}, {self.mix}"
            )
        if self.weighted and self.mix == 0:
            raise FewstepError("--timesteps.weighted needs mix > 0: without it the importance has no bound")

    def build(self, shape: tuple[int, ...], device: torch.device, seed: int) -> TimestepSampler:
        """The sampler of images of this shape (C, H, W), or of vectors, before any reward: the uniform law."""
        return _Reinforced(self, shape, device, seed)


class _Reinforced(TimestepSampler):
    def __init__(self, config: Learned, shape: tuple[int, ...], device: torch.device, seed: int):
        self.config = config
        with dropout_stream(int(philox(seed, "weights", 1).integers(2**63 - 1)), torch.device("cpu")):
            self.policy = Policy(shape, config.channels, config.hidden, config.mix).to(device)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=config.lr)
        self.decreases = torch.zeros(config.memory, config.candidates, device=device)  # the newest last
        self.baseline = torch.zeros((), device=device)
        self.updates = 0
        self.grid = (torch.arange(config.candidates, device=device) + 0.5) / config.candidates
        self.x: Sample | None = None  # the batch drawn last, its quantiles, and what before() measured
        self.u: Times | None = None
        self.measured: list[tuple[Times, PerSample]] = []

    @torch.no_grad()
    def draw(self, x: Sample, seed: int) -> tuple[Times, PerSample]:
        density = self.policy(x.float()).exp()
        u, there = quantile(density, uniforms(len(x), seed, x.device))
        self.x, self.u, self.measured = x, u, []
        return u, importance(there, 1 / self.config.mix) if self.config.weighted else torch.ones_like(u)

    def observe(self, u: Times, loss: PerSample, importance: PerSample) -> None:
        """Nothing: the policy learns from how the loss falls, not from its size."""

    def due(self, step: int) -> bool:
        return step % self.config.interval == 0

    @torch.no_grad()
    def before(self, loss_at: LossAt) -> None:
        assert self.u is not None, "draw() comes first"
        n = len(self.u)
        everywhere = [self.grid[which] for which in self.spread(n)]
        picked = [u.repeat(n) for u in self.grid[self.picked()]]
        self.measured = [(u, loss_at(u)) for u in (*everywhere, *picked)]

    @torch.no_grad()
    def after(self, loss_at: LossAt) -> None:
        assert self.measured, "before() comes first"
        falls = [fall(loss, loss_at(u)) for u, loss in self.measured]
        self.remember(falls[:-PICKED])
        level = torch.stack([loss for _, loss in self.measured[-PICKED:]]).sum(0)
        self.learn(self.advantage(torch.stack(falls[-PICKED:]).sum(0), level))
        self.x, self.u, self.measured, self.updates = None, None, [], self.updates + 1

    def spread(self, n: int) -> list[Tensor]:
        """Which candidate each of this rank's images [n] is measured at, in each of as few passes as cover them all."""
        rows = torch.arange(rank() * n, (rank() + 1) * n, device=self.grid.device)
        whole = n * world()
        passes = -(-self.config.candidates // whole)
        return [(rows + k * whole) % self.config.candidates for k in range(passes)]

    def remember(self, falls: list[PerSample]) -> None:
        """Add the mean decrease at every candidate to the memory; the oldest goes."""
        which, mine = torch.cat(self.spread(len(falls[0]))), torch.cat(falls)
        at = which[:, None] == torch.arange(self.config.candidates, device=which.device)
        row = torch.stack([torch.where(at, mine.nan_to_num(0, 0, 0)[:, None], 0.0).sum(0), at.float().sum(0)])
        sum_over_ranks([row])
        self.decreases.copy_(torch.cat([self.decreases[1:], (row[0] / row[1])[None]]))

    def picked(self) -> Tensor:
        """The three candidates by which the decrease over all of them is told best, [3]."""
        known = self.decreases[self.config.memory - min(self.updates, self.config.memory) :]
        if len(known) < 3:  # any two points lie on a line
            return (torch.arange(PICKED, device=self.grid.device) * 2 + 1) * self.config.candidates // (2 * PICKED)
        x, y = known - known.mean(0), known.sum(1) - known.sum(1).mean()
        r2 = (y @ x).square() / (x.square().sum(0) * y.square().sum())  # F = r2 / (1 - r2) * (rows - 2)
        return r2.nan_to_num(0, 0, 0).sort(descending=True, stable=True).indices[:PICKED]

    def advantage(self, reward: PerSample, level: PerSample) -> PerSample:
        """The reward [n] as a part of the batch's mean loss (of level [n]), less its running mean; 0 where all are equal."""
        known = reward.isfinite() & level.isfinite()
        reward, level = torch.where(known, reward, 0.0), torch.where(known, level, 0.0)
        sums = torch.stack([reward.sum(), level.float().sum(), known.sum().float()])
        sum_over_ranks([sums])
        unit = sums[1].abs().clamp(min=torch.finfo(sums.dtype).tiny) / sums[2].clamp(min=1)
        mean = sums[0] / sums[2].clamp(min=1) / unit
        baseline = self.baseline if self.updates else mean
        off = torch.where(known, reward / unit - baseline, 0.0)
        square = off.square().sum()
        sum_over_ranks([square])
        spread = (square / sums[2].clamp(min=1)).sqrt()
        self.baseline = torch.lerp(mean, baseline, BASELINE_DECAY)
        return torch.where(spread > EQUAL * baseline.abs(), off, 0.0)

    @torch.enable_grad()
    def learn(self, advantage: PerSample) -> None:
        """One step of REINFORCE with entropy bonus; the gradient is the whole batch's."""
        assert self.x is not None
        assert self.u is not None
        log_density = self.policy(self.x.float())
        gain = advantage * log_density_at(log_density, self.u) + self.config.entropy * entropy(log_density)
        self.optimizer.zero_grad(set_to_none=True)
        (-gain.sum() / (len(gain) * world())).backward()
        sum_over_ranks([p.grad for p in self.policy.parameters() if p.grad is not None])
        nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.clip)
        self.optimizer.step()

    def density(self, x: Sample) -> Float[Tensor, "n bins"]:
        """p(u | x) in 1024 equal bins of u, mean 1 over the bins."""
        with torch.no_grad():
            return self.policy(x.float()).exp()

    def tensors(self) -> dict[str, Tensor]:
        flat = {f"policy/{name}": t for name, t in self.policy.state_dict().items()}
        for name, parameter in self.policy.named_parameters():
            flat |= {f"optimizer/{name}/{key}": t for key, t in self.optimizer.state[parameter].items()}
        return flat | {"decreases": self.decreases, "baseline": self.baseline, "updates": torch.tensor(self.updates)}

    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in flat.items() if name.startswith(prefix)}

        self.policy.load_state_dict(part("policy/"))
        for name, parameter in self.policy.named_parameters():
            saved = part(f"optimizer/{name}/")
            self.optimizer.state[parameter] = {
                key: t.clone() if key == "step" else t.to(parameter.device, copy=True) for key, t in saved.items()
            }
        self.decreases.copy_(flat["decreases"])
        self.baseline = flat["baseline"].to(self.grid.device, copy=True)
        self.updates = int(flat["updates"])


def fall(before: PerSample, after: PerSample) -> PerSample:
    """By how much each loss fell; nothing where the difference is rounding."""
    difference = before - after
    return torch.where(difference.abs() > ROUNDING * before.abs(), difference, 0.0).float()
