"""Searches: what each of them asks is a combination, depends on the costs alone, and gets where averages do not."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from fewstep.metrics import FrechetReference, Moments
from fewstep.snapshots import profiles, span
from fewstep.snapshots.search import DETERMINISTIC, EMAGrid, GreedySoup, PowerGrid, Space, normalised, searches
from fewstep.snapshots.span import Span

K = 12
NAMES = sorted(searches())


def walk(k=K, parameters=40, seed=0):
    """Weights [k, P] of a run: a decaying drift and a random walk whose noise averages would remove."""
    g = np.random.default_rng(seed)
    drift = np.exp(-np.arange(k) / k)[:, None] * g.standard_normal(parameters)
    return drift + 0.6 * g.standard_normal((k, parameters)) + 0.1 * g.standard_normal((k, parameters)).cumsum(0)


def space(weights, batch=10):
    moved = weights - weights[-1]
    return Space(tuple(range(100, 100 * len(weights) + 1, 100)), batch, moved @ moved.T)


WEIGHTS = walk()
SPACE = space(WEIGHTS)
TARGET = normalised(np.random.default_rng(5).standard_normal(K) * 0.5 + np.linspace(-0.2, 0.4, K))


def bowl(vector):
    """Squared distance of the combined weights from those of a signed vector that is no average, and a little more."""
    return float(np.square((vector - TARGET) @ WEIGHTS).sum()) + 0.1


def run(search, cost, budget, n=16, features=None):
    """Vectors [m, K] and costs [m] of the whole search."""
    vectors, costs = [], []
    while len(vectors) < budget and len(asked := search.ask(min(n, budget - len(vectors)))):
        told = np.array([cost(v) for v in asked])
        search.tell(told, [features(v) for v in asked] if features else ())
        vectors += list(asked)
        costs += told.tolist()
    return np.stack(vectors), np.array(costs)


def made(name, of=SPACE, seed=0):
    return searches()[name](of, seed)


def assert_combinations(vectors, most=np.inf):
    assert np.isfinite(vectors).all()
    off = np.abs(vectors.sum(1) - 1) / np.maximum(np.abs(vectors).sum(1), 1)
    assert off.max() < 1e-9
    assert np.abs(vectors).max() < most


# ------------------------------------------------------------------------------------------------ of every search


@pytest.mark.parametrize("name", NAMES)
def test_all_that_is_asked_is_finite_and_sums_to_1(name):
    assert_combinations(run(made(name), bowl, 150)[0])


@pytest.mark.parametrize("name", NAMES)
def test_costs_and_seed_alone_decide_what_is_asked(name):
    """Whoever asks for 1, 3 or 16 at a time gets the same; told the same again, it asks the same again; another seed
    asks for other vectors, but where the seed changes nothing."""
    vectors, costs = run(made(name), bowl, 90)
    for n in (1, 3, 7):
        again, told = run(made(name), bowl, 90, n)
        assert np.array_equal(again, vectors)
        assert np.array_equal(told, costs)
    kept = {v.tobytes(): c for v, c in zip(vectors, costs, strict=True)}
    assert np.array_equal(run(made(name), lambda v: kept[v.tobytes()], 90)[0], vectors)  # a replay knows every vector
    other = run(made(name, seed=1), bowl, 90)[0]
    assert (other.shape == vectors.shape and np.array_equal(other, vectors)) == (name in DETERMINISTIC)


@pytest.mark.parametrize("name", sorted(set(NAMES) - DETERMINISTIC))
def test_other_costs_lead_elsewhere(name):
    """But for the random search: it listens to nobody."""
    vectors, others = run(made(name), bowl, 60)[0], run(made(name), lambda v: -bowl(v), 60)[0]
    assert np.array_equal(vectors, others) == (name == "random")


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_what_it_promises(name):
    """The minimum is what must be evaluated before anything is new."""
    search = made(name)
    first = len(search.ask(10**6))
    assert {"soup": K, "ema": 12, "power": 12}.get(name, len(SPACE.starts)) == first
    assert first <= search.minimum <= first + 20
    if name not in ("soup", "ema", "power"):
        assert np.array_equal(made(name).ask(10**6), SPACE.starts)


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_candidate_has_lost_and_the_search_goes_on(name):
    """Every third has no finite cost: nothing else is lost, and where there is a direction to search it still gets there."""
    calls = iter(range(10**6))
    vectors, costs = run(made(name), lambda v: math.inf if next(calls) % 3 == 0 else bowl(v), 400)
    assert_combinations(vectors)
    assert np.isinf(costs).any()
    if name in ("evolution", "cmaes", "span"):
        assert len(costs) == 400
        assert costs.min() < 0.5 * min(map(bowl, SPACE.starts))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_failures_is_no_crash(name):
    vectors, _ = run(made(name), lambda v: math.inf, 150)
    assert_combinations(vectors)
    search = Span(SPACE, slope=quadratic) if name == "span" else made(name)
    vectors, _ = run(search, lambda v: math.inf, 150, features=lambda v: np.full((30, 4), np.nan))
    assert_combinations(vectors)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_few_snapshots_are_enough(name, k):
    weights = walk(k)
    vectors, costs = run(made(name, space(weights)), lambda v: float(np.square(v @ weights - 1.0).sum()), 60)
    assert_combinations(vectors)
    if name in ("evolution", "cmaes", "span"):  # all combinations of k points, so all of them find the best
        moves = weights[:-1] - weights[-1]
        best = weights[-1] + np.linalg.lstsq(moves.T, 1.0 - weights[-1], rcond=None)[0] @ moves
        assert costs.min() < 1.05 * np.square(best - 1.0).sum()


@pytest.mark.parametrize("name", NAMES)
def test_equal_snapshots_leave_nothing_to_search_and_nothing_to_divide_by(name):
    vectors, _ = run(made(name, space(np.ones((5, 3)))), lambda v: 1.0, 60)
    assert np.isfinite(vectors).all()
    assert (np.abs(vectors.sum(1) - 1) <= 1e-6 * np.maximum(np.abs(vectors).sum(1), 1)).all()  # what a bank takes


def test_the_unit_of_steps_is_the_distance_of_weights():
    for a, b in (SPACE.starts[:2], SPACE.starts[-2:], (TARGET, SPACE.starts[0])):
        assert SPACE.distance(a, b) == pytest.approx(np.linalg.norm((a - b) @ WEIGHTS), rel=1e-9)
    assert SPACE.radius == pytest.approx(np.sqrt(np.square(WEIGHTS - WEIGHTS[-1]).sum(1).mean()), rel=1e-9)
    basis = SPACE.zero_sum()
    assert np.allclose(basis.T @ basis, np.eye(K - 1), atol=1e-12)
    assert np.abs(basis.sum(0)).max() < 1e-12


def test_normalised_sums_to_1_and_never_divides_by_what_is_small():
    g = np.random.default_rng(0)
    for _ in range(100):
        v = g.standard_normal(9) * 3
        assert normalised(v).sum() == pytest.approx(1, abs=1e-9)
        assert np.abs(normalised(v)).max() <= 2 * np.abs(v).max() + (1 + np.abs(v.sum())) / 9
    assert np.array_equal(normalised(np.array([1.0, 1.0])), [0.5, 0.5])
    assert np.array_equal(normalised(np.array([0.25, 0.25])), [0.5, 0.5])  # by a shift


# ------------------------------------------------------------------------------------------ where they arrive


@pytest.mark.parametrize(("name", "share"), [("evolution", 0.6), ("cmaes", 0.2), ("span", 0.2)])
def test_signed_coefficients_beat_the_averages_and_chance_at_equal_evaluations(name, share):
    """Medians over three seeds; `share` of the best average's cost is what the search has always reached, with room."""
    budget = 250
    reached = np.median([run(made(name, seed=s), bowl, budget)[1].min() for s in range(3)])
    chance = np.median([run(made("random", seed=s), bowl, budget)[1].min() for s in range(3)])
    averages = min(run(made(kind), bowl, budget)[1].min() for kind in ("ema", "power", "soup"))
    assert reached < share * averages
    assert reached < share * chance


@pytest.mark.parametrize("name", ["evolution", "cmaes", "span"])
def test_more_evaluations_never_hurt_and_do_help(name):
    costs = np.minimum.accumulate(run(made(name), bowl, 400)[1])
    assert all(a > b for a, b in pairwise(costs[[9, 60, 150, 399]]))


@pytest.mark.parametrize(("grid", "law"), [(EMAGrid, partial(profiles.ema, batch=10)), (PowerGrid, profiles.power)])
@pytest.mark.parametrize("hidden", [0.13, 0.5, 0.83])
def test_a_grid_finds_the_best_of_its_family(grid, law, hidden):
    """The cost's minimum at a rate that no grid has: found within 30 evaluations to the resolution, 1 % of the rate."""
    low, high = grid(SPACE).grid()[0], grid(SPACE).grid()[-1]
    best = math.exp(math.log(low) + hidden * math.log(high / low))
    to_rate = (lambda x: math.exp(-10 / x)) if grid is EMAGrid else (lambda x: x)
    target = law(SPACE.nimg, to_rate(best))
    vectors, costs = run(grid(SPACE), lambda v: float(np.square((v - target) @ WEIGHTS).sum()), 100)
    assert len(costs) < 30
    nearest = [law(SPACE.nimg, to_rate(best * factor)) for factor in (0.985, 1.015)]
    assert costs.min() <= max(float(np.square((v - target) @ WEIGHTS).sum()) for v in nearest)
    assert costs.min() < 0.1 * costs[:12].min()
    assert (vectors >= 0).all()


def by_brute_force(weights, cost):
    """Recipe 1 of model soups, on the weights themselves."""
    k = len(weights)
    order = sorted(range(k), key=lambda i: cost(weights[i]))
    soup = [order[0]]
    for i in order[1:]:
        if cost(weights[[*soup, i]].mean(0)) <= cost(weights[soup].mean(0)):
            soup.append(i)
    return np.bincount(soup, minlength=k) / len(soup)


@pytest.mark.parametrize("seed", range(6))
def test_greedy_soup_is_the_papers(seed):
    weights, goal = walk(9, 6, seed), np.random.default_rng(seed).standard_normal(6) * 0.3
    cost = lambda theta: float(np.square(theta - goal).sum())  # noqa: E731
    vectors, costs = run(GreedySoup(space(weights)), lambda v: cost(v @ weights), 10**6, n=4)
    assert len(vectors) == 2 * 9 - 1  # each alone, then one by one
    assert np.allclose(vectors[costs.argmin()], by_brute_force(weights, cost))


# ---------------------------------------------------------------------------------------------------------- span


def features_of(seed=0, images=30, dims=4):
    """Features [n, d] that are linear in the coefficients, as span assumes, and those of the goal."""
    g = np.random.default_rng(seed)
    maps = g.standard_normal((K, images * dims)) * np.linspace(1.3, 0.7, K)[:, None]
    return lambda v: (v @ maps).reshape(images, dims).astype(np.float64)


FEATURES = features_of()
GOAL = FEATURES(TARGET) + 0.1 * np.random.default_rng(9).standard_normal((30, 4))


def quadratic(features):
    """The mean square distance from the goal, and its derivative."""
    return float(np.square(features - GOAL).mean()), 2 * (features - GOAL) / features.size


REFERENCE = FrechetReference(
    Moments.of(torch.from_numpy(np.random.default_rng(3).standard_normal((500, 4)) * 0.9 + 0.2))
)


def frechet(features):
    value, gradient = REFERENCE.slope(torch.from_numpy(features))
    return value, gradient.numpy()


def cost_of(slope):
    return lambda v: slope(FEATURES(v))[0]


def first_round(slope, windows, failed=(), reach=0.4):
    """The search when its first moves are told, and those: [starts + moves, K] with their costs; its fits are pending.

    failed: which of the moves have no finite cost."""
    starts, moves = len(SPACE.starts), len(Span(SPACE).averages(min(windows, K)))
    calls, search = iter(range(10**6)), Span(SPACE, slope=slope, windows=windows, reach=reach)
    cost = lambda v: math.inf if next(calls) - starts in failed else cost_of(slope)(v)  # noqa: E731
    vectors, costs = run(search, cost, starts + moves, features=FEATURES)
    return search, vectors, costs


def assert_closed_form(search):
    """Where the features are linear and the metric is quadratic, least squares tells the least of each penalised cost."""
    cost, _, at = search.best
    flat = np.stack([(moved - at).ravel() for _, _, moved in search.known])
    assert len(search.pending) == len(span.RIDGES)
    for ridge, fit in zip(span.RIDGES, search.pending, strict=True):
        weight = ridge * cost / at.var(0).sum() / len(at)
        both = flat * np.sqrt(1 / at.size + weight)
        z = np.linalg.lstsq(both.T, (GOAL - at).ravel() / at.size / np.sqrt(1 / at.size + weight))[0]
        off = np.square(at.ravel() + z @ flat - GOAL.ravel()).mean()
        least = off + weight * np.square(z @ flat).sum()
        reached = cost_of(quadratic)(fit) + weight * np.square(FEATURES(fit) - at).sum()
        assert least < cost
        assert least - 1e-9 < reached < least + 0.02 * (cost - least)


def test_a_round_moves_by_its_step_and_asks_for_the_closed_form_of_its_penalised_fits():
    search, vectors, costs = first_round(quadratic, 8)
    n = len(SPACE.starts)
    start = vectors[costs[:n].argmin()]
    assert np.allclose([SPACE.distance(v, start) for v in vectors[n:]], 0.1 * SPACE.radius, rtol=1e-6)
    assert search.best[0] == costs.min()
    assert len(search.known) > len(vectors) - n + 1  # starts that are near enough tell something too
    assert_closed_form(search)
    fitted = [cost_of(quadratic)(fit) for fit in search.pending]
    assert (np.diff([costs.min(), *fitted]) < 0).all()  # the weaker the penalty, the lower: the model is exact here


def test_what_is_far_from_the_best_tells_its_fits_nothing():
    search, vectors, _ = first_round(quadratic, 8, reach=0.25)
    distances = [SPACE.distance(vector, search.best[1]) for _, vector, _ in search.known]
    assert max(distances) <= 0.25 * SPACE.radius
    assert len(search.known) < len(first_round(quadratic, 8, reach=0.4)[0].known) < len(vectors)
    assert_closed_form(search)


def test_a_direction_that_failed_is_left_out_of_the_fits():
    search, vectors, costs = first_round(quadratic, 8, failed=[2])
    at = len(SPACE.starts) + 2
    assert np.isinf(costs).tolist() == [i == at for i in range(len(costs))]
    assert not any(np.array_equal(vector, vectors[at]) for _, vector, _ in search.known)
    assert_closed_form(search)


@pytest.mark.parametrize("slope", [quadratic, frechet], ids=["quadratic", "frechet"])
def test_without_a_penalty_one_round_reaches_the_least_cost_in_its_span(slope, monkeypatch):
    monkeypatch.setattr(span, "RIDGES", (0.0,))
    search, _, costs = first_round(slope, 6, reach=0.2)
    steps = np.stack([vector - search.best[1] for _, vector, _ in search.known])
    there = lambda z: cost_of(slope)(search.best[1] + z @ steps)  # noqa: E731
    least = minimize(there, np.zeros(len(steps)), method="BFGS", options={"gtol": 1e-7}).fun
    assert least < 0.97 * costs.min()
    assert there(np.zeros(len(steps))) == costs.min()
    assert cost_of(slope)(search.pending[0]) == pytest.approx(least, rel=0.01)


def test_when_windows_of_one_width_are_exhausted_narrower_ones_reach_the_least_cost_of_all():
    """The least over all K - 1 directions, by least squares; one width of window alone stops above it."""
    maps = np.stack([FEATURES(row).ravel() for row in np.eye(K)])
    moves = maps[:-1] - maps[-1]
    z = np.linalg.lstsq(moves.T, GOAL.ravel() - maps[-1])[0]
    least = float(np.square(maps[-1] + z @ moves - GOAL.ravel()).mean())
    reached = [run(Span(SPACE, slope=quadratic, windows=3, finest=n), cost_of(quadratic), 10**4, features=FEATURES)[1].min()
               for n in (3, 12)]  # fmt: skip
    assert least <= reached[1] < min(1.1 * least, reached[0])


def test_where_nothing_is_gained_the_windows_are_halved_until_the_finest_and_it_ends():
    weights, flat = walk(64), np.zeros((30, 4))
    search = Span(space(weights), slope=lambda features: (1.0, 0 * features), windows=4, finest=16)
    asked = []
    while len(vectors := search.ask(10**6)):
        search.tell(np.ones(len(vectors)), [flat] * len(vectors))
        asked.append(len(vectors))
    fits = len(span.RIDGES)
    assert asked == [len(SPACE.starts), 4, fits, 8, fits, 16, fits]
    assert search.minimum == sum(asked[:3])


def test_rounds_go_on_until_one_gains_little_and_each_has_other_windows():
    search = Span(SPACE, slope=frechet)
    vectors, costs = run(search, cost_of(frechet), 10**4, features=FEATURES)
    best = np.minimum.accumulate(costs)
    assert search.minimum < len(costs) < 1000
    assert best[-1] < 0.2 * best[len(SPACE.starts) - 1]
    assert_combinations(vectors, most=30)
    assert not len(search.ask(16))  # it has ended


def test_nothing_is_fitted_before_the_minimum_is_spent():
    """All directions and all fits of one round are within it; a budget of one less has no last fit."""
    fitted = []
    told = lambda x: fitted.append(1) or quadratic(x)  # noqa: E731
    for windows in (4, 8, 16):
        search = Span(SPACE, slope=told, windows=windows)
        run(search, cost_of(quadratic), search.minimum - len(span.RIDGES) - 1, n=1, features=FEATURES)
        assert not fitted
        begun = first_round(quadratic, windows)
        assert len(begun[1]) + len(begun[0].pending) <= search.minimum
        fitted.clear()


@pytest.mark.parametrize("how", ["no slope", "no features", "no finite start"])
def test_without_slope_features_or_a_finite_start_it_searches_the_same_span_by_cma_es(how):
    """Every vector is the best start and a combination of the first windows' differences: 6 windows, so rank 5."""
    slope = None if how == "no slope" else quadratic
    calls = iter(range(10**6))
    cost = lambda v: math.inf if how == "no finite start" and next(calls) < 10 else bowl(v)  # noqa: E731
    features = None if how == "no features" else FEATURES
    vectors, costs = run(Span(SPACE, slope=slope, windows=6), cost, 120, features=features)
    assert len(costs) == 120
    moves = vectors[len(SPACE.starts) :] - SPACE.starts[costs[: len(SPACE.starts)].argmin()]
    spread = np.linalg.svd(moves, compute_uv=False)
    assert 2 <= (spread > 1e-9 * spread[0]).sum() <= 5
    assert costs[len(SPACE.starts) :].min() < 0.8 * min(map(bowl, SPACE.starts))
