"""Gradient-free searches for coefficients that sum to 1: ask for vectors, tell their costs. No network is seen here.

LCSC (arXiv:2404.02241) searches the coefficients of a run's checkpoints by evolution on the generation metric itself;
its code was never published. What the paper leaves open is ours, and documented at each class. A search is a generator
of generations: it yields vectors [m, K] and is sent their costs. All begin with the same `Space.starts`, and all are pure
functions of their seed and of what they were told: told the same again, they ask the same again, so that nothing but
the costs has to be kept to resume one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, TypeAlias

import numpy as np
from jaxtyping import Float, Float64

from fewstep.snapshots import profiles

Vector: TypeAlias = Float64[np.ndarray, " k"]
Vectors: TypeAlias = Float64[np.ndarray, "m k"]
Costs: TypeAlias = Float64[np.ndarray, " m"]
Features: TypeAlias = Float[np.ndarray, "n d"]
Slope: TypeAlias = Callable[[Features], tuple[float, Features]]
Generations: TypeAlias = Generator[Vectors, tuple[Costs, Sequence[Features]], None]


@dataclass(frozen=True, eq=False)
class Space:
    """What a search knows of a bank: when its K snapshots were saved, and how far apart their weights are."""

    nimg: tuple[int, ...]
    """images seen at each snapshot, increasing"""
    batch: int
    """images per optimizer step, the unit of an EMA's decay"""
    gram: Float64[np.ndarray, "k k"]
    """inner products of the snapshots' weights, each less those of the last"""

    def __len__(self) -> int:
        return len(self.nimg)

    @cached_property
    def radius(self) -> float:
        """Root mean square distance of the snapshots' weights from those of the last: the unit of all step sizes."""
        return math.sqrt(max(float(self.gram.diagonal().mean()), 1e-60))

    @cached_property
    def starts(self) -> Vectors:
        """Where every search begins: EMAs of 8 rates over the window, the last snapshot, the uniform average."""
        emas = [profiles.ema(self.nimg, decay, self.batch) for decay in profiles.ema_grid(self.nimg, self.batch, 8)]
        return np.stack([*emas, profiles.last(self.nimg), profiles.uniform(self.nimg)])

    def distance(self, a: Vector, b: Vector) -> float:
        """Euclidean distance between the combined weights of two coefficient vectors."""
        return math.sqrt(max(float((a - b) @ self.gram @ (a - b)), 0.0))

    def zero_sum(self) -> Float64[np.ndarray, "k m"]:
        """k - 1 orthonormal directions that keep the sum of a vector (Helmert's)."""
        k = len(self)
        rows = (np.tril(np.ones((k, k)), -1) - np.diag(np.arange(k)))[1:]
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T


class Search(ABC):
    """Ask for at most n vectors, tell the costs of all that were asked; lower is better, infinite has failed."""

    races = False
    """whether a rough cost is enough for a vector that cannot become one of the `keep` best"""
    keep = 1

    def __init__(self, space: Space, seed: int = 0):
        self.space, self.seed, self.rng = space, seed, np.random.default_rng(seed)
        self.script: Generations | None = None
        self.pending: Vectors = np.zeros((0, len(space)))
        self.asked = 0
        self.told: list[tuple[float, Features]] = []

    @property
    def minimum(self) -> int:
        """Evaluations below which it has only seen its starts."""
        return len(self.space.starts) + 1

    def name_of(self, vector: Vector) -> str:
        """The profile that a vector it asked is, e.g. ema:0.99; empty where it has no name."""
        return ""

    @abstractmethod
    def generations(self) -> Generations:
        """Yields vectors, each of sum 1, and is sent their costs, and features [n, d] where they have any."""

    def ask(self, n: int) -> Vectors:
        """The next vectors, at most n; none at the end of the search."""
        if self.script is None:
            self.script = self.generations()
            self.pending = next(self.script)
        vectors = self.pending[self.asked : self.asked + n]
        self.asked += len(vectors)
        return vectors

    def tell(self, costs: Costs, features: Sequence[Features] = ()) -> None:
        """The costs of the vectors just asked, in their order."""
        self.told += zip(costs.tolist(), features or [np.zeros((0, 0))] * len(costs), strict=True)
        assert self.script is not None
        assert len(self.told) == self.asked
        if self.asked == len(self.pending) > 0:
            told, self.told, self.asked = self.told, [], 0
            try:
                self.pending = self.script.send((np.array([cost for cost, _ in told]), [f for _, f in told]))
            except StopIteration:
                self.pending = self.pending[:0]


class Evolution(Search):
    """The paper's search as we instantiate it: of all vectors so far the best 12 are parents of the next 8.

    Two parents are drawn, the k-th best with weight 1/k. A child is the better of them, or with probability 0.3 their
    crossover: each gene of the better with probability 0.6. Then each gene mutates with probability 0.25 (one does at
    least) by a normal step of `scale` times the larger of its own size and the vector's root mean square, `scale` drawn
    log-uniformly in 0.05 to 1 for each child; then the vector is divided by its sum.
    """

    races, keep = True, 12

    def generations(self) -> Generations:
        vectors, best = self.space.starts, []
        while True:
            costs, _ = yield vectors
            best += list(zip(costs.tolist(), vectors, strict=True))
            best = sorted(best, key=lambda pair: pair[0])[: self.keep]
            vectors = np.stack([self.child([vector for _, vector in best]) for _ in range(8)])

    def child(self, parents: Sequence[Vector]) -> Vector:
        """parents: the best first."""
        rng, weights = self.rng, 1 / np.arange(1, len(parents) + 1)
        better, worse = sorted(rng.choice(len(parents), 2, p=weights / weights.sum()))
        child, k = parents[better], len(parents[better])
        if rng.random() < 0.3:
            child = np.where(rng.random(k) < 0.6, child, parents[worse])
        scale = math.exp(rng.uniform(math.log(0.05), 0.0))
        sizes = np.maximum(np.abs(child), np.sqrt(np.mean(child**2)))
        steps, mutates = rng.standard_normal(k), rng.random(k) < 0.25
        if not mutates.any():  # one gene at least: a copy of its parent teaches nothing
            mutates[rng.integers(k)] = True
        return normalised(child + scale * sizes * steps * mutates)


class CMAES(Search):
    """CMA-ES (Hansen, arXiv:1604.00772, by the `cmaes` package) in the K - 1 directions that keep the sum.

    It starts at the best of the starts. The directions are the principal ones of the snapshots' weights, each scaled by
    1 / sqrt(its spread), so that the weights move less along directions in which the run hardly moved; the first steps
    move the weights by `step` of the radius.
    """

    def __init__(self, space: Space, seed: int = 0, step: float = 0.08):
        super().__init__(space, seed)
        self.step = step

    @property
    def minimum(self) -> int:
        return len(self.space.starts) + 4 + int(3 * math.log(self.directions().shape[0]))  # the package's population

    def directions(self) -> Vectors:
        """[m, K], each of sum 0."""
        basis = self.space.zero_sum()
        values, vectors = np.linalg.eigh(basis.T @ self.space.gram @ basis)
        spreads = np.sqrt(np.maximum(values, 0))
        return (basis @ vectors / np.sqrt(np.maximum(spreads, spreads.max() / 10 + 1e-30))).T

    def generations(self) -> Generations:
        costs, _ = yield self.space.starts
        yield from self.around(self.space.starts[costs.argmin()])

    def around(self, center: Vector) -> Generations:
        """Without end."""
        from cmaes import CMA

        directions = self.directions()
        move = math.sqrt(max(float(np.trace(directions @ self.space.gram @ directions.T)), 1e-60))
        cma = CMA(np.zeros(len(directions)), self.step * self.space.radius / move, seed=self.seed)
        while True:
            points = [cma.ask() for _ in range(cma.population_size)]
            costs, _ = yield np.stack([normalised(center + z @ directions) for z in points])
            cma.tell([(z, min(cost, 1e300)) for z, cost in zip(points, costs.tolist(), strict=True)])


class Grid(Search):
    """One family of averages: its whole grid first, then again and again the middles beside the best so far."""

    def __init__(self, space: Space, seed: int = 0, resolution: float = 0.01):
        super().__init__(space, seed)
        self.resolution = resolution
        self.names: dict[bytes, str] = {}

    def name_of(self, vector: Vector) -> str:
        return self.names.get(vector.tobytes(), "")

    @property
    def minimum(self) -> int:
        return len(self.grid())

    @abstractmethod
    def grid(self) -> Sequence[float]:
        """The family's parameter, positive, increasing."""

    @abstractmethod
    def member(self, parameter: float) -> tuple[str, Vector]:
        """The profile's name and its vector."""

    def vector(self, parameter: float) -> Vector:
        name, vector = self.member(parameter)
        self.names[vector.tobytes()] = name
        return vector

    def generations(self) -> Generations:
        tried: dict[float, float] = {}
        points = [math.log(x) for x in self.grid()]
        while points:
            costs, _ = yield np.stack([self.vector(math.exp(x)) for x in points])
            tried |= dict(zip(points, costs.tolist(), strict=True))
            best, known = min(tried, key=tried.__getitem__), sorted(tried)
            i = known.index(best)
            middles = [(best + x) / 2 for x in (*known[max(i - 1, 0) : i], *known[i + 1 : i + 2])]
            points = [x for x in middles if abs(x - best) > self.resolution]


class EMAGrid(Grid):
    """The best constant EMA over the snapshots, by its time constant in images."""

    def grid(self) -> Sequence[float]:
        return (-self.space.batch / np.log(profiles.ema_grid(self.space.nimg, self.space.batch, 12))).tolist()

    def member(self, parameter: float) -> tuple[str, Vector]:
        decay = math.exp(-self.space.batch / parameter)
        return f"ema:{decay:.6g}", profiles.ema(self.space.nimg, decay, self.space.batch)


class PowerGrid(Grid):
    """The best power-function EMA over the snapshots, by its relative width."""

    def grid(self) -> Sequence[float]:
        return profiles.power_grid(12).tolist()

    def member(self, parameter: float) -> tuple[str, Vector]:
        return f"power:{parameter:.4g}", profiles.power(self.space.nimg, parameter)


class Random(Search):
    """The baseline: an EMA of a rate drawn from the grid plus a normal vector of sum 0, its size log-uniform in 0.01 to 1."""

    races = True

    def generations(self) -> Generations:
        space, decays = self.space, profiles.ema_grid(self.space.nimg, self.space.batch, 64)
        yield space.starts
        while True:
            vectors = []
            for _ in range(8):
                step = self.rng.standard_normal(len(space)) * math.exp(self.rng.uniform(math.log(0.01), 0.0))
                ema = profiles.ema(space.nimg, float(self.rng.choice(decays)), space.batch)
                vectors.append(normalised(ema + step - step.mean()))
            yield np.stack(vectors)


class GreedySoup(Search):
    """Model soups (arXiv:2203.05482, recipe 1): each snapshot alone; then one by one, in the order of their costs, they
    join the uniform average of those chosen where the average becomes no worse."""

    @property
    def minimum(self) -> int:
        return len(self.space) + 1

    def generations(self) -> Generations:
        alone = np.eye(len(self.space))
        costs, _ = yield alone
        order = costs.argsort(kind="stable").tolist()
        chosen, cost = [order[0]], costs[order[0]]
        for i in order[1:]:
            costs, _ = yield alone[[*chosen, i]].mean(0)[None]
            if costs[0] <= cost:
                chosen, cost = [*chosen, i], costs[0]


def normalised(vector: Vector) -> Vector:
    """Divided by its sum; where that is below a half, shifted to sum 1 instead."""
    total = vector.sum()
    return vector / total if total > 0.5 else vector + (1 - total) / len(vector)


def searches() -> dict[str, type[Search]]:
    """By name."""
    from fewstep.snapshots.span import Span

    return {
        "span": Span, "evolution": Evolution, "cmaes": CMAES, "random": Random, "soup": GreedySoup,
        "ema": EMAGrid, "power": PowerGrid,
    }  # fmt: skip


DETERMINISTIC: Final = frozenset({"soup", "ema", "power"})  # of the names above: the seed changes nothing
