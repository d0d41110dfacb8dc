"""Our own search: few evaluations, each of which tells all its features and not one number only."""

from itertools import pairwise

import numpy as np
from scipy.optimize import minimize

from fewstep.snapshots.search import CMAES, Features, Generations, Slope, Space, Vector, Vectors

RIDGES = (1.0, 0.3, 0.1)


class Span(CMAES):
    """Gauss-Newton without gradients of the network, in the span of averages over windows of training.

    A generation metric is a function of features of images, and on the same noise those change smoothly with the
    coefficients: about a center c they are nearly F(c) + sum_j z_j (F(c + u_j) - F(c)). One evaluation per direction u_j
    gives that model; the metric's minimum on it costs no images. The directions lead from the center to uniform
    averages over `windows` intervals of training: so few, and so smooth, that the search cannot fit the noise and the
    reference images as the K - 1 free coefficients of other searches do. Each step they move the weights by `step` of
    the radius.

    A round: the directions, then the minima under the penalty ridge * cost * (move of the weights / radius)^2 for three
    ridges, all evaluated in truth; the best vector so far is the next center, with other windows. It ends when a round
    gains less than `tolerance` of the cost. Where there are no features to tell, no slope (d cost / d features), or no
    start that is finite, it is CMA-ES in the span of the first windows.
    """

    def __init__(
        self, space: Space, seed: int = 0, slope: Slope | None = None, windows: int = 8, step: float = 0.1,
        tolerance: float = 0.01,
    ):  # fmt: skip
        super().__init__(space, seed, step)
        self.slope, self.windows, self.tolerance = slope, min(windows, len(space)), tolerance

    @property
    def minimum(self) -> int:
        return len(self.space.starts) + self.windows + len(RIDGES)

    def averages(self) -> Vectors:
        """Uniform averages over consecutive intervals of training, as vectors; their borders lie elsewhere each time."""
        k, width = len(self.space), len(self.space) / self.windows
        inner = width * (np.arange(1, self.windows) + self.rng.uniform(-0.5, 0.5))
        edges = np.unique([0, *inner.round().astype(int), k])
        return np.stack([np.repeat([0.0, 1 / (b - a), 0.0], [a, b - a, k - b]) for a, b in pairwise(edges)])

    def directions(self) -> Vectors:
        """Of CMA-ES, where there is no slope."""
        averages = self.averages()
        return averages - averages.mean(0)

    def generations(self) -> Generations:
        vectors = self.space.starts
        costs, features = yield vectors
        best, cost, at = vectors[costs.argmin()], costs.min(), features[int(costs.argmin())]
        if self.slope is None or not at.size or not np.isfinite(cost):
            yield from self.around(best)
        while True:
            before = cost
            steps = np.stack([self.scaled(average - best) for average in self.averages()])
            costs, features = yield best + steps
            changes = [moved - at if np.isfinite(c) else 0 * at for c, moved in zip(costs, features, strict=True)]
            vectors = np.stack([best + self.minimum_of(cost, at, changes, steps, ridge) for ridge in RIDGES])
            costs, features = yield vectors
            if costs.min() < cost:
                best, cost, at = vectors[costs.argmin()], costs.min(), features[int(costs.argmin())]
            if not cost < before - self.tolerance * abs(before):
                return

    def scaled(self, direction: Vector) -> Vector:
        """Of a length that moves the weights by `step` of the radius; those that move them hardly at all stay so."""
        length = self.space.distance(direction, 0 * direction)
        return direction * (self.step * self.space.radius / max(length, 1e-3 * self.space.radius))

    def minimum_of(self, cost: float, at: Features, changes: list[Features], steps: Vectors, ridge: float) -> Vector:
        """The move, in the span of the steps, of least modelled cost plus penalty."""
        assert self.slope is not None
        slope, flat = self.slope, np.stack(changes).reshape(len(changes), -1)
        metric = steps @ self.space.gram @ steps.T * (ridge * abs(cost) / self.space.radius**2)

        def modelled(z: np.ndarray) -> tuple[float, np.ndarray]:
            value, gradient = slope(at + (z @ flat).reshape(at.shape))
            return value + z @ metric @ z, flat @ gradient.reshape(-1) + 2 * metric @ z

        found = minimize(modelled, np.zeros(len(steps)), jac=True, method="L-BFGS-B", options={"maxiter": 60})
        return found.x @ steps
