"""Steps of the ODE and samplers on Gaussian data, where the trajectory is x_r = x_t sqrt((s^2+r^2)/(s^2+t^2))."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep import ode
from fewstep.ode import Euler, check_sigmas, karras_sigmas
from fewstep.samplers import SECOND_SIGMA, DPMSolver, FewStep, Heun, Sampler, few_step
from fewstep.types import FewstepError, like

sigma_lists = st.lists(st.floats(0.01, 80), min_size=1, max_size=6, unique=True).map(
    lambda sigmas: tuple(sorted(sigmas, reverse=True))
)


def denoiser(s):
    return lambda x, t, label=None: x * like(s**2 / (s**2 + t**2), x)


def consistency_function(s):
    return lambda x, t, label=None: x * like(s / (s**2 + t**2).sqrt(), x)


def std(sampler, network):
    """The exact standard deviation of a sampler that is linear in its noises: the norm of its coefficients."""
    n = len(sampler.sigmas)
    coefficients = sampler(network, lambda k: torch.eye(n, dtype=torch.float64)[k][:, None])
    return coefficients.square().sum().sqrt().item()


def march(solver, network, sigmas):
    """From x = 1 down the decreasing noise levels."""
    x = torch.ones(1, 1, dtype=torch.float64)
    for t, r in pairwise(sigmas):
        x = solver(network, x, t[None], r[None])
    return x.item()


# ------------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 1), (ode.Heun(), 2)])
@pytest.mark.parametrize(("s", "t", "r"), [(0.5, 2.0, 0.1), (0.5, 80.0, 5.0), (2.0, 1.0, 0.3)])
def test_a_solver_converges_to_the_exact_trajectory_at_its_order(solver, order, s, t, r):
    exact = math.sqrt((s**2 + r**2) / (s**2 + t**2))
    steps = torch.tensor([64, 128, 256])
    paths = [torch.linspace(math.log(t), math.log(r), n + 1, dtype=torch.float64).exp() for n in steps]
    errors = [abs(march(solver, denoiser(s), path) - exact) for path in paths]
    assert errors[-1] < 0.02 * exact
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize(("solver", "order"), [(Euler(), 2), (ode.Heun(), 3)])
def test_the_error_of_a_single_step_is_one_order_higher(solver, order):
    errors = []
    for gap in (0.04, 0.02, 0.01):
        t, r = torch.tensor([1.0, 1 - gap], dtype=torch.float64)
        errors.append(abs(march(solver, denoiser(0.5), [t, r]) - math.sqrt((0.25 + r**2) / 1.25)))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)


@settings(deadline=None)
@given(st.floats(0.1, 80), st.floats(0, 0.99))
def test_euler_is_exact_where_the_denoiser_is_constant_and_reaches_zero(t, ratio):
    target = torch.full((2, 3), 0.3, dtype=torch.float64)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).double()
    times = torch.full((2,), t, dtype=torch.float64)
    out = Euler()(lambda *_: target, x, times, ratio * times)
    assert torch.allclose(out, target + ratio * (x - target))
    assert torch.equal(Euler()(lambda *_: target, x, times, 0 * times), target)


def test_heun_uses_edms_two_evaluations_with_the_label():
    asked = []

    def network(x, t, label=None):
        asked.append((x.item(), t.item(), label.item()))
        return 0 * x

    x = ode.Heun()(network, torch.ones(1, 1), torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([7]))
    assert asked == [(1.0, 2.0, 7), (0.5, 1.0, 7)]  # where D = 0, dx/dt = x/t and x_r = x r/t
    assert x.item() == 0.5


# ----------------------------------------------------------------------------------------------- consistency sampling


@settings(deadline=None)
@given(sigma_lists, st.floats(0.1, 2))
def test_few_step_with_the_exact_consistency_function_has_a_known_standard_deviation(sigmas, s):
    # var' = (var + sigma^2) s^2/(s^2 + sigma^2): each step leaves s^2/(s^2 + sigma^2) of what is missing to s^2
    missing = math.prod(s**2 / (s**2 + sigma**2) for sigma in sigmas)
    assert std(FewStep(sigmas), consistency_function(s)) == pytest.approx(s * math.sqrt(1 - missing), rel=1e-6)


def test_from_80_one_step_is_s_over_the_root_of_1_plus_s2_over_80_2_and_further_steps_are_never_worse():
    s = 0.5
    assert std(FewStep((80.0,)), consistency_function(s)) == pytest.approx(s / math.sqrt(1 + s**2 / 80**2), rel=1e-9)
    stds = [std(few_step(n), consistency_function(s)) for n in range(1, 6)]
    assert stds == sorted(stds)
    assert stds[-1] <= s * (1 + 1e-9)
    assert stds[0] > s * (1 - 2e-5)


def test_the_denoiser_is_not_a_consistency_function():
    assert std(FewStep((80.0,)), denoiser(0.5)) < 0.01  # one step of a diffusion model is the mean image


def test_few_step_adds_fresh_noise_at_each_level_and_passes_the_label():
    asked, label = [], torch.tensor([4, 5])

    def network(x, t, label=None):
        asked.append((x.clone(), t.clone(), label))
        return torch.full_like(x, 10.0 * len(asked))

    noises = [torch.full((2, 3), 1.0), torch.full((2, 3), -2.0)]
    out = FewStep((80.0, 0.5))(network, lambda k: noises[k], label)
    (x0, t0, l0), (x1, t1, l1) = asked
    assert torch.equal(x0, torch.full((2, 3), 80.0))
    assert torch.equal(x1, torch.full((2, 3), 10.0 + 0.5 * -2.0))
    assert (t0.tolist(), t1.tolist()) == ([80.0, 80.0], [0.5, 0.5])
    assert torch.equal(l0, label)
    assert torch.equal(l1, label)
    assert torch.equal(out, torch.full((2, 3), 20.0))


def test_few_steps_levels_go_geometrically_from_80_to_the_second_sigma():
    assert few_step(1).sigmas == (80.0,)
    assert few_step(2).sigmas == (80.0, SECOND_SIGMA) == (80.0, 0.821)
    assert few_step(2, 1.526).sigmas == (80.0, 1.526)
    for steps in range(2, 10):
        logs = torch.tensor(few_step(steps).sigmas, dtype=torch.float64).log()
        assert len(logs) == steps
        assert torch.allclose(logs.diff(), logs.diff()[0])


# ----------------------------------------------------------------------------------------------------- Heun's sampler


def test_heun_converges_to_the_exact_standard_deviation_at_second_order():
    s = 0.5
    exact = 80 * s / math.sqrt(s**2 + 80**2)
    errors = [abs(std(Heun.karras(n), denoiser(s)) - exact) / exact for n in (9, 18, 36, 72)]
    assert errors[1] < 0.06  # EDM's 18 levels
    assert errors[3] < 0.003
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.35)


@pytest.mark.parametrize("steps", [1, 2, 5, 18])
def test_nfe_is_the_number_of_network_evaluations(steps):
    count, network = [], denoiser(0.5)

    def counting(x, t, label=None):
        count.append(t[0].item())
        return network(x, t, label)

    noise = lambda k: torch.ones(2, 1)  # noqa: E731
    for sampler, nfe in (
        (Heun.karras(steps), 2 * steps - 1),
        (DPMSolver.karras(steps), steps),
        (few_step(steps), steps),
    ):
        count.clear()
        sampler(counting, noise)
        assert isinstance(sampler, Sampler)
        assert len(count) == sampler.nfe == nfe
        assert len(sampler.sigmas) == steps
        assert min(count) > 0  # never at sigma 0
        assert count[0] == pytest.approx(80)


def test_heuns_levels_are_edms_grid_downwards():
    assert DPMSolver.karras(18).sigmas == Heun.karras(18).sigmas
    assert Heun.karras(18).sigmas == pytest.approx(karras_sigmas(18).flip(0).tolist())
    assert Heun.karras(18).sigmas[:4] == pytest.approx((80.0, 57.586, 40.786, 28.375), abs=1e-3)


# ----------------------------------------------------------------------------------------------------- DPM-Solver++(2M)


def test_dpm_converges_to_the_exact_standard_deviation_at_second_order():
    s = 0.5
    exact = 80 * s / math.sqrt(s**2 + 80**2)
    errors = [abs(std(DPMSolver.karras(n), denoiser(s)) - exact) / exact for n in (18, 36, 72, 144)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.3)
    assert errors[0] < abs(std(Heun.karras(9), denoiser(s)) - exact) / exact / 4  # at 18 evaluations and 17


def test_dpm_is_exact_where_the_denoiser_is_constant_and_extrapolates_it_in_the_logarithm_elsewhere():
    asked = []

    def constant(x, t, label=None):
        asked.append(x.item())
        return torch.full_like(x, 0.25)

    noise = lambda k: torch.ones(1, 1, dtype=torch.float64)  # noqa: E731
    assert DPMSolver((8.0, 2.0, 1.0))(constant, noise).item() == 0.25
    assert asked == [0.25 + t * 7.75 / 8 for t in (8.0, 2.0, 1.0)]

    asked.clear()
    linear = lambda x, t, label=None: asked.append(x.item()) or t.log()[:, None] + 0 * x  # noqa: E731
    DPMSolver((8.0, 2.0, 1.0))(linear, noise)  # D(2) + half of h = ln 2 at slope 1 is the step's middle, ln 2 / 2
    first = math.log(8) + (8 - math.log(8)) / 4
    assert asked == pytest.approx([8, first, math.log(2) / 2 + (first - math.log(2) / 2) / 2])


@pytest.mark.parametrize("steps", [2, 3, 10, 20])
def test_dpm_equals_diffusers_on_a_mixture_of_gaussians(steps):
    means = torch.tensor([[0.6, -0.2, 0.1], [-0.5, 0.4, 0.3], [0.1, 0.1, -0.7]], dtype=torch.float64)

    def mixture(x, t, label=None):
        variance = 0.2**2 + like(t, x) ** 2
        nearness = torch.softmax(-((x[:, None] - means).square().sum(-1) / (2 * variance)), 1)
        return 0.04 / variance * x + (1 - 0.04 / variance) * nearness @ means

    noise = torch.randn(16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theirs = EDMDPMSolverMultistepScheduler(
        sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, sigma_schedule="karras", algorithm_type="dpmsolver++",
        solver_order=2, solver_type="midpoint", final_sigmas_type="zero",
    )  # fmt: skip
    theirs.set_timesteps(steps)
    x = 80 * noise
    for t, sigma in zip(theirs.timesteps, theirs.sigmas.double(), strict=False):
        denoised = mixture(x, sigma.expand(16))
        raw = (denoised - 0.25 / (0.25 + sigma**2) * x) * (0.25 + sigma**2).sqrt() / (0.5 * sigma)  # the F of this D
        x = theirs.step(raw, t, x).prev_sample
    ours = DPMSolver.karras(steps)(mixture, lambda k: noise)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- laws of both kinds


@pytest.mark.parametrize("sampler", [few_step(1), few_step(3), Heun.karras(6), DPMSolver.karras(6)])
def test_a_sample_does_not_depend_on_its_batch(sampler):
    noise = [torch.randn(8, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    network = denoiser(0.5)
    whole = sampler(network, lambda k: noise[k])
    parts = [sampler(network, lambda k, i=i: noise[k][i : i + 3]) for i in (0, 3, 6)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("sigmas", [(), (0.5, 80.0), (80.0, 80.0), (80.0, 0.0), (80.0, -1.0)])
@pytest.mark.parametrize("kind", [FewStep, Heun, DPMSolver, check_sigmas])
def test_levels_that_are_not_positive_and_decreasing_are_refused(kind, sigmas):
    with pytest.raises(FewstepError):
        kind(sigmas)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (2, 0.0), (2, -1.0), (2, 80.0), (3, 90.0)])
def test_few_steps_that_make_no_sampler_are_refused(arguments):
    with pytest.raises(FewstepError):
        few_step(*arguments)
    for kind in (Heun, DPMSolver):
        with pytest.raises(FewstepError):
            kind.karras(min(arguments[0], 0))
