"""Which noise goes with which image. A coupling permutes the noise, never the data, so labels stay attached."""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment

from fewstep.types import FewstepError, Labels, Sample


@runtime_checkable
class Coupling(Protocol):
    """The rows of noise [n, *dims], reordered for the rows of x [n, *dims] and their labels [n]."""

    def __call__(self, x: Sample, noise: Sample, label: Labels = None, /) -> Sample: ...


@dataclass(frozen=True)
class Independent:
    """Noise as it comes."""

    def __call__(self, x: Sample, noise: Sample, label: Labels = None, /) -> Sample:
        return noise


@dataclass(frozen=True)
class MinibatchOT:
    """Optimal transport: the order of the noise at which sum ||x_i - z_i||^2 over the batch is least, exactly.

    Minibatch couplings: arXiv:2304.14772; in consistency training: sLCT, arXiv:2502.01441; within a label: 2503.10636.
    """

    by_class: Literal["auto", "always", "never"] = "auto"
    """auto: within a label where the recipe has labels. never: also across labels, which makes p(noise | label) depend on
    the label, while samplers draw the same noise for every label"""
    over: Literal["rank", "world"] = "rank"
    """rank: each process its own rows, as the paper; world: the whole batch of all processes, a lower cost"""

    def __post_init__(self) -> None:
        if self.by_class not in ("auto", "always", "never") or self.over not in ("rank", "world"):
            raise FewstepError("--objective.coupling needs by-class auto, always or never, and over rank or world")

    def __call__(self, x: Sample, noise: Sample, label: Labels = None, /) -> Sample:
        if self.by_class == "always" and label is None:
            raise FewstepError(
                "optimal transport within each class needs labels: train with --conditional on labelled data, "
                "or give --objective.coupling.by-class auto"
            )
        value = products(x, noise)
        if not np.isfinite(value).all():  # the loss will not be finite either, and says where
            return noise
        order = np.arange(len(value))
        for rows in classes(None if self.by_class == "never" else label, len(value)):
            order[rows] = rows[assigned(value[np.ix_(rows, rows)])]
        return noise[torch.from_numpy(order).to(noise.device)]


def products(x: Sample, noise: Sample) -> Float[np.ndarray, "n n"]:
    """(x_i - mean of x) . z_j in float32 (or float64, as x), on x's device: what of -||x_i - z_j||^2/2 depends on the order.

    The mean adds the same to a whole column; without it float32 keeps more digits and the assignment is found faster.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    a, b = x.detach().flatten(1).to(dtype), noise.detach().flatten(1).to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        return ((a - a.mean(0)) @ b.T).cpu().numpy()


def classes(label: Labels, n: int) -> list[Int[np.ndarray, " m"]]:
    """The rows of each label, in order; without labels all n rows."""
    if label is None:
        return [np.arange(n)]
    values = label.cpu().numpy()
    order = np.argsort(values, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(values[order])) + 1)


def assigned(value: Float[np.ndarray, "n n"]) -> Int[np.ndarray, " n"]:
    """The column of each row at the largest sum of values, every column used once.

    Exact whatever the prices, which only shorten the search: value - price, column by column, has the same optimum.
    scipy (1.12 and newer) lets other threads run meanwhile.
    """
    return linear_sum_assignment(prices(value).astype(np.float64) - value)[1]


def prices(value: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " n"]:
    """Prices of the columns at which nearly every row prefers a column of its own: an auction, stopped early.

    Bertsekas, MIT LIDS-P-1908 (1989), with simultaneous bids. Batches of 512 and more are assigned faster with it, small
    ones without.
    """
    n, bids = len(value), 0
    price, owner, free = np.zeros(n, value.dtype), np.full(n, -1), np.arange(n)
    if n < 512:
        return price
    step = 0.03 * value.std()
    while len(free) > n // 100 and bids < 12 * n:  # images that occur many times would outbid each other for long
        bids += len(free)
        rows, profit = np.arange(len(free)), value[free] - price
        best = profit.argmax(1)
        most = profit[rows, best]
        profit[rows, best] = -np.inf
        offer = price[best] + (most - profit.max(1)) + step
        by_offer, winner = np.argsort(offer, kind="stable"), np.full(n, -1)
        winner[best[by_offer]] = by_offer  # the last, highest offer stays
        sold = np.flatnonzero(winner >= 0)
        won, lost = winner[sold], owner[sold]
        price[sold], owner[sold] = offer[won], free[won]
        free = np.concatenate([np.delete(free, won), lost[lost >= 0]])
    return price


def transport_cost(x: Sample, noise: Sample) -> float:
    """Mean of ||x_i - z_i||^2 over its mean over all pairs i, j: 1 on average for independent noise."""
    a, b = x.detach().flatten(1).float(), noise.detach().flatten(1).float()
    norms = a.square().sum(1).mean() + b.square().sum(1).mean()
    return ((norms - 2 * (a * b).sum(1).mean()) / (norms - 2 * a.mean(0) @ b.mean(0))).item()
