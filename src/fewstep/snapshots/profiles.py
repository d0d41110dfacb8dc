"""Averages of the weights as coefficient vectors c [k] over snapshots: of sum 1, in float64, and but for post_hoc's >= 0.

Snapshot i, saved at nimg_i images seen, stands for the training since the one before it: its coefficient is the mass
that the average's profile has on (nimg_{i-1}, nimg_i], and the first takes all the mass before it too. Over snapshots of
every optimizer step these are the running averages of fewstep.ema to rounding; over fewer they approximate them.
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from fewstep.types import FewstepError


def ema(nimg: Sequence[int], decay: float, batch: int) -> Float64[np.ndarray, " k"]:
    """The constant average of `decay` per optimizer step of `batch` images, begun at the first snapshot's weights."""
    if not 0 <= decay < 1 or batch < 1:
        raise FewstepError(f"an EMA needs a decay in [0, 1) and a batch of 1 or more, got {decay} and {batch}")
    n = images_seen(nimg)
    return masses(decay ** ((n[-1] - n) / batch))


def power(nimg: Sequence[int], std: float) -> Float64[np.ndarray, " k"]:
    """The power-function average of relative width `std` at the last snapshot (EDM2, arXiv:2312.02696, sec. 3.1)."""
    n = images_seen(nimg)
    return masses((n / n[-1]) ** (gamma(std) + 1))


def uniform(nimg: Sequence[int]) -> Float64[np.ndarray, " k"]:
    """1/k each, whatever the intervals between them."""
    k = len(images_seen(nimg))
    return np.full(k, 1 / k)


def last(nimg: Sequence[int]) -> Float64[np.ndarray, " k"]:
    """The last snapshot itself."""
    return np.eye(len(images_seen(nimg)))[-1]


def profile(text: str, nimg: Sequence[int], batch: int) -> Float64[np.ndarray, " k"]:
    """The vector of an average by name: ema:DECAY (per step of `batch` images), power:STD, uniform, last.

    ema-0.999 and power-0.1, the names of a run's averages, are understood too. FewstepError for anything else.
    """
    if text in ("uniform", "last"):
        return uniform(nimg) if text == "uniform" else last(nimg)
    kind, _, number = re.sub("[:-]", ":", text, count=1).partition(":")
    laws = {"ema": lambda decay: ema(nimg, decay, batch), "power": lambda std: power(nimg, std)}
    try:
        law, value = laws[kind], float(number)
    except (KeyError, ValueError):
        raise FewstepError(
            f"unknown average {text!r}: use ema:DECAY, power:STD, uniform or last, e.g. ema:0.999"
        ) from None
    return law(value)


def post_hoc(stored: Sequence[tuple[float, int]], std: float, nimg: int) -> Float64[np.ndarray, " k"]:
    """Coefficients of stored power averages (std_i, nimg_i) that rebuild the one of width `std` at `nimg` images.

    EDM2's post-hoc EMA (arXiv:2312.02696, sec. 3.2): the least-squares fit of the profiles
    p_i(t) = (g_i + 1) t^g_i / nimg_i^(g_i + 1) on [0, nimg_i], then scaled to sum 1. Entries may be negative.
    """
    if not stored or min(nimg, *(t for _, t in stored)) < 1:
        raise FewstepError(
            "a post-hoc average needs stored averages, and images seen of 1 or more for each and for itself"
        )
    g = np.array([gamma(s) for s in (*(s for s, _ in stored), std)])
    t = np.array([*(t for _, t in stored), nimg], np.float64) / nimg
    later = np.maximum(t[:, None], t)
    exponent = np.where(t[:, None] >= t, g[:, None], g)  # gamma of the later of the two
    inner = (g[:, None] + 1) * (g + 1) / (g[:, None] + g + 1) * (np.minimum(t[:, None], t) / later) ** exponent / later
    inner /= (norms := np.sqrt(inner.diagonal()))[:, None] * norms
    c = np.linalg.lstsq(inner[:-1, :-1], inner[:-1, -1], rcond=None)[0] / norms[:-1]
    return c / c.sum()


def ema_grid(nimg: Sequence[int], batch: int, n: int) -> Float64[np.ndarray, " n"]:
    """n decays whose time constants, -batch / ln(decay) images, go geometrically from half a mean interval to the window."""
    seen = images_seen(nimg)
    if len(seen) < 2:
        raise FewstepError("a grid of decays needs two snapshots or more")
    window = seen[-1] - seen[0]
    return np.exp(-batch / np.geomspace(window / (2 * len(seen) - 2), window, n))


def power_grid(n: int) -> Float64[np.ndarray, " n"]:
    """n relative widths, geometrically from 0.01 to 0.25."""
    return np.geomspace(0.01, 0.25, n)


def gamma(std: float) -> float:
    """The exponent of the power profile of this relative width: the real root of (g+2)^2 (g+3) = (g+1) / std^2."""
    if not 0 < std < 0.28:
        raise FewstepError(f"a power-function average's std must be in (0, 0.28), got {std}")
    return float(np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max())


def images_seen(nimg: Sequence[int]) -> Float64[np.ndarray, " k"]:
    """As an array; FewstepError unless they rise from 0 or more to more than 0."""
    n = np.asarray(nimg, np.float64)
    if not n.size or n[0] < 0 or n[-1] <= 0 or (np.diff(n) <= 0).any():
        raise FewstepError(f"snapshots must be in the order of their images seen, each once; got {list(nimg)[:12]}")
    return n


def masses(cumulative: Float64[np.ndarray, " k"]) -> Float64[np.ndarray, " k"]:
    """The mass of each interval from that of everything up to its end, which is 1 at the last."""
    return np.diff(np.maximum.accumulate(cumulative), prepend=0.0)  # accumulate: rounding makes no mass negative
