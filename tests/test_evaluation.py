"""Evaluation: image i of seed s is one image however it is batched, and a number is the number computed by hand."""

import math
import os
import threading
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from fewstep import evaluation
from fewstep.data import DataSpec, open_images, to_uint8
from fewstep.environment import workers
from fewstep.evaluation import EVALUATION_SEED, SEARCH_SEED, Generator, evaluate, reference_of, search_second_sigma
from fewstep.metrics import Reference, frechet_distance, load_extractor, measure
from fewstep.metrics.statistics import Moments
from fewstep.networks import MLP, Architecture, EDMUNet
from fewstep.noise import NoiseStream
from fewstep.run import GRID_SEED
from fewstep.samplers import FewStep, Heun, few_step
from fewstep.types import FewstepError, like

SAMPLERS = [few_step(1), few_step(2), few_step(3), Heun((80.0, 5.0, 0.5))]


def denoiser(network, shape=(1, 4, 4), classes=3):
    """A network none of whose branches is zero."""
    net = Architecture(network, shape, classes).build()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
    return net.eval().requires_grad_(False)


NETWORKS = {
    "mlp": MLP(16, 2),
    "conv": EDMUNet(channels=8, multipliers=(1,), blocks=1, attention=(), dropout=0.5, augment_dim=0),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{type(s).__name__}{len(s.sigmas)}")
def test_an_image_is_the_same_at_any_batch_size_and_number(network, sampler):
    whole = Generator(denoiser(network), (1, 4, 4), 3)
    (all_of_them,) = whole(sampler, 23, seed=4)
    assert all_of_them.std() > 0.01
    for batch, num in ((1, 3), (7, 23), (23, 23), (10, 20), (5, 1)):
        cut = list(replace(whole, batch=batch)(sampler, num, seed=4))
        assert [len(part) for part in cut] == [min(batch, num - k) for k in range(0, num, batch)]
        error = (torch.cat(cut) - all_of_them[:num]).abs().max()  # the last bits of a matrix product depend on its size
        assert error <= 1e-5 * all_of_them.abs().max()
    (other,) = whole(sampler, 23, seed=5)
    assert (other - all_of_them).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_steps_of_a_sample_meet_different_noise():
    """A denoiser that returns its input shows the noise: sigma_0 z_0 + sigma_1 z_1, each of its own stream."""
    (x,) = Generator(lambda x, t, label=None, /: x, (2, 3))(FewStep((80.0, 0.5)), 6, seed=9)
    z = [torch.stack([NoiseStream(9).normal([i], (2, 3), draw)[0] for i in range(6)]) for draw in (0, 1)]
    torch.testing.assert_close(x, 80 * z[0] + 0.5 * z[1])
    assert (z[0] - z[1]).abs().mean() > 0.5


def test_labels_are_a_stream_too():
    def shown(x, t, label=None, /):
        """Each image is its label, -1 without one."""
        return torch.full_like(x, -1) if label is None else like(label.to(x.dtype), x).expand_as(x)

    def labels(batch, num, classes=10, label=None):
        images = list(Generator(shown, (2,), classes, batch=batch)(few_step(1), num, 3, label))
        return torch.cat(images)[:, 0].long()

    whole = labels(500, 200)
    assert torch.equal(labels(7, 200), whole)
    assert torch.equal(labels(7, 31), whole[:31])
    assert set(whole.tolist()) == set(range(10))
    assert labels(4, 9, label=7).tolist() == [7] * 9
    assert labels(3, 9, label=[0, 5]).tolist() == [0, 5] * 4 + [0]  # by the image's number, not its place in the batch
    assert labels(4, 9, classes=0).tolist() == [-1] * 9
    made = Generator(shown, (2,), 10).labels(NoiseStream(3), range(31), None)
    assert made.dtype == torch.int64
    assert torch.equal(made, whole[:31])


def test_generating_leaves_autograd_as_it_was():
    g = Generator(denoiser(NETWORKS["mlp"]), (1, 4, 4), 3, batch=2)
    for samples in g(few_step(1), 5):
        assert torch.is_grad_enabled()
        assert not samples.requires_grad
    stream = g(few_step(1), 5)
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("num", [0, -3])
def test_no_images_are_refused(num):
    with pytest.raises(FewstepError, match="--num must be 1 or more"):
        list(Generator(denoiser(NETWORKS["mlp"]), (1, 4, 4), 3)(few_step(1), num))


# ---------------------------------------------------------------------------------------------- batches at once


@pytest.fixture
def threads(monkeypatch):
    """threads(w): as on a CPU with w idle cores."""
    return lambda w: monkeypatch.setattr(evaluation, "workers", lambda: w)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{type(s).__name__}{len(s.sigmas)}")
def test_batches_made_at_once_are_those_made_in_turn(network, sampler, threads):
    made = Generator(denoiser(network), (1, 4, 4), 3, batch=3)
    threads(1)
    one = list(made(sampler, 20, 4, first=2))
    for w in (2, 3, 16):
        threads(w)
        several = list(made(sampler, 20, 4, first=2))
        assert [len(x) for x in several] == [3] * 6
        assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


class Meeting:
    """A denoiser whose calls wait until `parties` of them are under way; it counts them, and those at the same time."""

    def __init__(self, parties):
        self.barrier, self.lock, self.calls, self.now, self.most = threading.Barrier(parties), threading.Lock(), 0, 0, 0
        self.where = set()

    def __call__(self, x, t, label=None, /):
        with self.lock:
            self.calls, self.now, self.where = self.calls + 1, self.now + 1, self.where | {threading.get_ident()}
            self.most = max(self.most, self.now)
        self.barrier.wait(30)
        assert torch.is_inference_mode_enabled()
        with self.lock:
            self.now -= 1
        return x


def test_as_many_batches_are_made_at_once_as_cores_are_idle(threads):
    threads(3)
    before, meeting = threading.active_count(), Meeting(3)
    stream = Generator(meeting, (2,), batch=4)(few_step(1), 4 * 9)
    assert meeting.calls == 0
    next(stream)
    assert meeting.calls == 3  # no more than so many ahead of who takes them
    assert len(list(stream)) == 8
    assert (meeting.calls, meeting.most) == (9, 3)
    assert threading.active_count() == before


@dataclass(frozen=True)
class Noiseless:
    """A sampler that puts nothing on a device."""

    sigmas: tuple[float, ...] = (80.0,)
    nfe: int = 1

    def __call__(self, denoiser, noise, label=None, /):
        return denoiser(torch.zeros(4, 2), torch.ones(4), label)


@pytest.mark.parametrize(("w", "num", "device"), [(1, 36, "cpu"), (3, 4, "cpu"), (3, 36, "cuda"), (3, 36, "cpu")])
def test_one_core_one_batch_or_another_device_needs_no_threads(threads, w, num, device):
    threads(w)
    meeting, here = Meeting(1), {threading.get_ident()}
    assert len(list(Generator(meeting, (2,), 0, device, batch=4)(Noiseless(), num))) == num // 4
    assert (meeting.where == here) == ((w, num, device) != (3, 36, "cpu"))


def test_who_stops_early_leaves_no_threads(threads):
    threads(2)
    before, made = threading.active_count(), Generator(denoiser(NETWORKS["mlp"]), (1, 4, 4), 3, batch=2)
    stream = made(few_step(1), 100)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before
    for _ in made(few_step(1), 100):
        break
    assert threading.active_count() == before


def test_an_error_in_a_batch_comes_after_the_batches_before_it(threads):
    def failing(x, t, label=None, /):
        if len(x) == 1:
            raise FewstepError("the last batch")
        return x

    threads(2)
    before, stream = threading.active_count(), Generator(failing, (2,), batch=4)(few_step(1), 13)
    assert [len(next(stream)) for _ in range(3)] == [4, 4, 4]
    with pytest.raises(FewstepError, match="the last batch"):
        next(stream)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("cores", "inside", "env", "expected"),
    [(8, 1, {}, 8), (8, 2, {}, 4), (8, 3, {}, 2), (2, 4, {}, 1), (8, 2, {"LOCAL_WORLD_SIZE": "2"}, 2),
     (8, 1, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "16"}, 4), (8, 1, {"WORLD_SIZE": "16"}, 1)],
)  # fmt: skip
def test_idle_cores_are_those_that_threads_and_processes_leave(monkeypatch, cores, inside, env, expected):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: inside)
    assert workers() == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert workers() == expected
    monkeypatch.undo()  # the guard of the globals asks for the true number


# -------------------------------------------------------------------------------------------------------- numbers


@pytest.fixture(scope="module")
def digits():
    extractor = load_extractor("digits")
    images = open_images(DataSpec())
    return images, extractor, reference_of(images, extractor, "heldout", 0.1, batch=37)


def test_the_reference_is_the_split_it_names(digits):
    images, extractor, reference = digits
    part = images.split("heldout", 0.1)
    assert (reference.name, reference.n) == ("digits[heldout]", len(part))
    torch.testing.assert_close(reference.features, extractor(part.pixels(range(len(part)))), rtol=1e-5, atol=1e-5)
    whole = reference_of(images, extractor, "heldout", 0.1)
    assert whole.sha256 == reference.sha256
    assert reference_of(images, extractor, "train", 0.1).n + reference.n == len(images)


def test_evaluate_is_the_direct_computation(digits):
    _, extractor, reference = digits
    generator = Generator(denoiser(NETWORKS["conv"], (1, 8, 8), 10), (1, 8, 8), 10, batch=16)
    ticks = []
    sampler = few_step(2, 0.7)
    records = evaluate(
        generator, sampler, reference, extractor, 50, (3, 8), ("fd", "kid", "prdc"), "name", "hash", ticks.append
    )
    by_hand = {}
    for seed in (3, 8):
        (samples,) = replace(generator, batch=50)(sampler, 50, seed)
        features = extractor(to_uint8(samples))
        for name, value in measure(reference, features, ["fd", "kid", "prdc"]).items():
            by_hand.setdefault(name, []).append(value)
        moments = Moments.of(features)
        assert by_hand["fd"][-1] == pytest.approx(frechet_distance(moments, reference.moments), rel=1e-6)
    assert [r.metric for r in records] == ["fd", "kid", "precision", "recall", "density", "coverage"]
    for record in records:
        assert record.values == pytest.approx(by_hand[record.metric], rel=1e-3, abs=1e-6), record.metric
        assert record.value == pytest.approx(sum(record.values) / 2)
        assert (record.seeds, record.n, record.nfe, record.sigmas) == ((3, 8), 50, 2, (80.0, 0.7))
        assert (record.model, record.model_sha256, record.sampler) == ("name", "hash", "FewStep")
        assert (record.reference, record.reference_n) == ("digits[heldout]", reference.n)
        assert (record.extractor, record.extractor_sha256) == ("digits", extractor.sha256)
        assert record.reference_sha256 == reference.sha256
    assert ticks == [16, 16, 16, 2] * 2


def test_the_streamed_frechet_distance_is_the_stored_one(digits):
    _, extractor, reference = digits
    generator = Generator(denoiser(NETWORKS["mlp"], (1, 8, 8), 10), (1, 8, 8), 10, batch=13)
    streamed = evaluate(generator, few_step(1), reference, extractor, 60, (0, 1), ("fd",))
    stored = evaluate(generator, few_step(1), reference, extractor, 60, (0, 1), ("kid", "fd"))
    assert [r.metric for r in streamed] == ["fd"]
    assert streamed[0].values == pytest.approx(stored[1].values, rel=1e-6)
    assert streamed[0].values[0] != streamed[0].values[1]


def test_what_cannot_be_evaluated_is_refused(digits):
    _, extractor, reference = digits
    generator = Generator(denoiser(NETWORKS["mlp"], (1, 8, 8), 10), (1, 8, 8), 10)
    for num, seeds, metrics, words in [
        (1, (0,), ("fd",), "--num 2 or more"),
        (0, (0,), ("fd",), "--num 2 or more"),
        (10, (), ("fd",), "at least one seed"),
        (10, (0,), ("fid",), "unknown metric fid"),
        (10, (0,), ("fd", "fid"), "unknown metric fid"),
    ]:
        with pytest.raises(FewstepError, match=words):
            evaluate(generator, few_step(1), reference, extractor, num, seeds, metrics)
    other = Reference.of(load_extractor("pixels"), [torch.zeros(5, 1, 4, 4, dtype=torch.uint8)], "small")
    with pytest.raises(FewstepError, match="use one extractor"):
        evaluate(generator, few_step(1), other, extractor, 10)


def test_no_choice_is_made_on_noise_that_a_report_quotes():
    seeds = {SEARCH_SEED, EVALUATION_SEED, GRID_SEED}
    assert len(seeds) == 3
    assert seeds.isdisjoint(range(100))


# --------------------------------------------------------------------------------------------------------- search


@dataclass(frozen=True)
class Biased:
    """Images 0.3 z, shifted by 0.2 ln(sigma / best): exact when its last step starts from sigma = best."""

    best: float

    def __call__(self, x, t, label=None, /):
        return torch.where(
            like(t, x) > 50, torch.zeros_like(x), 0.3 * x / like(t, x) + 0.2 * like((t / self.best).log(), x)
        )


@pytest.mark.parametrize("best", [0.12, 0.821, 5.0])
def test_the_search_finds_the_best_second_sigma(best):
    """Within half of its last interval, an eighth of (60)^(1/8), but for the noise of the samples."""
    extractor = load_extractor("pixels")
    z = torch.cat(list(Generator(Biased(1.0), (1, 2, 2))(FewStep((80.0, 1.0)), 1500, seed=1)))
    reference = Reference.of(extractor, [to_uint8(z)], "real")
    ticks = []
    sigma, tried = search_second_sigma(
        Generator(Biased(best), (1, 2, 2)), reference, extractor, num=400, tick=ticks.append
    )
    interval = math.log(60) / 8 / 4
    assert abs(math.log(sigma / best)) <= interval / 2 + 0.04
    values = dict(tried)
    assert values[sigma] == min(values.values())
    assert [s for s, _ in tried] == sorted(values)
    assert 9 + 2 <= len(tried) <= 9 + 4
    assert sum(ticks) == 400 * len(tried)
    inner = [s for s in values if 0.1 <= s <= 6.0]
    assert min(inner) == 0.1 or best < 0.2
    assert max(b / a for a, b in pairwise(sorted(values))) == pytest.approx(60 ** (1 / 8), rel=1e-3)


def test_the_search_is_repeatable_and_uses_its_own_noise(digits):
    extractor = load_extractor("pixels")
    reference = Reference.of(extractor, [torch.randint(0, 256, (50, 1, 2, 2), dtype=torch.uint8)], "real")
    generator = Generator(Biased(1.0), (1, 2, 2))
    sigma, tried = search_second_sigma(generator, reference, extractor, 20, coarse=3)
    assert (sigma, tried) == search_second_sigma(generator, reference, extractor, 20, coarse=3)
    by_hand = evaluate(generator, FewStep((80.0, sigma)), reference, extractor, 20, (SEARCH_SEED,))[0]
    assert dict(tried)[sigma] == by_hand.value


@pytest.mark.parametrize("kept", [evaluation.KEPT_BYTES, 14 * 16, 0])
def test_the_search_takes_the_first_step_once_and_sees_the_samplers_own_images(kept, monkeypatch):
    """kept: bytes for all 20 images of 4 floats, for the first two batches of 7, for none."""
    monkeypatch.setattr(evaluation, "KEPT_BYTES", kept)
    extractor, first = load_extractor("pixels"), []

    def counting(x, t, label=None, /):
        first.extend([len(x)] * bool(t[0] == 80))
        return Biased(1.0)(x, t) + 0.01 * x / like(t, x)

    reference = Reference.of(extractor, [torch.randint(0, 256, (50, 1, 2, 2), dtype=torch.uint8)], "real")
    generator = Generator(counting, (1, 2, 2), batch=7)
    _, tried = search_second_sigma(generator, reference, extractor, 20, coarse=4)
    sigmas = len(tried)
    assert sum(first) == {14 * 16: 14 + 6 * sigmas, 0: 20 * sigmas}.get(kept, 20)
    for sigma, value in tried:
        assert value == evaluate(generator, FewStep((80.0, sigma)), reference, extractor, 20, (SEARCH_SEED,))[0].value


def test_the_search_refuses_what_no_sampler_takes(digits):
    generator = Generator(Biased(1.0), (1, 2, 2))
    reference = Reference.of(load_extractor("pixels"), [torch.zeros(5, 1, 2, 2, dtype=torch.uint8)], "real")
    with pytest.raises(FewstepError, match="strictly decreasing"):
        search_second_sigma(generator, reference, load_extractor("pixels"), 20, low=90.0, high=100.0)
