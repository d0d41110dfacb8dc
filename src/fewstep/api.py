"""The Python API: the verbs of the command line as typed functions."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import UInt8
from torch import Tensor

from fewstep import distributed
from fewstep.combination import Plan
from fewstep.combination import combine as carry_out_combine
from fewstep.console import say
from fewstep.data import DataSpec, open_images, originals, to_uint8
from fewstep.encoding import Encoding, encode
from fewstep.environment import pick_device
from fewstep.evaluation import evaluate as evaluate_stream
from fewstep.evaluation import reference_of, reference_to
from fewstep.files import read_json
from fewstep.fitness import Fitness, Function, Metric, generator, load_function
from fewstep.metrics import Extractor, Record, Reference, load_extractor
from fewstep.model import Model, find, load, read_info, save_model
from fewstep.objectives import Networks, PairObjective
from fewstep.progress import Progress
from fewstep.recipes import recipe as get_recipe
from fewstep.run import train
from fewstep.rundir import RunDir
from fewstep.samplers import Sampler
from fewstep.snapshots import (
    Bank,
    Storage,
    checkpoint_files,
    exact,
    profiles,
    read_checkpoint,
    read_header,
    weights_hash,
    write,
)
from fewstep.snapshots.sources import read_foreign_header
from fewstep.types import FewstepError, Labels, Sample

__all__ = [
    "Encoding",
    "Plan",
    "average",
    "combine",
    "encode",
    "evaluate",
    "generator",
    "get_recipe",
    "loss",
    "measure_against",
    "sample",
    "train",
]

Which: TypeAlias = Literal["train", "heldout", "all"]


def sample(
    model: Model, steps: int = 1, num: int = 64, seed: int = 0, label: int | str | None = None,
    sampler: Sampler | None = None,
) -> UInt8[Tensor, "n c h w"]:  # fmt: skip
    """Images uint8 [num, C, H, W]. label: a class by number or name (None: uniform). sampler: None for the model's own."""
    number = model.info.label(label)
    batches = generator(model)(sampler or model.info.sampler(steps), num, seed, number)
    return torch.cat([to_uint8(samples).cpu() for samples in batches])


def loss(
    model: Model, objective: PairObjective, x: Sample, label: Labels = None, progress: Progress | None = None, seed: int = 0
) -> dict[str, Tensor]:  # fmt: skip
    """The terms of an objective on a batch x [n, C, H, W] in [-1, 1] (or of normalised latents), each a scalar.

    Their sum is the loss.

    For gradients load the model with load(path, trainable=True).
    """
    return objective(Networks(model.denoiser), x, label, progress or Progress(0, 1), seed)


def evaluate(
    model: Model, data: str | DataSpec, steps: int = 1, metrics: Sequence[str] = ("fd",), extractor: str = "digits",
    num: int = 5000, seeds: int = 3, reference: Which = "train", heldout: float | None = None,
    weights: Path | None = None, sampler: Sampler | None = None,
) -> list[Record]:  # fmt: skip
    """Stamped records of a model against a split of a data source: mean and spread over noise seeds 0 .. seeds - 1."""
    features, real = measure_against(model, data, extractor, reference, heldout, weights)
    return evaluate_stream(
        generator(model), sampler or model.info.sampler(steps), real, features, num, range(seeds), metrics,
        model=str(model.path or ""), model_sha256=model.sha256,
    )  # fmt: skip


def measure_against(
    model: Model, data: str | DataSpec, extractor: str = "digits", reference: Which = "train",
    heldout: float | None = None, weights: Path | None = None,
) -> tuple[Extractor, Reference]:  # fmt: skip
    """The features to measure a model with, and the reference: a split of the data at the model's size, held out as it was.

    heldout: another fraction than the model's training held out; refused where it would call training images held out.
    """
    if isinstance(data, str):
        own = model.info.heldout if heldout is None else heldout
        data = DataSpec(data, resolution=model.info.image_shape[-1], heldout=own)
    images = originals(open_images(data))
    seen = model.info.trained_on(images) and data.heldout > model.info.heldout
    if reference == "heldout" and seen:
        raise FewstepError(
            f"the model was trained with {model.info.heldout:g} held out: at {data.heldout:g} some of its training images "
            "would count as held out; leave out --heldout, or compare with --reference train"
        )
    features = load_extractor(extractor, str(model.device), weights)
    return features, reference_of(images, features, reference, data.heldout)


def combine(
    sources: str | Path | Sequence[str | Path], out: str | Path, plan: Plan | None = None, *, steps: int = 1,
    metric: str | Function = "fd", data: str | DataSpec = "", extractor: str = "", share: float = 0.5,
    solver: str | None = None, second_sigma: float | None = None, first_nimg: int = 0, last_nimg: int | None = None,
    every: int = 1, storage: Storage = "bf16", like: str = "", weights: Path | None = None, batch: int = 500,
    device: str = "auto", resume: bool = False, overwrite: bool = False, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """LCSC: the best linear combination of a run's snapshots (or of any checkpoint files) for one way of sampling.

    The real images are split by a hash of their names: a `share` of the training images is searched on, the rest are
    reported on. data, extractor: the run's own if not given. like: a model whose network takes the weights, where the files
    do not say. Writes OUT/bank.safetensors, result.json and combined.safetensors; returns what result.json holds.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    files = checkpoint_files(given, first_nimg, last_nimg, every)
    run = run_of(given)
    recipe = RunDir(run).recipe() if run else None
    directory = RunDir(out)
    if directory.recipe_file.exists():
        raise FewstepError(f"{out} holds a training run: choose another --out, e.g. {out}-lcsc")
    if not (resume or overwrite) and (directory.path / "search.json").exists():
        raise FewstepError(f"{out} holds a search: give --resume or --overwrite, or choose another --out")
    place = distributed.start(pick_device(device))
    model = load(like or files[-1], place) if like or read_foreign_header(files[-1]) else None
    if second_sigma is None and run and not like:  # a search for it has stored it with the run's best weights
        second_sigma = read_info(read_header(find(run)), run).second_sigma
    if model and second_sigma is not None:
        model = replace(model, info=replace(model.info, second_sigma=second_sigma))
    function = load_function(metric) if isinstance(metric, str) and ":" in metric else metric
    fitness: Fitness
    if isinstance(function, str):
        if model is None:
            raise FewstepError(
                f"{files[-1]} does not say what network it is: give --like MODEL, or --metric FILE.py:FUNCTION"
            )
        spec = data or (recipe.data if recipe else "")
        if not spec:
            raise FewstepError("--data: checkpoint files do not say where the images are; give a source")
        features = load_extractor(
            extractor or (recipe.evaluation.extractor if recipe else "digits"), str(place), weights
        )
        searched, reported = halves(model, spec, features, share)
        fitness = Metric(function, model.info.sampler(steps, solver), features, searched, batch)
        heldout: Fitness = fitness.against(reported)
    else:
        fitness = heldout = function
    path, images = directory.path / "bank.safetensors", recipe.batch_size if recipe else 1

    def begin() -> None:
        directory.path.mkdir(parents=True, exist_ok=True)
        directory.take_lock()  # before the bank: another search may be using the one that is there
        fresh_bank(files, path, storage, images, resume, quiet)

    try:
        distributed.on_first_rank(begin)
        bank = Bank.open(path).to(place)
    except BaseException:
        directory.release()
        raise
    return carry_out_combine(
        bank, model, fitness, heldout, out, plan, run=str(run.resolve()) if run else "", resume=resume,
        overwrite=overwrite, quiet=quiet, directory=directory,
    )  # fmt: skip


def run_of(sources: Sequence[str | Path]) -> Path | None:
    """The run directory that the sources are, or are the snapshots of."""
    folders = {Path(s) if (Path(s) / "recipe.json").exists() else Path(s).absolute().parent for s in sources}
    folders = {folder.parent if folder.name == "snapshots" else folder for folder in folders}
    only = folders.pop() if len(folders) == 1 else None
    return only if only and (only / "recipe.json").exists() else None


def halves(model: Model, data: str | DataSpec, extractor: Extractor, share: float) -> tuple[Reference, Reference]:
    """The training images that a search sees, and those that it does not: by a hash of their names."""
    if not 0 < share < 1:
        raise FewstepError(f"--share must be between 0 and 1, got {share}")
    held, shape = model.info.heldout, model.info.image_shape
    spec = DataSpec(data, resolution=shape[-1], heldout=held) if isinstance(data, str) else data
    images, limit = originals(open_images(spec)), held + (1 - held) * share
    if images.shape != shape:
        raise FewstepError(f"the images are {images.shape}, the model makes {shape}: give --data of the model's size")
    searched = images.split("heldout", limit)
    searched = searched.split("train", held) if held else searched
    return (
        reference_to(searched, extractor, f"{images.name}[search]"),
        reference_to(images.split("train", limit), extractor, f"{images.name}[report]"),
    )


def fresh_bank(files: Sequence[Path], path: Path, storage: Storage, batch: int, resume: bool, quiet: bool) -> None:
    """Make the bank of these files; one that a resumed search has is kept, and made again where only its file is damaged."""
    if resume and path.exists():
        damage = damage_of(path, files, storage)
        if damage is None:
            return
        say(f"{damage}; all {len(files)} are as they were, so this is done now")
    Bank.build(files, path, storage, batch, quiet)


def damage_of(path: Path, files: Sequence[Path], storage: Storage) -> FewstepError | None:
    """What is wrong with a bank's file, if anything; FewstepError unless its sources are these files, as they were."""
    try:
        bank = Bank.open(path)
    except FewstepError as error:  # the header, which names the sources, is damaged; the search names them too
        told, hashes = read_json(path.parent / "search.json"), [read_checkpoint(f).weights_sha256 for f in files]
        if (hashes, storage) != (told["sources"], told["storage"]):
            raise
        return error
    bank.verify()
    if ([source.path for source in bank.sources], bank.storage) != ([str(f.absolute()) for f in files], storage):
        raise FewstepError(
            f"{path} was built of other snapshots or storage: repeat the options, or choose another --out"
        )
    try:
        bank.check()
    except FewstepError as error:
        return error
    return None


def average(
    sources: str | Path | Sequence[str | Path], profile: str = "", out: str | Path | None = None, *, first_nimg: int = 0,
    last_nimg: int | None = None, every: int = 1, batch: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """An average of snapshots after training, or a search's result rebuilt bit for bit from its result.json.

    profile: ema:DECAY (per optimizer step of `batch` images, the run's own), power:STD, uniform, last. Where all sources
    are stored power-function averages, power:STD is EDM2's post-hoc reconstruction from them. out: default, in a run,
    averages/PROFILE-snapshots.safetensors. Returns what was written and its coefficients.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise FewstepError("give a run directory, checkpoint files or a result.json")
    first = Path(given[0])
    if len(given) == 1 and first.is_file() and first.suffix == ".json":
        if profile:
            raise FewstepError(f"{first} holds its own coefficients: leave out --profile")
        return rebuild(first, Path(out) if out else None)
    files = checkpoint_files(given, first_nimg, last_nimg, every)
    stored = [read_foreign_header(file).get("model", {}) for file in files]
    nimg = [info.get("nimg", i) for i, info in enumerate(stored)]
    if not profile:
        raise FewstepError("--profile: give ema:DECAY, power:STD, uniform or last, e.g. --profile ema:0.999")
    run = run_of(given)
    if run is None and batch is None and stored[-1] and profile.startswith("ema"):
        raise FewstepError(
            "--batch: give the images per optimizer step, which these files do not tell, or the run directory"
        )
    stds = [
        float(info["weights"].removeprefix("power-")) for info in stored if info.get("weights", "").startswith("power-")
    ]
    if len(stds) == len(files):
        if not re.fullmatch(r"power[:-](\d+\.?\d*|\.\d+)", profile):
            raise FewstepError("from stored power-function averages only another is made: give --profile power:STD")
        vector = profiles.post_hoc(list(zip(stds, nimg, strict=True)), float(profile[len("power:") :]), max(nimg))
    else:
        vector = profiles.profile(profile, nimg, batch or (RunDir(run).recipe().batch_size if run else 1))
    name = f"{profile.replace(':', '-')}-snapshots"
    if out is None and run is None:
        raise FewstepError("--out: give the file to write, for these sources are no run directory")
    path = Path(out) if out else run / "averages" / f"{name}.safetensors"  # type: ignore[operator]
    if path.is_dir():
        raise FewstepError(f"--out {path} is a folder: give the file to write, e.g. {path / name}.safetensors")
    hashes = [read_checkpoint(file).weights_sha256 for file in files]
    digest = write_combination(path, files, hashes, vector.tolist(), name)
    return {
        "out": str(path), "profile": profile, "snapshots": len(files), "weights_sha256": digest,
        "coefficients": vector.tolist(),
    }  # fmt: skip


def rebuild(result: Path, out: Path | None) -> dict[str, Any]:
    """The weights of a result.json, from its snapshots; FewstepError where they are not those it names, or not the result."""
    told = read_json(result)
    if not {"snapshots", "coefficients", "weights_sha256"} <= told.keys():
        raise FewstepError(f"{result} is not the result.json of a search")
    if out is None:
        raise FewstepError("--out: give the file to write the rebuilt weights to")
    files = [Path(source["path"]) for source in told["snapshots"]]
    hashes = [source["sha256"] for source in told["snapshots"]]
    digest = write_combination(out, files, hashes, told["coefficients"], "lcsc", told["weights_sha256"])
    return {"out": str(out), "profile": "lcsc", "snapshots": len(files), "weights_sha256": digest}


def write_combination(
    path: Path, files: Sequence[Path], hashes: Sequence[str], coefficients: list[float], name: str, expected: str = ""
) -> str:
    """Combine the files themselves, in float64; a model's description is the last one's with this name.

    expected: the SHA-256 that the weights must have, else nothing is written.
    """
    tensors = exact(files, hashes, torch.tensor(coefficients, dtype=torch.float64))
    if expected and weights_hash(tensors) != expected:
        raise FewstepError(f"these coefficients do not make the weights {expected[:12]}...: the result was altered")
    header = read_foreign_header(files[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    if not header:
        return write(path, tensors, {"coefficients": coefficients})
    return save_model(path, tensors, replace(read_info(header, files[-1]), weights=name, best={}))
