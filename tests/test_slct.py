"""sLCT, CD and TCM: the spec's numbers computed again, and what each part must do."""

import math
from dataclasses import replace
from itertools import islice

import pytest
import torch

from fewstep import codec, recipes
from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import MLP, Architecture, UNet
from fewstep.noise import step_seed
from fewstep.objectives import (
    EDM,
    Cauchy,
    Consistency,
    DimensionScale,
    GemanMcClure,
    Independent,
    IntervalScale,
    KarrasGrid,
    LowestOf,
    MinibatchOT,
    Networks,
    PseudoHuber,
    ResidualScale,
    Truncated,
)
from fewstep.ode import Heun
from fewstep.progress import Constant, Doubling, Progress
from fewstep.recipe import Recipe
from fewstep.recipes.slct import PARTS, without
from fewstep.run import train
from fewstep.training import TrainState, running, training_steps
from fewstep.types import FewstepError

DIM = 4 * 32 * 32


def stage(s: int) -> Progress:
    """A moment of stage s of the seven from 10 to 640."""
    return Progress(1000 * s + 500, 7000)


# ------------------------------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize(
    ("s", "n", "c"),
    [(0, 10, 0.03456), (1, 20, 0.013635), (2, 40, 0.0061444), (3, 80, 0.0027688), (4, 160, 0.0012477),
     (5, 320, 0.00056225), (6, 640, 0.00025336)],
)  # fmt: skip
def test_the_table_of_c(s, n, c):
    assert Doubling(10, 640)(stage(s)) == n
    assert IntervalScale()(DIM, stage(s)) == pytest.approx(c, rel=5e-5)


def test_cauchy_over_the_sum_with_sqrt_d_times_c_is_cauchy_over_the_mean():
    a, b = torch.randn(2, 5, 4, 8, 8, dtype=torch.float32)
    mean, total = Cauchy(0.02, over="mean"), Cauchy(0.02 * math.sqrt(256), over="sum")
    torch.testing.assert_close(mean(a, b), total(a, b))


def test_robust_distances_are_their_formulas_and_quadratic_at_first():
    a, b = torch.zeros(4, 3), torch.tensor([0.0, 1e-3, 1.0, 1e3])[:, None].repeat(1, 3)
    m, c = b[:, 0].double() ** 2, 0.1
    torch.testing.assert_close(Cauchy(c)(a, b).double(), torch.log(1 + m / (2 * c**2)), rtol=1e-5, atol=0)
    torch.testing.assert_close(GemanMcClure(c)(a, b).double(), 2 * m / (m + 4 * c**2), rtol=1e-5, atol=0)
    for distance in (Cauchy(c), GemanMcClure(c)):  # both are m / (2 c^2) where m << c^2 (arXiv:1701.03077)
        assert distance(a, b)[1].item() == pytest.approx(m[1].item() / (2 * c**2), rel=1e-3)
    assert GemanMcClure(c)(a, b)[3] == pytest.approx(2.0, abs=1e-6)


def test_an_outlier_pulls_less_under_cauchy_than_under_pseudo_huber_and_least_under_geman_mcclure():
    def pull(distance, size):
        a = torch.full((1, 1), size, requires_grad=True)
        return torch.autograd.grad(distance(a, torch.zeros(1, 1)).sum(), a)[0].item()

    c = 0.1
    share = {d: pull(d, 10.0) / pull(d, 0.01) for d in (PseudoHuber(c), Cauchy(c), GemanMcClure(c))}
    assert share[PseudoHuber(c)] > 5 * share[Cauchy(c)] > 25 * share[GemanMcClure(c)]


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_scales_refuse_what_is_no_scale(bad):
    for make in (Cauchy, GemanMcClure, DimensionScale, ResidualScale):
        with pytest.raises(FewstepError, match="positive"):
            make(bad)
    with pytest.raises(FewstepError, match="half-life"):
        ResidualScale(half_life_nimg=0)


def test_the_residual_scale_follows_what_was_measured():
    scale = ResidualScale(factor=2.0)
    assert scale(100, Progress(0, 10)) == pytest.approx(0.0054)
    assert scale(100, Progress(5, 10, residual=0.3)) == pytest.approx(0.6)
    assert scale(100, Progress(5, 10, residual=0.0)) > 0


def test_the_running_residual_is_a_geometric_mean_with_a_half_life():
    assert running(None, math.log(0.5), 0.1) == pytest.approx(0.5)
    assert running(4.0, math.log(1.0), 1.0) == pytest.approx(2.0)  # one half-life: half way in logarithms
    value = 1.0
    for _ in range(200):
        value = running(value, math.log(0.01), 0.1)
    assert value == pytest.approx(0.01, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------- masks


def test_the_lowest_quarter_of_640_intervals_ends_at_0170():
    mask, grid = LowestOf(KarrasGrid(Doubling(10, 640)), 0.25), KarrasGrid(Doubling(10, 640))
    assert mask.sigma(stage(6)) == pytest.approx(0.170, abs=5e-4)
    t = grid(stage(6)).float()[1:]  # t = sigma_{i+1}
    selected = mask(t, t, stage(6))
    assert selected.tolist() == [i < 160 for i in range(640)]


def test_the_denoising_term_is_zero_where_nothing_is_selected():
    objective = recipes.recipe("slct").objective
    x = torch.randn(8, 2)
    nets = Networks(Architecture(MLP(width=8), (2,), sigma_min=0.002).build())
    draw = objective.draw(x, stage(6), 3)
    high = replace(draw, t=torch.full((8,), 5.0), share=objective.shares(torch.full((8,), 5.0), draw.r, stage(6)))
    losses = objective.losses(nets, x, None, high, stage(6))
    assert losses["denoising"].tolist() == [0.0] * 8
    assert losses["consistency"].isfinite().all()


def test_the_denoising_term_is_5_times_the_mean_over_the_selected():
    objective = recipes.recipe("slct").objective
    x, progress = 0.5 * torch.randn(512, 2), stage(6)
    nets = Networks(Architecture(MLP(width=8), (2,), sigma_min=0.002).build())
    draw = replace(objective.draw(x, progress, 3), dropout_seed=0)
    found = objective.losses(nets, x, None, draw, progress)["denoising"].mean()
    low = draw.t <= 0.17
    assert 0 < low.sum() < 512
    x_t = x + draw.t[:, None] * draw.noise
    square = (nets.online(x_t, draw.t) - x).square().mean(1) * (1 / draw.t**2 + 4)
    torch.testing.assert_close(found, 5 * square[low].mean())


# --------------------------------------------------------------------------------------------------------------- parts


def test_slct_without_its_five_parts_is_ilct_with_c_on_the_mean():
    plain = recipes.recipe("slct", "celebahq256")
    for part in PARTS:
        plain = without(plain, part)
    baseline = recipes.recipe("ilct", "celebahq256")
    for own in ("objective", "network", "optimizer", "lr", "total_nimg", "batch_size", "sigma_min", "averages"):
        assert getattr(plain, own) == getattr(baseline, own), own


@pytest.mark.parametrize("part", PARTS)
def test_each_part_can_be_left_out_alone(part):
    whole = recipes.recipe("slct", "digits")
    less = recipes.without("slct", whole, part)
    changed = {
        "cauchy": isinstance(less.objective.terms["consistency"].distance, Cauchy),
        "denoising": "denoising" in less.objective.terms,
        "ot": isinstance(less.objective.coupling, MinibatchOT),
        "adaptive-c": isinstance(less.objective.terms["consistency"].distance.c, IntervalScale),
        "nsln": less.network.norm == "nonscaling-layer",
    }
    assert changed == {name: name != part for name in PARTS}
    assert codec.decode(codec.encode(less)) == less


def test_an_unknown_part_and_a_method_without_parts_are_refused():
    with pytest.raises(FewstepError, match="choose from cauchy"):
        without(recipes.recipe("slct"), "dropout")
    with pytest.raises(FewstepError, match="no parts"):
        recipes.without("ect", recipes.recipe("ect"), "ot")


def test_a_scale_or_mask_of_another_grid_is_refused():
    slct = recipes.recipe("slct")
    term = slct.objective.terms["consistency"]
    other = replace(term, distance=Cauchy(IntervalScale(Doubling(10, 320))))
    with pytest.raises(FewstepError, match=r"distance\.c\.intervals"):
        replace(slct, objective=replace(slct.objective, terms={**slct.objective.terms, "consistency": other}))
    term = replace(slct.objective.terms["denoising"], where=LowestOf(KarrasGrid(Doubling(10, 320))))
    with pytest.raises(FewstepError, match=r"where\.grid"):
        replace(slct, objective=replace(slct.objective, terms={**slct.objective.terms, "denoising": term}))


def test_transport_within_classes_is_for_conditional_recipes():
    slct = recipes.recipe("slct")
    coupled = replace(slct.objective, coupling=MinibatchOT(by_class="always"))
    with pytest.raises(FewstepError, match="--conditional"):
        replace(slct, objective=coupled)
    assert replace(slct, objective=coupled, conditional=True).objective == coupled


# ------------------------------------------------------------------------------------------------------------ training


def toy(**changes) -> Recipe:
    """sLCT on points of the plane."""
    slct = recipes.recipe("slct")
    return replace(
        slct,
        network=MLP(width=16),
        data=DataSpec("digits"),
        total_nimg=6_400,
        batch_size=64,
        lr=replace(slct.lr, peak=1e-3),
        averages=(ConstantEMA(0.9),),
        **changes,
    )


def following(recipe: Recipe) -> Recipe:
    """The recipe with c from the measured residual."""
    term = recipe.objective.terms["consistency"]
    terms = {**recipe.objective.terms, "consistency": replace(term, distance=Cauchy(ResidualScale(half_life_nimg=128)))}
    return replace(recipe, objective=replace(recipe.objective, terms=terms))


def feed(recipe: Recipe, start: int = 0):
    k = start
    while True:
        generator = torch.Generator().manual_seed(k)
        yield 0.5 * torch.randn(recipe.batch_size, 2, generator=generator), None
        k += 1


def points(stored, seed, nimg, rank=0, world=1):
    return stored


def test_a_run_whose_c_follows_the_residual_resumes_to_the_bit():
    recipe = following(toy())
    architecture = Architecture(MLP(width=16), (2,), 0, 0.5, 0.002)
    whole = TrainState.create(recipe, architecture, torch.device("cpu"))
    steps = list(islice(training_steps(whole, recipe, feed(recipe), prepare=points), 8))
    first = TrainState.create(recipe, architecture, torch.device("cpu"))
    list(islice(training_steps(first, recipe, feed(recipe), prepare=points), 5))
    saved = {name: t.clone() for name, t in first.tensors().items()}
    second = TrainState.create(recipe, architecture, torch.device("cpu"))
    second.load_tensors(saved)
    second.nimg = first.nimg
    rest = list(islice(training_steps(second, recipe, feed(recipe, 5), prepare=points), 3))
    assert [s.losses for s in rest] == [s.losses for s in steps[5:]]
    assert second.residual == whole.residual
    assert steps[-1].notes["residual"] == whole.residual
    assert all(torch.equal(t, second.tensors()[name]) for name, t in whole.tensors().items())


def test_the_measured_residual_is_the_one_of_the_networks():
    recipe = following(toy())
    state = TrainState.create(recipe, Architecture(MLP(width=16), (2,), 0, 0.5, 0.002), torch.device("cpu"))
    x = next(feed(recipe))[0]
    draw = recipe.objective.draw(x, Progress(0, 6_400), step_seed(0, 0))
    pair = recipe.objective.pair(Networks(state.model), x, None, draw, Progress(0, 6_400))
    expected = (pair.denoised_t - pair.denoised_r).square().mean(1).sqrt().log().mean().exp().item()
    next(training_steps(state, recipe, feed(recipe), prepare=points))
    assert state.residual == pytest.approx(expected, rel=1e-5)


def test_microbatches_measure_the_same_residual_and_gradient():
    found = []
    for size in (None, 16):
        recipe = following(toy(microbatch=size))
        state = TrainState.create(recipe, Architecture(MLP(width=16), (2,), 0, 0.5, 0.002), torch.device("cpu"))
        step = next(training_steps(state, recipe, feed(recipe), prepare=points))
        found.append((state.residual, step.gradient_norm))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_coupled_batches_are_drawn_ahead_and_cost_less_transport():
    recipe = toy()
    state = TrainState.create(recipe, Architecture(MLP(width=16), (2,), 0, 0.5, 0.002), torch.device("cpu"))
    steps = list(islice(training_steps(state, recipe, feed(recipe), prepare=points), 4))
    assert all(0 < step.notes["transport"] < 0.7 for step in steps)
    plain = replace(recipe, objective=replace(recipe.objective, coupling=Independent()))
    state = TrainState.create(plain, Architecture(MLP(width=16), (2,), 0, 0.5, 0.002), torch.device("cpu"))
    step = next(training_steps(state, plain, feed(plain), prepare=points))
    assert "transport" not in step.notes


def test_a_feed_that_ends_ends_the_steps():
    for recipe in (toy(), replace(toy(), objective=replace(toy().objective, coupling=Independent()))):
        state = TrainState.create(recipe, Architecture(MLP(width=16), (2,), 0, 0.5, 0.002), torch.device("cpu"))
        assert len(list(training_steps(state, recipe, list(islice(feed(recipe), 3)), prepare=points))) == 3


# ---------------------------------------------------------------------------------------------------------- CD and TCM


def test_the_target_of_cd_lies_one_heun_step_of_the_teacher_away():
    objective, progress = recipes.recipe("cd").objective, Progress(0, 10)
    student = Architecture(MLP(width=8), (2,), 0, 0.5, 0.002).build(0)
    teacher = Architecture(MLP(width=8), (2,)).build(1)
    for p in (*student.parameters(), *teacher.parameters()):
        p.requires_grad_(False).add_(0.1)
    x = 0.5 * torch.randn(16, 2)
    draw = objective.draw(x, progress, 5)
    pair = objective.pair(Networks(student, None, teacher), x, None, draw, progress)
    x_t = x + draw.t[:, None] * draw.noise
    torch.testing.assert_close(pair.denoised_r, student(Heun()(teacher, x_t, draw.t, draw.r), draw.r))


def digits(name: str, **changes) -> Recipe:
    small = {"total_nimg": 64, "batch_size": 16, "snapshot_nimg": 32, "grid_nimg": 0, "log_nimg": 16}
    recipe = recipes.recipe(name, "digits")
    return replace(recipe, evaluation=replace(recipe.evaluation, every_nimg=0), **{**small, **changes})


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "edm"
    train(digits("edm"), out, device="cpu", quiet=True)
    return out


def test_cd_keeps_its_teacher_and_resumes_without_init(diffusion, tmp_path):
    from fewstep.model import load

    recipe = digits("cd")
    start = load(diffusion)
    train(recipe, tmp_path / "whole", init=start, device="cpu", quiet=True)
    train(replace(recipe, total_nimg=64), tmp_path / "part", init=start, device="cpu", quiet=True)
    assert load(tmp_path / "part" / "teacher.safetensors").sha256 == start.sha256
    again = train(recipe, tmp_path / "part", resume=True, device="cpu", quiet=True)
    assert again.progress()["nimg"] == 64
    assert load(tmp_path / "whole:online").sha256 == load(tmp_path / "part:online").sha256
    moved = load(tmp_path / "whole").denoiser.state_dict()
    assert any(not torch.equal(t, moved[name]) for name, t in start.denoiser.state_dict().items())


def test_a_model_of_the_wrong_kind_is_no_start(diffusion, tmp_path):
    from fewstep.model import load

    with pytest.raises(FewstepError, match="is a diffusion model"):  # TCM's second stage without a first one
        train(digits("tcm"), tmp_path / "tcm", init=load(diffusion), device="cpu", quiet=True)
    train(digits("ect"), tmp_path / "ect", init=load(diffusion), device="cpu", quiet=True)
    with pytest.raises(FewstepError, match="is a consistency model"):
        train(digits("cd"), tmp_path / "cd", init=load(tmp_path / "ect"), device="cpu", quiet=True)
    assert not (tmp_path / "tcm").exists()


@pytest.mark.parametrize("name", ["cd", "tcm"])
def test_methods_that_cannot_start_from_nothing_say_so(name, tmp_path):
    with pytest.raises(FewstepError, match="--init"):
        train(digits(name), tmp_path / "run", device="cpu", quiet=True)


def test_tcm_stage_two_trains_only_above_the_boundary(diffusion, tmp_path):
    from fewstep.model import load
    from fewstep.train_cli import inherit

    train(digits("ect"), tmp_path / "ect", init=load(diffusion), device="cpu", quiet=True)
    first = load(tmp_path / "ect")
    recipe = inherit(digits("tcm", lr=replace(recipes.recipe("tcm").lr, peak=1e-2)), first)
    train(recipe, tmp_path / "tcm", init=first, device="cpu", quiet=True)
    second = load(tmp_path / "tcm")
    x, label = torch.randn(6, 1, 8, 8), torch.arange(6)
    low, high = torch.tensor([0.01, 0.3, 0.999, 0.5, 0.1, 0.7]), torch.tensor([1.0, 2.0, 80.0, 5.0, 30.0, 1.5])
    with torch.no_grad():
        torch.testing.assert_close(second(x, low, label), first(x, low, label))
        assert (second(x, high, label) - first(x, high, label)).abs().amax((1, 2, 3)).min() > 0
    assert inherit(recipe, second).network == recipe.network  # its own second stage goes on
    with pytest.raises(FewstepError, match="truncated"):
        inherit(digits("ect"), second)


def test_tcm_draws_a_quarter_at_the_boundary_and_the_rest_above_it():
    pairs = recipes.recipe("tcm").objective.pairs
    assert isinstance(pairs, Truncated)
    t, r = pairs(20_000, Progress(0, 10), torch.Generator().manual_seed(0))
    assert (t == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert ((t >= 1) & (t <= 80)).all()
    assert ((r > 0) & (r <= 0.999 * t * (1 + 1e-6))).all()
    terms = recipes.recipe("tcm").objective.terms
    shares = recipes.recipe("tcm").objective.shares(t, r, Progress(0, 10))
    assert ((shares["consistency"] > 0) ^ (shares["boundary"] > 0)).all()
    assert terms["boundary"].scale == 0.1
    assert isinstance(terms["boundary"], Consistency)


def test_the_log_student_law_is_its_quantile():
    from scipy import stats

    law = recipes.recipe("tcm").objective.pairs.times
    u = torch.linspace(0.01, 0.99, 33)
    t = law.quantile(u, 1.0, 80.0)
    student = stats.t(0.01, scale=0.2)
    share = (student.cdf(t.double().log().numpy()) - 0.5) / (student.cdf(math.log(80)) - 0.5)
    torch.testing.assert_close(torch.from_numpy(share).float(), u, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- adaptive times


@pytest.mark.parametrize("name", ["edm", "ect", "ict", "slct", "tcm"])
def test_every_law_of_times_takes_quantiles(name):
    pairs, progress = recipes.recipe(name).objective.pairs, Progress(50, 100)
    generator = torch.Generator().manual_seed(0)
    u = torch.linspace(0.001, 0.999, 4_000)
    t, r = pairs(4_000, progress, generator, u)
    free, _ = pairs(4_000, progress, torch.Generator().manual_seed(1))
    assert (r < t).all()
    if name != "tcm":  # a random quarter of it lies at the boundary
        assert (t.diff() >= 0).all()
    for q in (0.3, 0.5, 0.7, 0.9):
        assert t.log().quantile(q).item() == pytest.approx(free.log().quantile(q).item(), abs=0.25)


def test_a_term_is_the_mean_over_its_samples_weighted_by_importance():
    objective, progress = recipes.recipe("slct").objective, stage(6)
    draw = objective.draw(torch.randn(64, 2), progress, 1)
    u, importance = torch.rand(64), torch.rand(64)
    new = objective.retimed(draw, u, importance, progress, 1)
    plain = objective.retimed(draw, u, torch.ones(64), progress, 1)
    assert torch.equal(new.noise, draw.noise)
    for name, term in objective.terms.items():
        chosen, values = term.where(new.t, new.r, progress), torch.rand(64)
        expected = (importance * values)[chosen].sum() / importance[chosen].sum()
        torch.testing.assert_close((new.share[name] * values).mean(), expected)
        torch.testing.assert_close(plain.share[name], objective.shares(new.t, new.r, progress)[name])


@pytest.mark.parametrize("law", ["variance", "learned"])
def test_a_run_with_learned_times_resumes_to_the_bit(law):
    from fewstep.timesteps import Learned, LossVariance

    recipe = toy(timesteps=LossVariance(bins=8, weighted=True) if law == "variance" else Learned(interval=2))
    architecture = Architecture(MLP(width=16), (2,), 0, 0.5, 0.002)
    whole, first, second = (TrainState.create(recipe, architecture, torch.device("cpu")) for _ in range(3))
    list(islice(training_steps(whole, recipe, feed(recipe), prepare=points), 8))
    list(islice(training_steps(first, recipe, feed(recipe), prepare=points), 5))
    second.load_tensors({name: t.clone() for name, t in first.tensors().items()})
    second.nimg = first.nimg
    list(islice(training_steps(second, recipe, feed(recipe, 5), prepare=points), 3))
    flat = second.tensors()
    assert any(name.startswith("timesteps/") for name in flat)
    assert all(torch.equal(t, flat[name]) for name, t in whole.tensors().items())
    plain = replace(recipe, timesteps=None)
    other = TrainState.create(plain, architecture, torch.device("cpu"))
    list(islice(training_steps(other, plain, feed(plain), prepare=points), 8))
    assert not torch.equal(other.tensors()["model/network.first.weight"], flat["model/network.first.weight"])


def test_the_edm_weighting_of_the_denoising_term_follows_sigma_data():
    recipe = recipes.recipe("slct")
    with pytest.raises(FewstepError, match="sigma-data"):
        replace(recipe, sigma_data=1.0)
    assert recipe.objective.terms["denoising"].weighting == EDM(0.5)


def test_a_target_decay_is_allowed_with_a_coupling():
    recipe = toy(target_decay=Constant(0.5))
    state = TrainState.create(recipe, Architecture(MLP(width=16), (2,), 0, 0.5, 0.002), torch.device("cpu"))
    assert next(training_steps(state, recipe, feed(recipe), prepare=points)).problem == ""


def test_the_network_of_slct_has_no_group_norm():
    network = recipes.recipe("slct", "digits").network
    assert isinstance(network, UNet)
    built = network.build((1, 8, 8), 10)
    assert not any(isinstance(m, torch.nn.GroupNorm) for m in built.modules())
