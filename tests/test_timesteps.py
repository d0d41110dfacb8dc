"""Adaptive laws of times: uniform until something was measured, unbiased where weighted, and drawn to where they pay."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, norm

from fewstep import codec
from fewstep.objectives import Diffusion, GridPairs, KarrasGrid, LogNormal
from fewstep.progress import Constant, Progress
from fewstep.snapshots import read, write
from fewstep.timesteps import Learned, LossVariance, importance
from fewstep.timesteps.law import quantile, uniforms
from fewstep.timesteps.policy import BINS, CONCENTRATION, Policy, entropy, log_density_at
from fewstep.types import FewstepError
from test_distributed import together
from test_pairs import LAWS

CPU, IMAGE = torch.device("cpu"), (1, 8, 8)
SMALL = Learned(channels=(4,), hidden=8, interval=1)
CONFIGS = {
    "variance": LossVariance(),
    "second moment, weighted": LossVariance(moment="second", weighted=True),
    "learned": SMALL,
    "learned, weighted": replace(SMALL, weighted=True),
}


def images(n, seed=0, shape=IMAGE):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def middles(points):
    return (torch.arange(points) + 0.5) / points


def taught(sampler, steps, observed=None, fell=None, n=64):
    """The sampler after steps in which the loss at u was observed(u), and where it fell by fell(x, drawn u, u)."""
    for step in range(steps):
        x = images(n, step)
        u, weights = sampler.draw(x, step)
        if sampler.due(step):
            sampler.before(lambda at: torch.ones_like(at))
            sampler.after(lambda at, x=x, u=u: 1 - fell(x, u, at))
        sampler.observe(u, (observed or torch.ones_like)(u) * weights, weights)
    return sampler


def is_uniform(sampler, n=1000):
    u, weights = sampler.draw(images(n), 7)
    return torch.equal(u, uniforms(n, 7, CPU)) and torch.equal(weights, torch.ones(n))


def concentrations(sampler, alpha, beta):
    """Give every image Beta(alpha, beta)."""
    limit = math.log(CONCENTRATION)
    with torch.no_grad():
        sampler.policy.head[-1].weight.zero_()
        sampler.policy.head[-1].bias.copy_((torch.tensor([alpha, beta]).log() / limit).atanh() * limit)
    return sampler


# ---------------------------------------------------------------------------------- densities on quantiles of a base law


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=40))
def test_quantiles_invert_the_distribution_function(heights):
    density = torch.tensor(heights) / torch.tensor(heights).mean()
    v = middles(4096)
    u, there = quantile(density.expand(len(v), -1), v)
    edges = torch.cat([torch.zeros(1), density.double().cumsum(0) / len(density)])
    k = (u * len(density)).long().clamp(max=len(density) - 1)
    below = edges[k] + (u * len(density) - k) * density[k].double() / len(density)
    assert (below - v).abs().max() < 1e-5
    assert (u.diff() >= 0).all()
    assert u.max() < 1
    assert ((there == density[k]).float().mean() > 1 - 2 * len(density) / len(v)).all()  # but for rounding at edges


def test_a_uniform_density_leaves_the_uniform_numbers_as_they_are():
    v = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    v[0] = 0
    for bins in (2, 32, BINS):
        assert torch.equal(quantile(torch.ones(len(v), bins), v)[0], v)


@pytest.mark.parametrize("f", [lambda u: u, lambda u: u.square() - 1, lambda u: (9 * u).sin().exp()])
def test_importance_weighted_means_are_the_base_laws(f):
    v = middles(2**13)  # the integral over v of w(u(v)) f(u(v)) is that of f over u
    truth = f(v).mean()
    density = LossVariance().build(IMAGE, CPU, 0).density() * torch.linspace(0.2, 1.8, 32)
    beta = concentrations(SMALL.build(IMAGE, CPU, 0), 1.5, 0.8).density(images(1))[0]
    for p in (density, beta):
        u, there = quantile(p.expand(len(v), -1), v)
        plain, weighted = f(u).mean(), (importance(there, 1e9) * f(u)).mean()
        assert weighted.item() == pytest.approx(truth.item(), rel=2e-3)
        assert abs(plain - truth) > 0.01  # the importance-free form minimises something else


def test_importance_is_clipped_and_has_mean_one_over_the_batch():
    w = importance(torch.tensor([4.0, 1.0, 0.5, 0.001]), 10.0)
    assert torch.allclose(w, torch.tensor([0.25, 1, 2, 10]) * 4 / 13.25)


@pytest.mark.parametrize("name", LAWS)
def test_uniform_quantiles_are_every_pair_law_itself(name):
    law, generator = LAWS[name], torch.Generator().manual_seed(0)
    for fraction in (0.0, 0.6):
        progress = Progress(int(fraction * 1000), 1000)
        own, _ = law(20_000, progress, generator)
        t, r = law(20_000, progress, generator, torch.rand(20_000, generator=generator))
        assert (r >= 0).all()
        assert (r < t).all()
        assert (t.log().mean() - own.log().mean()).abs() < 0.08
        assert (t.log().std() - own.log().std()).abs() < 0.08
        t, r = law(4, progress, generator, torch.tensor([0.0, 0.5, 1 - 2**-24, 1.0]))
        assert t.isfinite().all()
        assert (r < t).all()
        assert (t.diff() >= 0).all()


def test_a_laws_quantiles_are_the_normals_and_a_grids_are_its_cumulated_masses():
    u = middles(999)
    t = LogNormal(-1.1, 2.0).quantile(u)
    assert torch.allclose(t.log().double(), torch.tensor(norm(-1.1, 2.0).ppf(u.numpy())), atol=1e-4)
    assert torch.equal(t, Diffusion(LogNormal(-1.1, 2.0))(999, Progress(0, 1), torch.Generator(), u)[0])
    law = GridPairs(KarrasGrid(Constant(10.0)), LogNormal(-1.1, 2.0))
    t, _ = law(999, Progress(0, 1), torch.Generator(), u)
    p = law.density.masses(law.grid(Progress(0, 1)))
    share = torch.stack([(t == s).double().mean() for s in law.grid(Progress(0, 1)).float()[1:]])
    assert (share - p).abs().max() < 2e-3


def test_given_no_quantiles_a_law_draws_what_it_always_drew():
    g = torch.Generator().manual_seed(3)
    expected = torch.exp(-1.2 + 1.2 * torch.randn(5, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(Diffusion()(5, Progress(0, 1), g)[0], expected)


# -------------------------------------------------------------------------------- uniform where nothing tells times apart


@pytest.mark.parametrize("name", CONFIGS)
def test_before_anything_is_measured_the_law_is_uniform_exactly(name):
    sampler = CONFIGS[name].build(IMAGE, CPU, 0)
    assert is_uniform(sampler)
    u, _ = sampler.draw(images(20_000), 1)
    assert kstest(u.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("size", [0.0, 0.1, 7.3])
def test_equal_statistics_and_equal_rewards_leave_the_law_uniform_exactly(name, size):
    sampler = CONFIGS[name].build(IMAGE, CPU, 0)
    taught(sampler, 12, lambda u: size * torch.ones_like(u), lambda x, u, at: size * torch.ones_like(u), n=50)
    assert is_uniform(sampler)


def test_a_loss_that_changes_by_rounding_only_teaches_nothing():
    sampler = taught(SMALL.build(IMAGE, CPU, 0), 12, fell=lambda x, u, at: 2e-7 * u)
    assert is_uniform(sampler)
    assert not is_uniform(taught(sampler, 12, fell=lambda x, u, at: 2e-3 * u))


def test_a_loss_of_the_same_spread_everywhere_leaves_the_law_uniform_but_for_chance():
    noise = torch.Generator().manual_seed(0)
    sampler = taught(
        LossVariance().build(IMAGE, CPU, 0),
        200,
        lambda u: torch.rand(len(u), generator=noise) + 9 * u,
        n=1000,
    )
    assert (sampler.density() - 1).abs().max() < 0.12  # its mean's slope within a bin adds 9/32/sqrt(12) to 0.289


def test_equal_rewards_draw_a_learned_law_back_to_the_uniform_one():
    sampler = concentrations(replace(SMALL, lr=0.2).build(IMAGE, CPU, 0), 4.0, 0.7)
    lost = -entropy(sampler.policy(images(64)))
    taught(sampler, 80, fell=lambda x, u, at: 0.3 * torch.ones_like(u))
    assert (-entropy(sampler.policy(images(64)))).max() < 0.01 * lost.min()


def test_a_skipped_update_leaves_no_trace():
    sampler, other = (taught(SMALL.build(IMAGE, CPU, 0), 3, fell=lambda x, u, at: u) for _ in range(2))
    sampler.draw(images(64, 99), 99)
    sampler.before(torch.ones_like)
    for s in (sampler, other):
        taught(s, 3, fell=lambda x, u, at: u)
    assert all(torch.equal(t, other.tensors()[name]) for name, t in sampler.tensors().items())


# ------------------------------------------------------------------------------------------------- the loss's own spread


@pytest.mark.parametrize(("moment", "root"), [("variance", lambda s: s), ("second", lambda s: (4 + s**2).sqrt())])
@pytest.mark.parametrize("weighted", [False, True])
def test_loss_variance_converges_to_the_optimal_density(moment, root, weighted):
    noise, config = (
        torch.Generator().manual_seed(0),
        LossVariance(16, decay=0.99, mix=0.1, moment=moment, weighted=weighted),
    )

    def spread(u):
        return 0.1 + 3 * (middles(16)[(u * 16).long()] - 0.5).abs()

    def loss(u):  # mean 2, standard deviation spread(u)
        return 2 + spread(u) * torch.randn(len(u), generator=noise)

    sampler = taught(config.build(IMAGE, CPU, 0), 300, loss, n=1000)
    s = root(spread(middles(16)))
    expected = 0.1 + 0.9 * s / s.mean()
    assert torch.allclose(sampler.density(), expected, rtol=0.06)
    u, weights = sampler.draw(images(50_000), 0)
    share = torch.bincount((u * 16).long(), minlength=16) / len(u)
    assert torch.allclose(share * 16, sampler.density(), rtol=0.06)
    assert torch.equal(weights, torch.ones_like(u)) != weighted
    if weighted:
        assert torch.allclose(weights * sampler.density()[(u * 16).long()], torch.ones(()), rtol=0.02)
        assert (weights * loss(u)).mean().item() == pytest.approx(2, abs=0.03)
    if weighted and moment == "variance":
        assert (weights * (loss(u) - 2)).var() < 0.85 * loss(torch.rand(50_000, generator=noise)).var()


def test_statistics_forget_and_follow():
    sampler = taught(LossVariance(8, decay=0.9).build(IMAGE, CPU, 0), 60, lambda u: u * torch.randn(len(u)), n=500)
    before = sampler.density()
    after = taught(sampler, 120, lambda u: (1 - u) * torch.randn(len(u)), n=500).density()
    assert before[0] < 0.6 < 1.4 < before[-1]
    assert after[-1] < 0.6 < 1.4 < after[0]


def test_losses_that_are_not_finite_and_importance_do_not_reach_the_statistics():
    u, loss = torch.rand(64), torch.rand(64)
    weights = torch.rand(64) + 0.5
    one, two = (LossVariance().build(IMAGE, CPU, 0) for _ in range(2))
    one.observe(u, loss, torch.ones(64))
    bad = torch.tensor([math.nan, math.inf])
    two.observe(torch.cat([u, torch.rand(2)]), torch.cat([loss * weights, bad]), torch.cat([weights, torch.ones(2)]))
    assert torch.allclose(one.sums, two.sums, rtol=1e-5)
    assert one.sums[0].sum() == 64


# -------------------------------------------------------------------------------------------------------- the learned law


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, 5.0), (0.7, 1.4), (9.0, 3.0)])
def test_the_policys_law_is_the_beta_law(alpha, beta):
    log_density = concentrations(replace(SMALL, mix=0.0).build(IMAGE, CPU, 0), alpha, beta).policy(images(1))
    law = torch.distributions.Beta(alpha, beta)
    u = middles(BINS)
    assert torch.allclose(log_density[0, 20:-20], law.log_prob(u)[20:-20], atol=5e-3)
    assert torch.equal(log_density_at(log_density.expand(BINS, -1), u), log_density[0])
    assert entropy(log_density).item() == pytest.approx(law.entropy().item(), abs=5e-3)
    mixed = concentrations(replace(SMALL, mix=0.3).build(IMAGE, CPU, 0), alpha, beta).density(images(1))
    assert torch.allclose(mixed, 0.3 + 0.7 * log_density.exp(), rtol=1e-4)
    assert log_density.exp().mean().item() == pytest.approx(1, abs=1e-5)


def test_the_entropys_gradient_is_that_of_its_definition_and_zero_at_the_uniform_law():
    policy = Policy(IMAGE, (4,), 8, 0.1)
    energy = torch.randn(3, BINS, requires_grad=True)
    log_density = energy - energy.exp().mean(1, keepdim=True).log()
    (expected,) = torch.autograd.grad(-(log_density.exp() * log_density).mean(1).sum(), energy, retain_graph=True)
    (found,) = torch.autograd.grad(entropy(log_density).sum(), energy)
    assert torch.allclose(found, expected, atol=1e-6)
    entropy(policy(images(5))).sum().backward()
    assert all((p.grad == 0).all() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (4, 5, 7), (6,), (2, 3)])
def test_policies_of_images_and_of_vectors(shape):
    sampler = Learned(interval=1).build(shape, CPU, 0)
    for step in range(3):
        u, _ = sampler.draw(images(8, step, shape), step)
        sampler.before(torch.ones_like)
        sampler.after(lambda at, u=u: 1 - u)
    density = sampler.density(images(8, 0, shape))
    assert (density != 1).any()
    assert density.isfinite().all()


@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_the_policy_goes_where_the_reward_is_larger_whatever_its_size(size):
    sampler = replace(SMALL, lr=0.05).build(IMAGE, CPU, 0)
    noise = torch.Generator().manual_seed(0)
    for step in range(100):
        x = images(64, step)
        u, _ = sampler.draw(x, step)
        fell = size * (torch.exp(-((u - 0.8) ** 2) / 0.02) + 0.3 * torch.randn(len(u), generator=noise))
        sampler.before(lambda at: 2 * size * torch.ones_like(at))
        sampler.after(lambda at, fell=fell: 2 * size - fell)
    u, _ = sampler.draw(images(4000), 0)
    assert ((u - 0.8).abs() < 0.15).float().mean() > 0.6  # 0.3 under the uniform law
    assert sampler.updates == 100


def test_the_policy_learns_a_law_for_each_image():
    sampler = replace(SMALL, lr=0.05).build(IMAGE, CPU, 0)

    def pictures(seed):  # dark ones profit at small u, bright ones at large u
        sign = torch.randint(2, (64, 1, 1, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        return sign + 0.1 * images(64, seed)

    for step in range(60):
        x = pictures(step)
        u, _ = sampler.draw(x, step)
        sampler.before(torch.ones_like)
        sampler.after(lambda at, x=x, u=u: 1 - (u - 0.5) * x.mean((1, 2, 3)))
    x = pictures(999)
    u, bright = sampler.draw(x, 0)[0], x.mean((1, 2, 3)) > 0
    assert u[bright].mean() > 0.65
    assert u[~bright].mean() < 0.35


def test_the_regression_picks_the_times_that_tell_the_decrease_over_all():
    sampler = replace(SMALL, candidates=16).build(IMAGE, CPU, 0)
    assert sampler.picked().tolist() == [2, 8, 13]  # evenly spaced
    drivers = torch.tensor([4, 11, 14])
    g = torch.Generator().manual_seed(0)
    for _ in range(25):
        row = 0.01 * torch.randn(16, generator=g)
        row[drivers] += torch.randn((), generator=g) + 0.1 * torch.randn(3, generator=g)
        sampler.remember([row])
        sampler.updates += 1
        assert torch.equal(sampler.decreases[-1], row)
    assert sorted(sampler.picked().tolist()) == [4, 11, 14]


def test_every_candidate_is_measured_and_the_mean_decrease_kept():
    sampler = replace(SMALL, candidates=10).build(IMAGE, CPU, 0)
    sampler.draw(images(4), 0)
    seen = []
    sampler.before(lambda at: seen.append(at) or torch.zeros_like(at))
    assert len(seen) == 3 + 3  # three passes of 4 images cover 10 candidates
    sampler.after(lambda at: -at.square())
    grid = middles(10)
    assert torch.allclose(sampler.decreases[-1], grid.square())
    assert torch.equal(sampler.decreases[:-1], torch.zeros(19, 10))
    assert [at.unique().numel() for at in seen[3:]] == [1, 1, 1]


# ------------------------------------------------------------------------------------------------ state, files, processes


def step_on(sampler, steps, n=32):
    drawn = []
    for step in steps:
        x = images(n, step)
        u, weights = sampler.draw(x, step)
        if sampler.due(step):
            sampler.before(torch.ones_like)
            sampler.after(lambda at, u=u: 1 - 0.1 * (u - 0.3).square() * at)
        sampler.observe(u, weights * u.square() * (1 + x.mean((1, 2, 3))), weights)
        drawn += [u, weights]
    return drawn


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("stop", [0, 5, 8])
def test_a_resumed_law_goes_on_bit_for_bit(name, stop, tmp_path):
    config = replace(CONFIGS[name], interval=2) if "learned" in name else CONFIGS[name]
    whole, first = (config.build(IMAGE, CPU, 0) for _ in range(2))
    expected = step_on(whole, range(24))
    step_on(first, range(stop))
    write(tmp_path / "state.safetensors", first.tensors(), {})
    resumed = config.build(IMAGE, CPU, 1)
    resumed.load_tensors(read(tmp_path / "state.safetensors").tensors)
    found = step_on(resumed, range(stop, 24))
    assert all(torch.equal(a, b) for a, b in zip(found, expected[2 * stop :], strict=True))
    assert all(torch.equal(t, whole.tensors()[key]) for key, t in resumed.tensors().items())
    assert not is_uniform(whole)  # so that something was there to lose


def test_a_draw_is_a_function_of_state_images_and_seed():
    sampler = taught(SMALL.build(IMAGE, CPU, 0), 20, fell=lambda x, u, at: u)
    one, two, other = (sampler.draw(images(16), seed)[0] for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_round_trip(name):
    assert codec.decode(codec.encode(CONFIGS[name])) == CONFIGS[name]


@pytest.mark.parametrize("wrong", [{"bins": 1}, {"decay": 1.0}, {"mix": 0.0}, {"mix": 1.1}])
def test_a_baseline_without_bins_or_floor_is_refused(wrong):
    with pytest.raises(FewstepError, match="bins >= 2"):
        LossVariance(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"interval": 0}, {"memory": 2}, {"candidates": 2}, {"channels": (0,)}, {"hidden": 0}, {"lr": 0.0}, {"clip": 0.0},
     {"entropy": -1.0}, {"mix": -0.1}, {"mix": 1.0}, {"mix": 0.0, "weighted": True}],
)  # fmt: skip
def test_a_learned_law_that_cannot_learn_is_refused(wrong):
    with pytest.raises(FewstepError, match=r"--timesteps.* needs"):
        Learned(**wrong)


PROCESSES = """
from fewstep.snapshots import write
from fewstep.timesteps import Learned, LossVariance
learned = Learned(channels=(4,), hidden=8, interval=2, candidates=40, weighted=True)
tensors = {}
for name, law in {"variance": LossVariance(weighted=True), "learned": learned}.items():
    sampler = law.build((1, 8, 8), torch.device("cpu"), 0)
    for step in range(40):
        n = 32 // world
        x = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(step))[rank * n : (rank + 1) * n]
        u, weights = sampler.draw(x, step)
        if sampler.due(step):
            sampler.before(torch.ones_like)
            sampler.after(lambda at: 1 - 0.1 * (u - 0.3).square() * (1 + at) * (1 + x.mean((1, 2, 3))))
        sampler.observe(u, weights * u.square() * (1 + x.mean((1, 2, 3))), weights)
        if step % 13 == 0:
            tensors |= {f"u/{name}/{step}": u, f"w/{name}/{step}": weights}
    tensors |= {f"state/{name}/{key}": t.contiguous() for key, t in sampler.tensors().items()}
write(Path(out) / f"{world}-{rank}.safetensors", tensors, {})
distributed.stop()
"""


def test_two_processes_hold_the_same_law_and_draw_what_one_does(tmp_path):
    together(PROCESSES, 1, out=str(tmp_path))
    together(PROCESSES, 2, out=str(tmp_path))
    one, two, other = (read(tmp_path / f"{name}.safetensors").tensors for name in ("1-0", "2-0", "2-1"))
    for name, t in two.items():
        if name.startswith("state/"):
            assert torch.equal(t, other[name]), f"the processes differ in {name}"
            assert torch.allclose(t.float(), one[name].float(), rtol=1e-3, atol=1e-4), name
        else:
            rows = torch.cat([t, other[name]])
            assert torch.equal(rows, one[name]) or (
                not name.endswith("/0") and torch.allclose(rows, one[name], atol=1e-4)
            )
    assert (one["state/learned/baseline"] != 0).all()
