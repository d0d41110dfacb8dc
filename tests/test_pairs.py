"""The parts of an objective: the laws p(t, r), ECT's mapping and the consistency models' grids, and the distances."""

import math
from decimal import Decimal, localcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from fewstep.objectives import (
    ContinuousSchedule,
    Diffusion,
    DimensionScale,
    GridPairs,
    KarrasGrid,
    LogNormal,
    PairSampler,
    PseudoHuber,
    SquaredL2,
    UniformIndex,
)
from fewstep.ode import karras_sigmas
from fewstep.progress import Constant, Doubling, Progress, SquareRoot, Stages
from fewstep.types import FewstepError

LAWS = {
    "ect cifar10": ContinuousSchedule(LogNormal(-1.1, 2.0), q=2.0, stages=Stages(8)),
    "ect 1 hour": ContinuousSchedule(LogNormal(-1.1, 2.0), q=256.0, stages=Stages(1)),
    "ect imagenet": ContinuousSchedule(LogNormal(-0.8, 1.6), q=4.0, stages=Stages(4)),
    "ect const": ContinuousSchedule(k=0.0),
    "ict": GridPairs(KarrasGrid(Doubling(10, 1280)), LogNormal(-1.1, 2.0)),
    "ct": GridPairs(KarrasGrid(SquareRoot(2, 150)), UniformIndex()),
    "cd": GridPairs(KarrasGrid(Constant(17.0)), UniformIndex()),
    "edm": Diffusion(),
}


def stage(s, stages=8):
    return Progress(s, stages)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


# ---------------------------------------------------------------------------------------------------------- every law


@pytest.mark.parametrize("name", LAWS)
@settings(max_examples=15, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**62))
def test_every_law_gives_t_above_r_and_is_a_pure_function_of_its_generator(name, fraction, seed):
    law, progress = LAWS[name], Progress(int(fraction * 10**6), 10**6)
    t, r = law(500, progress, generator(seed))
    assert t.isfinite().all()
    assert (r >= 0).all()
    assert (r < t).all()
    again = law(500, progress, generator(seed))
    assert torch.equal(t, again[0])
    assert torch.equal(r, again[1])
    only_one = len(t.unique()) == 1  # CT begins with a single interval
    assert torch.equal(t, law(500, progress, generator(seed + 1))[0]) == only_one


@pytest.mark.parametrize("name", LAWS)
def test_zero_says_whether_r_is_zero(name):
    law = LAWS[name]
    assert isinstance(law, PairSampler)
    for s in range(8):
        _, r = law(5000, stage(s), generator())
        share = (r == 0).float().mean()
        assert {"never": share == 0, "sometimes": 0 < share < 1, "always": share == 1}[law.zero(stage(s))]


# --------------------------------------------------------------------------------------------------- ECT's mapping


def test_ect_first_stage_at_q_2_is_denoising_exactly_below_ln_7():
    # r = 0 where n(t) = 1 + 8 sigmoid(-t) >= 2, that is e^t <= 7
    law, edge = ContinuousSchedule(q=2.0), math.log(7)
    t = torch.cat([torch.logspace(-6, math.log10(edge - 1e-5), 500), torch.linspace(edge + 1e-5, 100, 500)])
    r = law.r(t, stage(0))
    assert (r[:500] == 0).all()
    assert (r[500:] > 0).all()
    wide = t[500:].double()
    assert torch.allclose(r[500:].double(), wide * (1 - (1 + 8 / (1 + wide.exp())) / 2), rtol=1e-4, atol=1e-6)


def test_ect_last_stage_at_q_2_has_a_gap_of_5_in_256_near_zero_and_1_in_256_far_out():
    law = ContinuousSchedule(q=2.0)
    t = torch.tensor([1e-4, 1.0, 50.0])
    gap = ((t - law.r(t, stage(7))) / t).tolist()
    assert gap[0] == pytest.approx(5 / 256, rel=1e-3) == pytest.approx(0.0195, abs=5e-5)
    assert gap[1] == pytest.approx((1 + 8 / (1 + math.e)) / 256, rel=1e-4)
    assert gap[2] == pytest.approx(1 / 256, rel=1e-4) == pytest.approx(0.0039, abs=1e-5)


def test_ect_gap_shrinks_by_q_from_stage_to_stage():
    t = torch.linspace(5, 80, 50)
    for q, stages in ((2.0, 8), (4.0, 4)):
        law = ContinuousSchedule(q=q, stages=Stages(stages))
        gaps = [t - law.r(t, stage(s, stages)) for s in range(stages)]
        for wide, narrow in pairwise(gaps):
            assert torch.allclose(wide / narrow, torch.full_like(t, q), rtol=5e-3)


def test_ect_at_q_256_never_reaches_zero():
    law = ContinuousSchedule(q=256.0, stages=Stages(1))
    assert law.zero(Progress(0, 1)) == "never"
    t = torch.logspace(-12, 3, 1000)
    assert (law.r(t, Progress(0, 1)) > 0).all()


def test_const_mapping_is_k_zero_and_r_in_proportion_to_t():
    law, t = ContinuousSchedule(q=2.0, k=0.0), torch.logspace(-3, 2, 50)
    for s in range(8):
        assert torch.allclose(law.r(t, stage(s)), t * (1 - 0.5 ** (s + 1)), rtol=1e-6)
        assert law.zero(stage(s)) == "never"


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.integers(2, 300).map(float), st.floats(1, 300, exclude_min=True)),
    st.one_of(st.integers(0, 20).map(float), st.floats(0, 20)),
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    st.integers(0, 7),
)
def test_zero_never_lies_about_ects_mapping(q, k, b, s):
    assume(q ** (s + 1) <= 1e6)
    law = ContinuousSchedule(q=q, k=k, b=b, stages=Stages(s + 1))
    t = torch.logspace(-15, 3, 200)
    some = bool((law.r(t, stage(s, s + 1)) == 0).any())
    if some:
        assert law.zero(stage(s, s + 1)) == "sometimes"
    assume(abs((1 + k / 2) / q ** (s + 1) - 1) > 1e-5)  # where float32 decides
    assert (law.zero(stage(s, s + 1)) == "sometimes") == some


def test_a_mapping_finer_than_float32_is_refused():
    with pytest.raises(FewstepError, match="too fine"):
        ContinuousSchedule(q=256.0, stages=Stages(8))


@pytest.mark.parametrize("wrong", [{"q": 1.0}, {"q": 0.5}, {"k": -1.0}, {"b": -1.0}])
def test_a_mapping_whose_gap_would_not_shrink_or_whose_r_would_lie_is_refused(wrong):
    with pytest.raises(FewstepError, match="q > 1"):
        ContinuousSchedule(**wrong)


@pytest.mark.parametrize("law", [LogNormal(-1.1, 2.0), LogNormal(-0.8, 1.6), LogNormal()])
def test_times_are_log_normal(law):
    t = law(20_000, generator(1))
    assert kstest(t.log().double().numpy(), norm(law.mean, law.std).cdf).pvalue > 1e-3
    assert torch.equal(t, Diffusion(law)(20_000, stage(0), generator(1))[0])
    assert torch.equal(t, ContinuousSchedule(law)(20_000, stage(0), generator(1))[0])


# ------------------------------------------------------------------------------------------------------------- grids


def test_karras_grid_is_edms_for_18_points():
    published = [80.0, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923, 1.088, 0.585, 0.296, 0.140,
                 0.060, 0.023, 0.008, 0.002]  # fmt: skip
    assert karras_sigmas(18).flip(0).tolist() == pytest.approx(published, rel=1e-3, abs=5e-4)


@settings(deadline=None)
@given(st.integers(2, 1500), st.floats(1e-4, 0.1), st.floats(1, 100), st.floats(1, 10))
def test_karras_grid_has_its_end_points_and_increases(points, low, high, rho):
    sigmas = karras_sigmas(points, low, high, rho)
    assert len(sigmas) == points
    assert sigmas[0].item() == pytest.approx(low, rel=1e-9)
    assert sigmas[-1].item() == pytest.approx(high, rel=1e-9)
    assert (sigmas.diff() > 0).all()
    roots = sigmas ** (1 / rho)
    assert torch.allclose(roots.diff(), roots.diff()[0], rtol=1e-5)  # equal steps in sigma^(1/rho)


def test_karras_grid_of_640_intervals_has_the_papers_landmarks():
    sigmas = KarrasGrid(Doubling(10, 640))(Progress(99, 100))
    assert len(sigmas) == 641
    assert sigmas[640 - 440].item() == pytest.approx(0.3693, abs=5e-5)  # index 440 counted from 80 downwards
    assert sigmas[640 - 420].item() == pytest.approx(0.5286, abs=5e-5)
    assert 0.169 < sigmas[160] <= 0.170  # the lowest quarter


@pytest.mark.parametrize("wrong", [(1,), (5, 0.0), (5, 2.0, 1.0)])
def test_a_grid_that_cannot_increase_is_refused(wrong):
    with pytest.raises(FewstepError, match="sigma grid"):
        karras_sigmas(*wrong)


@pytest.mark.parametrize(
    "wrong", [{"sigma_min": 0.0}, {"sigma_max": 0.001}, {"sigma_max": math.inf}, {"rho": 0.0}, {"rho": math.nan}]
)
def test_a_grid_law_that_cannot_increase_is_refused(wrong):
    with pytest.raises(FewstepError, match="sigma grid"):
        KarrasGrid(**wrong)


@pytest.mark.parametrize("wrong", [{"std": 0.0}, {"std": -1.0}, {"std": math.inf}, {"mean": math.nan}])
def test_a_log_normal_law_without_a_density_is_refused(wrong):
    with pytest.raises(FewstepError, match="positive std"):
        LogNormal(**wrong)


@pytest.mark.parametrize("intervals", [10, 80, 1280])
def test_icts_index_law_is_the_normal_mass_between_neighbouring_log_sigmas(intervals):
    sigmas = karras_sigmas(intervals + 1)
    p = LogNormal(-1.1, 2.0).masses(sigmas)
    cdf = norm(-1.1, 2.0).cdf(sigmas.log().numpy())
    assert p.sum().item() == pytest.approx(1, abs=1e-12)
    assert p.tolist() == pytest.approx(((cdf[1:] - cdf[:-1]) / (cdf[-1] - cdf[0])).tolist(), rel=1e-6)
    assert UniformIndex().masses(sigmas).tolist() == pytest.approx([1 / intervals] * intervals)


@pytest.mark.parametrize("density", [LogNormal(-1.1, 2.0), UniformIndex()])
def test_grid_pairs_are_neighbours_drawn_with_their_masses(density):
    law, n = GridPairs(KarrasGrid(Constant(10.0)), density), 40_000
    sigmas = karras_sigmas(11)
    t, r = law(n, stage(0), generator(2))
    i = torch.searchsorted(sigmas.float(), r)
    assert torch.equal(sigmas.float()[i], r)
    assert torch.equal(sigmas.float()[i + 1], t)
    p = density.masses(sigmas)
    counts = torch.bincount(i, minlength=10)
    assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt() + 1).all()


@pytest.mark.parametrize(("name", "expected"), [("ict", [10, 20, 40, 80, 160, 320, 640, 1280]), ("cd", [17] * 8)])
def test_a_grids_stage_is_its_number_of_intervals_and_its_lowest_r_is_sigma_min(name, expected):
    law = LAWS[name]
    assert [law.stage(stage(s)) for s in range(8)] == expected
    _, r = law(5000, stage(0), generator())
    assert r.min().item() == pytest.approx(0.002)
    assert [LAWS["ect cifar10"].stage(stage(s)) for s in range(8)] == list(range(8))
    assert Diffusion().stage(stage(5)) == 0


# ---------------------------------------------------------------------------------------------------------- distances


@settings(deadline=None)
@given(st.floats(1e-8, 1e3), st.floats(1e-4, 10), st.integers(1, 40))
def test_pseudo_huber_keeps_its_digits_where_the_textbook_form_cancels(norm, c, dim):
    a = torch.full((1, dim), norm / math.sqrt(dim))
    with localcontext() as context:
        context.prec = 60
        m = sum((Decimal(v) ** 2 for v in a[0].tolist()), Decimal(0))
        exact = float((m + Decimal(c) ** 2).sqrt() - Decimal(c))
    assert PseudoHuber(c=c)(a, torch.zeros(1, dim)).item() == pytest.approx(exact, rel=1e-6)


@settings(deadline=None)
@given(st.integers(1, 50), st.floats(1e-3, 1), st.integers(0, 1000))
def test_pseudo_huber_limits_and_reductions(dim, c, seed):
    a, b = normal(8, dim, seed=seed), normal(8, dim, seed=seed + 1)
    norm = (a - b).norm(dim=1)
    assert torch.allclose(PseudoHuber()(a, b), norm)
    assert torch.allclose(PseudoHuber(c=1e-6)(a, b), norm, rtol=1e-4, atol=1e-5)
    assert torch.allclose(PseudoHuber(over="mean")(a, b), norm / math.sqrt(dim))
    large = PseudoHuber(c=100.0)(a, b)
    assert torch.allclose(large, norm**2 / 200, rtol=0.01)  # quadratic below c
    summed = PseudoHuber(c=c * math.sqrt(dim))(a, b)  # c_sum^2 = d c_mean^2
    assert torch.allclose(summed, math.sqrt(dim) * PseudoHuber(c=c, over="mean")(a, b), rtol=1e-4)
    assert torch.allclose(PseudoHuber(DimensionScale(c))(a, b, Progress(0, 1)), summed, rtol=1e-6)
    assert torch.allclose(SquaredL2("sum")(a, b), dim * SquaredL2("mean")(a, b), rtol=1e-5)
    assert (PseudoHuber(c=c)(a, a) == 0).all()


@pytest.mark.parametrize("distance", [PseudoHuber(), PseudoHuber(c=0.06), SquaredL2("sum"), SquaredL2("mean")])
def test_distances_are_float32_for_bfloat16_under_autocast(distance):
    a, b = normal(4, 3000).bfloat16(), normal(4, 3000, seed=1).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        d = distance(a, b)
    assert d.dtype == torch.float32
    assert torch.allclose(d, distance(a.float(), b.float()))


def test_a_negative_constant_is_refused():
    with pytest.raises(FewstepError, match="positive"):
        PseudoHuber(-0.1)
