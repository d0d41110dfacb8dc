"""The training loop: one generator. It never logs, saves, evaluates or stops; fewstep.run does.

Everything chance decides in a step is a function of (seed, images seen), so a resumed run needs no random state.
"""

import copy
import math
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from itertools import count

import torch
from torch import Tensor

from fewstep.data.order import prefetched
from fewstep.data.prepare import Pixels, Prepare
from fewstep.distributed import gather_rows, rank, sum_over_ranks, world
from fewstep.ema import Average, lerp
from fewstep.networks import Architecture, Preconditioned
from fewstep.noise import step_seed
from fewstep.objectives import Draw, Independent, Networks, Pair
from fewstep.objectives.couplings import transport_cost
from fewstep.progress import Progress
from fewstep.recipe import Recipe
from fewstep.timesteps import TimestepSampler
from fewstep.types import Denoiser, Labels, PerSample, Sample, Times


@dataclass
class TrainState:
    """All that training changes."""

    model: Preconditioned
    optimizer: torch.optim.Optimizer
    averages: dict[str, Average]
    target: Preconditioned | None = None
    timesteps: TimestepSampler | None = None
    residual: float | None = None
    """running geometric mean of |D(x_t, t) - D(x_r, r)|, where a distance asks for it"""
    nimg: int = 0
    skipped: int = 0

    @classmethod
    def create(cls, recipe: Recipe, architecture: Architecture, device: torch.device) -> "TrainState":
        """A fresh state; weights depend on the recipe's seed only."""
        model = architecture.build(recipe.seed).to(device).train()
        target = copy.deepcopy(model).requires_grad_(False) if recipe.target_decay else None
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        averages = {law.name: Average(law, trained) for law in recipe.averages}
        timesteps = recipe.timesteps.build(architecture.shape, device, recipe.seed) if recipe.timesteps else None
        return cls(model, recipe.optimizer.build(trained.values()), averages, target, timesteps)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def parameters(self) -> dict[str, Tensor]:
        """The trained parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """Begin with these weights (network, target and averages alike)."""
        self.model.load_state_dict(tensors)
        if self.target:
            self.target.load_state_dict(tensors)
        for average in self.averages.values():
            for name, weight in average.weights.items():
                weight.copy_(tensors[name])

    def weights(self, name: str) -> dict[str, Tensor]:
        """A complete state dict: 'online', or an average by name."""
        state = self.model.state_dict()
        return state if name == "online" else {**state, **self.averages[name].weights}

    def tensors(self) -> dict[str, Tensor]:
        """Everything as one flat dict of tensors, for a safetensors file."""
        flat = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        if self.target:
            flat |= {f"target/{name}": t for name, t in self.target.state_dict().items()}
        for key, average in self.averages.items():
            flat |= {f"average/{key}/{name}": t for name, t in average.weights.items()}
        for name, parameter in self.parameters().items():
            flat |= {f"optimizer/{name}/{key}": t for key, t in self.optimizer.state[parameter].items()}
        if self.timesteps:
            flat |= {f"timesteps/{name}": t for name, t in self.timesteps.tensors().items()}
        if self.residual is not None:
            flat["residual"] = torch.tensor(self.residual, dtype=torch.float64)
        return flat

    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        """The inverse of tensors()."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): t for name, t in flat.items() if name.startswith(prefix)}

        self.model.load_state_dict(part("model/"))
        if self.target:
            self.target.load_state_dict(part("target/"))
        for key, average in self.averages.items():
            for name, tensor in part(f"average/{key}/").items():
                average.weights[name].copy_(tensor)
        for name, parameter in self.parameters().items():
            saved = part(f"optimizer/{name}/")
            self.optimizer.state[parameter] = {
                key: t.clone() if key == "step" else t.to(parameter.device, copy=True) for key, t in saved.items()
            }
        if self.timesteps:
            self.timesteps.load_tensors(part("timesteps/"))
        self.residual = flat["residual"].item() if "residual" in flat else None


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. nimg counts the images seen including this step's."""

    nimg: int
    losses: dict[str, float]
    lr: float
    gradient_norm: float
    t: Times
    per_sample: PerSample = field(repr=False)
    """the summed loss of each of this rank's samples, on the device"""
    problem: str = ""
    """why the weights were left unchanged; empty: all was well"""
    notes: dict[str, float] = field(default_factory=dict)
    """what else there is to log: the residual that a distance follows, the transport cost that a coupling leaves"""


@dataclass(frozen=True)
class Batch:
    """This rank's rows of one optimizer step: data x [n, *dims] scaled to sigma_data, labels, and what chance decided."""

    x: Sample
    label: Labels
    draw: Draw
    transport: float | None = None
    """transport cost of image and noise as coupled, over that of independent ones; None: they are independent"""


def training_steps(
    state: TrainState, recipe: Recipe, batches: Iterable[tuple[Tensor, Labels]], teacher: Denoiser | None = None,
    prepare: Prepare | None = None,
) -> Generator[Step, None, None]:  # fmt: skip
    """Train for as long as it is asked: each item is one optimizer step on one batch of this rank's images.

    batches: what the data set stores [n, ...], and labels; prepare makes x [n, *dims] of it (default: of uint8 pixels).
    """
    parameters, nets = state.parameters(), Networks(state.model, state.target, teacher)
    with closing(drawn(state, recipe, iter(batches), prepare or Pixels(recipe.data.flip))) as feed:
        for batch in feed:
            progress = Progress(state.nimg, recipe.total_nimg, state.residual)
            lr, lesson = recipe.lr(progress), None
            if state.timesteps:
                lesson = Lesson(state, recipe, nets, batch, progress)
                batch = lesson.batch
            state.optimizer.zero_grad(set_to_none=True)
            losses, residual = accumulate_gradient(nets, recipe, batch, progress)
            gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            sums = torch.stack([*(loss.sum() for loss in losses.values()), residual])
            sum_over_ranks([*gradients.values(), sums])
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values()))))
            values = torch.cat([norm[None], sums / recipe.batch_size]).tolist()  # the step's one wait for the device
            means, problem = dict(zip(losses, values[1:], strict=False)), ""

            state.nimg += recipe.batch_size
            if all(map(math.isfinite, values)):
                with lesson or nullcontext():  # it looks at the loss before and after
                    update(state, recipe, lr, progress)
                if lesson:
                    lesson.observe(losses)
                if scale := recipe.objective.residual_scale:
                    state.residual = running(state.residual, values[-1], recipe.batch_size / scale.half_life_nimg)
            else:
                state.skipped += 1
                problem = find_cause(losses, means, gradients, batch.draw, progress)
            notes = {"residual": state.residual, "transport": batch.transport}
            yield Step(
                state.nimg, means, lr, values[0], batch.draw.t, torch.stack(list(losses.values())).sum(0), problem,
                {name: value for name, value in notes.items() if value is not None},
            )  # fmt: skip


def update(state: TrainState, recipe: Recipe, lr: float, progress: Progress) -> None:
    """The optimizer's step and what follows the weights: averages and the target network."""
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    state.optimizer.step()
    for average in state.averages.values():
        average.update(state.parameters(), state.nimg, recipe.batch_size)
    if state.target and recipe.target_decay:
        lerp(dict(state.target.named_parameters()), dict(state.model.named_parameters()),
             1 - recipe.target_decay(progress))  # fmt: skip


def running(before: float | None, log_residual: float, half_lives: float) -> float:
    """The running geometric mean after one more measurement."""
    if before is None:
        return math.exp(log_residual)
    old = 0.5**half_lives
    return math.exp(old * math.log(before) + (1 - old) * log_residual)


def drawn(
    state: TrainState, recipe: Recipe, stored: Iterator[tuple[Tensor, Labels]], prepare: Prepare
) -> Generator[Batch, None, None]:
    """The batches from the state's position on; those that need a coupling are drawn one step ahead, in a thread."""
    start, device, coupling = state.nimg, state.device, recipe.objective.coupling
    whole = getattr(coupling, "over", "rank") == "world"  # then every process has, and couples, the whole batch
    place = (0, 1) if whole else (rank(), world())

    def make(k: int) -> Batch | None:
        item = next(stored, None)
        if item is None:
            return None
        nimg = start + k * recipe.batch_size
        x = prepare(item[0].to(device, non_blocking=True), recipe.seed, nimg, *place)
        label = None if item[1] is None else item[1].to(device, non_blocking=True)
        draw = recipe.objective.draw(x, Progress(nimg, recipe.total_nimg), step_seed(recipe.seed, nimg), *place, label)
        cost = None if isinstance(coupling, Independent) else transport_cost(x, draw.noise)
        if not whole or world() == 1:
            return Batch(x, label, draw, cost)
        n = len(x) // world()
        rows = slice(rank() * n, (rank() + 1) * n)
        return Batch(x[rows], None if label is None else label[rows], draw.rows(rows.start, rows.stop), cost)

    if isinstance(coupling, Independent):
        made: Generator[Batch | None, None, None] = (make(k) for k in count())
    else:
        made = prefetched(make, ahead=1)
    with closing(made):
        for batch in made:
            if batch is None:
                return
            yield batch


class Lesson:
    """One step of an adaptive law of times: it draws them, and learns from the loss; around the update, where it is due."""

    def __init__(self, state: TrainState, recipe: Recipe, nets: Networks, batch: Batch, progress: Progress):
        assert state.timesteps is not None
        self.times, self.recipe, self.nets, self.drawn, self.progress = state.timesteps, recipe, nets, batch, progress
        self.seed = step_seed(recipe.seed, state.nimg, "times")
        self.due = self.times.due(state.nimg // recipe.batch_size)
        self.u, self.importance = self.times.draw(batch.x, self.seed)
        self.batch = self.at(self.u, self.importance)

    def at(self, u: Times, importance: PerSample) -> Batch:
        """The batch with its times at these quantiles of the recipe's law."""
        draw = self.recipe.objective.retimed(
            self.drawn.draw, gather_rows(u), gather_rows(importance), self.progress, self.seed, rank()
        )
        return replace(self.drawn, draw=draw)

    @torch.no_grad()
    def loss_at(self, u: Times) -> PerSample:
        """The loss of each of this rank's images at the quantiles u [n], with the batch's own noise and dropout."""
        batch, parts = self.at(u, torch.ones_like(u)), []
        for part, _ in microbatches(self.nets, self.recipe, batch, self.progress):
            parts.append(torch.stack(list(part.values())).sum(0))
        return torch.cat(parts)

    def observe(self, losses: dict[str, PerSample]) -> None:
        """The step's own losses."""
        self.times.observe(self.u, torch.stack(list(losses.values())).sum(0), self.importance)

    def __enter__(self) -> None:
        if self.due:
            self.times.before(self.loss_at)

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if self.due and kind is None:
            self.times.after(self.loss_at)


def microbatches(
    nets: Networks, recipe: Recipe, batch: Batch, progress: Progress
) -> Iterator[tuple[dict[str, PerSample], Pair]]:
    """The per-sample losses of each term, and the pair they are of, one microbatch after another."""
    n, objective = len(batch.x), recipe.objective
    size = recipe.microbatch or n
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        label, draw = None if batch.label is None else batch.label[rows], batch.draw.rows(rows.start, rows.stop)
        with torch.autocast(batch.x.device.type, dtype, enabled=recipe.precision == "bf16"):
            pair = objective.pair(nets, batch.x[rows], label, draw, progress)
            losses = objective.weigh(pair, draw, progress)
        yield losses, pair


def accumulate_gradient(
    nets: Networks, recipe: Recipe, batch: Batch, progress: Progress
) -> tuple[dict[str, PerSample], Tensor]:
    """Add the gradient of this rank's share of the loss, microbatch by microbatch.

    Returns the per-sample losses of each term, and the sum of ln |D(x_t, t) - D(x_r, r)| where a distance follows it.
    """
    parts, residual = [], batch.x.new_zeros(())
    for losses, pair in microbatches(nets, recipe, batch, progress):
        (torch.stack(list(losses.values())).sum() / recipe.batch_size).backward()
        parts.append({name: loss.detach() for name, loss in losses.items()})
        if recipe.objective.residual_scale:
            residual += pair.log_residual().sum()
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, residual


def find_cause(
    losses: dict[str, PerSample],
    means: dict[str, float],
    gradients: dict[str, Tensor],
    draw: Draw,
    progress: Progress,
) -> str:
    """Which term, t and r, or which weight's gradient, is not finite."""
    where = f"after {progress.nimg} images ({progress.fraction:.1%} of the run)"
    for name, loss in losses.items():
        bad = (~loss.isfinite()).nonzero().flatten().tolist()
        if bad:
            i = bad[0]
            return (
                f"the {name} term is {loss[i].item()} for {len(bad)} of {len(loss)} images {where}, "
                f"first at t = {draw.t[i].item():.5g}, r = {draw.r[i].item():.5g}"
            )
    for name, mean in means.items():
        if not math.isfinite(mean):
            return f"the {name} term is {mean} in another process {where}"
    for name, gradient in gradients.items():
        if not gradient.isfinite().all():
            return f"the loss is finite but the gradient of {name} is not, {where}"
    return f"the loss and every gradient are finite but the gradient's norm is not, {where}"
