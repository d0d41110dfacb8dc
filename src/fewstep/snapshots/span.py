"""Our own search: few evaluations, each of which tells all its features and not one number only."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import minimize

from fewstep.snapshots.search import CMAES, Costs, Features, Generations, Slope, Space, Vector, Vectors

RIDGES = (6.0, 2.0)


class Span(CMAES):
    """Gauss-Newton without gradients of the network, in the span of averages over windows of training.

    A generation metric is a function of features of images, and on the same noise those change smoothly with the
    coefficients: about a center c they are nearly F(c) + sum_j z_j (F(v_j) - F(c)) for c + sum_j z_j (v_j - c), where
    the v_j are the vectors evaluated so far that lie within `reach` radii of c. The metric's minimum on this model costs
    no images. New v_j lead from c, by a `step` of the radius, towards uniform averages over `windows` intervals of
    training: each is a change that training made, and together they are fewer than the K - 1 free coefficients.

    A round: one v_j for each window, then the minima under the penalty ridge * cost * (mean square move of the features
    / their variance) for two ridges, all evaluated in truth. It bounds the move where the model may be wrong, which is
    in the images, not in the weights. The best vector so far is the next center, with other windows; what earlier rounds
    have told stays in the model. When a round gains less than `tolerance` of the cost, the windows are halved in width;
    when one of the `finest` windows does, it ends. Where there are no features to tell, no slope (d cost / d features),
    or no start that is finite, it is CMA-ES in the span of 8 windows.
    """

    def __init__(
        self, space: Space, seed: int = 0, slope: Slope | None = None, windows: int = 22, step: float = 0.1,
        tolerance: float = 0.01, reach: float = 0.4, finest: int = 44,
    ):  # fmt: skip
        super().__init__(space, seed, step)
        self.slope, self.tolerance, self.reach = slope, tolerance, reach
        self.windows, self.finest = min(windows, len(space)), min(finest, len(space))
        self.known: list[tuple[float, Vector, Features]] = []
        self.best: tuple[float, Vector, Features]

    @property
    def minimum(self) -> int:
        return len(self.space.starts) + self.windows + len(RIDGES)

    def averages(self, windows: int) -> Vectors:
        """Uniform averages over consecutive intervals of training, as vectors; their borders lie elsewhere each time."""
        k = len(self.space)
        inner = k / windows * (np.arange(1, windows) + self.rng.uniform(-0.5, 0.5))
        edges = np.unique([0, *inner.round().astype(int), k])
        return np.stack([np.repeat([0.0, 1 / (b - a), 0.0], [a, b - a, k - b]) for a, b in pairwise(edges)])

    def directions(self) -> Vectors:
        """Of CMA-ES, where there is no slope."""
        averages = self.averages(min(self.windows, 8))
        return averages - averages.mean(0)

    def generations(self) -> Generations:
        vectors = self.space.starts
        costs, features = yield vectors
        first = int(costs.argmin())
        if self.slope is None or not features[first].size or not np.isfinite(costs[first]):
            yield from self.around(vectors[first])
        self.learn(vectors, costs, features)
        windows = self.windows
        while True:
            before, best, _ = self.best
            vectors = best + np.stack([self.scaled(average - best) for average in self.averages(windows)])
            self.learn(vectors, *(yield vectors))
            vectors = np.stack([self.modelled_minimum(ridge) for ridge in RIDGES])
            self.learn(vectors, *(yield vectors))
            if not self.best[0] < before - self.tolerance * abs(before):
                if windows >= self.finest:
                    return
                windows = min(2 * windows, self.finest)

    def learn(self, vectors: Vectors, costs: Costs, features: Sequence[Features]) -> None:
        """Keep what has not failed and is near the best."""
        told = zip(costs.tolist(), vectors, features, strict=True)
        self.known += [row for row in told if np.isfinite(row[0])]
        self.best = min(self.known, key=lambda row: row[0])
        reach = self.reach * self.space.radius
        self.known = [row for row in self.known if self.space.distance(row[1], self.best[1]) <= reach]

    def scaled(self, direction: Vector) -> Vector:
        """Of a length that moves the weights by `step` of the radius; those that move them hardly at all stay so."""
        length = self.space.distance(direction, 0 * direction)
        return direction * (self.step * self.space.radius / max(length, 1e-3 * self.space.radius))

    def modelled_minimum(self, ridge: float) -> Vector:
        """The vector, in the span of those known, of least modelled cost plus penalty."""
        assert self.slope is not None
        slope, (cost, center, at) = self.slope, self.best
        steps = np.stack([vector - center for _, vector, _ in self.known])
        changes = np.stack([moved - at for _, _, moved in self.known]).reshape(len(steps), -1)
        variance = max(float(at.var(0).sum()), 1e-30) * len(at)
        metric = (changes @ changes.T).astype(np.float64) * (ridge * abs(cost) / variance)

        def modelled(z: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = slope(at + (z.astype(changes.dtype) @ changes).reshape(at.shape))
            return value + z @ metric @ z, changes @ gradient.reshape(-1).astype(changes.dtype) + 2 * metric @ z

        found = minimize(modelled, np.zeros(len(steps)), jac=True, method="L-BFGS-B", options={"maxiter": 60})
        return center + found.x @ steps
