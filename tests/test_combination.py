"""A search from snapshots to result.json: honest numbers, nothing lost at any kill, clear errors."""

import hashlib
import json
import math
import multiprocessing as mp
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep import combination
from fewstep.api import Plan, average, combine
from fewstep.combination import Combination, verdict
from fewstep.evaluation import CANDIDATE_SEED, RERANK_SEED, Generator
from fewstep.fitness import Function, Metric, load_function
from fewstep.interrupts import Interrupted
from fewstep.metrics import Record
from fewstep.model import ModelInfo, load, save_model
from fewstep.networks import MLP, Architecture
from fewstep.samplers import DPMSolver, FewStep, Heun
from fewstep.scoring import Gate, Score, Scorer, Wearer
from fewstep.snapshots import Bank, profiles, read
from fewstep.types import FewstepError
from full_disk import ENOSPC, HalfWritten

K = 7
ARCH = Architecture(MLP(8, 2), (1, 4, 4))
TINY = Plan(
    search="evolution", budget=20, num=20, rerank=2, rerank_num=24, report_num=16, seeds=2, second=("kid",), baselines=()
)  # fmt: skip


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without git, pictures and the wait for the disk."""
    monkeypatch.setattr("fewstep.combination.environment", lambda device: {"device": device})
    monkeypatch.setattr(Combination, "draw", lambda self, vector: None)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def snapshots(folder, k=K, kind="consistency", arch=ARCH, seed=0, **info):
    """A folder like a run's: weights that near their goal, are noisy about it, and stop before they are there."""
    folder.mkdir(parents=True)
    g, base = torch.Generator().manual_seed(seed), arch.build().state_dict()
    drift = {name: torch.randn(t.shape, generator=g) for name, t in base.items()}
    for i in range(k):
        left = 1 - 0.7 * i / (k - 1)
        tensors = {n: t + left * drift[n] + 0.25 * torch.randn(t.shape, generator=g) for n, t in base.items()}
        save_model(
            folder / f"{100 * (i + 1):012d}.safetensors", tensors, ModelInfo(arch, kind, nimg=100 * (i + 1), **info)
        )
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    g, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, images=g.integers(100, 200, (60, 4, 4, 1), dtype=np.uint8))
    return str(path)


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    return snapshots(tmp_path_factory.mktemp("run") / "snapshots")


def go(sources, out, plan=TINY, **how):
    return combine(sources, out, plan, device="cpu", quiet=True, **how)


def images(sources, out, plan=TINY, **how):
    """By the Frechet distance of pixels, of 16 dimensions."""
    return go(sources, out, plan, extractor="pixels", **how)


def distance_to(goal):
    """A user's function: the squared distance of the weights from these, and a little noise of the seed's."""

    def cost(model, seed):
        tensors = model if isinstance(model, dict) else model.denoiser.state_dict()
        noise = float(np.random.default_rng(seed).uniform(0, 1e-3))
        return sum(float((tensors[n] - t).double().square().sum()) for n, t in goal.items()) + noise

    return cost


GOAL = ARCH.build().state_dict()
TO_GOAL = Function("goal", distance_to(GOAL))


def content(out):
    """What result.json holds but for times."""
    told = json.loads((out / "result.json").read_text())
    told["cost"].pop("seconds")
    told.pop("environment")
    return told


def rows(out):
    return [json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def searched(run, data, tmp_path_factory):
    """An uninterrupted search with all baselines, and its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.combination.environment", lambda device: {"device": device})
        out = tmp_path_factory.mktemp("out") / "whole"
        plan = replace(TINY, budget=40, baselines=("ema", "power", "random"))
        return images(run, out, plan, data=data), out


# ------------------------------------------------------------------------------------------------------- the result


def test_the_result_is_rebuilt_bit_for_bit_from_its_json(searched, tmp_path):
    result, out = searched
    assert json.loads((out / "result.json").read_text()) == result
    made = average(out / "result.json", out=tmp_path / "again.safetensors")
    assert made["weights_sha256"] == result["weights_sha256"] == read(out / "combined.safetensors").weights_sha256
    a, b = (read(path).tensors for path in (out / "combined.safetensors", tmp_path / "again.safetensors"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_combined_weights_are_the_sum_and_a_model_for_every_verb(searched, run):
    result, out = searched
    model, parts = fewstep.load(out), [read(file).tensors for file in sorted(run.iterdir())]
    for name, tensor in model.denoiser.state_dict().items():
        total = sum(c * part[name].double() for c, part in zip(result["coefficients"], parts, strict=True))
        torch.testing.assert_close(tensor, total.float(), rtol=1e-6, atol=1e-6)
    assert model.info.weights == "lcsc"
    assert model.sha256 == result["weights_sha256"]
    assert fewstep.sample(model, num=5).shape == (5, 1, 4, 4)


def test_what_is_quoted_is_of_the_saved_weights_on_held_out_images(searched, data):
    """Measured again by hand: the same record, to the bit, for the first seeds, against the images not searched."""
    result, out = searched
    (first, second), model = result["records"]["lcsc"], load(out)
    assert (first["metric"], second["metric"]) == ("fd", "kid")
    assert first == model.info.best["record"] | {"model": "lcsc"}
    assert (first["seeds"], first["n"], first["model_sha256"]) == ([0, 1], 16, model.sha256)
    _, reported = combination_halves(data, model)
    features = pixels()
    make = Generator(model.denoiser, (1, 4, 4))
    again = combination.evaluate(make, FewStep((80.0,)), reported, features, 16, (0, 1), ("fd",))[0]
    assert list(again.values) == first["values"]


def pixels():
    from fewstep.metrics import load_extractor

    return load_extractor("pixels")


def combination_halves(data, model, share=0.5):
    from fewstep.api import halves

    return halves(model, data, pixels(), share)


def test_noise_and_images_of_search_re_ranking_and_report_never_meet(searched, data, run, monkeypatch, tmp_path):
    result, _ = searched
    noise = result["noise"]
    seeds = [noise["search"], noise["rerank"], *noise["report"]]
    assert len(set(seeds)) == 4
    assert (noise["search"], noise["rerank"]) == (CANDIDATE_SEED, RERANK_SEED)
    searched_on, reported = combination_halves(data, load(sorted(run.iterdir())[-1]))
    assert searched_on.n + reported.n == 60
    for a in searched_on.features:  # random images: no two are equal
        assert not (reported.features == a).all(1).any()
    told = result["reference"]
    assert (told["search_sha256"], told["report_sha256"]) == (searched_on.sha256, reported.sha256)
    assert {r["reference_sha256"] for rs in result["records"].values() for r in rs} == {reported.sha256}

    used, make = [], Generator.__call__

    def spy(self, sampler, num, seed=0, label=None, first=0):
        used.append((seed, first, num))
        return make(self, sampler, num, seed, label, first)

    monkeypatch.setattr(Generator, "__call__", spy)
    images(run, tmp_path / "out", data=data)
    assert {seed for seed, *_ in used} == {CANDIDATE_SEED, RERANK_SEED, 0, 1}
    assert {(first, num) for seed, first, num in used if seed == CANDIDATE_SEED} == {(0, 16), (16, 20)}


def test_held_out_images_of_training_are_neither_searched_nor_reported(data, tmp_path):
    """Of a run that held out 20 %: the two halves share out the other 80 %."""
    model = load(sorted(snapshots(tmp_path / "run", 2, heldout=0.2).iterdir())[-1])
    from fewstep.data import DataSpec, open_images

    training = open_images(DataSpec(data)).split("train", 0.2)
    a, b = combination_halves(data, model, 0.3)
    both = {tuple(row) for half in (a, b) for row in half.features.tolist()}
    assert a.n + b.n == len(both) == len(training)
    assert both == {tuple(row) for row in pixels()(training.pixels(range(len(training)))).tolist()}
    assert 0 < a.n < b.n


def test_equal_vectors_have_equal_costs_and_others_meet_the_same_noise(run, data, tmp_path):
    """Common random numbers: in one pass, in two, alone; and the cost is the metric's of a model made by hand."""
    bank = Bank.build(sorted(run.iterdir()), tmp_path / "bank.safetensors", "fp32", quiet=True)
    model = load(sorted(run.iterdir())[-1])
    reference, _ = combination_halves(data, model)
    metric = Metric("fd", FewStep((80.0,)), pixels(), reference)
    scorer = Scorer(Wearer(bank, model), metric, 20, CANDIDATE_SEED, tmp_path / "scores.jsonl")
    vectors = np.stack([profiles.uniform(bank.nimg), profiles.last(bank.nimg), profiles.uniform(bank.nimg)])
    a, b, c = scorer(vectors, "x")
    assert a.cost == c.cost != b.cost
    fresh = Scorer(Wearer(bank, model), metric, 20, CANDIDATE_SEED, tmp_path / "others.jsonl")
    assert [fresh(v[None], "x")[0].cost for v in vectors[::-1]] == [c.cost, b.cost, a.cost]
    last = load(sorted(run.iterdir())[-1])
    assert metric.cost(last, metric.features(last, 0, 20, CANDIDATE_SEED), CANDIDATE_SEED) == b.cost
    other = Scorer(Wearer(bank, model), metric, 20, RERANK_SEED, tmp_path / "scores.jsonl")
    assert other(vectors[:1], "x")[0].cost != a.cost  # another noise is another row of the same file


def test_the_result_tells_all_that_was_done(searched):
    result, out = searched
    assert {p.name for p in out.iterdir()} == {
        ".lock", "bank.safetensors", "best.png", "combined.safetensors", "evaluations.jsonl", "result.json", "search.json"
    }  # fmt: skip
    assert list(result["candidates"]) == ["lcsc", "ema", "power", "random", "uniform", "last"]
    assert list(result["records"]) == list(result["candidates"])
    assert list(result["traces"]) == ["evolution/0", "ema/0", "power/0", "random/0"]
    assert sum(len(trace) for trace in result["traces"].values()) == result["cost"]["evaluations"]
    for trace in result["traces"].values():
        assert [n for n, _ in trace] == list(range(1, len(trace) + 1))
        assert len(trace) <= 40
        costs = [cost for _, cost in trace]
        assert costs == sorted(costs, reverse=True)
    assert len([r for r in rows(out) if "cost" in r]) == result["cost"]["evaluated"]
    assert all(sum(c["coefficients"]) == pytest.approx(1, abs=1e-9) for c in result["candidates"].values())
    assert [s["nimg"] for s in result["snapshots"]] == [100 * (i + 1) for i in range(K)]
    assert result["gains"].keys() == {"ema", "power", "random", "uniform", "last"}
    assert result["searches"]["evolution/0"]["coefficients"] == result["coefficients"]
    assert result["seed_spread"] is None


def test_signed_coefficients_get_nearer_than_any_average_and_the_verdict_says_so(run, tmp_path):
    plan = Plan(search="cmaes", budget=100, seeds=3, baselines=("ema", "random", "soup"))
    result = go(run, tmp_path / "out", plan, metric=TO_GOAL)
    value = {name: records[0]["value"] for name, records in result["records"].items()}
    assert value["lcsc"] < 0.8 * min(value[name] for name in value if name != "lcsc")
    assert value["lcsc"] == pytest.approx(distance_to(GOAL)(load(tmp_path / "out"), 0), abs=1e-3)
    assert min(result["coefficients"]) < 0
    rival, label = ("ema", "best EMA") if value["ema"] < value["last"] else ("last", "last snapshot")
    assert not result["gains"][rival]["within_noise"]
    assert result["verdict"].startswith("LCSC improves goal")
    assert label in result["verdict"]
    fraction = 1 - value["lcsc"] / value[rival]
    assert result["gains"][rival]["fraction"] == pytest.approx(fraction, rel=1e-9)
    assert f"{100 * fraction:.0f} %" in result["verdict"]


def test_a_gain_within_the_noise_is_called_that(run, tmp_path):
    """A cost that no weights change: whoever is found, the report's noise decides who looks better."""
    chance = Function("chance", lambda model, seed: float(np.random.default_rng([seed, weights_key(model)]).normal()))
    for seeds in (1, 3):
        out = tmp_path / f"{seeds}"
        result = go(run, out, replace(TINY, seeds=seeds, rerank=8, baselines=("ema",)), metric=chance)
        gain, lcsc = result["gains"]["ema"], result["candidates"]["lcsc"]
        assert result["verdict"].startswith("No gain beyond the noise: chance")
        assert (gain["paired_std"] is None) == (seeds == 1)
        found = [row for row in rows(out) if row.get("search") == "evolution/0"]
        again = [row["cost"] for row in found if f"|{RERANK_SEED}|" in row["key"]]
        assert len(again) == 8
        assert lcsc["rerank"] == min(again)  # the best of them on fresh noise, which had not been the best before
        assert lcsc["search"] > min(row["cost"] for row in found if f"|{CANDIDATE_SEED}|" in row["key"])


def weights_key(model):
    """A whole number of the weights, the same whatever was combined beside them."""
    return int(1e4 * abs(model.denoiser.state_dict()["network.first.weight"][0, 0]))


def record(values, metric="fd"):
    return Record.of(
        metric, values, range(len(values)), n=9, extractor="", extractor_sha256="", reference="", reference_n=0,
        reference_sha256="", sampler="", sigmas=(), nfe=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "mine", "ema", "last", "within", "words"),
    [
        ("fd", [1.0, 1.1, 1.2], [2.0, 2.1, 2.2], [3.0, 3.1, 3.2], False, "best EMA, held out: 48 %"),
        ("fd", [1.0, 1.1, 1.2], [3.0, 3.1, 3.2], [2.0, 2.1, 2.2], False, "last snapshot, held out: 48 %"),
        ("fd", [2.0, 2.1, 2.2], [1.0, 1.1, 1.2], [3.0, 3.1, 3.2], False, "LCSC is worse: fd 2.1 against 1.1"),
        ("fd", [1.0, 1.0, 1.0], [1.1, 1.3, 0.9], [3.0, 3.0, 3.0], True, "No gain"),  # 0.1 on average, 0.2 apart
        ("recall", [0.5, 0.6, 0.7], [0.4, 0.5, 0.6], [0.3, 0.4, 0.5], False, "best EMA, held out: 20 %"),
        ("recall", [0.3, 0.4, 0.5], [0.4, 0.5, 0.6], [0.3, 0.4, 0.5], False, "LCSC is worse: recall 0.4 against 0.5"),
        ("mine.py:f", [-3.0, -3.0], [-2.0, -2.0], [-1.0, -1.0], False, "best EMA, held out: 50 %"),
        ("fd", [1.0, 1.1], [math.inf, math.inf], [2.0, 2.1], False, "last snapshot"),
        ("mine.py:f", [1.0, 1.1], [math.nan, math.nan], [2.0, 2.1], False, "last snapshot"),
        ("fd", [math.inf, 1.1], [1.0, 1.0], [2.0, 2.1], True, "No gain"),
    ],
)  # fmt: skip
def test_the_verdict_compares_with_the_better_rival_over_paired_noise(metric, mine, ema, last, within, words):
    told = verdict({name: [record(v, metric)] for name, v in (("lcsc", mine), ("ema", ema), ("last", last))}, metric)
    assert words in told["verdict"]
    rival = "last" if "of the last snapshot" in told["verdict"] else "ema"
    assert told["gains"][rival]["within_noise"] == within
    json.dumps(told, allow_nan=False)


def test_three_seeds_tell_how_far_their_results_lie_apart(run, tmp_path):
    result = go(run, tmp_path / "out", replace(TINY, search_seeds=3, budget=60), metric=TO_GOAL)
    names = [f"evolution/{k}" for k in range(3)]
    assert list(result["searches"]) == list(result["traces"]) == names
    vectors = [np.array(result["searches"][name]["coefficients"]) for name in names]
    parts = [read(s["path"] and Path(s["path"])).tensors for s in result["snapshots"]]
    flat = np.stack([torch.cat([t.flatten() for t in part.values()]).double().numpy() for part in parts])
    radius = np.sqrt(np.square(flat - flat[-1]).sum(1).mean())
    spread = result["seed_spread"]
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            apart = np.linalg.norm((a - b) @ flat) / radius
            assert spread["distance"][i][j] == pytest.approx(apart, rel=0.01, abs=1e-6)
            assert spread["cosine"][i][j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            assert (apart > 0.01) == (i != j)
    assert result["chosen"] == min(names, key=lambda name: result["searches"][name]["rerank_score"])
    assert all(result["searches"][name]["records"][0]["metric"] == "goal" for name in names)
    assert result["searches"][result["chosen"]]["coefficients"] == result["coefficients"]


def test_a_search_that_no_seed_changes_is_done_once(run, tmp_path):
    result = go(run, tmp_path / "out", replace(TINY, search="ema", search_seeds=3), metric=TO_GOAL)
    assert list(result["searches"]) == ["ema/0"]


# ------------------------------------------------------------------------------------- ways to sample, other networks


@pytest.mark.parametrize(
    ("kind", "how", "sampler"),
    [
        ("diffusion", {"steps": 3}, {"name": "Heun", "sigmas": list(Heun.karras(3).sigmas), "nfe": 5}),
        (
            "diffusion", {"steps": 3, "solver": "dpm"},
            {"name": "DPMSolver", "sigmas": list(DPMSolver.karras(3).sigmas), "nfe": 3},
        ),
        ("consistency", {"steps": 2, "second_sigma": 1.5}, {"name": "FewStep", "sigmas": [80.0, 1.5], "nfe": 2}),
    ],
    ids=["heun", "dpm", "two-steps"],
)  # fmt: skip
def test_any_sampler_is_searched_for(data, tmp_path, kind, how, sampler):
    run, plan = snapshots(tmp_path / "run", 4, kind), replace(TINY, budget=13)
    result = images(run, tmp_path / "out", plan, data=data, **how)
    assert result["sampler"] == sampler
    record = result["records"]["lcsc"][0]
    assert (record["sampler"], record["sigmas"], record["nfe"]) == tuple(sampler.values())
    model = load(tmp_path / "out")
    assert model.info.kind == kind
    if "second_sigma" in how:
        assert model.info.second_sigma == 1.5  # so that two steps of it are what was searched for
    with pytest.raises(FewstepError, match="begun with other"):
        images(run, tmp_path / "out", plan, data=data, **{**how, "steps": how["steps"] + 1}, resume=True)


def test_a_conditional_model_is_searched_and_drawn_over_its_classes(data, tmp_path, monkeypatch):
    monkeypatch.undo()
    run = snapshots(tmp_path / "run", 4, arch=Architecture(MLP(8, 2), (1, 4, 4), 3), class_names=("a", "b", "c"))
    result = images(run, tmp_path / "out", replace(TINY, search="ema", budget=12), data=data)
    assert result["environment"]["packages"]["torch"] == torch.__version__
    again = Metric("fd", FewStep((80.0,)), pixels(), combination_halves(data, model := load(tmp_path / "out"))[1])
    assert again.cost(model, again.features(model, 0, 16, 1), 1) == result["records"]["lcsc"][0]["values"][1]
    with Image.open(tmp_path / "out" / "best.png") as picture:
        assert picture.size == (3 * 40 + 2 * 2, 8 * 40 + 7 * 2)  # a column of 8 for each class


@pytest.mark.parametrize("metric", ["kid", "recall"])
def test_other_metrics_of_images(run, data, tmp_path, metric):
    plan = replace(TINY, second=("fd", "prdc"), search="span", budget=21)
    result = images(run, tmp_path / "out", plan, data=data, metric=metric)
    first, *others = result["records"]["lcsc"]
    assert first["metric"] == metric
    expected = {"fd", "precision", "recall", "density", "coverage"}
    assert {r["metric"] for r in others} == (expected | {"kid"} if metric == "kid" else expected) - {metric}
    searched, _ = combination_halves(data, model := load(tmp_path / "out"))
    judge = Metric(metric, FewStep((80.0,)), pixels(), searched)
    assert judge.cost(model, searched.features, 0) == pytest.approx(-1 if metric == "recall" else 0, abs=0.05)


def foreign(folder, k=5):
    folder.mkdir()
    g = torch.Generator().manual_seed(1)
    for i in range(k):
        torch.save(
            {"state_dict": {"w": torch.randn(4, 3, generator=g), "steps": torch.tensor(i)}}, folder / f"step{i}.pt"
        )
    return folder


def test_a_users_function_on_foreign_files_without_a_network(tmp_path):
    folder, script = foreign(tmp_path / "files"), tmp_path / "mine.py"
    script.write_text("def size(model, seed):\n    return model['w'].square().sum() + (model['steps'] != 4)\n")
    plan = replace(TINY, budget=150, search="span", baselines=("ema", "random"))
    result = go(folder, tmp_path / "out", plan, metric=f"{script}:size")
    assert result["metric"] == f"{script}:size#{hashlib.sha256(script.read_bytes()).hexdigest()[:8]}"
    assert (result["sampler"], result["reference"]) == (None, None)
    values = {name: records[0]["value"] for name, records in result["records"].items()}
    stack = np.stack([torch.load(folder / f"step{i}.pt")["state_dict"]["w"].numpy().ravel() for i in range(5)])
    least = np.linalg.inv(stack @ stack.T).sum()  # the least square of a combination of sum 1 is its inverse
    assert values["lcsc"] == pytest.approx(1 / least, rel=0.1)
    assert values["lcsc"] < min(values["ema"], values["uniform"], values["last"])
    made = average(tmp_path / "out" / "result.json", out=tmp_path / "again.safetensors")
    assert made["weights_sha256"] == result["weights_sha256"] == read(tmp_path / "again.safetensors").weights_sha256
    assert read(tmp_path / "again.safetensors").tensors["steps"] == 4


def test_another_network_is_no_home_for_the_weights(run, data, tmp_path):
    other = snapshots(tmp_path / "run", 2, arch=Architecture(MLP(9, 2), (1, 4, 4)))
    with pytest.raises(FewstepError, match=r"another network than the checkpoints' \(\d+ tensors differ"):
        images(run, tmp_path / "out", data=data, like=str(sorted(other.iterdir())[0]))
    with pytest.raises(FewstepError, match=r"another network than the checkpoints'"):
        images(foreign(tmp_path / "pt"), tmp_path / "out2", data=data, like=str(sorted(run.iterdir())[0]))
    with pytest.raises(FewstepError, match="give --like MODEL"):
        images(tmp_path / "pt", tmp_path / "out3", data=data)


# --------------------------------------------------------------------------------------------- candidates that fail


def failing(bad):
    """The distance from the goal, not a number for those whose coefficients `bad` dislikes."""
    near = distance_to(GOAL)
    return Function("goal", lambda model, seed: math.nan if bad(model, seed) else near(model, seed))


def odd(model, seed):
    return weights_key(model) % 2 == 1


def test_a_metric_that_is_no_number_loses_and_the_search_goes_on(run, tmp_path):
    plan = replace(TINY, budget=100, baselines=("random",))
    result = go(run, tmp_path / "out", plan, metric=failing(odd))
    at_search = [row for row in rows(tmp_path / "out") if f"|{CANDIDATE_SEED}|" in row.get("key", "")]
    lost = {row["key"] for row in at_search if row["cost"] is None}
    assert len(lost) > 60
    assert result["cost"]["evaluations"] == 200
    assert len(lost) <= result["cost"]["failed"] <= len(lost) + 10  # both searches begin with the same 10 vectors
    assert 200 - len(at_search) == 10
    assert result["candidates"]["lcsc"]["rerank"] < 0.8 * distance_to(GOAL)(load(sorted(run.iterdir())[-1]), 0)
    assert go(run, tmp_path / "out", plan, metric=failing(odd), resume=True)["coefficients"] == result["coefficients"]


@pytest.mark.parametrize("when", ["always", "search", "re-ranking"])
@pytest.mark.parametrize("search", ["evolution", "soup", "span"])
def test_nothing_but_failures_is_a_clear_error(run, tmp_path, search, when):
    seeds = {"always": {CANDIDATE_SEED, RERANK_SEED, 0, 1}, "search": {CANDIDATE_SEED}, "re-ranking": {RERANK_SEED}}[
        when
    ]
    plan = replace(TINY, search=search, budget=30, baselines=("ema",))
    with pytest.raises(FewstepError, match=f"no candidate of {search} has a finite goal"):
        go(run, tmp_path / "out", plan, metric=failing(lambda model, seed: seed in seeds))


def test_only_the_main_search_failing_is_the_same_error(run, tmp_path):
    """Its baseline has costs; but there is nothing to compare with it."""
    calls = iter(range(10**6))
    with pytest.raises(FewstepError, match="no candidate of evolution"):
        go(
            run, tmp_path / "out", replace(TINY, baselines=("ema",)),
            metric=failing(lambda model, seed: next(calls) < TINY.budget),
        )  # fmt: skip


def test_a_rival_that_fails_held_out_is_no_crash(run, tmp_path):
    last = weights_key(load(sorted(run.iterdir())[-1]))
    metric = failing(lambda model, seed: seed < 10 and weights_key(model) == last)
    result = go(run, tmp_path / "out", replace(TINY, baselines=("ema",)), metric=metric)
    assert result["records"]["last"][0]["value"] == "nan"
    assert result["gains"]["last"]["paired_mean"] is None
    assert "best EMA" in result["verdict"]
    json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (replace(TINY, budget=10), "--budget 10 is less than the 11 evaluations with which evolution begins"),
        (replace(TINY, search="soup", budget=K), f"--budget {K} is less than the {K + 1}"),
        (replace(TINY, baselines=("cmaes",), budget=12), "less than the 19 evaluations with which cmaes begins"),
        (replace(TINY, search="span", budget=14), "less than the .. evaluations with which span begins"),
    ],
    ids=["evolution", "soup", "a baseline", "span"],
)  # fmt: skip
def test_a_budget_below_the_population_is_refused(run, tmp_path, plan, words):
    with pytest.raises(FewstepError, match=words):
        go(run, tmp_path / "out", plan, metric=TO_GOAL)


@pytest.mark.parametrize(
    "change",
    [
        {"search": "best"}, {"baselines": ("ema", "sgd")}, {"num": 1}, {"report_num": 1}, {"rerank": 0}, {"seeds": 0},
        {"search_seeds": 0}, {"minutes": 0.0}, {"second": ("fid",)},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_plans_are_refused(change):
    with pytest.raises(FewstepError):
        replace(TINY, **change)


def test_fewer_than_two_snapshots_and_mixed_networks_are_refused(run, data, tmp_path):
    files = sorted(run.iterdir())
    with pytest.raises(FewstepError, match="at least 2 are combined"):
        images(files[-1], tmp_path / "out", data=data)
    other = sorted(snapshots(tmp_path / "run", 2, arch=Architecture(MLP(9, 2), (1, 4, 4))).iterdir())
    with pytest.raises(FewstepError, match="not of one network"):
        images([*other, files[-1]], tmp_path / "out", data=data)
    assert not (tmp_path / "out" / "search.json").exists()
    with pytest.raises(FewstepError, match="in the order of their images seen"):
        images([files[1], files[0]], tmp_path / "out2", data=data)
    np.savez(tmp_path / "rgb.npz", images=np.zeros((60, 4, 4, 3), np.uint8) + np.arange(3, dtype=np.uint8))
    with pytest.raises(FewstepError, match=r"the images are \(3, 4, 4\), the model makes \(1, 4, 4\)"):
        images(run, tmp_path / "out3", data=str(tmp_path / "rgb.npz"))
    with pytest.raises(FewstepError, match="unknown metric"):
        images(run, tmp_path / "out4", data=data, metric="fid")
    with pytest.raises(FewstepError, match="--solver is for diffusion models"):
        images(run, tmp_path / "out5", data=data, solver="dpm")
    with pytest.raises(FewstepError, match="--data"):
        images(run, tmp_path / "out6")


def alter(file):
    stored = read(file)
    tensors = {name: tensor.clone() for name, tensor in stored.tensors.items()}
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    file.unlink()
    save_model(file, tensors, load_info(stored, file))


def load_info(stored, file):
    from fewstep.model import read_info

    return read_info(stored.header, file)


WRONG = {"deleted": (Path.unlink, "does not exist"), "altered": (alter, "was altered")}


@pytest.mark.parametrize("how", WRONG)
def test_a_snapshot_that_is_not_what_it_was_before_a_resume_is_named(run, tmp_path, how):
    mine = shutil.copytree(run, tmp_path / "run")
    result, file = go(mine, tmp_path / "out", metric=TO_GOAL), sorted(mine.iterdir())[2]
    bank = (tmp_path / "out" / "bank.safetensors").read_bytes()
    wrong, words = WRONG[how]
    wrong(file)
    for action in (
        lambda: go(mine, tmp_path / "out", metric=TO_GOAL, resume=True),
        lambda: average(tmp_path / "out" / "result.json", out=tmp_path / "again.safetensors"),
    ):
        with pytest.raises(FewstepError, match=f"{file.name}.*{words}"):
            action()
    assert not (tmp_path / "again.safetensors").exists()
    assert (tmp_path / "out" / "bank.safetensors").read_bytes() == bank
    shutil.copy(run / file.name, file)
    assert go(mine, tmp_path / "out", metric=TO_GOAL, resume=True)["coefficients"] == result["coefficients"]
    wrong(file)  # but a search that replaces it takes them as they are now
    sources = go(mine, tmp_path / "out", metric=TO_GOAL, overwrite=True)["snapshots"]
    assert len(sources) == K - (how == "deleted")


def flip(file, place=-100):
    """One bit of one byte; the last ones are of the differences."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "difference": (flip, "rows do not match"),
    "header": (lambda file: flip(file, file.read_bytes().index(b"fewstep-bank/1") + 100), "header does not match"),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-100]), "truncated or damaged"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_bank_is_made_again_on_resume_of_snapshots_that_are_intact(run, tmp_path, capfd, how):
    mine, out = shutil.copytree(run, tmp_path / "run"), tmp_path / "out"
    result, bank = go(mine, out, metric=TO_GOAL), (out / "bank.safetensors").read_bytes()
    (damage, words), file = DAMAGE[how], sorted(mine.iterdir())[2]
    damage(out / "bank.safetensors")
    damaged = (out / "bank.safetensors").read_bytes()
    assert damaged != bank
    alter(file)
    with pytest.raises(FewstepError, match=f"{file.name} was altered" if how == "difference" else words):
        go(mine, out, metric=TO_GOAL, resume=True)
    assert (out / "bank.safetensors").read_bytes() == damaged
    assert "this is done now" not in capfd.readouterr().err
    shutil.copy(run / file.name, file)
    assert go(mine, out, metric=TO_GOAL, resume=True)["coefficients"] == result["coefficients"]
    assert (out / "bank.safetensors").read_bytes() == bank
    told = capfd.readouterr().err
    assert words in told
    assert f"build the bank again from its checkpoints; all {K} are as they were, so this is done now" in told
    damage(out / "bank.safetensors")  # and of another storage it is still refused
    with pytest.raises(FewstepError, match="repeat the options" if how == "difference" else words):
        go(mine, out, metric=TO_GOAL, resume=True, storage="fp32")
    assert (out / "bank.safetensors").read_bytes() == damaged


@pytest.mark.parametrize("how", WRONG)
def test_a_snapshot_that_changes_while_the_search_goes_on_is_found_before_weights_are_saved(run, tmp_path, how):
    mine = shutil.copytree(run, tmp_path / "run")
    wrong, words = WRONG[how]
    file, calls = sorted(mine.iterdir())[2], iter(range(10**6))
    near = distance_to(GOAL)
    metric = Function("goal", lambda m, seed: (wrong(file) if next(calls) == 15 else 0) or near(m, seed))
    with pytest.raises(FewstepError, match=f"{file.name}.*{words}"):
        go(mine, tmp_path / "out", metric=metric)
    assert not (tmp_path / "out" / "combined.safetensors").exists()
    assert not (tmp_path / "out" / "result.json").exists()
    shutil.copy(run / file.name, file)
    go(mine, tmp_path / "out", metric=TO_GOAL, resume=True)
    go(run, tmp_path / "whole", metric=TO_GOAL)
    assert without_paths(tmp_path / "out") == without_paths(tmp_path / "whole")


def without_paths(out):
    told = content(out)
    return {**told, "snapshots": [{**source, "path": ""} for source in told["snapshots"]]}


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: [2 * x for x in c], "must sum to 1"),
        (lambda c: c[:-1], "coefficients for"),
        (lambda c: [c[0] + 1e-3, c[1] - 1e-3, *c[2:]], "altered"),
        (lambda c: [float("nan"), *c[1:]], "not finite"),
    ],
    ids=["sum", "count", "value", "nan"],
)
def test_an_edited_result_is_refused_and_nothing_is_written(searched, tmp_path, edit, words):
    told, file = json.loads((searched[1] / "result.json").read_text()), tmp_path / "result.json"
    told["coefficients"] = edit(told["coefficients"])
    file.write_text(json.dumps(told))
    (tmp_path / "again.safetensors").write_bytes(b"mine")
    with pytest.raises(FewstepError, match=words):
        average(file, out=tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == b"mine"
    file.write_text("{}")
    with pytest.raises(FewstepError, match=r"not the result.json of a search"):
        average(file, out=tmp_path / "again.safetensors")


def test_functions_that_are_none_are_refused(tmp_path):
    (tmp_path / "mine.py").write_text("number = 3\n")
    for text in (f"{tmp_path}/mine.py:number", f"{tmp_path}/mine.py:absent", f"{tmp_path}/none.py:f", "mine.py:1x"):
        with pytest.raises(FewstepError, match="--metric"):
            load_function(text)


# -------------------------------------------------------------------------------------------- stopped and gone on


class Stop(BaseException):
    """The process dies, so to say."""


def stopping(patch, after, error=Stop):
    """From its `after`-th evaluation on, of candidates or of a report, each ends the process before it is kept."""
    count = [0]
    for owner, name in ((Scorer, "evaluate"), (Combination, "records"), (Combination, "save")):

        def stopped(self, *args, _done=getattr(owner, name), **kwargs):
            made = _done(self, *args, **kwargs)
            count[0] += 1
            if count[0] == after:
                raise error
            return made

        patch.setattr(owner, name, stopped)
    return count


@pytest.mark.parametrize(
    ("search", "every"), [("evolution", 1), ("span", 3), pytest.param("span", 1, marks=pytest.mark.slow)]
)
def test_stopped_at_every_evaluation_and_resumed_it_is_the_whole_search(run, data, tmp_path, search, every):
    """Each life does `every` evaluations and dies in the next, which is lost; span's features are kept until the result."""
    plan, how = replace(TINY, search=search, budget=18, num=16, rerank_num=16, report_num=8), {"first_nimg": 400}
    images(run, tmp_path / "whole", plan, data=data, **how)
    lives, out = 0, tmp_path / "out"
    while True:
        with pytest.MonkeyPatch.context() as patch:
            stopping(patch, every + 1)
            try:
                images(run, out, plan, data=data, resume=lives > 0, **how)
                break
            except Stop:
                lives += 1
                assert not (out / "result.json").exists()
    assert every * (lives + 1) >= len(rows(out)) > 20  # evaluations, reports, and the saving of the weights
    assert not (out / "features").exists()
    assert content(out) == content(tmp_path / "whole")
    for name in ("combined.safetensors", "bank.safetensors"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_says_how_to_go_on(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stopping(patch, 13, KeyboardInterrupt)
        with pytest.raises(Interrupted, match=f"every score is kept; continue with --resume --out {tmp_path}") as end:
            go(run, tmp_path / "out", metric=TO_GOAL)
    assert end.value.exit_code == 130
    go(run, tmp_path / "out", metric=TO_GOAL, resume=True)
    go(run, tmp_path / "whole", metric=TO_GOAL)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    for _ in range(2):  # a finished search is replayed, and nothing is evaluated again
        with monkeypatch.context() as patch:
            patch.setattr(Scorer, "evaluate", lambda *_: pytest.fail("evaluated again"))
            go(run, tmp_path / "out", metric=TO_GOAL, resume=True)
        assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_resumed_search_repeats_its_options(run, data, tmp_path):
    out, files = tmp_path / "out", sorted(run.iterdir())
    images(run, out, data=data)
    bank = (out / "bank.safetensors").read_bytes()
    plans = [{"budget": 21}, {"num": 21}, {"search": "random"}, {"rerank": 3}, {"baselines": ("ema",)}]
    for change in plans:
        with pytest.raises(FewstepError, match="begun with other"):
            images(run, out, replace(TINY, **change), data=data, resume=True)
    for change in ({"steps": 2}, {"metric": "kid"}, {"share": 0.4}):
        with pytest.raises(FewstepError, match="begun with other"):
            images(run, out, data=data, **change, resume=True)
    for sources, change in (
        (run, {"every": 2}),
        (run, {"storage": "fp32"}),
        (files[1:], {}),
        (run, {"first_nimg": 200}),
    ):
        with pytest.raises(FewstepError, match="repeat"):
            images(sources, out, data=data, **change, resume=True)
    assert (out / "bank.safetensors").read_bytes() == bank
    before = content(out)
    images(run, out, replace(TINY, minutes=60.0), data=data, resume=True)  # how long it may take is free
    assert content(out) == before


def test_nothing_is_replaced_unless_asked_for(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FewstepError, match="holds no search to resume"):
        go(run, out, metric=TO_GOAL, resume=True)
    go(run, out, metric=TO_GOAL)
    before = content(out)
    with pytest.raises(FewstepError, match="--resume or --overwrite"):
        go(run, out, metric=TO_GOAL)
    assert content(out) == before
    (out / "mine.txt").write_text("kept")
    (out / ".bank.safetensors.123.part").mkdir()  # of a process that was killed
    (out / "report.html").write_text("of the old search")
    go(run, out, replace(TINY, search="random"), metric=TO_GOAL, overwrite=True)
    assert content(out)["chosen"] == "random/0"
    assert (out / "mine.txt").exists()
    assert not list(out.glob(".*.part"))
    assert not (out / "report.html").exists()
    assert "evolution/0" not in {row["search"] for row in rows(out) if "cost" in row}


def test_two_processes_do_not_search_in_one_folder(run, tmp_path):
    seen, out = [], tmp_path / "out"

    def cost(model, seed):
        if not seen:
            seen.append(1)
            with pytest.raises(FewstepError, match="in use by another process"):
                go(run, out, metric=TO_GOAL, overwrite=True)
        return distance_to(GOAL)(model, seed)

    go(run, out, metric=Function("goal", cost))
    go(run, tmp_path / "whole", metric=TO_GOAL)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "victim", ["bank.safetensors", "search.json", "evaluations.jsonl", "combined.safetensors", "result.json"]
)
def test_a_full_disk_says_so_and_nothing_is_missing_after_a_resume(run, tmp_path, victim):
    out, opened, replaced = tmp_path / "out", Path.open, os.replace
    calls = iter(range(10**6))

    def full(source, target):
        if Path(target).name == victim:
            raise ENOSPC
        replaced(source, target)

    def half_open(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        return HalfWritten(file) if mode == "a" and self.name == victim and next(calls) == 13 else file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        patch.setattr(Path, "open", half_open)
        with pytest.raises(FewstepError, match=f"the disk is full: .*{victim}"):
            go(run, out, metric=TO_GOAL)
    assert not list(out.rglob("*.part"))
    begun = (out / "search.json").exists()
    assert begun == (victim not in ("bank.safetensors", "search.json"))
    go(run, out, metric=TO_GOAL, resume=begun)
    go(run, tmp_path / "whole", metric=TO_GOAL)
    assert content(out) == content(tmp_path / "whole")
    assert [r for r in rows(out) if "report" in r] == [r for r in rows(tmp_path / "whole") if "report" in r]


def test_a_time_limit_leaves_each_search_its_first_vectors_and_a_result(run, tmp_path):
    plan = replace(TINY, budget=60, minutes=1e-9, baselines=("ema", "random"))
    result = go(run, tmp_path / "out", plan, metric=TO_GOAL)
    assert {name: len(trace) for name, trace in result["traces"].items()} == {
        "evolution/0": 10,
        "ema/0": 12,
        "random/0": 10,
    }
    assert load(tmp_path / "out").sha256 == result["weights_sha256"]
    longer = go(run, tmp_path / "out", replace(plan, minutes=60.0), metric=TO_GOAL, resume=True)
    assert len(longer["traces"]["evolution/0"]) == 60


# ------------------------------------------------------------------------------------------------------------ racing


def test_a_gate_drops_only_what_is_worse_than_all_it_keeps():
    """Rough costs that are 1 too high and 0.1 uncertain."""
    g = np.random.default_rng(0)
    gate, costs = Gate(keep=4), np.linspace(1, 3, 9)
    assert gate.closed_to(1e9) is None  # it has seen nothing
    scores = [Score(float(c), float(c + 1 + 0.1 * g.standard_normal())) for c in costs]
    gate.add(scores)
    assert gate.closed_to(2.7) is None  # a full cost of 1.7 +- 0.1, and the worst of the best 4 has 1.75
    assert gate.closed_to(2.9) is None  # nor is 1.9 three standard deviations worse
    assert gate.closed_to(4.0) == pytest.approx(3.0, abs=0.15)
    assert gate.closed_to(math.inf) is None
    gate.add([Score(0.0, 1.0, dropped=True), Score(math.inf, 1.0), Score(0.0, math.inf)])
    assert len(gate.seen) == 9


def rough():
    """A fitness whose features are 64 noisy looks at the distance from the goal, and its cost their mean."""

    class Looks:
        name = "looks"

        def features(self, model, first, last, seed, /):
            near = distance_to(GOAL)(model, 0)
            noise = np.random.default_rng(seed).standard_normal(64)[first:last]
            own = np.random.default_rng(weights_key(model)).standard_normal(64)[first:last]
            return torch.from_numpy(near + noise + own)[:, None]

        def cost(self, model, features, seed, /):
            return float(features.mean())

    return Looks()


def raced(run, out, fitness, plan, monkeypatch, gate=True):
    """The search by its own function, for such a fitness has no name on the command line."""
    bank = Bank.build(sorted(run.iterdir()), out.with_suffix(".bank"), "fp32", quiet=True)
    model = load(sorted(run.iterdir())[-1])
    with monkeypatch.context() as patch:
        if not gate:
            patch.setattr(Gate, "closed_to", lambda self, rough: None)
        patch.setattr(Combination, "records", lambda self, name, tensors, tick: [record([1.0, 2.0], "looks")])
        return combination.combine(bank, model, fitness, fitness, out, plan, quiet=True)


def test_racing_spares_images_drops_what_is_worse_and_finds_the_same(run, tmp_path, monkeypatch):
    plan = replace(TINY, budget=120, num=64, rerank_num=64)
    fast = raced(run, tmp_path / "fast", rough(), plan, monkeypatch)
    slow = raced(run, tmp_path / "slow", rough(), plan, monkeypatch, gate=False)
    with pytest.raises(FewstepError, match="--resume or --overwrite"):
        raced(run, tmp_path / "fast", rough(), plan, monkeypatch)
    assert fast["cost"]["raced_out"] > 10
    assert slow["cost"]["raced_out"] == 0
    assert fast["cost"]["images"] == slow["cost"]["images"] - 48 * fast["cost"]["raced_out"]
    assert fast["coefficients"] == slow["coefficients"]
    assert fast["traces"] == slow["traces"]
    dropped = [row for row in rows(tmp_path / "fast") if row.get("dropped")]
    assert all(row["images"] == 16 and row["key"].endswith("|evolution/0") for row in dropped)
    truth = {row["key"]: row["cost"] for row in rows(tmp_path / "slow") if f"|{CANDIDATE_SEED}|" in row.get("key", "")}
    worst_parent = sorted(truth.values())[11]
    assert all(truth[row["key"].removesuffix("|evolution/0")] > worst_parent for row in dropped)


def test_a_dropped_candidate_is_never_chosen_whatever_was_predicted(run, tmp_path, monkeypatch):
    """A gate that drops every other one and predicts the best of costs: none of them is re-ranked, none is quoted."""
    calls = iter(range(10**6))
    monkeypatch.setattr(Gate, "closed_to", lambda self, rough: -1e9 if next(calls) % 2 else None)
    result = raced(run, tmp_path / "out", rough(), replace(TINY, num=64, rerank_num=64, rerank=50), monkeypatch)
    found = [row for row in rows(tmp_path / "out") if "cost" in row]
    assert result["cost"]["raced_out"] == 10
    again = {row["key"].split("|")[3] for row in found if f"|{RERANK_SEED}|" in row["key"]}
    dropped = {row["key"].split("|")[3] for row in found if row["dropped"]}
    assert len(dropped) == 10
    extra = {hashlib.sha256(v.tobytes()).hexdigest()[:24] for v in (np.full(K, 1 / K), np.eye(K)[-1])}
    assert not dropped & (again - extra)
    assert min(cost for _, cost in result["traces"]["evolution/0"] if cost is not None) > -1e9


def test_what_one_search_dropped_another_measures_and_a_resume_repeats_both(run, data, tmp_path):
    """Scores of dropped candidates are their search's alone; asked again, each gets what it got."""
    bank = Bank.build(sorted(run.iterdir()), tmp_path / "bank.safetensors", "fp32", quiet=True)
    wearer, vector = Wearer(bank, load(sorted(run.iterdir())[-1])), np.full((1, K), 1 / K)

    def scorer():
        return Scorer(wearer, rough(), 64, 1, tmp_path / "scores.jsonl")

    class Closed(Gate):
        def closed_to(self, rough):
            return 7.0

    (dropped,), (full,) = scorer()(vector, "a", Closed(1)), scorer()(vector, "b")
    assert (dropped.cost, dropped.dropped, full.dropped) == (7.0, True, False)
    for search, score in {"a": dropped, "b": full, "c": full}.items():
        (again,) = scorer()(vector, search)
        assert (again.cost, again.dropped) == (score.cost, score.dropped)


# ----------------------------------------------------------------------------------------------------------- kill -9

LIFE = """
import os, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
from fewstep.api import Plan, combine
from fewstep.combination import Combination
Combination.draw = lambda self, vector: None
"""

SEARCH = """
result = combine(run, out, Plan(**plan), data=data, extractor="pixels", device="cpu", quiet=True, resume=resume)
assert result["chosen"] and result["records"]["lcsc"]
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_times(run, data, tmp_path, seed):
    """THE promise: killed at any moment, resumed until done, it has the uninterrupted search's result."""
    plan = {**vars(TINY), "budget": 60, "baselines": ("random",)}
    images(run, tmp_path / "whole", Plan(**plan), data=data)
    out, killed, draw = tmp_path / "out", 0, random.Random(seed)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["fewstep.api"])

    def written():
        return (out / "evaluations.jsonl").stat().st_size if (out / "evaluations.jsonl").exists() else 0

    for _ in range(100):
        names = {"run": str(run), "data": data, "plan": plan, "out": str(out), "resume": (out / "search.json").exists()}
        process, seen = context.Process(target=exec, args=(LIFE + SEARCH, names)), written()
        process.start()
        while process.is_alive() and killed < 8 and written() <= seen:
            time.sleep(0.001)  # let it score one at least, else it would never get anywhere
        time.sleep(draw.uniform(0, 0.1))
        if killed < 8 and process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    assert killed >= 3
    assert content(out) == content(tmp_path / "whole")
    assert (out / "combined.safetensors").read_bytes() == (tmp_path / "whole" / "combined.safetensors").read_bytes()
