"""Scores of coefficient vectors: one bank pass for many, common noise for all, each score kept on the disk at once."""

import hashlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep import distributed
from fewstep.files import append_jsonl, atomic_write, read_jsonl
from fewstep.fitness import Fitness
from fewstep.model import Model
from fewstep.snapshots import Bank
from fewstep.snapshots.search import Vector, Vectors
from fewstep.types import FewstepError

ROWS = 16  # combinations made in one pass over the bank


@dataclass(frozen=True)
class Score:
    """What became of one vector."""

    cost: float
    """lower is better; +inf: the metric was not finite"""
    rough: float
    """the cost of the first quarter of the images; +inf where there are none"""
    dropped: bool = False
    """whether it lost the race: its cost is then a prediction"""
    images: int = 0
    seconds: float = 0.0
    features: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), repr=False)

    NUMBERS = ("cost", "rough", "dropped", "images", "seconds")

    def to_json(self) -> dict[str, Any]:
        """Costs that strict JSON lacks become null."""
        values = {name: getattr(self, name) for name in self.NUMBERS}
        return {k: None if v == math.inf else v for k, v in values.items()}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Score":
        cost, rough = (math.inf if row[name] is None else row[name] for name in ("cost", "rough"))
        return cls(cost, rough, row["dropped"], row["images"], row["seconds"])


@dataclass
class Gate:
    """Racing: a candidate whose cost on a quarter of the images says that it cannot become one of the best is dropped.

    Its full cost is predicted from its rough one by the median difference of those seen so far; it is dropped if even
    three standard deviations of that difference below, the prediction is above the worst of the `keep` best.
    """

    keep: int
    seen: list[tuple[float, float]] = field(default_factory=list)

    def add(self, scores: Sequence[Score]) -> None:
        self.seen += [(s.rough, s.cost) for s in scores if not s.dropped and math.isfinite(s.cost + s.rough)]

    def closed_to(self, rough: float) -> float | None:
        """The predicted cost of a candidate that is to be dropped, else None."""
        if len(self.seen) < max(self.keep, 8) or not math.isfinite(rough):
            return None
        differences = [cost - rough_cost for rough_cost, cost in self.seen]
        predicted = rough + statistics.median(differences)
        bound = sorted(cost for _, cost in self.seen)[self.keep - 1]
        return predicted if predicted - 3 * statistics.stdev(differences) > bound else None


@dataclass
class Wearer:
    """Lets one network wear the combined weights of a bank, or hands out its tensors where the network is unknown."""

    bank: Bank
    model: Model | None

    def __post_init__(self) -> None:
        self.own = self.model.denoiser.state_dict() if self.model else {}
        ours, theirs = ({n: t.shape for n, t in d.items()} for d in (self.own, self.bank.tensors(self.bank.base)))
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if self.model and odd:
            raise FewstepError(
                f"{self.model.path} is another network than the checkpoints' ({len(odd)} tensors differ, {odd[0]} for one): "
                "give --like a model that takes these weights"
            )

    def wear(self, tensors: dict[str, Tensor]) -> Any:
        if self.model is None:
            return tensors
        with torch.no_grad():
            for name, tensor in tensors.items():
                self.own[name].copy_(tensor)
        return self.model


@dataclass
class Scorer:
    """Scores vectors on the noise of one seed; what a file already holds is not computed again.

    With several processes each evaluates its share of a pass; all of them return all scores.
    """

    wearer: Wearer
    fitness: Fitness
    num: int
    seed: int
    file: Path
    after: Callable[[Score], None] = lambda score: None
    """called for each score as it comes"""

    def __post_init__(self) -> None:
        distributed.barrier()  # the first process has written its last row
        self.known = {row["key"]: Score.from_json(row) for row in read_jsonl(self.file) if "cost" in row}
        bank = self.wearer.bank
        self.room = torch.empty(ROWS, bank.size, device=bank.base.device)

    def key(self, vector: Vector, search: str = "") -> str:
        """Of a vector on this noise; `search` for what only that search may use."""
        digest = hashlib.sha256(np.ascontiguousarray(vector).tobytes()).hexdigest()[:24]
        return f"{self.fitness.name}|{self.num}|{self.seed}|{digest}" + f"|{search}" * bool(search)

    def __call__(self, vectors: Vectors, search: str, gate: Gate | None = None, features: bool = False) -> list[Score]:
        """At most ROWS of them; gate: for those that may be dropped; features: with the features that were scored."""
        assert len(vectors) <= ROWS
        found: list[Score | None] = [self.known.get(self.key(v, search), self.known.get(self.key(v))) for v in vectors]
        if features:
            found = [score and self.with_features(self.key(v), score) for v, score in zip(vectors, found, strict=True)]
        for score in filter(None, found):
            self.after(score)
        todo, world = [i for i, score in enumerate(found) if score is None], distributed.world()
        mine = todo[distributed.rank() :: world]
        made = self.wearer.bank.combine(torch.from_numpy(vectors), mine, self.room[: len(mine)]) if todo else self.room
        for start in range(0, len(todo), world):
            together = todo[start : start + world]
            own = next((i for i in mine if i in together), None)
            made_here = None if own is None else self.evaluate(made[mine.index(own)], gate)
            for i, shared in zip(together, share(made_here, together, own, features), strict=True):
                found[i] = shared
                self.keep(vectors[i], search, shared, features)
                self.after(shared)
        scores = [score for score in found if score is not None]
        if gate:
            gate.add(scores)
        return scores

    def evaluate(self, flat: Tensor, gate: Gate | None) -> Score:
        """One combination, on this process."""
        began, quarter = time.monotonic(), max(self.num // 4, min(self.num, 16))
        model = self.wearer.wear(self.wearer.bank.tensors(flat))
        first = self.fitness.features(model, 0, quarter, self.seed)
        if first is None:
            return Score(finite(self.fitness.cost(model, None, self.seed)), math.inf, seconds=time.monotonic() - began)
        rough = finite(self.fitness.cost(model, first, self.seed))
        predicted = gate.closed_to(rough) if gate else None
        if predicted is not None:
            return Score(predicted, rough, True, quarter, time.monotonic() - began)
        rest = self.fitness.features(model, quarter, self.num, self.seed) if quarter < self.num else first[:0]
        assert rest is not None
        features = torch.cat([first, rest])
        cost = finite(self.fitness.cost(model, features, self.seed))
        return Score(cost, rough, False, self.num, time.monotonic() - began, features.float().cpu().numpy())

    def keep(self, vector: Vector, search: str, score: Score, features: bool) -> None:
        key = self.key(vector, search if score.dropped else "")
        if features and distributed.rank() == 0:
            tensors = {"features": torch.from_numpy(score.features)}
            atomic_write(self.features_file(key), lambda new: save_file(tensors, str(new)))
        if key not in self.known and distributed.rank() == 0:
            append_jsonl(self.file, {"key": key, "search": search, **score.to_json()})
        self.known[key] = replace(score, features=np.zeros((0, 0)))

    def features_file(self, key: str) -> Path:
        """OUT/features/..., which are deleted when the result is written."""
        return self.file.parent / "features" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def with_features(self, key: str, score: Score) -> Score | None:
        """The score with the features it was made of, if they are still there."""
        try:
            with safe_open(str(self.features_file(key)), framework="pt") as file:
                return replace(score, features=file.get_tensor("features").numpy())
        except (OSError, SafetensorError):  # never written, or cut short by a kill: it is made again
            return None


def share(score: Score | None, together: Sequence[int], own: int | None, features: bool) -> list[Score]:
    """The scores of the candidates that the processes have just evaluated, one each."""
    if distributed.world() == 1:
        return [score] if score else []
    device = torch.device("cuda" if distributed.dist_is_nccl() else "cpu")
    numbers = torch.zeros(len(together), len(Score.NUMBERS) + 2, dtype=torch.float64, device=device)
    if score is not None and own is not None:
        values = [float(getattr(score, name)) for name in Score.NUMBERS]
        numbers[together.index(own)] = torch.tensor([*values, *score.features.shape], dtype=torch.float64)
    distributed.sum_over_ranks([numbers])
    shape = tuple(int(n) for n in numbers[:, -2:].max(0).values)
    shared = torch.zeros(len(together), *shape, device=device) if features else torch.zeros(len(together), 0, 0)
    if features and score is not None and own is not None and score.features.size:
        shared[together.index(own)] = torch.from_numpy(score.features).to(device)
    if features:
        distributed.sum_over_ranks([shared])
    return [
        Score(row[0], row[1], bool(row[2]), int(row[3]), row[4], feature)
        for row, feature in zip(numbers.tolist(), shared.cpu().numpy(), strict=True)
    ]


def finite(cost: float) -> float:
    """A cost that is no number has lost."""
    return cost if math.isfinite(cost) else math.inf
