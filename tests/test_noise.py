"""Streams of random numbers: one per sample, whatever the batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.noise import PURPOSE, NoiseStream, dropout_stream, permutation, philox, step_seed
from fewstep.types import FewstepError

CPU = torch.device("cpu")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**32), min_size=0, max_size=12), st.integers(0, 12), st.integers(0, 9))
def test_image_137_is_the_same_in_any_batch(others, place, draw):
    stream = NoiseStream(3)
    alone = stream.normal([137], (2, 3), draw)[0]
    batch = [*others[:place], 137, *others[place:]]
    assert torch.equal(stream.normal(batch, (2, 3), draw)[batch.index(137)], alone)
    assert stream.labels(batch, 1000)[batch.index(137)] == stream.labels([137], 1000)[0]


def test_seeds_draws_indices_and_purposes_are_different_streams():
    keys = [
        (seed, purpose, index, draw)
        for seed in (0, 1)
        for purpose in PURPOSE
        for index in (0, 1, 2**40)
        for draw in (0, 1)
    ]
    firsts = {philox(*key).integers(2**63) for key in keys}
    assert len(firsts) == len(keys) == 2 * len(PURPOSE) * 3 * 2
    assert len(set(PURPOSE.values())) == len(PURPOSE)


def test_neighbouring_streams_do_not_overlap():
    # a stream of a million numbers and its neighbours in every word of the counter share no block
    blocks = [philox(0, "noise", i, d).integers(2**63, size=100_000) for i, d in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert len(np.unique(np.concatenate(blocks))) == 400_000


def test_noise_is_standard_normal_within_and_across_samples():
    x = NoiseStream(0).normal(range(2000), (50,))
    assert x.dtype == torch.float32
    n, wide = x.numel(), 5.0  # standard errors
    assert abs(x.mean()) < wide / math.sqrt(n)
    assert abs(x.square().mean() - 1) < wide * math.sqrt(2 / n)
    assert abs(x.pow(3).mean()) < wide * math.sqrt(15 / n)
    assert abs(x.pow(4).mean() - 3) < wide * math.sqrt(96 / n)
    assert abs((x[:-1] * x[1:]).mean()) < wide / math.sqrt(n)  # neighbours are independent
    assert abs((x[:, :-1] * x[:, 1:]).mean()) < wide / math.sqrt(n)
    other = NoiseStream(0).normal(range(2000), (50,), draw=1)
    assert abs((x * other).mean()) < wide / math.sqrt(n)


def test_labels_are_uniform():
    counts = torch.bincount(NoiseStream(5).labels(range(5000), 10), minlength=10)
    assert len(counts) == 10
    assert ((counts - 500).abs() < 5 * math.sqrt(5000 * 0.09)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(0, 300))
def test_permutation_is_a_permutation_and_a_pure_function(seed, epoch, n):
    order = permutation(seed, epoch, n)
    assert torch.equal(order.sort().values, torch.arange(n))
    assert torch.equal(order, permutation(seed, epoch, n))
    if n > 50:
        assert not torch.equal(order, permutation(seed, epoch + 1, n))
        assert not torch.equal(order, permutation(seed + 1, epoch, n))


def test_step_seeds_are_different_for_every_step_seed_and_purpose():
    seeds = {
        step_seed(seed, nimg, purpose)
        for seed in range(3)
        for nimg in range(0, 6400, 64)
        for purpose in ("step", "flip")
    }
    assert len(seeds) == 600
    assert all(0 <= s < 2**63 for s in seeds)


def test_the_numbers_are_the_format():
    """A numpy that draws other numbers changes every published figure: then these values must be changed on purpose."""
    assert NoiseStream(0).normal([137], (3,))[0].tolist() == pytest.approx([-1.5065, -0.0999, -0.7377], abs=5e-5)
    assert NoiseStream(7).normal([137], (3,), draw=1)[0].tolist() == pytest.approx([-0.3751, 1.1260, -1.2942], abs=5e-5)
    assert NoiseStream(0).labels([0, 1, 2, 137], 10).tolist() == [9, 0, 9, 8]
    assert permutation(3, 1, 8).tolist() == [0, 5, 6, 1, 2, 4, 7, 3]
    assert step_seed(0, 0) == 8007737062876837280
    assert step_seed(0, 0, "flip") == 7217269280714015098


def test_a_negative_seed_is_refused():
    with pytest.raises(FewstepError, match="a seed must be 0 or more, got -1"):
        NoiseStream(-1)


def test_no_samples_are_an_empty_batch():
    assert NoiseStream(0).normal([], (3, 4)).shape == (0, 3, 4)
    assert NoiseStream(0).labels([], 10).shape == (0,)


def test_global_generators_are_never_touched():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    NoiseStream(0).normal([1, 2], (3,))
    NoiseStream(0).labels([1, 2], 3)
    permutation(0, 0, 10)
    step_seed(0, 0)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_dropout_streams_of_one_seed_draw_the_same_masks_and_of_two_seeds_others():
    def mask(seed):
        with dropout_stream(seed, CPU):
            return torch.nn.functional.dropout(torch.ones(64), 0.5)

    assert torch.equal(mask(1), mask(1))
    assert not torch.equal(mask(1), mask(2))


def test_dropout_stream_leaves_the_global_state_bit_identical_even_after_an_exception():
    before = torch.get_rng_state()
    with dropout_stream(1, CPU):
        torch.rand(10)
    assert torch.equal(before, torch.get_rng_state())

    def interrupted():
        with dropout_stream(1, CPU):
            torch.rand(10)
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert torch.equal(before, torch.get_rng_state())


def test_nested_dropout_streams_continue_where_they_were():
    with dropout_stream(1, CPU):
        whole = torch.rand(4)
    with dropout_stream(1, CPU):
        first = torch.rand(2)
        with dropout_stream(2, CPU):
            torch.rand(7)
        rest = torch.rand(2)
    assert torch.equal(whole, torch.cat([first, rest]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_dropout_is_shared_on_cuda_and_the_other_streams_are_untouched():
    device, ones = torch.device("cuda"), torch.ones(1000, device="cuda")
    before = torch.cuda.get_rng_state(), torch.get_rng_state()
    masks = []
    for seed in (5, 5, 6):
        with dropout_stream(seed, device):
            masks.append(torch.nn.functional.dropout(ones, 0.5))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
