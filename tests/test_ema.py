"""Averages of the weights against their closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.ema import Average, AverageLaw, ConstantEMA, PowerEMA, lerp
from fewstep.types import FewstepError


def profile(law, batches):
    """The coefficient of each step's weights in the final average: (1 - beta_i) * prod of the later betas."""
    nimg = np.cumsum(batches)
    betas = np.array([law.beta(int(n), int(b)) for n, b in zip(nimg, batches, strict=True)])
    later = np.append(np.cumprod(betas[::-1])[::-1][1:], 1.0)
    return nimg, (1 - betas) * later, betas.prod()


def walk(steps, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [{"a": torch.randn(3, generator=g), "b": torch.randn(2, 2, generator=g)} for _ in range(steps)]


@pytest.mark.parametrize("law", [ConstantEMA(0.9), ConstantEMA(0.0), PowerEMA(0.1), PowerEMA(0.05)])
def test_the_online_average_is_its_coefficients_applied_to_the_weights(law):
    weights = walk(40)
    average = Average(law, weights[0])
    for i, w in enumerate(weights[1:], 1):
        average.update(w, nimg=64 * i, batch=64)
    _, coefficients, initial = profile(law, [64] * 39)
    assert coefficients.sum() + initial == pytest.approx(1)
    for name in "ab":
        expected = initial * weights[0][name] + sum(c * w[name] for c, w in zip(coefficients, weights[1:], strict=True))
        assert torch.allclose(average.weights[name], expected.float(), atol=1e-6)


@settings(deadline=None)
@given(st.floats(0, 0.9999), st.integers(1, 200), st.integers(1, 4096))
def test_constant_average_is_a_geometric_series_per_step_whatever_the_batch(decay, steps, batch):
    _, coefficients, initial = profile(ConstantEMA(decay), [batch] * steps)
    assert initial == pytest.approx(decay**steps, abs=1e-12)
    assert coefficients.tolist() == pytest.approx([(1 - decay) * decay ** (steps - i) for i in range(1, steps + 1)])


def test_constant_average_of_a_constant_is_the_constant_and_of_a_ramp_lags_by_its_time_constant():
    law, x = ConstantEMA(0.98), 0.0
    for i in range(1, 2000):
        x = law.beta(64 * i, 64) * x + (1 - law.beta(64 * i, 64)) * i
    assert 1999 - x == pytest.approx(0.98 / (1 - 0.98), rel=1e-6)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.10, 0.20, 0.27])
def test_power_average_has_the_relative_width_it_is_named_after(std):
    law, batches = PowerEMA(std), [128] * 8_000
    nimg, coefficients, initial = profile(law, batches)
    assert initial == 0  # the first step forgets the initial weights
    age = nimg / nimg[-1]
    mean = (coefficients * age).sum()
    assert math.sqrt((coefficients * (age - mean) ** 2).sum()) == pytest.approx(std, rel=4e-3)
    assert mean == pytest.approx((law.gamma + 1) / (law.gamma + 2), rel=1e-3)


@settings(deadline=None)
@given(st.floats(0.005, 0.279))
def test_gamma_inverts_edm2s_width_of_the_power_profile(std):
    gamma = PowerEMA(std).gamma
    assert math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) == pytest.approx(std, rel=1e-6)
    assert gamma > 0


def test_gamma_is_edm2s_at_the_published_widths():
    assert PowerEMA(0.05).gamma == pytest.approx(16.97, abs=0.01)  # arXiv:2312.02696, sec. 3.1
    assert PowerEMA(0.10).gamma == pytest.approx(6.94, abs=0.01)


@settings(deadline=None)
@given(st.floats(0.01, 0.27), st.lists(st.integers(1, 500), min_size=1, max_size=30))
def test_power_average_forgets_by_images_not_by_steps(std, batches):
    law, start = PowerEMA(std), 1000
    ends = start + np.cumsum(batches)
    kept = math.prod(law.beta(int(n), b) for n, b in zip(ends, batches, strict=True))
    assert kept == pytest.approx((start / ends[-1]) ** (law.gamma + 1), rel=1e-6, abs=1e-300)


def test_lerp_works_in_place_and_is_exact_at_both_ends():
    average, towards = walk(2)
    tensors, before = dict(average), {k: v.clone() for k, v in average.items()}
    lerp(average, towards, 0.0)
    assert all(torch.equal(average[k], before[k]) for k in before)
    lerp(average, dict(reversed(towards.items())), 0.25)  # by name, not by order
    assert all(average[k] is tensors[k] for k in tensors)
    assert all(torch.allclose(average[k], 0.75 * before[k] + 0.25 * towards[k]) for k in before)
    lerp(average, towards, 1.0)
    assert all(torch.equal(average[k], towards[k]) for k in before)


def test_an_average_keeps_its_own_memory_and_no_gradient():
    parameter = torch.nn.Parameter(torch.ones(2))
    average = Average(ConstantEMA(0.5), {"p": parameter})
    with torch.no_grad():
        parameter.mul_(3)
    assert average.weights["p"].tolist() == [1, 1]
    average.update({"p": parameter}, 64, 64)
    assert average.weights["p"].tolist() == [2, 2]
    assert not average.weights["p"].requires_grad
    assert parameter.tolist() == [3, 3]


def test_names_tell_averages_apart():
    laws = [ConstantEMA(0.9999), ConstantEMA(0.9993), PowerEMA(0.05), PowerEMA(0.1)]
    assert [law.name for law in laws] == ["ema-0.9999", "ema-0.9993", "power-0.05", "power-0.1"]
    assert all(isinstance(law, AverageLaw) for law in laws)


@pytest.mark.parametrize("wrong", [lambda: ConstantEMA(1.0), lambda: ConstantEMA(-0.1), lambda: PowerEMA(0.3),
                                   lambda: PowerEMA(0.0)])  # fmt: skip
def test_averages_that_cannot_be_are_refused(wrong):
    with pytest.raises(FewstepError):
        wrong()
