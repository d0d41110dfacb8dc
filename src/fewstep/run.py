"""A training run: everything with a side effect, in order, in sight."""

import copy
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fewstep import distributed
from fewstep.console import ProgressLine
from fewstep.data import BatchOrder, Images, batches, open_images, preparation, to_uint8
from fewstep.environment import pick_device
from fewstep.evaluation import EVALUATION_SEED, GRID_SEED, Generator, evaluate, reference_of
from fewstep.files import append_jsonl
from fewstep.interrupts import Interrupted, caught_signals, signalled
from fewstep.latents import decoder
from fewstep.metrics import Extractor, Record, Reference, better, load_extractor
from fewstep.model import Model, ModelInfo, check_latents, load, load_weights, save_model
from fewstep.networks import Architecture, Spliced
from fewstep.pictures import beside, grid, save
from fewstep.progress import Progress
from fewstep.recipe import Recipe
from fewstep.rundir import RunDir
from fewstep.training import Step, TrainState, training_steps
from fewstep.types import Denoiser, FewstepError

SIGMA_EDGES = torch.logspace(math.log10(0.002), math.log10(80), 17).tolist()  # the bins of "loss by noise level"


def train(
    recipe: Recipe, out: str | Path, *, init: Model | None = None, resume: bool = False, overwrite: bool = False,
    device: str = "auto", quiet: bool = False,
) -> RunDir:  # fmt: skip
    """Carry out a recipe in the run directory `out`; returns the directory when all its images are seen.

    init: the model whose weights training starts from. resume: continue `out`, bit for bit. overwrite: replace what
    `out` holds. Raises FewstepError for bad input and non-finite losses, Interrupted (saved) on Ctrl-C and SIGTERM.
    """
    place = distributed.start(pick_device(device))
    if recipe.batch_size % distributed.world():
        raise FewstepError(f"--batch-size {recipe.batch_size} cannot be shared by {distributed.world()} processes")
    images = open_images(recipe.data)
    check_latents(images, recipe.sigma_data, init.info if init else None)
    shown = images.split("train", recipe.data.heldout)
    architecture = architecture_for(recipe, images)
    if recipe.needs_init and not init and not resume:
        raise FewstepError(f"{recipe.name} starts from {recipe.starts_from}: give its run or snapshot with --init")
    if init and recipe.needs_init not in ("", init.info.kind):
        raise FewstepError(
            f"{recipe.name} starts from {recipe.starts_from}, but {init.path} is a {init.info.kind} model: give another --init"
        )
    state = TrainState.create(recipe, architecture, place)
    if init:
        tensors = init.denoiser.state_dict()
        if isinstance(recipe.network, Spliced):
            tensors = recipe.network.start_from(tensors)
        load_weights(state.model, tensors, str(init.path))
        state.start_from(tensors)
    if distributed.rank() == 0:
        decoder(images.space, place)  # for the grids: a VAE that is missing is told of now, not hours later
    judge = Judge.of(recipe, images, place) if recipe.evaluation.every_nimg and distributed.rank() == 0 else None
    run = RunDir(out)  # nothing there is touched before all of the above has worked
    try:
        needed = recipe.disk_bytes(sum(t.numel() for t in state.model.state_dict().values()))
        distributed.on_first_rank(lambda: run.claim(str(place), recipe, resume, overwrite, needed))
        seconds, origin, lineage = 0.0, init.sha256 if init else "", init.info.lineage if init else ()
        if resume:
            seconds, began_from, lineage = run.load_state(state, images.fingerprint)
            if init and began_from != origin:
                raise FewstepError(f"{run.path} did not begin with {init.path}: leave out --init to resume it")
            origin = began_from
        if distributed.rank() == 0:  # from here on, a run killed at any moment can be resumed
            if resume:
                run.forget_after(state.nimg)
                run.thin(recipe.snapshot_keep)
            else:
                if recipe.teacher and init:
                    save_model(run.teacher_file, init.denoiser.state_dict(), init.info)
                run.save_state(state, seconds, origin, images.fingerprint, lineage)
        distributed.barrier()
        teacher = load(run.teacher_file, place).denoiser if recipe.teacher else None
        if recipe.compile:
            state.model.network.compile()
        info = ModelInfo(
            architecture, recipe.kind, recipe=recipe.name, data=images.name, heldout=recipe.data.heldout,
            data_fingerprint=images.fingerprint, class_names=images.class_names, second_sigma=recipe.second_sigma,
            initialised_from=origin, latents=images.space, lineage=lineage,
        )  # fmt: skip
        with float32_precision(recipe.precision):
            Keeper(run, recipe, state, info, judge, seconds, quiet).train(shown, teacher)
    finally:
        run.release()
    return run


@contextmanager
def float32_precision(name: str) -> Iterator[None]:
    """tf32: let CUDA round the factors of float32 products; otherwise float32 is float32. Restored afterwards."""
    old = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(old[0])
        torch.backends.cudnn.allow_tf32 = old[1]


@dataclass(frozen=True)
class Judge:
    """What a run's own evaluations need: ready before the first step, so that nothing fails hours later."""

    extractor: Extractor
    reference: Reference

    @classmethod
    def of(cls, recipe: Recipe, images: Images, device: torch.device) -> "Judge":
        extractor = load_extractor(recipe.evaluation.extractor, str(device))
        return cls(extractor, reference_of(images, extractor, "train", recipe.data.heldout))


def architecture_for(recipe: Recipe, images: Images) -> Architecture:
    """The denoiser that the recipe's network becomes on these images; FewstepError when they do not go together."""
    if recipe.conditional and images.labels is None:
        raise FewstepError(
            f"{images.name} has no labels but the recipe is class-conditional: give labelled data (class folders, "
            "dataset.json, a label column), or train without classes by --no-conditional"
        )
    classes = images.num_classes if recipe.conditional else 0
    return Architecture(recipe.network, images.shape, classes, recipe.sigma_data, recipe.sigma_min)


@dataclass
class Keeper:
    """Looks after a run while it trains: logs, pictures, evaluations, files, signals."""

    run: RunDir
    recipe: Recipe
    state: TrainState
    info: ModelInfo
    judge: Judge | None
    seconds: float
    quiet: bool = False
    row: "LogRow" = field(init=False)

    def __post_init__(self) -> None:
        self.main = distributed.rank() == 0
        self.row = LogRow(len(SIGMA_EDGES) + 1, self.state.device)
        self.board = tensorboard_writer(self.run.path, self.state.nimg) if self.main else None
        self.clock = time.monotonic() - self.seconds

    def train(self, shown: Images, teacher: Denoiser | None = None) -> None:
        """From the state's position to the end of the recipe."""
        recipe, state, total = self.recipe, self.state, self.recipe.total_nimg
        order = BatchOrder(len(shown), recipe.seed)
        whole = getattr(recipe.objective.coupling, "over", "rank") == "world"  # then every process needs all rows
        feed = batches(
            shown, order, state.nimg, recipe.batch_size, rank=0 if whole else distributed.rank(),
            world=1 if whole else distributed.world(),
        )  # fmt: skip
        labelled = feed if recipe.conditional else ((pixels, None) for pixels, _ in feed)
        steps = training_steps(state, recipe, labelled, teacher, preparation(shown, recipe.data))
        line = ProgressLine(recipe.name, total, state.nimg, quiet=self.quiet or not self.main)
        board = closing(self.board) if self.board else nullcontext()
        with closing(feed), closing(steps), line, board, caught_signals() as caught:
            while state.nimg < total:
                step = next(steps)
                if step.problem:
                    self.not_finite(step)
                self.row.add(step)
                line.note(" ".join(f"{name} {value:.4g}" for name, value in step.losses.items()))
                line.advance(recipe.batch_size)
                before = time.monotonic()
                self.keep(step)
                self.row.began += time.monotonic() - before  # images per second are of training alone
                if number := signalled(caught, state.device):
                    self.interrupted(number)
        if state.skipped * recipe.batch_size >= total:
            raise FewstepError(f"every step was skipped for a loss that is not finite: see {self.run.problems_file}")

    def due(self, interval: int) -> bool:
        """Whether the last step passed a multiple of `interval` images, or the end of the run."""
        nimg = self.state.nimg
        passed = interval > 0 and nimg // interval > (nimg - self.recipe.batch_size) // interval
        return passed or nimg >= self.recipe.total_nimg

    def keep(self, step: Step) -> None:
        """All that is due after this step: the state comes last, so what a killed run lacks is made again."""
        saving = self.due(self.recipe.snapshot_nimg)
        if saving or self.due(self.recipe.log_nimg):  # the sums of a row are not in the state
            self.log()
        if self.main and saving:
            for name in ("online", *(self.state.averages if self.recipe.snapshot_averages else ())):
                info = replace(self.info, nimg=step.nimg, weights=name)
                save_model(self.run.snapshot_file(step.nimg, name), self.state.weights(name), info)
        if self.main and self.due(self.recipe.grid_nimg):
            self.draw_grid()
        if self.judge and self.due(self.recipe.evaluation.every_nimg):
            self.evaluate(self.judge)
        if saving:
            self.save()

    def save(self) -> None:
        """The averages' weights and the training state. No process goes on, or ends, before they are on the disk."""
        if self.main:
            for name in self.state.averages:
                info = replace(self.info, nimg=self.state.nimg, weights=name)
                save_model(self.run.average_file(name), self.state.weights(name), info)
            seconds = time.monotonic() - self.clock
            self.run.save_state(
                self.state, seconds, self.info.initialised_from, self.info.data_fingerprint, self.info.lineage
            )
            self.run.thin(self.recipe.snapshot_keep)
        distributed.barrier()

    def log(self) -> None:
        """One row: mean losses since the last one, and the loss by noise level."""
        if self.row.steps and self.main:
            stage = self.recipe.objective.pairs.stage(
                Progress(self.state.nimg - self.recipe.batch_size, self.recipe.total_nimg)
            )
            row = {"nimg": self.state.nimg, "stage": stage, "skipped": self.state.skipped, **self.row.summary()}
            row["seconds"] = round(time.monotonic() - self.clock, 3)
            append_jsonl(self.run.log_file, row)
            if self.board:
                for name, value in row["losses"].items():
                    self.board.add_scalar(f"loss/{name}", value, self.state.nimg)
                self.board.add_scalar("lr", row["lr"], self.state.nimg)
        self.row = LogRow(len(SIGMA_EDGES) + 1, self.state.device)

    def shadow(self, name: str) -> Generator:
        """A generator with the weights called `name`; training goes on untouched."""
        denoiser = copy.deepcopy(self.state.model).eval().requires_grad_(False)
        denoiser.load_state_dict(self.state.weights(name))
        arch = self.info.architecture
        decode = decoder(self.info.latents, self.state.device)
        return Generator(denoiser, arch.shape, arch.num_classes, self.state.device, decode=decode)

    def draw_grid(self) -> None:
        """Samples of the first average, else the raw weights, from the run's fixed noise: 1 | 2 steps, or 18 Heun steps."""
        if len(self.info.architecture.shape) != 3:
            return
        generator = self.shadow(next(iter(self.state.averages), "online"))
        classes = min(self.info.architecture.num_classes, 10)
        steps = (18,) if self.recipe.kind == "diffusion" else (1, 2)
        pictures = []
        for count in steps:
            labels = list(range(classes)) if classes else None
            samples = torch.cat(list(generator(self.info.sampler(count), 8 * (classes or 8), GRID_SEED, labels)))
            pictures.append(grid(to_uint8(samples), classes or 8))
        save(self.run.grid_file(self.state.nimg), beside(pictures))

    def evaluate(self, judge: Judge) -> None:
        """The Frechet distance of the raw weights and every average; the best so far is kept with its record."""
        plan = self.recipe.evaluation
        sampler = self.info.sampler(plan.steps)
        for name in ("online", *self.state.averages):
            record = evaluate(
                self.shadow(name), sampler, judge.reference, judge.extractor, plan.num, (EVALUATION_SEED,), model=name
            )[0]
            before = [Record.from_json(row["record"]) for row in self.run.metrics()]
            row = {"nimg": self.state.nimg, "weights": name, "record": record.to_json()}
            peers = [old for old in before if (old.stamp(), old.sigmas) == (record.stamp(), record.sigmas)]
            if all(better(record, old) for old in peers):
                info = replace(self.info, nimg=self.state.nimg, weights=name, best=row)
                save_model(self.run.average_file("best"), self.state.weights(name), info)
            append_jsonl(self.run.metrics_file, row)
            if self.board:
                self.board.add_scalar(f"fd/{name}", record.value, self.state.nimg)

    def not_finite(self, step: Step) -> None:
        """Skip the step if the recipe says so; otherwise save and stop with the cause."""
        stage = self.recipe.objective.pairs.stage(Progress(step.nimg - self.recipe.batch_size, self.recipe.total_nimg))
        problem = f"{step.problem}, stage {stage}"
        if self.main:  # a resumed run meets this batch, and writes this row, again
            append_jsonl(self.run.problems_file, {"nimg": step.nimg, "problem": problem})
        if self.recipe.on_nonfinite == "skip" and self.state.skipped <= self.recipe.max_skipped:
            return
        self.state.nimg -= self.recipe.batch_size
        self.state.skipped -= 1
        again = "start again with a lower --lr.peak or another --init"
        if not all(tensor.isfinite().all() for tensor in self.state.tensors().values()):
            raise FewstepError(
                f"{problem}; the weights overflowed before, so {self.run.path} keeps its last good state: {again}"
            )
        self.log()
        self.save()
        raise FewstepError(
            f"{problem}; saved at {self.state.nimg} images in {self.run.path}: {again}, or go on with "
            "--resume --on-nonfinite skip"
        )

    def interrupted(self, number: int) -> None:
        self.log()
        self.save()
        name = signal.Signals(number).name
        raise Interrupted(
            number, f"{name}: saved at {self.state.nimg} images; continue with --resume --out {self.run.path}"
        )


class LogRow:
    """Sums since the last line of the log; nothing here waits for the device before summary()."""

    def __init__(self, bins: int, device: torch.device):
        self.steps, self.images, self.began = 0, 0, time.monotonic()
        self.losses: dict[str, float] = {}
        self.notes: dict[str, float] = {}
        self.norm = self.lr = 0.0
        self.edges = torch.tensor(SIGMA_EDGES, device=device)
        self.sums, self.counts = torch.zeros(bins, device=device), torch.zeros(bins, device=device)

    def add(self, step: Step) -> None:
        if step.problem:
            return
        for name, value in step.losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value
        for name, value in step.notes.items():
            self.notes[name] = self.notes.get(name, 0.0) + value
        self.steps, self.norm, self.lr = self.steps + 1, self.norm + step.gradient_norm, step.lr
        self.images += len(step.t) * distributed.world()
        bins = torch.bucketize(step.t, self.edges)
        self.sums.index_add_(0, bins, step.per_sample)
        self.counts.index_add_(0, bins, torch.ones_like(step.t))

    def summary(self) -> dict[str, Any]:
        means = (self.sums / self.counts).tolist()
        return {
            "losses": {name: value / self.steps for name, value in self.losses.items()},
            **{name: value / self.steps for name, value in self.notes.items()},
            "lr": self.lr,
            "gradient_norm": self.norm / self.steps,
            "images_per_second": round(self.images / max(time.monotonic() - self.began, 1e-9), 1),
            "loss_by_sigma": [None if math.isnan(value) else value for value in means],
        }


def tensorboard_writer(path: Path, nimg: int) -> Any:
    """A TensorBoard writer when tensorboard is installed, else None; what it holds beyond nimg is made again."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(path / "tensorboard"), purge_step=nimg + 1 if nimg else None)


__all__ = ["SIGMA_EDGES", "Interrupted", "Keeper", "architecture_for", "train"]
