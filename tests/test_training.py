"""The training loop: a step is a function of (state, seed, images seen), however it is cut into parts."""

import copy
import math
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch
from torch import Tensor

from fewstep.data import BatchOrder, DataSpec, batches, open_images, to_float
from fewstep.data.prepare import Pixels
from fewstep.ema import Average, ConstantEMA, PowerEMA
from fewstep.networks import MLP, Architecture, EDMUNet, UNet
from fewstep.noise import step_seed
from fewstep.objectives import (
    EDM,
    Below,
    Consistency,
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
)
from fewstep.progress import Constant, LearningRate, Progress, SquareRoot, TargetDecay
from fewstep.recipe import Optimizer, Recipe
from fewstep.recipes.ct import objective as ct_objective
from fewstep.recipes.edm import objective as edm_objective
from fewstep.training import TrainState, find_cause, training_steps
from fewstep.types import FewstepError

CPU = torch.device("cpu")
SMALL = MLP(16, 2)
CONV = EDMUNet(channels=8, multipliers=(1,), blocks=1, attention=(), dropout=0.0, augment_dim=0)

# A consistency term everywhere and a denoising term on the part of the batch below sigma = 1 (4 of 10, about).
TWO_TERMS = PairObjective(
    pairs=GridPairs(KarrasGrid(Constant(20.0)), density=LogNormal(-0.5, 1.0)),
    terms={
        "consistency": Consistency(distance=PseudoHuber(c=0.03), weighting=InverseGap()),
        "denoising": Denoising(distance=SquaredL2("mean"), weighting=EDM(), where=Below(0.6), scale=5.0),
    },
)


def recipe(**changes):
    """A recipe of 8 tiny images a step."""
    plain = Recipe(
        name="test", objective=TWO_TERMS, network=SMALL, total_nimg=800, batch_size=8, averages=(),
        lr=LearningRate(1e-3), optimizer=Optimizer("adam"),
    )  # fmt: skip
    return replace(plain, **changes)


def pictures(n=8, shape=(1, 8, 8), seed=0):
    return torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def feed(r, classes=0):
    """Batch k of a run is a function of k."""
    k = 0
    while True:
        x = pictures(r.batch_size, seed=k)
        yield x, torch.arange(r.batch_size) % classes if classes else None
        k += 1


def begin(r, classes=0, shape=(1, 8, 8)):
    return TrainState.create(r, Architecture(r.network, shape, classes, r.sigma_data, r.sigma_min), CPU)


def run(r, steps, classes=0, state=None):
    """The state after so many steps, and those steps."""
    state = state or begin(r, classes)
    return state, list(islice(training_steps(state, r, feed(r, classes)), steps))


def weights(state):
    return torch.cat([p.detach().reshape(-1) for p in state.parameters().values()])


def assert_close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------- gradient accumulation


@pytest.mark.parametrize("microbatch", [1, 3, 100])
def test_accumulation_is_the_large_batch(microbatch):
    large, steps = run(recipe(network=CONV, optimizer=Optimizer("adam", eps=1e-2)), 4)
    small, parts = run(recipe(network=CONV, optimizer=Optimizer("adam", eps=1e-2), microbatch=microbatch), 4)
    assert_close(weights(small), weights(large))
    assert (weights(large) - weights(begin(recipe(network=CONV)))).abs().max() > 1e-4
    for a, b in zip(steps, parts, strict=True):
        assert a.losses == pytest.approx(b.losses, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
        assert_close(a.t, b.t, 0)
        assert_close(a.per_sample / b.per_sample, torch.ones(8), 1e-4)


def test_accumulation_of_labels_and_an_ema_target():
    r = recipe(target_decay=Constant(0.9), optimizer=Optimizer("adam", eps=1e-2))
    assert_close(weights(run(replace(r, microbatch=3), 3, classes=3)[0]), weights(run(r, 3, classes=3)[0]))


def test_a_masked_term_is_the_mean_over_the_selected_samples_of_the_whole_batch():
    """A mean over each microbatch's own selected samples would weigh them by where the batch happens to be cut."""
    r = recipe(microbatch=3)
    state = begin(r)
    model = copy.deepcopy(state.model)
    step = next(training_steps(state, r, feed(r)))
    x = to_float(pictures())
    selected = step.t <= 0.6
    assert 0 < selected.sum() < 8
    assert len({int(part.sum()) for part in selected.split(3)}) > 1  # the cuts see different numbers
    draw = TWO_TERMS.draw(x, Progress(0, 800), step_seed(r.seed, 0))
    assert_close(draw.t, step.t, 0)
    denoised = model(x + draw.t[:, None, None, None] * draw.noise, draw.t).detach()
    loss = 5 * (1 / draw.t**2 + 4) * (denoised - x).square().mean((1, 2, 3))
    assert step.losses["denoising"] == pytest.approx(loss[selected].mean().item(), rel=1e-5)


def test_microbatches_do_not_share_their_dropout_masks():
    draw = TWO_TERMS.draw(to_float(pictures()), Progress(0, 800), 1)
    assert len({draw.rows(start, start + 2).dropout_seed for start in range(0, 8, 2)}) == 4


def test_a_mask_that_selects_nothing_gives_zero_and_no_trouble():
    terms = {**TWO_TERMS.terms, "denoising": replace(TWO_TERMS.terms["denoising"], where=Below(1e-9))}
    _, steps = run(recipe(objective=replace(TWO_TERMS, terms=terms), microbatch=3), 2)
    assert [step.losses["denoising"] for step in steps] == [0, 0]
    assert not any(step.problem for step in steps)


# --------------------------------------------------------------------------------------------------------- a step


def test_a_step_is_this_and_no_more():
    """Forward, backward, Adam, average, written out once more for one step of EDM."""
    r = recipe(
        network=CONV, objective=edm_objective(), averages=(ConstantEMA(0.5),), lr=LearningRate(1e-2, warmup_nimg=16)
    )
    state, _ = run(r, 1)  # lr is 0 in the first step of a warm-up
    assert_close(weights(state), weights(begin(r)), 0)
    before = copy.deepcopy(state)
    steps = training_steps(state, r, islice(feed(r), 1, None))
    step = next(steps)
    assert (step.nimg, step.lr, step.problem) == (16, 0.005, "")
    loss = r.objective(
        Networks(before.model), to_float(pictures(seed=1)), None, Progress(8, 800), seed=step_seed(r.seed, 8)
    )["denoising"]  # fmt: skip
    assert step.losses == {"denoising": pytest.approx(loss.item(), rel=1e-5)}
    loss.backward()
    before.optimizer.param_groups[0]["lr"] = 0.005
    before.optimizer.step()
    assert_close(weights(state), weights(before), 1e-7)
    for name, p in state.parameters().items():
        assert_close(state.averages["ema-0.5"].weights[name], (begin(r).parameters()[name] + p) / 2)


def test_training_depends_on_the_seed_and_on_no_global_state():
    torch.manual_seed(1)
    a, _ = run(recipe(network=replace(CONV, dropout=0.5)), 2)
    torch.manual_seed(2)
    drawn = torch.get_rng_state()
    b, _ = run(recipe(network=replace(CONV, dropout=0.5)), 2)
    assert torch.equal(torch.get_rng_state(), drawn)
    c, _ = run(recipe(network=replace(CONV, dropout=0.5), seed=1), 2)
    assert torch.equal(weights(a), weights(b))
    assert not torch.allclose(weights(a), weights(c))


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_weights_gradients_and_losses_are_float32_in_every_precision(precision):
    r = recipe(network=CONV, precision=precision, averages=(ConstantEMA(0.9),))
    state, steps = run(r, 2)
    exact, _ = run(recipe(network=CONV), 2)
    assert {t.dtype for name, t in state.tensors().items()} == {torch.float32}
    assert {p.grad.dtype for p in state.parameters().values() if p.grad is not None} == {torch.float32}
    for step in steps:
        assert step.per_sample.dtype == torch.float32
        assert math.isfinite(step.gradient_norm)
        assert all(map(math.isfinite, step.losses.values()))
    same = torch.equal(weights(state), weights(exact))
    assert same == (precision != "bf16")  # bf16 did something
    assert_close(weights(state), weights(exact), 1e-2)


def test_the_loss_decreases_on_digits():
    images = open_images(DataSpec()).split("train", 0.1)
    net = UNet(channels=8, multipliers=(1,), layers=1, attention=(), head_dim=8, norm_groups=4)
    r = recipe(
        objective=edm_objective(),
        network=net,
        batch_size=32,
        total_nimg=32 * 60,
        lr=LearningRate(3e-3),
        microbatch=None,
    )
    state, order = begin(r, 10), BatchOrder(len(images), 0)
    source = batches(images, order, 0, 32)
    losses = [step.losses["denoising"] for step in islice(training_steps(state, r, source), 60)]
    source.close()
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


# ------------------------------------------------------------------------------------------------- flips, averages


def test_a_flip_depends_on_the_seed_and_the_images_number_only():
    stored, flip = pictures(64), Pixels(flip=True)
    x, a = to_float(stored), flip(stored, 3, 640)
    flipped = torch.tensor([not torch.equal(u, v) for u, v in zip(a, x, strict=True)])
    assert 15 < flipped.sum() < 49
    assert torch.equal(a[flipped], x.flip(-1)[flipped])
    y = to_float(pictures(64, seed=9))
    other = flip(pictures(64, seed=9), 3, 640)
    assert torch.equal(other, torch.where(flipped[:, None, None, None], y.flip(-1), y))
    for seed, nimg in ((4, 640), (3, 704)):
        assert not torch.equal(flip(stored, seed, nimg), a)


def test_flips_of_two_ranks_are_those_of_one():
    stored, flip = pictures(8), Pixels(flip=True)
    both = [flip(half, 0, 0, rank, 2) for rank, half in enumerate(stored.split(4))]
    assert torch.equal(torch.cat(both), flip(stored, 0, 0))


def test_flipping_happens_only_if_asked_and_only_to_x():
    plain, flipped = recipe(), recipe(data=DataSpec(flip=True))
    a, b = run(plain, 1)[1][0], run(flipped, 1)[1][0]
    assert torch.equal(a.t, b.t)
    assert a.losses != b.losses


@pytest.mark.parametrize("law", [ConstantEMA(0.9), ConstantEMA(0.0), PowerEMA(0.1), PowerEMA(0.25)])
def test_an_average_is_the_sum_it_says_it_is(law):
    """From the sequence of weights: the product form of the coefficients, in float64."""
    r = recipe(averages=(law,), lr=LearningRate(1e-2))
    state = begin(r)
    history = [weights(state).double()]
    for _ in islice(training_steps(state, r, feed(r)), 6):
        history.append(weights(state).double())
    betas = [law.beta(8 * k, 8) for k in range(1, 7)]
    coefficients = [math.prod(betas)] + [(1 - b) * math.prod(betas[k + 1 :]) for k, b in enumerate(betas)]
    assert sum(coefficients) == pytest.approx(1)
    expected = sum(c * w for c, w in zip(coefficients, history, strict=True))
    found = torch.cat([w.reshape(-1) for w in state.averages[law.name].weights.values()])
    assert_close(found.double(), expected)
    if isinstance(law, PowerEMA):
        assert coefficients[0] == 0  # nothing is left of the random start
        centres = [(k - 0.5) / 6 for k in range(1, 7)]
        assert sum(c * t for c, t in zip(coefficients[1:], centres, strict=True)) == pytest.approx(
            (law.gamma + 1) / (law.gamma + 2), abs=0.06
        )


def test_cts_target_follows_mu():
    """target <- mu(k) target + (1 - mu(k)) online, mu(k) = exp(s0 ln(mu0) / N(k)) (arXiv:2303.01469, app. C)."""
    decay = TargetDecay(SquareRoot(2, 20), mu0=0.5)
    r = recipe(objective=ct_objective(2, 20), target_decay=decay, sigma_min=0.002, total_nimg=48, lr=LearningRate(1e-2))
    state = begin(r)
    target, mus = weights(state), []
    for step in islice(training_steps(state, r, feed(r)), 6):
        intervals = SquareRoot(2, 20)(Progress(step.nimg - 8, 48))
        mus.append(math.exp(2 * math.log(0.5) / (intervals + 1)))
        target = mus[-1] * target + (1 - mus[-1]) * weights(state)
        assert_close(torch.cat([p.reshape(-1) for p in state.target.parameters()]), target)
    assert mus == sorted(mus)
    assert mus[0] < 0.75 < mus[-1]
    assert not any(p.requires_grad for p in state.target.parameters())


def test_the_target_network_is_used():
    r = recipe(objective=ct_objective(2, 20), target_decay=Constant(0.99), sigma_min=0.002, lr=LearningRate(1e-2))
    with_target, without = run(r, 4)[1], run(replace(r, target_decay=None), 4)[1]
    assert with_target[0].losses == without[0].losses
    assert with_target[3].losses != without[3].losses


# ----------------------------------------------------------------------------------------------- state to and fro


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "radam"])
def test_a_state_round_trips_through_tensors_bit_for_bit(optimizer):
    r = recipe(
        optimizer=Optimizer(optimizer, weight_decay=0.01),
        averages=(ConstantEMA(0.9), PowerEMA(0.1)),
        target_decay=Constant(0.9),
    )
    whole, _ = run(r, 9)
    half, _ = run(r, 6)
    flat = {name: t.clone() for name, t in half.tensors().items()}
    other = begin(replace(r, seed=5))
    other.load_tensors(flat)
    other.nimg = half.nimg
    again = other.tensors()
    assert again.keys() == flat.keys()
    assert all(torch.equal(again[name], t) and again[name].dtype == t.dtype for name, t in flat.items())
    count = len(half.parameters())
    assert sum(name.endswith("/step") for name in flat) == count
    assert {t.item() for name, t in flat.items() if name.endswith("/step")} == {6.0}
    assert sum(name.startswith("optimizer/") for name in flat) == 3 * count
    list(islice(training_steps(other, r, islice(feed(r), 6, None)), 3))
    for name, t in whole.tensors().items():
        assert torch.equal(other.tensors()[name], t), name
    for name, t in flat.items():  # what was loaded is a copy, not an alias
        assert torch.equal(half.tensors()[name], t), name


def test_a_state_before_the_first_step_round_trips_too():
    r = recipe(averages=(ConstantEMA(0.9),))
    state, fresh = begin(replace(r, seed=7)), begin(r)
    state.load_tensors(fresh.tensors())
    run(r, 2, state=state)
    assert torch.equal(weights(state), weights(run(r, 2)[0]))


def test_start_from_sets_network_target_and_averages():
    r = recipe(averages=(ConstantEMA(0.9),), target_decay=Constant(0.9))
    origin = begin(replace(r, seed=3)).model.state_dict()
    state = begin(r)
    state.start_from(origin)
    for tensors in (state.weights("online"), state.weights("ema-0.9"), state.target.state_dict()):
        assert tensors.keys() == origin.keys()
        assert all(torch.equal(t, origin[name]) for name, t in tensors.items())
    run(r, 1, state=state)
    assert not torch.equal(state.weights("online")["network.rest.4.bias"], origin["network.rest.4.bias"])


def test_an_average_is_a_complete_state_dict_even_of_a_partly_frozen_network():
    r = recipe(averages=(ConstantEMA(0.9),))
    state = begin(r)
    frozen = next(iter(state.parameters()))
    dict(state.model.named_parameters())[frozen].requires_grad_(False)
    state.averages = {law.name: Average(law, state.parameters()) for law in r.averages}
    before = state.model.state_dict()[frozen].clone()
    run(r, 2, state=state)
    assert frozen not in state.averages["ema-0.9"].weights
    average = state.weights("ema-0.9")
    assert average.keys() == state.weights("online").keys() == state.model.state_dict().keys()
    assert torch.equal(average[frozen], before)
    assert not torch.equal(average["network.rest.4.weight"], state.weights("online")["network.rest.4.weight"])


# ------------------------------------------------------------------------------------------------------ not finite


@dataclass(frozen=True)
class Poisoned:
    """||a - b||^2, but `value` for samples whose x is brighter than a limit; or a gradient that is not finite."""

    value: float = float("nan")
    gradient_only: bool = False

    def __call__(self, a: Tensor, b: Tensor, progress: object = None, /) -> Tensor:
        m = (a - b).square().flatten(1).mean(1)
        bad = b.flatten(1).mean(1) > 0.9
        if self.gradient_only:  # sqrt has no derivative at 0
            return torch.where(bad, (m * 0).sqrt(), m)
        return m * torch.where(bad, self.value, 1.0)


def poisoned(distance=None):
    terms = {
        "good": Denoising(distance=SquaredL2("mean"), weighting=EDM()),
        "bad": Denoising(distance=distance or Poisoned(), weighting=EDM()),
    }
    return PairObjective(pairs=Diffusion(LogNormal()), terms=terms)


def poisoned_feed(at, row=5):
    for k in range(100):
        x = pictures(seed=k)
        if k == at:
            x[row] = 255
        yield x, None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_named(value, microbatch):
    r = recipe(
        objective=poisoned(Poisoned(value)),
        averages=(ConstantEMA(0.9),),
        target_decay=Constant(0.9),
        microbatch=microbatch,
    )
    state = begin(r)
    steps = training_steps(state, r, poisoned_feed(at=2))
    next(steps), next(steps)
    before = {name: t.clone() for name, t in state.tensors().items()}
    step = next(steps)
    assert all(torch.equal(state.tensors()[name], t) for name, t in before.items())
    assert (state.nimg, state.skipped, step.nimg) == (24, 1, 24)
    t = step.t[5].item()
    assert step.problem == (
        f"the bad term is {value} for 1 of 8 images after 16 images (2.0% of the run), first at t = {t:.5g}, r = 0"
    )
    assert not next(steps).problem
    assert not torch.equal(weights(state), torch.cat([before[f"model/{n}"].reshape(-1) for n in state.parameters()]))
    assert all(t.isfinite().all() for t in state.tensors().values())
    assert (state.nimg, state.skipped) == (32, 1)


def test_a_gradient_that_is_not_finite_is_named_too():
    r = recipe(objective=poisoned(Poisoned(gradient_only=True)))
    state = begin(r)
    before = weights(state).clone()
    step = next(training_steps(state, r, poisoned_feed(at=0)))
    assert step.problem.startswith("the loss is finite but the gradient of network.")
    assert math.isfinite(step.losses["bad"])
    assert torch.equal(weights(state), before)


def test_the_cause_of_another_process_is_not_blamed_on_a_gradient():
    """The gradient is summed over the processes before it is looked at, so one NaN is in everybody's."""
    draw = Draw(torch.ones(2), torch.zeros(2), torch.zeros(2, 1), {}, 0)
    fine, nan = {"a": torch.ones(2), "b": torch.ones(2)}, float("nan")
    gradients = {"w": torch.tensor([nan])}
    text = find_cause(fine, {"a": 1.0, "b": nan}, gradients, draw, Progress(8, 80))
    assert text == "the b term is nan in another process after 8 images (10.0% of the run)"
    assert "gradient of w" in find_cause(fine, {"a": 1.0, "b": 1.0}, gradients, draw, Progress(8, 80))
    own = {**fine, "b": torch.tensor([1.0, nan])}
    assert "first at t = 1, r = 0" in find_cause(own, {"a": 1.0, "b": nan}, gradients, draw, Progress(8, 80))
    overflow = find_cause(fine, {"a": 1.0, "b": 1.0}, {"w": torch.ones(1)}, draw, Progress(8, 80))
    assert "gradient's norm" in overflow


def test_recipes_that_cannot_be_are_refused():
    for change, words in [
        ({"batch_size": 0}, "--batch-size must be 1 or more"),
        ({"total_nimg": 0}, "--total-nimg"),
        ({"log_nimg": 0}, "--log-nimg"),
        ({"microbatch": 0}, "--microbatch"),
        ({"averages": (ConstantEMA(0.9), ConstantEMA(0.9))}, "same name"),
    ]:
        with pytest.raises(FewstepError, match=words):
            recipe(**change)
