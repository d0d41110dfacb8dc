"""What optimal-transport coupling costs per step, hidden behind the network and not, and what it gains in transport cost.

    python benchmarks/ot.py --data.source cifar10/ --data.resolution 8 --out benchmarks/results/DATE-ot.json
    python benchmarks/ot.py --data.source latents/ --network.channels 128 --device cuda --out ...

Every round trains the same network for --steps steps with independent noise and for as many with MinibatchOT, in turns,
each after one step that is not counted; figures are medians over rounds, ratios within a round. `alone` is the coupling
of such batches by itself, one thread waiting for it: what a step would take longer if nothing were hidden.

On a CPU, --threads 1 leaves a core to the coupling's thread, as a GPU leaves all of them. `cpu_seconds` are those of the
whole process: what the coupling costs where no core is free.
"""

import json
import statistics
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import tyro

from fewstep.data import BatchOrder, DataSpec, Images, batches, open_images, preparation
from fewstep.environment import environment
from fewstep.networks import Architecture, UNet
from fewstep.noise import step_seed
from fewstep.objectives import Coupling, Independent, MinibatchOT
from fewstep.objectives.couplings import transport_cost
from fewstep.progress import Progress
from fewstep.recipe import Recipe
from fewstep.recipes.edm import DIGITS_NETWORK
from fewstep.recipes.slct import objective
from fewstep.training import Step, TrainState, training_steps
from fewstep.types import Labels, Sample


@dataclass(frozen=True)
class Arguments:
    out: Path
    data: DataSpec = field(default_factory=DataSpec)
    network: UNet = DIGITS_NETWORK
    batch_sizes: tuple[int, ...] = (128, 512, 1024, 2048)
    conditional: bool = False
    """couple within labels"""
    microbatch: int | None = None
    device: str = "cpu"
    threads: int = 1
    """of PyTorch, on the CPU"""
    rounds: int = 7
    steps: int = 3
    """counted steps per round and coupling"""
    only_gains: bool = False
    """no training: transport costs and the coupling alone, e.g. at other --data.resolution"""


@dataclass
class Run:
    """One coupling's training, continued from round to round."""

    recipe: Recipe
    images: Images
    device: torch.device

    def __post_init__(self) -> None:
        classes = self.images.num_classes if self.recipe.conditional else 0
        architecture = Architecture(self.recipe.network, self.images.shape, classes)
        self.state = TrainState.create(self.recipe, architecture, self.device)

    def steps(self) -> Generator[Step, None, None]:
        order = BatchOrder(len(self.images), self.recipe.seed)
        with closing(batches(self.images, order, self.state.nimg, self.recipe.batch_size)) as feed:
            labelled = feed if self.recipe.conditional else ((stored, None) for stored, _ in feed)
            prepare = preparation(self.images, self.recipe.data)
            with closing(training_steps(self.state, self.recipe, labelled, None, prepare)) as steps:
                yield from steps

    def timed(self, count: int) -> tuple[float, float]:
        """Seconds and CPU seconds per step, the first not counted."""
        with closing(self.steps()) as steps:
            next(steps)
            began, cpu = time.perf_counter(), time.process_time()
            for _ in range(count):
                step = next(steps)
            assert not step.problem
            return (time.perf_counter() - began) / count, (time.process_time() - cpu) / count


def recipe_with(a: Arguments, n: int, coupling: Coupling) -> Recipe:
    return Recipe(
        name="benchmark", objective=replace(objective(), coupling=coupling), network=a.network, data=a.data,
        conditional=a.conditional, batch_size=n, microbatch=a.microbatch, total_nimg=10**9,
    )  # fmt: skip


def overhead(a: Arguments, images: Images, n: int) -> dict[str, Any]:
    """Step times with and without, round by round."""
    runs = [Run(recipe_with(a, n, c), images, torch.device(a.device)) for c in (Independent(), MinibatchOT())]
    rounds = []
    for k in range(a.rounds):
        turns = runs if k % 2 else runs[::-1]
        seconds = {run.recipe.objective.coupling: run.timed(a.steps) for run in turns}
        rounds.append((seconds[Independent()], seconds[MinibatchOT()]))
    return {
        "independent": median([plain[0] for plain, _ in rounds]), "ot": median([ot[0] for _, ot in rounds]),
        "overhead": median([ot[0] - plain[0] for plain, ot in rounds]),
        "ratio": median([ot[0] / plain[0] for plain, ot in rounds]),
        "cpu_seconds": median([ot[1] - plain[1] for plain, ot in rounds]),
    }  # fmt: skip


def alone(a: Arguments, images: Images, n: int) -> dict[str, Any]:
    """The coupling by itself on successive batches, and the transport cost of its pairs over that of independent ones."""
    device, prepare = torch.device(a.device), preparation(images, a.data)
    coupling, objective_ = MinibatchOT(), recipe_with(a, n, Independent()).objective
    seconds, costs = [], []
    with closing(batches(images, BatchOrder(len(images), 0), 0, n)) as feed:
        for k in range(a.rounds):
            stored, label = next(feed)
            x: Sample = prepare(stored.to(device), 0, k * n)
            own: Labels = label.to(device) if a.conditional and label is not None else None
            noise = objective_.draw(x, Progress(k * n, 10**9), step_seed(0, k * n)).noise
            float(noise.sum())  # the device has finished
            began = time.perf_counter()
            coupled = coupling(x, noise, own)
            float(coupled.flatten()[0])
            seconds.append(time.perf_counter() - began)
            costs.append(transport_cost(x, coupled) / transport_cost(x, noise))
    return {"alone": median(seconds), "transport": median(costs)}


def median(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high], "values": values}


def main(a: Arguments) -> None:
    torch.set_num_threads(a.threads)
    images = open_images(a.data).split("train", a.data.heldout)
    sizes: dict[int, dict[str, Any]] = {}
    for n in a.batch_sizes:
        sizes[n] = alone(a, images, n)
        text = f"batch {n:5}: transport cost x {sizes[n]['transport']['median']:.3f}"
        text += f", coupling alone {1e3 * sizes[n]['alone']['median']:.1f} ms"
        if not a.only_gains:
            sizes[n] |= overhead(a, images, n)
            text += f", step {1e3 * sizes[n]['independent']['median']:.1f} ms independent"
            text += f", x {sizes[n]['ratio']['median']:.3f} with OT"
        print(text, flush=True)
    written = {
        "what": __doc__, "arguments": asdict(a),
        "data": {"name": images.name, "shape": images.shape, "images": len(images)},
        "environment": environment(a.device), "batch_sizes": sizes,
    }  # fmt: skip
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(written, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
