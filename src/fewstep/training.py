"""The training loop: one generator. It never logs, saves, evaluates or stops; fewstep.run does.

Everything chance decides in a step is a function of (seed, images seen), so a resumed run needs no random state.
"""

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import UInt8
from torch import Tensor

from fewstep.data import to_float
from fewstep.distributed import rank, sum_over_ranks, world
from fewstep.ema import Average, lerp
from fewstep.networks import Architecture, Preconditioned
from fewstep.noise import step_seed
from fewstep.objectives import Draw, Networks
from fewstep.progress import Progress
from fewstep.recipe import Recipe
from fewstep.types import Denoiser, Labels, PerSample, Sample, Times


@dataclass
class TrainState:
    """All that training changes."""

    model: Preconditioned
    optimizer: torch.optim.Optimizer
    averages: dict[str, Average]
    target: Preconditioned | None = None
    nimg: int = 0
    skipped: int = 0

    @classmethod
    def create(cls, recipe: Recipe, architecture: Architecture, device: torch.device) -> "TrainState":
        """A fresh state; weights depend on the recipe's seed only."""
        model = architecture.build(recipe.seed).to(device).train()
        target = copy.deepcopy(model).requires_grad_(False) if recipe.target_decay else None
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        averages = {law.name: Average(law, trained) for law in recipe.averages}
        return cls(model, recipe.optimizer.build(trained.values()), averages, target)

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


def training_steps(
    state: TrainState,
    recipe: Recipe,
    batches: Iterable[tuple[UInt8[Tensor, "n c h w"], Labels]],
    teacher: Denoiser | None = None,
) -> Iterator[Step]:
    """Train for as long as it is asked: each item is one optimizer step on one batch of this rank's images [n, c, h, w]."""
    device, parameters = state.device, state.parameters()
    nets = Networks(state.model, state.target, teacher)
    for pixels, label in batches:
        progress = Progress(state.nimg, recipe.total_nimg)
        lr = recipe.lr(progress)
        x = to_float(pixels.to(device, non_blocking=True))
        if recipe.data.flip:
            x = random_flip(x, recipe.seed, state.nimg)
        label = None if label is None else label.to(device, non_blocking=True)
        draw = recipe.objective.draw(x, progress, step_seed(recipe.seed, state.nimg), rank(), world())

        state.optimizer.zero_grad(set_to_none=True)
        losses = accumulate_gradient(nets, recipe, x, label, draw, progress)
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        sums = torch.stack([loss.sum() for loss in losses.values()])
        sum_over_ranks([*gradients.values(), sums])
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients.values()))))
        values = torch.cat([norm[None], sums / recipe.batch_size]).tolist()  # the step's one wait for the device

        state.nimg += recipe.batch_size
        problem = ""
        if all(map(math.isfinite, values)):
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            state.optimizer.step()
            for average in state.averages.values():
                average.update(parameters, state.nimg, recipe.batch_size)
            if state.target and recipe.target_decay:
                lerp(dict(state.target.named_parameters()), dict(state.model.named_parameters()),
                     1 - recipe.target_decay(progress))  # fmt: skip
        else:
            state.skipped += 1
            problem = find_cause(losses, dict(zip(losses, values[1:], strict=True)), gradients, draw, progress)
        yield Step(
            state.nimg, dict(zip(losses, values[1:], strict=True)), lr, values[0], draw.t,
            torch.stack(list(losses.values())).sum(0), problem,
        )  # fmt: skip


def accumulate_gradient(
    nets: Networks, recipe: Recipe, x: Sample, label: Labels, draw: Draw, progress: Progress
) -> dict[str, PerSample]:
    """Add the gradient of this rank's share of the loss, microbatch by microbatch; the per-sample losses of each term."""
    n, parts = len(x), []
    size = recipe.microbatch or n
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        with torch.autocast(x.device.type, dtype, enabled=recipe.precision == "bf16"):
            part = recipe.objective.losses(
                nets, x[rows], None if label is None else label[rows], draw.rows(rows.start, rows.stop), progress
            )
        (torch.stack(list(part.values())).sum() / recipe.batch_size).backward()
        parts.append({name: loss.detach() for name, loss in part.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def random_flip(x: Sample, seed: int, nimg: int) -> Sample:
    """Mirror each image [n, c, h, w] with probability 1/2; which ones depends on its number in the run only."""
    n = len(x)
    generator = torch.Generator().manual_seed(step_seed(seed, nimg, "flip"))
    flips = torch.rand(n * world(), generator=generator)[rank() * n : (rank() + 1) * n] < 0.5
    return torch.where(flips.to(x.device)[:, None, None, None], x.flip(-1), x)


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
