"""Couplings: optimal transport is a permutation of least cost, within labels where there are any."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from fewstep.codec import decode, encode
from fewstep.objectives.couplings import Independent, MinibatchOT, assigned, prices, transport_cost
from fewstep.types import FewstepError

OT = MinibatchOT()


def batch(n, shape=(3, 2, 2), seed=0, dtype=torch.float32):
    """Data with structure (a few directions, unequal lengths, a mean) and normal noise."""
    g = torch.Generator().manual_seed(seed)
    d = int(np.prod(shape))
    x = 0.5 * torch.randn(n, 3, generator=g) @ torch.randn(3, d, generator=g) + torch.randn(d, generator=g)
    x *= torch.rand(n, 1, generator=g) + 0.5
    return x.reshape(n, *shape).to(dtype), torch.randn(n, *shape, generator=g).to(dtype)


def cost(x, noise):
    return (x.double() - noise.double()).square().sum().item()


def order(noise, coupled):
    """Which row of the noise went where; fails unless it is the same rows, bit for bit, each once."""
    same = (coupled.flatten(1)[:, None] == noise.flatten(1)[None]).all(2)
    assert (same.sum(0) == 1).all()
    assert (same.sum(1) == 1).all()
    return same.float().argmax(1)


def least(x, noise):
    """The least cost over all permutations."""
    return min(cost(x, noise[list(p)]) for p in permutations(range(len(x))))


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 6), seed=st.integers(0, 10_000), shape=st.sampled_from([(1,), (2,), (3, 2, 2)]))
def test_no_permutation_costs_less(n, seed, shape):
    x, noise = batch(n, shape, seed)
    coupled = OT(x, noise)
    order(noise, coupled)
    assert cost(x, coupled) == pytest.approx(least(x, noise), rel=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), values=st.integers(1, 3))
def test_with_ties_the_cost_is_still_the_least(seed, values):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(values, (6, 2), generator=g).float()
    noise = torch.randint(values, (6, 2), generator=g).float()
    coupled = OT(x, noise)
    assert cost(x, coupled) == least(x, noise)
    assert torch.equal(coupled.unique(dim=0, return_counts=True)[1], noise.unique(dim=0, return_counts=True)[1])


def test_in_one_dimension_it_sorts():
    x, noise = batch(40, (1,))
    assert torch.equal(OT(x, noise)[x.flatten().argsort()], noise.sort(0).values)


@pytest.mark.parametrize("n", [2, 64, 600])
def test_images_that_are_their_own_noise_find_it(n):
    _, noise = batch(n, (4, 4))
    shuffled = noise[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    assert torch.equal(OT(noise, shuffled), noise)


@pytest.mark.parametrize("n", [511, 512, 700])  # with prices and without
def test_large_batches_are_assigned_exactly(n):
    x, noise = batch(n, (8,), dtype=torch.float64)
    coupled = OT(x, noise)
    order(noise, coupled)
    rows, columns = linear_sum_assignment(torch.cdist(x, noise).square().numpy())
    assert cost(x, coupled) == pytest.approx(cost(x[rows], noise[columns]), rel=1e-12)
    assert prices((x @ noise.T).numpy()).any() == (n >= 512)


@pytest.mark.parametrize("kind", ["two images", "one image", "one direction"])
def test_images_that_occur_many_times_are_assigned_too(kind):
    """Their rows bid for the same columns for ever, if they are let."""
    x, noise = batch(600, (8,), dtype=torch.float64)
    x = {"two images": x[torch.arange(600) % 2], "one image": 0 * x + 1, "one direction": x[:, :1] * x[:1]}[kind]
    coupled = OT(x, noise)
    rows, columns = linear_sum_assignment(-(x @ noise.T).numpy())
    assert cost(x, coupled) == pytest.approx(cost(x[rows], noise[columns]), rel=1e-9)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 40))
def test_prices_do_not_change_the_optimum(seed, n):
    g = np.random.default_rng(seed)
    value, price = g.standard_normal((n, n)), 10 * g.standard_normal(n)
    columns = assigned(value - price)
    assert value[range(n), columns].sum() == pytest.approx(value[range(n), assigned(value)].sum())


def test_the_same_constant_added_to_every_image_changes_nothing():
    x, noise = batch(100)
    constant = 100 * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(1))
    assert torch.equal(OT(x + constant, noise), OT(x, noise))
    assert torch.equal(OT(3 * x, noise), OT(x, noise))


def test_it_follows_the_images_not_the_order_of_the_noise():
    x, noise = batch(100)
    g = torch.Generator().manual_seed(1)
    rows, columns = torch.randperm(100, generator=g), torch.randperm(100, generator=g)
    assert torch.equal(OT(x[rows], noise[columns]), OT(x, noise)[rows])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    """float16 overflows at 65504: the products are made in float32."""
    x, noise = batch(50, (64,), dtype=dtype)
    big = 300 * x
    coupled = OT(big, noise)
    assert coupled.dtype == dtype
    order(noise, coupled)
    rows, columns = linear_sum_assignment(-(big.double() @ noise.double().T).numpy())
    assert cost(big, coupled) == pytest.approx(cost(big[rows], noise[columns]), rel=1e-6)


def test_autocast_does_not_round_the_products():
    x, noise = batch(300, (3, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(OT(x, noise), OT(x, noise))
        inside = OT(x, noise)
    assert torch.equal(inside, OT(x, noise))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("label", [None, torch.arange(20) % 3])
def test_images_that_are_not_finite_leave_the_noise_as_it_came(bad, label):
    x, noise = batch(20)
    x[7, 0, 0, 0] = bad
    assert torch.equal(OT(x, noise, label), noise)


def test_arguments_and_gradients_are_left_alone():
    x, noise = batch(30)
    before = x.clone(), noise.clone()
    x.requires_grad_()
    coupled = OT(x, noise)
    assert not coupled.requires_grad
    assert torch.equal(x, before[0])
    assert torch.equal(noise, before[1])


# Labels


@pytest.mark.parametrize("classes", [1, 3, 60])  # 60: most labels occur once
@pytest.mark.parametrize("by_class", ["auto", "always"])
def test_within_a_label_the_noise_stays_with_the_label(classes, by_class):
    x, noise = batch(80)
    label = torch.randint(classes, (80,), generator=torch.Generator().manual_seed(1))
    coupled = MinibatchOT(by_class)(x, noise, label)
    assert torch.equal(label[order(noise, coupled)], label)
    for value in label.unique():
        own = label == value
        assert cost(x[own], coupled[own]) == pytest.approx(cost(x[own], OT(x[own], noise[own])), rel=1e-6)


def test_labels_are_left_out_where_they_are_to_be():
    x, noise = batch(80)
    label = torch.arange(80) % 4
    across = MinibatchOT("never")(x, noise, label)
    assert torch.equal(across, OT(x, noise))
    within = OT(x, noise, label)
    assert cost(x, across) < cost(x, within) < cost(x, noise)


def test_across_labels_the_noise_of_a_label_is_biased_and_within_it_is_not():
    """Two labels at -1 and 1 in one dimension. Across labels the noise of the label at 1 is the larger half:
    its mean is E|z| = sqrt(2/pi). Samplers draw noise of mean 0 for both."""
    n = 400
    g = torch.Generator().manual_seed(0)
    label = torch.arange(n) % 2
    x = (2.0 * label - 1)[:, None] + 0.01 * torch.randn(n, 1, generator=g)
    noise = torch.randn(n, 1, generator=g)
    across = MinibatchOT("never")(x, noise, label)[label == 1].mean().item()
    within = MinibatchOT("auto")(x, noise, label)[label == 1].mean().item()
    assert across == pytest.approx((2 / np.pi) ** 0.5, abs=0.15)
    assert within == pytest.approx(0, abs=0.25)


def test_within_a_class_without_labels_is_refused():
    x, noise = batch(4)
    with pytest.raises(FewstepError, match=r"needs labels.*--conditional.*by-class auto"):
        MinibatchOT("always")(x, noise)


@pytest.mark.parametrize("options", [{"by_class": "sometimes"}, {"over": "node"}])
def test_unknown_choices_are_refused(options):
    wrong = object.__new__(MinibatchOT)  # in tests, the constructor's own annotations would refuse it first
    for name, value in {"by_class": "auto", "over": "rank", **options}.items():
        object.__setattr__(wrong, name, value)
    with pytest.raises(FewstepError, match=r"--objective\.coupling needs by-class auto, always or never"):
        wrong.__post_init__()


# Cost


def test_it_never_costs_more():
    label = torch.arange(64) % 5
    for seed in range(20):
        x, noise = batch(64, seed=seed)
        for coupled in (OT(x, noise), OT(x, noise, label)):
            assert transport_cost(x, coupled) < transport_cost(x, noise)


def test_a_larger_batch_costs_less():
    """Per pair, against the same rows coupled in four parts: what --objective.coupling.over world gains over rank."""
    x, noise = batch(256)
    parts = torch.cat([OT(x[i : i + 64], noise[i : i + 64]) for i in range(0, 256, 64)])
    assert transport_cost(x, OT(x, noise)) < transport_cost(x, parts) < transport_cost(x, noise)


def test_transport_cost_is_over_that_of_all_pairs():
    x, noise = batch(50)
    pairs = torch.cdist(x.flatten(1).double(), noise.flatten(1).double()).square()
    assert transport_cost(x, noise) == pytest.approx((pairs.diag().mean() / pairs.mean()).item(), rel=1e-5)
    assert transport_cost(noise, noise) == pytest.approx(0, abs=1e-6)


def test_transport_cost_of_one_dimensional_gaussians():
    """x ~ N(0, s^2), here its quantiles: independent s^2 + 1, sorted (s - 1)^2; 1/5 for s = 1/2."""
    z = torch.special.ndtri((torch.arange(200) + 0.5) / 200)[:, None]
    noise = z[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    assert transport_cost(0.5 * z, OT(0.5 * z, noise)) == pytest.approx(0.2, rel=1e-4)


def test_independent_noise_stays():
    x, noise = batch(5)
    assert Independent()(x, noise, torch.arange(5)) is noise
    assert decode(encode(replace(OT, over="world"))) == MinibatchOT(over="world")
