"""A run directory: what lies where, who owns it, and its training state."""

import json
import shutil
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

from fewstep import codec
from fewstep.environment import environment
from fewstep.files import PART, append_jsonl, atomic_write, read_json, read_jsonl, write_json
from fewstep.recipe import Recipe
from fewstep.snapshots import format as snapshot
from fewstep.training import TrainState
from fewstep.types import FewstepError

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None  # type: ignore[assignment]

# What a resumed run may change: nothing here touches the weights it will reach.
ALTERABLE = {
    "microbatch", "compile", "on_nonfinite", "max_skipped", "log_nimg", "snapshot_nimg", "snapshot_keep",
    "snapshot_averages", "grid_nimg", "evaluation", "second_sigma", "published",
}  # fmt: skip
HISTORY = f"averages/*/{'[0-9]' * 12}.safetensors"  # snapshots of the averages
WEIGHTS = ("snapshots/*.safetensors", "averages/*.safetensors", HISTORY, "teacher.safetensors")


class RunDir:
    """recipe.json, environment.json, log.jsonl, metrics.jsonl, state.safetensors, snapshots/, averages/, samples/."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.recipe_file = self.path / "recipe.json"
        self.log_file = self.path / "log.jsonl"
        self.metrics_file = self.path / "metrics.jsonl"
        self.problems_file = self.path / "problems.jsonl"
        self.environment_file = self.path / "environment.json"
        self.state_file = self.path / "state.safetensors"
        self.teacher_file = self.path / "teacher.safetensors"
        self.lock: IO[str] | None = None

    def snapshot_file(self, nimg: int, weights: str = "online") -> Path:
        folder = "snapshots" if weights == "online" else f"averages/{weights}"
        return self.path / folder / f"{nimg:012d}.safetensors"

    def average_file(self, name: str) -> Path:
        return self.path / "averages" / f"{name}.safetensors"

    def grid_file(self, nimg: int) -> Path:
        return self.path / "samples" / f"{nimg:012d}.png"

    def recipe(self) -> Recipe:
        """The resolved recipe of the run."""
        recipe = codec.decode(read_json(self.recipe_file))
        if not isinstance(recipe, Recipe):
            raise FewstepError(f"{self.recipe_file} holds no recipe: is {self.path} a fewstep run?")
        return recipe

    def log(self) -> list[dict[str, Any]]:
        """The rows of log.jsonl."""
        return read_jsonl(self.log_file)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: {"nimg", "weights", "record"}."""
        return read_jsonl(self.metrics_file)

    def claim(self, device: str, recipe: Recipe, resume: bool, overwrite: bool, needed: int = 0) -> Recipe:
        """Own the directory: begin a new run, or continue the one that is there. Never by guess.

        needed: bytes that the run's weights will take; a disk too small for them is refused before anything is changed.
        """
        leftover = [self.path / ".lock", *self.leftovers()]  # of a process that saved nothing
        if not self.state_file.exists() and self.is_ours():
            leftover += [self.recipe_file, self.environment_file]
        occupied = self.path.exists() and any(file not in leftover for file in self.path.iterdir())
        if resume and not self.recipe_file.exists():
            raise FewstepError(f"{self.path} holds no run to resume: leave out --resume to start one there")
        if occupied and not resume and not self.recipe_file.exists():
            raise FewstepError(f"{self.path} is not empty and no fewstep run: choose another --out")
        if occupied and not (resume or overwrite):
            raise FewstepError(
                f"{self.path} holds a run: continue it with --resume, replace it with --overwrite, or choose another --out"
            )
        if occupied and not resume and not self.is_ours():
            raise FewstepError(f"{self.recipe_file} is not a fewstep run's: choose another --out")
        self.path.mkdir(parents=True, exist_ok=True)
        self.take_lock()
        self.check_space(needed, recipe)
        if resume:
            recipe = self.reconcile(recipe)
        elif occupied:
            self.clear()
        for folder in self.leftovers():
            shutil.rmtree(folder, ignore_errors=True)
        write_json(self.recipe_file, codec.encode(recipe))
        here = environment(device)
        if resume:
            append_jsonl(self.path / "resumes.jsonl", here)
        else:
            write_json(self.environment_file, here)
        return recipe

    def is_ours(self) -> bool:
        """Whether recipe.json is a fewstep run's."""
        return self.recipe_file.exists() and '"fewstep.recipe:Recipe"' in self.recipe_file.read_text(errors="replace")

    def take_lock(self) -> None:
        """Refuse a directory that another process is training in; the lock ends with the process, however it ends."""
        if fcntl is None:
            return
        self.lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise FewstepError(
                f"{self.path} is in use by another process: wait for it, or choose another --out"
            ) from None

    def check_space(self, needed: int, recipe: Recipe) -> None:
        """FewstepError when the run's weights will not fit on the disk, the room of those that are there included."""
        disk = shutil.disk_usage(self.path)
        own = [self.state_file, *(file for pattern in WEIGHTS for file in self.path.glob(pattern))]
        room = disk.free + sum(file.stat().st_size for file in own if file.exists())
        if disk.total and needed > room:  # some network file systems know no sizes: all are 0 there
            raise FewstepError(
                f"the run needs up to {needed / 1e9:,.2f} GB but {self.path} has room for {room / 1e9:,.2f} GB: give a larger "
                f"--snapshot-nimg ({recipe.snapshot_nimg} makes {recipe.snapshots} snapshots), keep the newest N only by "
                f"--snapshot-keep N (now {recipe.snapshot_keep or 'all'}), or choose another --out"
            )

    def release(self) -> None:
        """Give the directory free."""
        if self.lock:
            self.lock.close()
            self.lock = None

    def clear(self) -> None:
        """Remove a run's own files (told so by --overwrite), and nothing else that lies there."""
        histories = {file.parent for file in self.path.glob(HISTORY)}
        for pattern in (*WEIGHTS, "samples/[0-9]*.png", "tensorboard/events.*"):
            for file in self.path.glob(pattern):
                file.unlink()
        for folder in histories:
            with suppress(OSError):  # something else lies there
                folder.rmdir()
        own = (self.log_file, self.metrics_file, self.problems_file, self.state_file)
        for file in (*own, self.path / "report.html", self.path / "resumes.jsonl"):
            file.unlink(missing_ok=True)

    def leftovers(self) -> list[Path]:
        """Folders with the half-written file of a process that was killed."""
        return [file for depth in ("", "*/", "averages/*/") for file in self.path.glob(f"{depth}.*.*{PART}")]

    def reconcile(self, asked: Recipe) -> Recipe:
        """The recipe of a resumed run: the stored one with the harmless changes asked for; anything else is refused."""
        stored = self.recipe()
        changed = [
            f.name
            for f in fields(Recipe)
            if codec.encode(getattr(stored, f.name)) != codec.encode(getattr(asked, f.name))
        ]
        forbidden = sorted(set(changed) - ALTERABLE)
        if forbidden:
            what = ", ".join(forbidden)
            raise FewstepError(
                f"{self.path} was begun with another {what}: a resumed run keeps them; start a new run with --init {self.path}"
            )
        return asked

    def save_state(
        self, state: TrainState, seconds: float, origin: str, data: str, lineage: tuple[str, ...] = ()
    ) -> None:
        """The one training state, replacing the older one only when it is whole.

        origin: the hash of the weights that training began with; data: the fingerprint of all the images; lineage: of the
        model that it began with.
        """
        header = {
            "nimg": state.nimg,
            "skipped": state.skipped,
            "seconds": seconds,
            "initialised_from": origin,
            "data": data,
            "lineage": list(lineage),
        }
        snapshot.write(self.state_file, state.tensors(), {"state": header})

    def progress(self) -> dict[str, Any]:
        """What the training state says of itself: nimg, skipped, seconds, initialised_from, data."""
        if not self.state_file.exists():
            raise FewstepError(
                f"{self.path} was stopped before it saved anything: leave out --resume to start it again"
            )
        return snapshot.read_header(self.state_file)["state"]

    def load_state(self, state: TrainState, data: str) -> tuple[float, str, tuple[str, ...]]:
        """Continue from the saved training state; returns the seconds trained, the hash of the weights it began with, and
        their lineage."""
        if self.progress()["data"] != data:
            raise FewstepError(
                f"the data are not those that {self.path} was begun with (other images, names or labels): restore them, "
                f"or start a new run with --init {self.path}"
            )
        try:
            stored = snapshot.read(self.state_file)
        except FewstepError as error:
            raise FewstepError(f"{error}; a new run can start with --init {self.path}:online") from None
        state.load_tensors(stored.tensors)
        saved = stored.header["state"]
        state.nimg, state.skipped = saved["nimg"], saved["skipped"]
        return float(saved["seconds"]), saved["initialised_from"], tuple(saved.get("lineage", ()))

    def forget_after(self, nimg: int) -> None:
        """Drop rows and files beyond the resumed state: they will be made again, the same."""
        for file in (self.log_file, self.metrics_file, self.problems_file):
            if file.exists():
                kept = [row for row in read_jsonl(file) if row["nimg"] <= nimg]
                atomic_write(file, "".join(json.dumps(row) + "\n" for row in kept))
        for pattern in ("snapshots/*", "samples/*", HISTORY):
            for file in self.path.glob(pattern):
                with suppress(ValueError):
                    if int(file.stem) > nimg:
                        file.unlink()

    def thin(self, keep: int) -> None:
        """Delete all but the newest `keep` snapshots, of the weights and of each average; 0: keep all.

        For when the training state is as new as they are: before, a resumed run would miss what it cannot make again.
        """
        folders = [self.path / "snapshots", *{file.parent for file in self.path.glob(HISTORY)}]
        for folder in folders if keep else ():
            for file in sorted(folder.glob(f"{'[0-9]' * 12}.safetensors"))[:-keep]:
                file.unlink()
