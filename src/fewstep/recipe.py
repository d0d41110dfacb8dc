"""Recipe: everything a run is made of, as one value. The functions that return recipes live in fewstep.recipes."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from fewstep.data import DataSpec
from fewstep.ema import AverageLaw, ConstantEMA
from fewstep.networks import Network, UNet
from fewstep.objectives import IntervalScale, LowestOf, PairObjective, Term
from fewstep.ode import SIGMA_MAX
from fewstep.progress import Constant, LearningRate, TargetDecay
from fewstep.timesteps import Adaptive
from fewstep.types import FewstepError

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "radam": torch.optim.RAdam,
}


@dataclass(frozen=True)
class Optimizer:
    """The gradient step; its learning rate is the recipe's lr."""

    name: Literal["adam", "adamw", "radam"] = "radam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or self.eps <= 0 or self.weight_decay < 0:
            raise FewstepError("--optimizer needs betas in [0, 1), eps > 0 and weight-decay >= 0")

    def build(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        kind = OPTIMIZERS[self.name]
        return kind(parameters, lr=0.0, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay)  # type: ignore[call-arg]


@dataclass(frozen=True)
class Evaluation:
    """What is measured while training, for the raw weights and every average."""

    every_nimg: int = 0
    """images between two evaluations; 0: never"""
    extractor: str = "digits"
    """feature extractor of the Frechet distance: digits, pixels, inception, dinov2"""
    num: int = 2000
    """generated images per evaluation"""
    steps: int = 1
    """sampling steps"""

    def __post_init__(self) -> None:
        if self.every_nimg < 0 or self.num < 2 or self.steps < 1:
            raise FewstepError("--evaluation needs every-nimg >= 0, num >= 2 and steps >= 1")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A complete run. Images are the clock: every interval is in images seen, not in steps."""

    name: str
    """the method"""
    objective: PairObjective
    kind: Literal["diffusion", "consistency"] = "consistency"
    """how the result is sampled"""
    network: Network = field(default_factory=UNet)
    data: DataSpec = field(default_factory=DataSpec)
    conditional: bool = False
    """class-conditional: the data must have labels"""
    sigma_data: float = 0.5
    """standard deviation of the data the network sees"""
    sigma_min: float = 0.0
    """> 0: the shifted boundary form D(x, sigma_min) = x of CT, CD and iCT"""
    second_sigma: float = 0.821
    """noise level of the second sampling step until a search finds a better one"""
    total_nimg: int = 25_600_000
    """images seen in the whole run"""
    batch_size: int = 128
    """images per optimizer step, over all processes"""
    microbatch: int | None = None
    """images per forward pass on one device; smaller saves memory and changes nothing else (dropout masks excepted)"""
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr: LearningRate = field(default_factory=LearningRate)
    averages: tuple[AverageLaw, ...] = (ConstantEMA(0.9999),)
    """the first is the one a run directory stands for until an evaluation finds a better one"""
    target_decay: TargetDecay | Constant | None = None
    """CT: decay per step of the target network's EMA; None: the online network is its own target"""
    timesteps: Adaptive | None = None
    """an adaptive law of times on top of the objective's own; None: its own"""
    teacher: bool = False
    """CD: the model of --init, frozen, steps from x_t to x_r; the run keeps a copy of it"""
    starts_from: str = ""
    """what --init should hold, e.g. 'a diffusion model'; empty: random weights are usual"""
    needs_init: Literal["", "diffusion", "consistency"] = ""
    """the kind of model without which, as --init, the run is refused"""
    seed: int = 0
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16: autocast with fp32 weights and loss; tf32: on CUDA"""
    compile: bool = False
    """torch.compile the network (65-97 s of warm-up on a CPU for little gain)"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """a NaN or infinite loss or gradient: stop with its cause, or skip the step"""
    max_skipped: int = 100
    """skipped steps before the run stops after all"""
    log_nimg: int = 12_800
    """images between two lines of log.jsonl"""
    snapshot_nimg: int = 1_280_000
    """images between two weights-only snapshots and training states (the newest kept); 0: only at the end"""
    snapshot_keep: int = 0
    """weights-only snapshots kept, the newest; 0: all: the window of a later search"""
    snapshot_averages: bool = False
    """keep every average's snapshots too, for EDM2's post-hoc reconstruction (arXiv:2312.02696, sec. 3.2)"""
    grid_nimg: int = 1_280_000
    """images between two sample grids; 0: only at the end"""
    evaluation: Evaluation = field(default_factory=Evaluation)
    published: str = ""
    """the paper's figures for this preset"""

    def __post_init__(self) -> None:
        for name in ("total_nimg", "batch_size", "log_nimg"):
            if getattr(self, name) < 1:
                raise FewstepError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        for name in ("snapshot_nimg", "snapshot_keep", "grid_nimg", "seed", "max_skipped"):
            if getattr(self, name) < 0:
                raise FewstepError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")
        if self.sigma_data <= 0 or self.sigma_min < 0 or not 0 < self.second_sigma < SIGMA_MAX:
            raise FewstepError("a recipe needs sigma-data > 0, sigma-min >= 0 and 0 < second-sigma < 80")
        for name, term in self.objective.terms.items():
            own = getattr(term.weighting, "sigma_data", self.sigma_data)
            if own != self.sigma_data:
                option = f"--objective.terms.{name}.weighting.sigma-data"
                raise FewstepError(f"{option} is {own} but --sigma-data {self.sigma_data}: give both the same value")
        intervals = getattr(getattr(self.objective.pairs, "grid", None), "intervals", None)
        if isinstance(self.target_decay, TargetDecay) and self.target_decay.grid != intervals:
            raise FewstepError(
                "--target-decay.grid and --objective.pairs.grid.intervals differ: give both the same s0 and s1"
            )
        for name, term in self.objective.terms.items():
            self.check_term(name, term)
        if getattr(self.objective.coupling, "by_class", "auto") == "always" and not self.conditional:
            raise FewstepError(
                "--objective.coupling.by-class always needs labels: give --conditional and labelled data, or by-class auto"
            )
        if self.microbatch is not None and self.microbatch < 1:
            raise FewstepError(f"--microbatch must be 1 or more, got {self.microbatch}")
        if len({law.name for law in self.averages}) < len(self.averages):
            raise FewstepError("two averages have the same name: give each --averages.N another decay or std")
        if self.snapshot_averages and not self.averages:
            raise FewstepError("--snapshot-averages needs averages, e.g. --averages power-0.05 power-0.1")

    def check_term(self, name: str, term: Term) -> None:
        """FewstepError where a part of the term repeats what the pairs say, and says something else."""
        grid, option = getattr(self.objective.pairs, "grid", None), f"--objective.terms.{name}"
        scale = getattr(term.distance, "c", None)
        if isinstance(scale, IntervalScale) and (grid is None or scale.intervals != grid.intervals):
            raise FewstepError(
                f"{option}.distance.c.intervals and --objective.pairs.grid.intervals differ: give both the same s0 and s1"
            )
        if isinstance(term.where, LowestOf) and term.where.grid != grid:
            raise FewstepError(f"{option}.where.grid and --objective.pairs.grid differ: give both the same")

    @property
    def snapshots(self) -> int:
        """How many snapshots the run makes: where a step passes a multiple of snapshot_nimg, and at the end."""
        steps = -(-self.total_nimg // self.batch_size)
        passed = (steps - 1) * self.batch_size // self.snapshot_nimg if self.snapshot_nimg else 0
        return min(passed, steps - 1) + 1

    def disk_bytes(self, parameters: int) -> int:
        """Bytes of the weights of a run's files at their most: when a state is written beside the one that it replaces,
        and a snapshot before the oldest makes room for it."""
        snapshots = min(self.snapshots, self.snapshot_keep + 1) if self.snapshot_keep else self.snapshots
        averages = len(self.averages)
        files = snapshots * (1 + averages * self.snapshot_averages) + averages + (self.evaluation.every_nimg > 0)
        files += self.teacher
        state = 3 + averages + bool(self.target_decay)  # weights, two moments
        return 4 * parameters * (files + 2 * state)


def with_sigma_data(recipe: Recipe, sigma_data: float) -> Recipe:
    """The recipe for data of this standard deviation, its weightings included."""
    terms = {
        name: replace(term, weighting=replace(term.weighting, sigma_data=sigma_data))  # type: ignore[type-var]
        if hasattr(term.weighting, "sigma_data")
        else term
        for name, term in recipe.objective.terms.items()
    }
    return replace(recipe, sigma_data=sigma_data, objective=replace(recipe.objective, terms=terms))
