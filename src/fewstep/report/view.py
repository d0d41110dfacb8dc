"""A run as the report sees it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewstep.model import Model, load
from fewstep.recipe import Recipe
from fewstep.rundir import RunDir
from fewstep.snapshots.format import read_header


@dataclass(frozen=True)
class RunView:
    """What a run directory tells; `model` is None until the run has saved weights, `hashes` are of all its weights."""

    path: Path
    recipe: Recipe
    log: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    model: Model | None
    hashes: frozenset[str]
    label: str

    @classmethod
    def open(cls, path: str | Path, device: str) -> "RunView":
        """Read a run directory; FewstepError when it is none."""
        run = RunDir(path)
        recipe = run.recipe()
        files = [*run.path.glob("averages/*.safetensors"), *run.path.glob("snapshots/*.safetensors")]
        hashes = frozenset(read_header(file)["weights_sha256"] for file in files)
        model = load(path, device) if files else None
        return cls(run.path, recipe, run.log(), run.metrics(), model, hashes, recipe.name.upper())

    @property
    def nimg(self) -> int:
        """Images seen, as far as the log and the weights know."""
        return max([row["nimg"] for row in self.log[-1:]] + [self.model.info.nimg if self.model else 0])

    def origin(self, views: "Sequence[RunView]") -> "RunView | None":
        """The other run that this one's first weights are of."""
        began = self.model.info.initialised_from if self.model else ""
        return next((view for view in views if view is not self and began in view.hashes), None)
