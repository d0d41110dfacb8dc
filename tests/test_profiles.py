"""Averages as coefficient vectors: the running averages of fewstep.ema, to rounding, and EDM2's reconstruction of them."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.ema import Average, ConstantEMA, PowerEMA
from fewstep.snapshots.profiles import ema, ema_grid, gamma, last, post_hoc, power, power_grid, profile, uniform
from fewstep.types import FewstepError

BATCH = 64
seen = st.lists(st.integers(1, 10**9), min_size=1, max_size=40, unique=True).map(lambda n: tuple(sorted(n)))


def walk(steps, seed=0):
    return torch.randn(steps, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(0)


def online(law, weights, nimg):
    """The running average after each step [k, d], of the weights [k, d], starting at the first of them."""
    average = Average(law, {"w": weights[0]})
    history = [weights[0].numpy().copy()]
    for n, w in zip(nimg[1:], weights[1:], strict=True):
        average.update({"w": w}, n, BATCH)
        history.append(average.weights["w"].numpy().copy())
    return np.stack(history)


# ------------------------------------------------------------------------------------------------- the running averages


@pytest.mark.parametrize(
    ("law", "vector"),
    [(ConstantEMA(b), lambda n, b=b: ema(n, b, BATCH)) for b in (0.0, 0.5, 0.99)]
    + [(PowerEMA(s), lambda n, s=s: power(n, s)) for s in (0.02, 0.1, 0.25)],
)
def test_over_snapshots_of_every_step_the_vector_is_the_running_average(law, vector):
    nimg = tuple(range(BATCH, 121 * BATCH, BATCH))
    weights = walk(len(nimg))
    assert vector(nimg) @ weights.numpy() == pytest.approx(online(law, weights, nimg)[-1], rel=1e-6, abs=1e-9)


def test_an_interval_has_the_mass_of_the_steps_within_it():
    fine = tuple(range(BATCH, 121 * BATCH, BATCH))
    every = 10
    coarse = fine[every - 1 :: every]
    for vector in (lambda n: ema(n, 0.97, BATCH), lambda n: power(n, 0.1)):
        assert vector(coarse) == pytest.approx(vector(fine).reshape(-1, every).sum(1), abs=1e-12)


@settings(deadline=None)
@given(seen, st.floats(0, 0.999999), st.floats(0.01, 0.279), st.integers(1, 4096))
def test_vectors_are_not_negative_and_sum_to_1(nimg, decay, std, batch):
    for c in (ema(nimg, decay, batch), power(nimg, std), uniform(nimg), last(nimg)):
        assert c.shape == (len(nimg),)
        assert c.dtype == np.float64
        assert (c >= 0).all()
        assert c.sum() == pytest.approx(1, abs=1e-12)


def test_their_limits():
    nimg = (100, 300, 350)
    assert ema(nimg, 0.0, 50).tolist() == last(nimg).tolist() == [0, 0, 1]
    assert ema(nimg, 1 - 1e-9, 50) == pytest.approx([1, 0, 0], abs=1e-7)  # what came before them is the first's
    assert ema(nimg, 0.5, 50) == pytest.approx([2**-5, 2**-1 - 2**-5, 2**-1])
    assert power((1, 2, 4), 0.1) == pytest.approx(np.diff([0, 0.25, 0.5, 1.0] ** np.float64(PowerEMA(0.1).gamma + 1)))
    assert power((0, 1, 2), 0.1)[0] == 0  # foreign checkpoints count from 0
    assert uniform(nimg).tolist() == [1 / 3] * 3


@given(st.floats(0.005, 0.279))
def test_gamma_is_that_of_the_running_average(std):
    assert gamma(std) == PowerEMA(std).gamma


@pytest.mark.parametrize("nimg", [(), (3, 3), (4, 3), (-1, 3), (0,)])
def test_snapshots_out_of_order_are_refused(nimg):
    for vector in (uniform, last, lambda n: ema(n, 0.9, 1), lambda n: power(n, 0.1)):
        with pytest.raises(FewstepError, match="in the order of their images seen"):
            vector(nimg)


@pytest.mark.parametrize("wrong", [lambda: ema((1, 2), 1.0, 1), lambda: ema((1, 2), -0.1, 1), lambda: ema((1, 2), 0.9, 0),
                                   lambda: power((1, 2), 0.0), lambda: power((1, 2), 0.28),
                                   lambda: ema((1, 2), float("nan"), 1), lambda: ema_grid((1,), 1, 3)])  # fmt: skip
def test_averages_that_cannot_be_are_refused(wrong):
    with pytest.raises(FewstepError):
        wrong()


# --------------------------------------------------------------------------------------------------- names and grids


def test_names():
    nimg = (100, 200, 400)
    for text in ("ema:0.9", "ema-0.9"):
        assert profile(text, nimg, 50).tolist() == ema(nimg, 0.9, 50).tolist()
    for text in ("power:0.1", PowerEMA(0.1).name, "power:1e-1"):
        assert profile(text, nimg, 50).tolist() == power(nimg, 0.1).tolist()
    assert profile("uniform", nimg, 50).tolist() == uniform(nimg).tolist()
    assert profile("last", nimg, 50).tolist() == [0, 0, 1]
    for text in ("", "ema", "ema:x", "ema:", "mean", "uniform:2", "emma:0.9"):
        with pytest.raises(FewstepError, match=r"use ema:DECAY, power:STD, uniform or last"):
            profile(text, nimg, 50)


def test_the_grid_of_decays_goes_from_half_an_interval_to_the_window_evenly_in_the_logarithm():
    nimg = tuple(range(1000, 11_001, 1000))
    lengths = -BATCH / np.log(ema_grid(nimg, BATCH, 9))
    assert (lengths[0], lengths[-1]) == (pytest.approx(500), pytest.approx(10_000))
    ratios = [b / a for a, b in pairwise(lengths)]
    assert ratios == pytest.approx([ratios[0]] * 8)
    assert ema(nimg, ema_grid(nimg, BATCH, 9)[0], BATCH)[-1] == pytest.approx(1 - math.exp(-2))
    assert power_grid(5)[[0, 2, 4]] == pytest.approx([0.01, 0.05, 0.25])


# ------------------------------------------------------------------------------------------------------------ post hoc


@pytest.mark.parametrize("which", [0, 3, 7])
def test_a_stored_average_is_rebuilt_as_itself(which):
    stored = [(std, n) for n in (10_000, 20_000, 30_000, 40_000) for std in (0.05, 0.1)]
    assert post_hoc(stored, *stored[which]) == pytest.approx(np.eye(8)[which], abs=1e-7)


def test_the_fit_is_the_least_squares_one():
    """No other coefficients are closer to the profile; by quadrature, not by the closed form of the products."""
    stored, std, nimg = [(0.05, 400), (0.1, 700), (0.1, 1000)], 0.15, 900
    t = (np.arange(200_000) + 0.5) / 200

    def p(s, n):
        g = gamma(s)
        return np.where(t <= n, (g + 1) / n * (t / n) ** g, 0.0)

    basis, target = np.stack([p(*average) for average in stored], 1), p(std, nimg)
    best = np.linalg.lstsq(basis, target, rcond=None)[0]
    c = post_hoc(stored, std, nimg)
    assert c == pytest.approx(best / best.sum(), rel=1e-4)
    assert c.sum() == pytest.approx(1, abs=1e-12)


def test_running_averages_are_rebuilt_after_training_better_the_more_were_stored():
    """EDM2 stores 0.05 and 0.1; what is rebuilt is compared with the average that was really run."""
    nimg = tuple(range(BATCH, 801 * BATCH, BATCH))
    weights = walk(len(nimg))
    history = {std: online(PowerEMA(std), weights, nimg) for std in (0.03, 0.05, 0.075, 0.1, 0.15, 0.2)}
    for std, run in history.items():
        errors = []
        for count in (4, 8, 32):
            stored = [(s, len(nimg) * (i + 1) // count - 1) for i in range(count) for s in (0.05, 0.1)]
            c = post_hoc([(s, nimg[i]) for s, i in stored], std, nimg[-1])
            rebuilt = c @ np.stack([history[s][i] for s, i in stored])
            errors.append(np.linalg.norm(rebuilt - run[-1]) / np.linalg.norm(run[-1] - weights[-1].numpy()))
        assert errors[2] < 0.005
        assert std in (0.05, 0.1) or errors == sorted(errors, reverse=True)


def test_images_seen_may_be_billions():
    stored = [(std, n * 10**8) for n in range(1, 21) for std in (0.05, 0.1)]
    c = post_hoc(stored, 0.15, 2 * 10**9)
    assert np.isfinite(c).all()
    small = post_hoc([(std, n // 10**8) for std, n in stored], 0.15, 20)
    assert c == pytest.approx(small, abs=1e-9)
    for wrong in ([], [(0.1, 0)], [(0.3, 5)]):
        with pytest.raises(FewstepError):
            post_hoc(wrong, 0.1, 5)
