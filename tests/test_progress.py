"""The schedules: tables of the papers, recomputed from their formulas."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.objectives import KarrasGrid
from fewstep.progress import (
    Constant,
    Doubling,
    LearningRate,
    Progress,
    Schedule,
    SquareRoot,
    Stages,
    TargetDecay,
)
from fewstep.types import FewstepError


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_the_fraction_is_in_the_half_open_unit_interval(nimg, total):
    fraction = Progress(nimg, total).fraction
    assert 0 <= fraction < 1
    if nimg < total < 2**30:
        assert fraction == nimg / total


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 10**9), st.data())
def test_stage_is_the_floor_of_images_times_count_over_total(count, total, data):
    nimg = data.draw(st.integers(0, total - 1))
    assert Stages(count)(Progress(nimg, total)) == nimg * count // total


@settings(deadline=None)
@given(st.integers(1, 10_000))
def test_the_end_and_beyond_belong_to_the_last_stage(count):
    assert Stages(count)(Progress(0, 640)) == 0
    assert Stages(count)(Progress(640, 640)) == count - 1
    assert Stages(count)(Progress(10**9, 640)) == count - 1


def test_ect_cifar10_moves_to_stage_s_after_s_times_25k_iterations_of_128():
    total = 200_000 * 128
    for s in range(8):
        assert Stages(8)(Progress(s * 25_000 * 128, total)) == s
        assert Stages(8)(Progress((s + 1) * 25_000 * 128 - 128, total)) == s


def test_ict_doubles_from_10_to_1280_intervals_in_8_equal_stages():
    schedule = Doubling(10, 1280)
    assert schedule.stages == 8
    for k, n in enumerate((10, 20, 40, 80, 160, 320, 640, 1280)):
        assert schedule(Progress(k * 1000, 8000)) == n
        assert schedule(Progress(k * 1000 + 999, 8000)) == n
        assert len(KarrasGrid(schedule)(Progress(k, 8))) == n + 1  # the paper's N(k): 11, 21, ..., 1281 points


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(2, 2000), st.integers(1, 100_000), st.data())
def test_doubling_is_icts_formula(s0, ratio, total, data):
    s1, k = s0 * ratio, data.draw(st.integers(0, total - 1))
    length = total / (math.log2(s1 // s0) + 1)  # K' of the paper without its floor
    if abs(k / length - round(k / length)) > 1e-9:
        assert Doubling(s0, s1)(Progress(k, total)) == min(s0 * 2 ** math.floor(k / length), s1)


def test_cts_number_of_points_is_the_papers_formula_from_2_to_151():
    s0, s1, total = 2, 150, 800_000
    points = lambda k: math.ceil(math.sqrt(k / total * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1  # noqa: E731
    schedule = SquareRoot(s0, s1)
    for k in [*range(200), *range(200, total, 3_333), total - 1]:
        assert len(KarrasGrid(schedule)(Progress(k, total))) == points(k)
    assert points(0) == 2
    assert points(total - 1) == 151
    assert [schedule(Progress(k, 4)) for k in range(4)] == [1, 75, 106, 130]  # sqrt(k/4 * 22797 + 4) - 1, rounded up


def test_cts_target_decay_is_s0_ln_mu0_over_the_number_of_points():
    decay = TargetDecay(SquareRoot(2, 150), mu0=0.9)
    assert decay(Progress(0, 100)) == pytest.approx(math.exp(2 * math.log(0.9) / 2)) == pytest.approx(0.9)
    assert decay(Progress(50, 100)) == pytest.approx(math.exp(2 * math.log(0.9) / 107))
    assert decay(Progress(100, 100)) == pytest.approx(math.exp(2 * math.log(0.9) / 151))


def test_learning_rate_warms_up_linearly_and_decays_like_one_over_the_square_root():
    rate = LearningRate(1e-3, warmup_nimg=100, decay_nimg=1000)
    assert [rate(Progress(n, 10**6)) for n in (0, 25, 100, 1000)] == pytest.approx([0, 2.5e-4, 1e-3, 1e-3])
    assert rate(Progress(4000, 10**6)) == pytest.approx(5e-4)
    assert rate(Progress(16_000, 10**6)) == pytest.approx(2.5e-4)
    edm2 = LearningRate(0.0010, decay_nimg=2000 * 128)  # ECT on ImageNet-64: lr / sqrt(max(iteration / 2000, 1))
    for iteration in (0, 1999, 2000, 3000, 50_000):
        assert edm2(Progress(iteration * 128, 10**9)) == pytest.approx(0.001 / math.sqrt(max(iteration / 2000, 1)))
    assert LearningRate(3e-4)(Progress(0, 1)) == LearningRate(3e-4)(Progress(10**9, 1)) == 3e-4


@settings(deadline=None)
@given(st.integers(1, 10**6), st.lists(st.integers(0, 2 * 10**6), min_size=2, max_size=8))
def test_curricula_never_go_back(total, moments):
    for schedule in (Stages(8), Doubling(10, 1280), SquareRoot(2, 150), TargetDecay()):
        values = [schedule(Progress(n, total)) for n in sorted(moments)]
        assert values == sorted(values)


def test_schedules_are_schedules_and_constant_is_constant():
    for schedule in (Constant(3.0), Stages(2), Doubling(), SquareRoot(), TargetDecay(), LearningRate()):
        assert isinstance(schedule, Schedule)
    assert {Constant(0.7)(Progress(n, 10)) for n in range(12)} == {0.7}


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (Stages, {"count": 0}, "count must be 1 or more"),
        *((kind, {"s0": a, "s1": b}, "1 <= s0 <= s1") for kind in (Doubling, SquareRoot) for a, b in ((0, 9), (9, 8))),
        *((TargetDecay, {"mu0": mu0}, "--target-decay.mu0") for mu0 in (0.0, 1.0, math.nan)),
        *((LearningRate, {"peak": peak}, "--lr.peak") for peak in (0.0, -1e-3, math.inf, math.nan)),
        (LearningRate, {"warmup_nimg": -1}, "--lr.warmup-nimg"),
        (LearningRate, {"decay_nimg": -1}, "--lr.decay-nimg"),
    ],
)
def test_impossible_schedules_are_refused(kind, wrong, message):
    with pytest.raises(FewstepError, match=message):
        kind(**wrong)
