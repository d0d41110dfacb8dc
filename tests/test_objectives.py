"""The objective on Gaussian data, where everything is known: D* = x s^2/(s^2+t^2) and f* = x s/sqrt(s^2+t^2)."""

import copy
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewstep.networks import MLP, Architecture
from fewstep.objectives import (
    EDM,
    Below,
    Consistency,
    ContinuousSchedule,
    Denoising,
    Diffusion,
    Draw,
    GridPairs,
    InverseGap,
    KarrasGrid,
    LogNormal,
    Networks,
    PairObjective,
    PseudoHuber,
    SquaredL2,
    Unit,
)
from fewstep.ode import Euler, Heun, karras_sigmas
from fewstep.progress import Constant, Progress, Stages
from fewstep.types import like

S = 0.5  # standard deviation of the data
START = Progress(0, 8)


def ideal_denoiser(x, t, label=None):
    return x * like(S**2 / (S**2 + t.double() ** 2), x)


def consistency_function(x, t, label=None, s=S):
    return x * like(s / (s**2 + t.double() ** 2).sqrt(), x)


def consistency(distance=None, weighting=None, **options):
    return {"loss": Consistency(distance=distance or SquaredL2(), weighting=weighting or Unit(), **options)}


def quadrature(dims, nodes):
    """x and z [n, dims] with weights [n]: sums of w * g are expectations over x ~ N(0, S^2), z ~ N(0, 1)."""
    z, w = np.polynomial.hermite_e.hermegauss(nodes)
    points = np.stack(np.meshgrid(*[z] * (2 * dims), indexing="ij"), -1).reshape(-1, 2 * dims)
    weights = np.stack(np.meshgrid(*[w / w.sum()] * (2 * dims), indexing="ij"), -1).reshape(-1, 2 * dims).prod(1)
    points = torch.from_numpy(points)
    return S * points[:, :dims], points[:, dims:], torch.from_numpy(weights)


def expected_loss(objective, nets, t, r, dims=1, nodes=40):
    """The exact expectation of the (only) term at times t, r."""
    x, z, w = quadrature(dims, nodes)
    full = lambda value: torch.full((len(x),), value, dtype=torch.float32)  # noqa: E731
    draw = Draw(full(t), full(r), z, dict.fromkeys(objective.terms, len(x) * w), 0)
    (loss,) = objective.losses(nets, x, None, draw, START).values()
    return loss.mean()


class Recorder(nn.Module):
    """A network that remembers what it was asked, and the dropout masks it drew."""

    def __init__(self, network):
        super().__init__()
        self.network, self.asked, self.masks = network, [], []

    def forward(self, x, t, label=None):
        self.asked.append((x.detach(), t, label))
        self.masks.append(F.dropout(torch.ones(64), 0.5))
        return self.network(x, t, label)


def mlp(dropout=0.0, classes=0, dim=2):
    model = Architecture(MLP(width=16, depth=3, dropout=dropout), (dim,), classes).build(0)
    nn.init.normal_(model.network.rest[-1].weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def data(n=64, dim=2, seed=0):
    return S * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- Gaussian data


@pytest.mark.parametrize("t", [0.01, 0.1, 0.5, 2.0, 80.0])
@pytest.mark.parametrize("dims", [1, 2])
def test_denoising_loss_of_the_ideal_denoiser_is_d_s2_t2_over_s2_plus_t2_and_minimal(t, dims):
    term = Denoising(distance=SquaredL2("sum"), weighting=Unit())
    objective = PairObjective(pairs=Diffusion(), terms={"denoising": term})
    loss = lambda d: expected_loss(objective, Networks(d), t, 0.0, dims, nodes=3).item()  # noqa: E731
    minimum = dims * S**2 * t**2 / (S**2 + t**2)
    assert loss(ideal_denoiser) == pytest.approx(minimum, rel=1e-5)
    for e in (-0.05, 0.05):  # a denoiser off by e x costs e^2 E||x_t||^2 more
        excess = dims * e**2 * (S**2 + t**2)
        assert loss(lambda x, t, _, e=e: ideal_denoiser(x, t) + e * x) == pytest.approx(minimum + excess, rel=1e-4)
    weighted = PairObjective(pairs=Diffusion(), terms={"d": Denoising(distance=SquaredL2("mean"), weighting=EDM(S))})
    assert expected_loss(weighted, Networks(ideal_denoiser), t, 0.0, dims, 3).item() == pytest.approx(1, rel=1e-5)


def distillation_loss(online, intervals, solver):
    """Mean over Karras' grid of |f(x_t) - f(x_r)| / (t - r) at x = z = 1/2 with the ideal teacher."""
    sigmas, half = karras_sigmas(intervals + 1, 0.02, 80.0).float(), torch.full((intervals, 1), 0.5).double()
    terms = consistency(PseudoHuber(over="sum"), InverseGap())
    objective = PairObjective(pairs=GridPairs(), terms=terms, solver=solver)
    draw = Draw(sigmas[1:], sigmas[:-1], half, {"loss": torch.ones(intervals)}, 0)
    nets = Networks(online, teacher=ideal_denoiser)
    return objective.losses(nets, half, None, draw, START)["loss"].mean().item()


@pytest.mark.parametrize(("solver", "order"), [(Heun(), 2), (Euler(), 1)])
def test_distillation_loss_of_the_consistency_function_vanishes_with_the_solvers_order(solver, order):
    losses = [distillation_loss(consistency_function, n, solver) for n in (20, 40, 80)]
    orders = [math.log2(a / b) for a, b in pairwise(losses)]
    assert orders == pytest.approx([order] * 2, abs=0.25)
    for wrong in (ideal_denoiser, lambda x, t, _: consistency_function(x, t, s=1.2 * S)):
        coarse, fine = distillation_loss(wrong, 80, solver), distillation_loss(wrong, 320, solver)
        assert fine > 0.8 * coarse
        assert coarse > 5 * losses[-1]


class Curved(nn.Module):
    """f(x, t) = (a x + b tanh(x)) / (1 + t^2), nonlinear unless b = 0."""

    def __init__(self, b):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.7).double()), nn.Parameter(torch.tensor(b).double())

    def forward(self, x, t, label=None):
        bent = self.b * torch.tanh(x) if self.b != 0 else 0 * self.b
        return (self.a * x + bent) / like(1 + t.double() ** 2, x)


def ct_and_cd_gradients(model, gap):
    objective = PairObjective(pairs=GridPairs(), terms=consistency(), solver=Euler())
    losses = [
        expected_loss(objective, Networks(model, teacher=teacher), 1.0, 1.0 - gap) for teacher in (None, ideal_denoiser)
    ]
    return [gradient(loss, model) for loss in losses]


@pytest.mark.parametrize("gap", [0.5, 0.1])
def test_consistency_training_has_distillations_gradient_for_a_linear_network_at_any_gap(gap):
    # E[x + r z | x_t] is the Euler step of the exact teacher
    training, distillation = ct_and_cd_gradients(Curved(0.0), gap)
    assert torch.allclose(training, distillation, rtol=1e-5, atol=0)
    assert training[0].abs() > 1e-3


def test_consistency_trainings_gradient_tends_to_distillations_as_r_tends_to_t():
    # arXiv:2303.01469, Theorem 2: the gradients are O(gap), their difference O(gap^2)
    differences, sizes = [], []
    for gap in (0.2, 0.1, 0.05):
        training, distillation = ct_and_cd_gradients(Curved(0.9), gap)
        differences.append((training - distillation).norm().item())
        sizes.append(distillation.norm().item())
    assert math.log2(differences[0] / differences[1]) == pytest.approx(2, abs=0.25)
    assert math.log2(differences[1] / differences[2]) == pytest.approx(2, abs=0.25)
    assert math.log2(sizes[1] / sizes[2]) == pytest.approx(1, abs=0.25)


# ---------------------------------------------------------------------------------------------------- limits and ECT


@pytest.mark.parametrize("kind", [Consistency, Denoising])
def test_with_r_zero_every_term_is_the_plain_diffusion_loss(kind):
    terms = {"loss": kind(distance=SquaredL2("mean"), weighting=EDM(S))}
    objective, model, x = PairObjective(pairs=Diffusion(), terms=terms), mlp(), data()
    draw = objective.draw(x, START, 5)
    x_t = x + draw.t[:, None] * draw.noise
    weight = (draw.t**2 + S**2) / (draw.t * S) ** 2
    plain = (weight * ((model(x_t, draw.t) - x) ** 2).mean(1)).mean()
    loss = objective(Networks(model), x, None, START, 5)["loss"]
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert torch.allclose(gradient(loss, model), gradient(plain, model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_no_target_network_is_a_detached_copy_as_target(dropout):
    objective, model, x = PairObjective(pairs=ContinuousSchedule(), terms=consistency()), mlp(dropout), data()
    for progress in (START, Progress(5, 8)):
        own = objective(Networks(model), x, None, progress, 5)["loss"]
        frozen = copy.deepcopy(model)
        other = objective(Networks(model, target=frozen), x, None, progress, 5)["loss"]
        assert torch.equal(own, other)
        assert torch.equal(gradient(own, model), gradient(other, model))
        assert all(p.grad is None for p in frozen.parameters())
    moved = copy.deepcopy(model).requires_grad_(False)
    nn.init.zeros_(moved.network.rest[-1].weight)
    assert objective(Networks(model, target=moved), x, None, progress, 5)["loss"] != other


CIFAR10 = dict(q=2.0, stages=8, c=0.0, times=LogNormal(-1.1, 2.0), weighting=InverseGap())
IMAGENET = dict(q=4.0, stages=4, c=0.06, times=LogNormal(-0.8, 1.6), weighting=EDM(0.5))


@pytest.mark.parametrize("s", range(8))
@pytest.mark.parametrize("constants", [CIFAR10, IMAGENET], ids=["cifar10", "imagenet"])
def test_ect_is_its_formula_and_never_asks_the_network_at_zero(constants, s):
    q, stages, c, times, weighting = constants.values()
    s %= stages
    law = ContinuousSchedule(times, q=q, stages=Stages(stages))
    objective = PairObjective(pairs=law, terms=consistency(PseudoHuber(c=c), weighting))
    model, x, progress = Recorder(mlp(classes=3, dim=6)), data(256, 6), Progress(s, stages)
    label = torch.arange(256) % 3
    draw = objective.draw(x, progress, 11)
    loss = objective(Networks(model), x, label, progress, 11)["loss"]
    (x_t, asked_t, label_t), (x_r, asked_r, label_r) = model.asked

    t, z = draw.t.double(), draw.noise
    r = torch.clamp(t * (1 - (1 + 8 / (1 + t.exp())) / q ** (s + 1)), min=0)
    zero = r == 0
    assert zero.any() == (q ** (s + 1) < 5)
    with torch.no_grad():
        denoised_r = model.network(x + r[:, None].float() * z, r.clamp(min=1e-6).float(), label)
        target = torch.where(zero[:, None], x, denoised_r)
        m = (model.network(x + draw.t[:, None] * z, draw.t, label) - target).double().norm(dim=1)
    weight = 1 / (t - r) if c == 0 else 1 / t**2 + 4
    assert loss.item() == pytest.approx((weight * ((m**2 + c**2).sqrt() - c)).mean().item(), rel=1e-3)
    assert gradient(loss, model).isfinite().all()

    assert torch.equal(asked_t, draw.t)
    assert (asked_r > 0).all()
    assert asked_r.isfinite().all()
    assert torch.equal(asked_r[~zero], draw.r[~zero])
    assert torch.equal(x_t, x + draw.t[:, None] * z)
    assert torch.equal(x_r[~zero], (x + draw.r[:, None] * z)[~zero])  # not x_t + (r - t) z
    assert torch.equal(label_t, label)
    assert torch.equal(label_r, label)


@pytest.mark.parametrize("c", [0.0, 1e-8, 0.06])
def test_gradient_is_zero_and_not_nan_where_the_network_meets_its_target(c):
    theta = nn.Parameter(torch.tensor(0.3))
    objective = PairObjective(
        pairs=ContinuousSchedule(q=256.0, stages=Stages(1)), terms=consistency(PseudoHuber(c=c), InverseGap())
    )
    loss = objective(Networks(lambda x, t, label: theta * torch.ones_like(x)), data(), None, START, 0)["loss"]
    assert loss.item() == 0
    assert torch.autograd.grad(loss, theta)[0].item() == 0


# ------------------------------------------------------------------------------------------------------------ dropout


def test_both_passes_draw_the_same_masks_and_microbatches_others_and_nothing_leaks():
    model, x = Recorder(mlp(dropout=0.4)).train(), data()
    objective = PairObjective(pairs=ContinuousSchedule(), terms=consistency())
    draw, before = objective.draw(x, START, 5), torch.get_rng_state()
    for rows in (slice(0, 32), slice(32, 64)):
        objective.losses(Networks(model), x[rows], None, draw.rows(rows.start, rows.stop), START)
    first, first_target, second, second_target = model.masks
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, first_target)
    assert torch.equal(second, second_target)
    assert not torch.equal(first, second)
    teacher = Networks(model, teacher=ideal_denoiser)
    objective.losses(teacher, x, None, objective.draw(x, START, 6), START)
    assert torch.equal(model.masks[-1], model.masks[-2])
    assert not torch.equal(model.masks[-1], first)  # another step


def test_with_shared_dropout_the_loss_vanishes_as_r_tends_to_t():
    model, x, t = mlp(dropout=0.4).train(), data(), torch.ones(64)
    objective = PairObjective(pairs=ContinuousSchedule(q=256.0, stages=Stages(1)), terms=consistency())
    draw = Draw(t, t - 1e-5, data(seed=1), {"loss": t}, dropout_seed=3)
    assert objective.losses(Networks(model), x, None, draw, START)["loss"].max() < 1e-6
    assert (model(x, t) - model(x, t)).square().sum(1).max() > 1e-3  # what it would be without


# ------------------------------------------------------------------------------------------------------ terms, masks

GRID = GridPairs(KarrasGrid(Constant(20.0)), LogNormal(-1.1, 2.0))
TWO_TERMS = PairObjective(
    pairs=GRID,
    terms={
        "consistency": Consistency(distance=PseudoHuber(c=0.1), weighting=InverseGap()),
        "denoising": Denoising(distance=SquaredL2(), weighting=EDM(S), where=Below(0.17), scale=5.0),
    },
)


def test_a_term_is_scale_times_the_mean_over_its_mask_and_terms_share_one_forward_pass():
    model, x = Recorder(mlp()), data(256)
    draw, losses = TWO_TERMS.draw(x, START, 5), TWO_TERMS(Networks(model), x, None, START, 5)
    assert len(model.asked) == 2
    x_t = x + draw.t[:, None] * draw.noise
    low = draw.t <= 0.17
    assert 0 < low.sum() < 256
    error = (1 / draw.t**2 + 4) * ((model.network(x_t, draw.t) - x) ** 2).sum(1)
    assert losses["denoising"].item() == pytest.approx(5 * error[low].mean().item(), rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.lists(st.integers(0, 12), max_size=3), st.integers(0, 2**40))
def test_microbatches_and_ranks_add_up_to_the_whole_batch(n, world, cuts, seed):
    x = data(n * world, seed=seed % 1000)
    whole = TWO_TERMS.draw(x, START, seed)
    nets = Networks(ideal_denoiser)
    losses = TWO_TERMS.losses(nets, x, None, whole, START)
    edges = sorted({0, n, *(min(c, n) for c in cuts)})
    sums = dict.fromkeys(losses, 0.0)
    for rank in range(world):
        mine = x[rank * n : (rank + 1) * n]
        draw = TWO_TERMS.draw(mine, START, seed, rank, world)
        for a in ("t", "r", "noise"):
            assert torch.equal(getattr(draw, a), getattr(whole, a)[rank * n : (rank + 1) * n])
        for start, stop in pairwise(edges):
            part = TWO_TERMS.losses(nets, mine[start:stop], None, draw.rows(start, stop), START)
            for name in sums:
                sums[name] += part[name].sum().item() / (n * world)
        assert all(torch.equal(draw.share[k], whole.share[k][rank * n : (rank + 1) * n]) for k in losses)
        assert draw.dropout_seed == whole.dropout_seed + rank * n
    for name, loss in losses.items():
        assert sums[name] == pytest.approx(loss.mean().item(), rel=1e-4, abs=1e-6)


def test_a_mask_that_selects_nothing_gives_zero_with_zero_gradient():
    model, x = mlp(), data()
    terms = consistency(PseudoHuber(), InverseGap(), where=Below(1e-9))
    loss = PairObjective(pairs=GRID, terms=terms)(Networks(model), x, None, START, 0)["loss"]
    assert loss.item() == 0
    assert (gradient(loss, model) == 0).all()
