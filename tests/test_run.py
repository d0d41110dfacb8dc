"""A run: killed at any moment, resumed, it ends as if nothing had happened; and nobody's files are lost."""

import hashlib
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import safetensors
import torch
from PIL import Image
from torch import Tensor

from fewstep import codec
from fewstep import run as module
from fewstep.data import DataSpec, to_uint8
from fewstep.ema import ConstantEMA, PowerEMA
from fewstep.evaluation import GRID_SEED, Generator
from fewstep.model import load
from fewstep.networks import MLP
from fewstep.objectives import EDM, Denoising, Diffusion, LogNormal, PairObjective, SquaredL2
from fewstep.pictures import beside, grid
from fewstep.progress import LearningRate, SquareRoot, TargetDecay
from fewstep.recipe import Evaluation, Optimizer, Recipe
from fewstep.recipes.ct import objective as ct_objective
from fewstep.recipes.ect import objective as ect_objective
from fewstep.recipes.edm import objective as edm_objective
from fewstep.run import Interrupted, Keeper, train
from fewstep.rundir import ALTERABLE, RunDir
from fewstep.snapshots import format as snapshot
from fewstep.types import FewstepError
from full_disk import ENOSPC, HalfWritten

CLOCKS = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without what costs time and shows nothing here: TensorBoard, git, the wait for the disk."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("fewstep.rundir.environment", lambda device: {"device": device})
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    g, path = np.random.default_rng(0), tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, images=g.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), labels=np.arange(40) % 3)
    return str(path)


def recipe(source, **changes):
    """Twelve steps of 8 images that log, save, draw and evaluate often."""
    plain = Recipe(
        name="test", objective=ect_objective(stages=4, c=0.03), network=MLP(8, 2), conditional=True,
        data=DataSpec(source, flip=True), total_nimg=96, batch_size=8, lr=LearningRate(1e-2), optimizer=Optimizer("radam"),
        averages=(PowerEMA(0.1), ConstantEMA(0.5)),
        log_nimg=16, snapshot_nimg=24, grid_nimg=48, evaluation=Evaluation(every_nimg=32, extractor="pixels", num=6),
    )  # fmt: skip
    return replace(plain, **changes)


def go(r, out, **how):
    return train(r, out, device="cpu", quiet=True, **how)


def rows(file):
    """The rows of a log without the clock's."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]


def everything(out):
    """All that a run leaves: hashes of files, rows of logs, tensors of the state."""
    state = snapshot.read(out / "state.safetensors")
    found = {
        "state": state.weights_sha256,
        "nimg": state.header["state"]["nimg"],
        "skipped": state.header["state"]["skipped"],
    }
    found |= {name: rows(out / f"{name}.jsonl") for name in ("log", "metrics", "problems")}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        if path.suffix in (".safetensors", ".png") and path.stem != "state":
            found[str(path.relative_to(out))] = hashlib.sha256(path.read_bytes()).hexdigest()
    found["files"] = sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.name != "resumes.jsonl")
    return found


def assert_same(a, b):
    differing = sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))
    assert not differing, {key: (a.get(key), b.get(key)) for key in differing}


@pytest.fixture(scope="session")
def uninterrupted(data, tmp_path_factory):
    """What an uninterrupted run leaves, and where."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        out = tmp_path_factory.mktemp("run") / "whole"
        go(recipe(data), out)
    return everything(out), out


class Stop(Exception):
    pass


def stop_after(monkeypatch, nimg):
    """The process dies, so to say, when the step that ends at nimg is done and kept."""
    keep = Keeper.keep

    def stopped(self, step):
        keep(self, step)
        if step.nimg == nimg:
            raise Stop

    monkeypatch.setattr(Keeper, "keep", stopped)


# ------------------------------------------------------------------------------------------------- what a run leaves


def test_what_a_run_leaves(uninterrupted, data):
    found, out = uninterrupted
    assert found["files"] == sorted(
        [
            "recipe.json",
            "environment.json",
            "log.jsonl",
            "metrics.jsonl",
            "state.safetensors",
            ".lock",
            "averages",
            "samples",
            "snapshots",
        ]
        + [f"snapshots/{n:012d}.safetensors" for n in (24, 48, 72, 96)]
        + [f"samples/{n:012d}.png" for n in (48, 96)]
        + [f"averages/{name}.safetensors" for name in ("best", "ema-0.5", "power-0.1")]
    )
    assert [row["nimg"] for row in found["log"]] == [16, 24, 32, 48, 64, 72, 80, 96]
    assert [(row["nimg"], row["weights"]) for row in found["metrics"]] == [
        (n, name) for n in (32, 64, 96) for name in ("online", "power-0.1", "ema-0.5")
    ]
    assert (found["nimg"], found["skipped"], found["problems"]) == (96, 0, [])
    run = RunDir(out)
    assert run.recipe() == recipe(data)
    online = load(f"{out}:online")
    info = online.info
    assert (info.nimg, info.weights, info.recipe, info.data) == (96, "online", "test", "data")
    assert (online.info.class_names, online.info.architecture.num_classes) == (("0", "1", "2"), 3)
    state = snapshot.read(run.state_file)
    assert all(torch.equal(t, state.tensors[f"model/{name}"]) for name, t in online.denoiser.state_dict().items())
    best = load(out).info.best
    values = [row["record"]["value"] for row in found["metrics"]]
    assert best["record"]["value"] == min(values)
    assert best in found["metrics"]
    assert run.state_file.stat().st_mode == run.log_file.stat().st_mode  # safetensors' own files are their owner's only


def test_a_row_is_the_mean_of_its_steps(uninterrupted, data, tmp_path):
    found, _ = uninterrupted
    go(recipe(data, log_nimg=8), tmp_path / "fine")
    each = {row["nimg"]: row for row in rows(tmp_path / "fine" / "log.jsonl")}
    assert list(each) == list(range(8, 97, 8))
    for row, before in zip(found["log"], [0, 16, 24, 32, 48, 64, 72, 80], strict=True):
        parts = [each[n]["losses"]["consistency"] for n in range(before + 8, row["nimg"] + 1, 8)]
        assert row["losses"]["consistency"] == pytest.approx(sum(parts) / len(parts), rel=1e-6)
        assert row["stage"] == (row["nimg"] - 8) * 4 // 96
        assert row["lr"] == 0.01


def test_loss_by_noise_level_is_the_loss_sorted_by_t(data, tmp_path):
    seen = []

    add = module.LogRow.add

    def spy(self, step):
        seen.append(step)
        add(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.LogRow, "add", spy)
        go(recipe(data, total_nimg=16, snapshot_nimg=0), tmp_path / "run")
    (row,) = rows(tmp_path / "run" / "log.jsonl")
    t, loss = (torch.cat([getattr(s, name) for s in seen]) for name in ("t", "per_sample"))
    edges = [0, *np.geomspace(0.002, 80, 17), float("inf")]
    for (low, high), value in zip(pairwise(edges), row["loss_by_sigma"], strict=True):
        inside = (t > low) & (t <= high)
        assert (value is None) == (not inside.any())
        if inside.any():
            assert value == pytest.approx(loss[inside].mean().item(), rel=1e-5)
    assert sum(v is not None for v in row["loss_by_sigma"]) > 3


def test_training_starts_from_the_weights_it_is_given(uninterrupted, data, tmp_path):
    _, out = uninterrupted
    init = load(f"{out}:online")
    go(recipe(data, lr=LearningRate(1e-60), total_nimg=8), tmp_path / "run", init=init)
    for name in ("online", "ema-0.5", "power-0.1"):
        model = load(f"{tmp_path / 'run'}:{name}")
        assert model.sha256 == init.sha256
        assert model.info.initialised_from == init.sha256
    with pytest.raises(FewstepError, match="another architecture"):
        go(recipe(data, network=MLP(16, 2)), tmp_path / "other", init=init)


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize("nimg", [8, 40, 48, 96])
def test_a_run_stopped_after_any_step_and_resumed_is_the_whole_run(uninterrupted, data, tmp_path, nimg):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, nimg)
        with pytest.raises(Stop):
            go(recipe(data), tmp_path / "run")
    state = snapshot.read(tmp_path / "run" / "state.safetensors")
    assert state.header["state"]["nimg"] == nimg // 24 * 24
    go(recipe(data), tmp_path / "run", resume=True)
    assert_same(everything(tmp_path / "run"), uninterrupted[0])


def test_resuming_a_finished_run_changes_nothing(uninterrupted, data, tmp_path):
    go(recipe(data), tmp_path / "run")
    for _ in range(2):
        go(recipe(data), tmp_path / "run", resume=True)
        assert_same(everything(tmp_path / "run"), uninterrupted[0])


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_a_target_network_and_other_optimizers_resume_too(data, tmp_path, optimizer):
    r = recipe(
        data, objective=ct_objective(2, 20), sigma_min=0.002, target_decay=TargetDecay(SquareRoot(2, 20)), grid_nimg=0,
        optimizer=Optimizer(optimizer, weight_decay=0.1), evaluation=Evaluation(),
        lr=LearningRate(1e-2, warmup_nimg=64, decay_nimg=40),
    )  # fmt: skip
    go(r, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 40)
        with pytest.raises(Stop):
            go(r, tmp_path / "run")
    go(r, tmp_path / "run", resume=True)
    assert_same(everything(tmp_path / "run"), everything(tmp_path / "whole"))


def test_seconds_go_on_counting(data, tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("fewstep.run.time.monotonic", lambda: now.__setitem__(0, now[0] + 1) or now[0])
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 48)
        with pytest.raises(Stop):
            go(recipe(data), tmp_path / "run")
    now[0] = 0.0  # another boot
    go(recipe(data), tmp_path / "run", resume=True)
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


# ------------------------------------------------------------------------------------------- killed, told to stop

LIFE = """
import json, os, random, signal, sys, time
sys.modules["torch.utils.tensorboard"] = None
import torch
torch.set_num_threads(1)
from pathlib import Path
from fewstep import codec, run
from fewstep.run import Interrupted, train
out = Path(out)
"""

TRAINING = """
how = {"resume": True} if (out / "state.safetensors").exists() else {"overwrite": (out / "recipe.json").exists()}
try:
    train(codec.decode(json.loads(recipe)), out, device="cpu", quiet=True, **how)
except Interrupted as end:
    (out.parent / "told").write_text(str(end))
    sys.exit(end.exit_code)
"""

# The process kills itself at its k-th dangerous moment: before and after every rename, in the middle of every
# safetensors file, in the middle of every line of a log.
SUICIDE = """
moments = 0
def moment():
    global moments
    moments += 1
    if moments == k:
        os.kill(os.getpid(), signal.SIGKILL)
replace_, save_, rows_ = os.replace, run.save_model.__globals__["snapshot"].save_file, run.append_jsonl
def replace(a, b):
    moment(); replace_(a, b); moment()
def save_file(tensors, path, metadata):
    save_(tensors, path, metadata=metadata)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[:len(whole) // 2])
    Path(path).with_name(".tmpAbCdEf").write_bytes(whole[:100])
    moment()
    Path(path).write_bytes(whole)
def append(path, row):
    text = json.dumps(row) + "\\n"
    with open(path, "a") as file:
        file.write(text[:len(text) // 2]); file.flush(); moment(); file.write(text[len(text) // 2:]); file.flush(); moment()
os.replace, run.save_model.__globals__["snapshot"].save_file, run.append_jsonl = replace, save_file, append
unlink_ = Path.unlink
def unlink(self, *args, **kwargs):
    moment(); unlink_(self, *args, **kwargs)
Path.unlink = unlink
"""


def life(script, **names):
    """A process that runs this; it has imported fewstep already, so that it is soon at work."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["fewstep.run", "torch._dynamo"])  # optimizers import the latter when first built
    process = context.Process(target=exec, args=(LIFE + script, names))
    process.start()
    return process


def end(process, seconds=60.0):
    process.join(seconds)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def sound(out):
    """Whatever a kill left: every file that a loader would find is whole."""
    for path in out.rglob("*.safetensors"):
        if ".part" not in str(path):
            snapshot.read(path)
    for path in out.rglob("*.json"):
        if ".part" not in str(path):
            json.loads(path.read_text())
    if (out / "averages").exists():
        assert load(out).info.nimg % 8 == 0


def kill_at_moments(out, r, draw):
    """Kill at some moment of each life, until one comes to its end; how many were killed."""
    text, killed = json.dumps(codec.encode(r)), 0
    while code := end(life(SUICIDE + TRAINING, out=str(out), recipe=text, k=draw.randint(25, 75))):
        assert code == -signal.SIGKILL
        killed += 1
        sound(out)
        assert killed < 100, "no progress"
    return killed


def often(data):
    """Saves after every step, so that most of the time is spent in writing files."""
    return recipe(
        data, total_nimg=48, snapshot_nimg=8, log_nimg=8, grid_nimg=16, evaluation=Evaluation(16, "pixels", 4)
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_killed_while_writing_again_and_again(data, tmp_path, seed):
    go(often(data), tmp_path / "whole")
    assert kill_at_moments(tmp_path / "run", often(data), random.Random(seed)) >= 2
    assert_same(everything(tmp_path / "run"), everything(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("keeping", [{}, {"snapshot_keep": 1, "snapshot_averages": True}])
def test_killed_once_at_every_moment_there_is(data, tmp_path, keeping):
    """Every rename, half file and half line of a short run, one kill each; then resumed to its end."""
    r = replace(often(data), total_nimg=24, averages=(ConstantEMA(0.5),), **keeping)
    go(r, tmp_path / "whole")
    whole, text, k = everything(tmp_path / "whole"), json.dumps(codec.encode(r)), 0
    while True:
        k += 1
        code = end(life(SUICIDE + TRAINING, out=str(tmp_path / f"{k}"), recipe=text, k=k))
        if code == 0:
            break
        sound(tmp_path / f"{k}")
        assert end(life(TRAINING, out=str(tmp_path / f"{k}"), recipe=text)) == 0
        assert_same(everything(tmp_path / f"{k}"), whole)
    assert k > 50


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_kill_9_at_random_times(data, tmp_path, seed):
    """THE promise: killed at any moment, resumed until done, it has the uninterrupted run's weights, rows and files."""
    r = replace(often(data), total_nimg=160)
    go(r, tmp_path / "whole")
    text, draw, out, killed = json.dumps(codec.encode(r)), random.Random(seed), tmp_path / "run", 0
    for _ in range(100):
        process = life(TRAINING, out=str(out), recipe=text)
        begun, seen = time.monotonic(), snapshot_count(out)
        while process.is_alive() and snapshot_count(out) <= seen and time.monotonic() - begun < 60:
            time.sleep(0.005)  # let it save once at least, else slow machines never get anywhere
        time.sleep(draw.uniform(0, 0.1))
        if killed < 3:
            os.kill(process.pid, signal.SIGKILL)
        if (code := end(process)) == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        sound(out)
    assert killed >= 1
    assert_same(everything(out), everything(tmp_path / "whole"))


def snapshot_count(out):
    return len(list((out / "snapshots").glob("*.safetensors")))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_and_says_how_to_go_on(data, tmp_path, number):
    r = recipe(data, total_nimg=800_000, snapshot_nimg=0, grid_nimg=0, evaluation=Evaluation())
    out = tmp_path / "run"
    process = life(TRAINING, out=str(out), recipe=json.dumps(codec.encode(r)))
    begun = time.monotonic()
    while not (out / "log.jsonl").exists() and time.monotonic() - begun < 60:
        time.sleep(0.01)
    os.kill(process.pid, number)
    assert end(process) == 128 + number
    state = snapshot.read(out / "state.safetensors").header["state"]
    told = (tmp_path / "told").read_text()
    assert told == f"{signal.Signals(number).name}: saved at {state['nimg']} images; continue with --resume --out {out}"
    assert state["nimg"] >= 16
    log = rows(out / "log.jsonl")
    assert log[-1]["nimg"] == state["nimg"]
    assert load(out).info.nimg == state["nimg"]
    # the state is that of a run that simply went so far
    with pytest.MonkeyPatch.context() as patch:
        stop_and_save(patch, state["nimg"])
        with pytest.raises(Stop):
            go(r, tmp_path / "again")
    assert (
        snapshot.read(tmp_path / "again" / "state.safetensors").weights_sha256
        == snapshot.read(out / "state.safetensors").weights_sha256
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, state["nimg"] + 16)
        with pytest.raises(Stop):
            go(r, out, resume=True)


def stop_and_save(monkeypatch, nimg):
    keep = Keeper.keep

    def stopped(self, step):
        keep(self, step)
        if step.nimg == nimg:
            self.save()
            raise Stop

    monkeypatch.setattr(Keeper, "keep", stopped)


@pytest.mark.parametrize("nimg", [8, 96])
def test_a_signal_at_any_step_and_resume_is_the_whole_run_but_for_its_extra_row(uninterrupted, data, tmp_path, nimg):
    keep = Keeper.keep

    def told(self, step):
        keep(self, step)
        if step.nimg == nimg:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "keep", told)
        with pytest.raises(Interrupted, match=f"SIGTERM: saved at {nimg} images") as caught:
            go(recipe(data), tmp_path)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    go(recipe(data), tmp_path, resume=True)
    found, whole = everything(tmp_path), dict(uninterrupted[0])
    log, expected = found.pop("log"), whole.pop("log")
    assert [row["nimg"] for row in log] == sorted({nimg, *(row["nimg"] for row in expected)})
    assert_same(found, whole)


# ------------------------------------------------------------------------------------------------ the run directory


def test_an_existing_run_is_never_continued_or_replaced_by_guess(uninterrupted, data):
    whole, out = uninterrupted
    with pytest.raises(FewstepError, match=r"continue it with --resume, replace it with --overwrite"):
        go(recipe(data), out)
    assert_same(everything(out), whole)


def test_what_is_no_run_is_not_resumed(data, tmp_path):
    for out in (tmp_path / "none", tmp_path):
        with pytest.raises(FewstepError, match="holds no run to resume"):
            go(recipe(data), out, resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_refused_and_untouched(data, tmp_path, overwrite):
    for name in ("notes.txt", "samples/mine.png", "snapshots/000000000008.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(FewstepError, match="is not empty and no fewstep run"):
        go(recipe(data), tmp_path, overwrite=overwrite)
    (tmp_path / "recipe.json").write_text('{"cake": ["flour", "eggs"]}')
    with pytest.raises(FewstepError, match="choose another --out"):
        go(recipe(data), tmp_path, overwrite=overwrite)
    with pytest.raises(FewstepError, match="holds no recipe"):
        go(recipe(data), tmp_path, resume=True)
    (tmp_path / "recipe.json").unlink()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_overwriting_removes_the_old_run_and_nothing_else(uninterrupted, data, tmp_path):
    out = tmp_path / "run"
    go(recipe(data, total_nimg=192, seed=3, averages=(ConstantEMA(0.25),)), out)
    mine = ["notes.txt", "samples/mine.png", "snapshots/notes.txt", "report/index.html"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    (out / "problems.jsonl").write_text('{"nimg": 8, "problem": "old"}\n')
    (out / "report.html").write_text("old")
    go(recipe(data), out, overwrite=True)
    for name in mine:
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    (out / "report").rmdir()
    assert_same(everything(out), uninterrupted[0])


def test_overwrite_of_nothing_is_a_new_run(data, tmp_path):
    go(recipe(data, total_nimg=8), tmp_path / "run", overwrite=True)
    (tmp_path / "empty").mkdir()
    go(recipe(data, total_nimg=8), tmp_path / "empty")


def test_a_run_killed_before_its_recipe_was_written_starts_anew(uninterrupted, data, tmp_path):
    (tmp_path / ".recipe.json.123.part").mkdir()
    (tmp_path / ".recipe.json.123.part" / "recipe.json").write_text("{")
    (tmp_path / ".lock").touch()
    go(recipe(data), tmp_path)
    assert_same(everything(tmp_path), uninterrupted[0])


def test_a_run_without_a_state_says_what_to_do(data, tmp_path):
    go(recipe(data, total_nimg=8), tmp_path)
    (tmp_path / "state.safetensors").unlink()
    with pytest.raises(FewstepError, match="stopped before it saved anything: leave out --resume to start it again"):
        go(recipe(data, total_nimg=8), tmp_path, resume=True)


def test_leftovers_of_a_kill_are_invisible_and_removed(uninterrupted, data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 56)
        with pytest.raises(Stop):
            go(recipe(data), tmp_path)
    for name in (
        ".state.safetensors",
        "averages/.ema-0.9.safetensors",
        "averages/.best.safetensors",
        "snapshots/.000000000099.safetensors",
    ):
        folder = tmp_path / f"{name}.4242.part"
        folder.mkdir()
        (folder / name.split("/.")[-1]).write_bytes(b"half")
        (folder / ".tmpXYZ").write_bytes(b"half")
    assert load(f"{tmp_path}:online").info.nimg == 48
    assert load(tmp_path).info.nimg == 32  # the best
    for name in ("snapshots/000000000056.safetensors", "samples/000000000056.png"):  # saved after the state, at 48
        (tmp_path / name).write_bytes(b"will be made again, if the recipe still says so")
    with pytest.raises(FewstepError, match=r"it has power-0.1, ema-0.5, best, online"):
        load(f"{tmp_path}:ema-0.9")
    go(recipe(data), tmp_path, resume=True)
    assert_same(everything(tmp_path), uninterrupted[0])


def test_a_torn_row_is_dropped_and_made_again(uninterrupted, data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 56)
        with pytest.raises(Stop):
            go(recipe(data), tmp_path)
    for name in ("log", "metrics", "problems"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write('{"nimg": 5')
    go(recipe(data), tmp_path, resume=True)
    found = everything(tmp_path)
    found["files"].remove("problems.jsonl")
    assert_same(found, uninterrupted[0])


CHANGES = {
    "name": "other", "objective": edm_objective(), "kind": "diffusion", "network": MLP(16, 2), "conditional": False,
    "sigma_data": 0.4,
    "sigma_min": 0.002, "total_nimg": 192, "batch_size": 16, "optimizer": Optimizer("adam"), "lr": LearningRate(1e-3),
    "averages": (ConstantEMA(0.5),), "seed": 1, "precision": "bf16", "starts_from": "x",
}  # fmt: skip


@pytest.mark.parametrize("field", CHANGES)
def test_a_run_is_not_resumed_with_another_recipe(uninterrupted, data, field):
    whole, out = uninterrupted
    with pytest.raises(FewstepError, match=f"was begun with another {field}: a resumed run keeps them"):
        go(recipe(data, **{field: CHANGES[field]}), out, resume=True)
    assert RunDir(out).recipe() == recipe(data)
    assert_same(everything(out), whole)


def test_all_that_differs_is_named(uninterrupted, data):
    _, out = uninterrupted
    with pytest.raises(FewstepError, match="with another batch_size, seed:"):
        go(recipe(data, seed=1, batch_size=16, microbatch=2), out, resume=True)


def test_what_may_change_does(uninterrupted, data, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 48)
        with pytest.raises(Stop):
            go(recipe(data), tmp_path)
    changes = {
        "microbatch": 3, "on_nonfinite": "skip", "max_skipped": 5, "log_nimg": 8, "snapshot_nimg": 32, "grid_nimg": 0,
        "evaluation": Evaluation(), "second_sigma": 0.5, "published": "x", "snapshot_keep": 9, "snapshot_averages": True,
    }  # fmt: skip
    assert changes.keys() | {"compile"} == ALTERABLE
    go(recipe(data, **changes), tmp_path, resume=True)
    assert RunDir(tmp_path).recipe() == recipe(data, **changes)
    assert [row["nimg"] for row in rows(tmp_path / "log.jsonl")] == [16, 24, 32, 48, 56, 64, 72, 80, 88, 96]
    assert load(f"{tmp_path}:online").info.second_sigma == 0.5
    ours, theirs = (snapshot.read(p / "state.safetensors").tensors for p in (tmp_path, uninterrupted[1]))
    for name, t in ours.items():
        torch.testing.assert_close(t, theirs[name], rtol=1e-3, atol=1e-4)


def test_two_handles_never_own_one_directory(data, tmp_path):
    first = RunDir(tmp_path)
    first.claim("cpu", recipe(data), resume=False, overwrite=False)
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(FewstepError, match="is in use by another process"):
            go(recipe(data), tmp_path, **how)
    assert json.loads((tmp_path / "recipe.json").read_text())["name"] == "test"
    first.release()
    go(recipe(data, total_nimg=8), tmp_path, overwrite=True)


def test_a_refusal_gives_the_directory_free(uninterrupted, data):
    _, out = uninterrupted
    with pytest.raises(FewstepError) as kept:  # the traceback holds train()'s frame, and with it the handle
        go(recipe(data, seed=9), out, resume=True)
    go(recipe(data), out, resume=True)
    assert "seed" in str(kept.value)


def test_another_process_is_refused_while_one_trains(data, tmp_path):
    r = recipe(data, total_nimg=800_000, snapshot_nimg=0, grid_nimg=0, evaluation=Evaluation())
    process = life(TRAINING, out=str(tmp_path / "run"), recipe=json.dumps(codec.encode(r)))
    try:
        begun = time.monotonic()
        while not (tmp_path / "run" / "state.safetensors").exists() and time.monotonic() - begun < 60:
            time.sleep(0.01)
        for how in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(FewstepError, match="in use by another process"):
                go(r, tmp_path / "run", **how)
        assert process.is_alive()
    finally:
        os.kill(process.pid, signal.SIGKILL)
        end(process)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 80)
        with pytest.raises(Stop):
            go(r, tmp_path / "run", resume=True)  # the lock ended with the process


# ------------------------------------------------------------------------------------------------------- not finite


@dataclass(frozen=True)
class Poisoned:
    """||a - b||^2, not a number for white images. Trusted by the codec as `test_run`."""

    def __call__(self, a: Tensor, b: Tensor, progress: object = None, /) -> Tensor:
        white = b.flatten(1).mean(1) > 0.9
        return (a - b).square().flatten(1).mean(1) * torch.where(white, float("nan"), 1.0)


def poisoned(tmp_path, monkeypatch, white=1, **changes):
    """A run in which `white` of its 40 images spoil a term, one in each epoch of 5 steps."""
    monkeypatch.setattr(codec, "_trusted", {*codec._trusted, Poisoned.__module__})
    g = np.random.default_rng(0)
    images = g.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    images[17 : 17 + white] = 255
    np.savez(tmp_path / "poisoned.npz", images=images)
    terms = {
        "denoising": Denoising(distance=SquaredL2("mean"), weighting=EDM()),
        "poisoned": Denoising(distance=Poisoned(), weighting=EDM()),
    }
    objective = PairObjective(pairs=Diffusion(LogNormal()), terms=terms)
    data = DataSpec(str(tmp_path / "poisoned.npz"), heldout=0.0)
    changes = {"data": data, **changes}
    return recipe("", objective=objective, conditional=False, evaluation=Evaluation(), grid_nimg=0, **changes)


def test_a_loss_that_is_not_finite_stops_with_its_cause_saved_and_resumable(tmp_path, monkeypatch):
    r, out = poisoned(tmp_path, monkeypatch, snapshot_nimg=0), tmp_path / "run"
    with pytest.raises(FewstepError) as caught:
        go(r, out)
    state = snapshot.read(out / "state.safetensors")
    nimg = state.header["state"]["nimg"]
    assert nimg < 40
    text = str(caught.value)
    assert "\n" not in text
    assert f"the poisoned term is nan for 1 of 8 images after {nimg} images" in text
    for words in (
        "first at t = ",
        "r = 0, stage 0",
        f"saved at {nimg} images in {out}",
        "--resume --on-nonfinite skip",
    ):
        assert words in text
    assert state.header["state"]["skipped"] == 0
    assert all(t.isfinite().all() for t in state.tensors.values())
    assert load(out).info.nimg == nimg
    with pytest.raises(FewstepError, match=f"after {nimg} images"):  # it meets the same batch again
        go(r, out, resume=True)
    assert [row["nimg"] for row in rows(out / "problems.jsonl")] == [nimg + 8]
    go(replace(r, on_nonfinite="skip"), out, resume=True)
    state = snapshot.read(out / "state.safetensors")
    assert state.header["state"]["nimg"] == 96
    assert state.header["state"]["skipped"] == len(rows(out / "problems.jsonl")) >= 2
    go(replace(r, on_nonfinite="skip"), tmp_path / "skipping")  # as if it had skipped from the start
    assert snapshot.read(tmp_path / "skipping" / "state.safetensors").weights_sha256 == state.weights_sha256


def test_skipping_counts_goes_on_and_stops_when_it_is_too_much(tmp_path, monkeypatch):
    r, out = poisoned(tmp_path, monkeypatch, on_nonfinite="skip", log_nimg=8), tmp_path / "run"
    go(r, out)
    problems = rows(out / "problems.jsonl")
    log = {row["nimg"]: row for row in rows(out / "log.jsonl")}
    spoilt = {row["nimg"] for row in problems}
    assert 2 <= len(spoilt) <= 3  # one in each epoch of five steps
    assert log.keys() == set(range(8, 97, 8)) - spoilt
    assert log[max(log)]["skipped"] == sum(n <= max(log) for n in spoilt)
    assert all(np.isfinite(list(row["losses"].values())).all() for row in log.values())
    steps = {float(t) for name, t in snapshot.read(out / "state.safetensors").tensors.items() if name.endswith("/step")}
    assert steps == {12.0 - len(spoilt)}  # the optimizer took no step either
    with pytest.raises(FewstepError, match="the poisoned term is nan"):
        go(replace(r, max_skipped=1), tmp_path / "strict")
    state = snapshot.read(tmp_path / "strict" / "state.safetensors").header["state"]
    assert (state["nimg"] + 8, state["skipped"]) == (sorted(spoilt)[1], 1)
    with pytest.raises(FewstepError, match="the poisoned term is nan"):
        go(replace(r, max_skipped=0), tmp_path / "stricter")
    assert snapshot.read(tmp_path / "stricter" / "state.safetensors").header["state"]["skipped"] == 0
    go(replace(r, max_skipped=100), tmp_path / "strict", resume=True)
    assert everything(tmp_path / "strict")["state"] == everything(out)["state"]
    assert rows(tmp_path / "strict" / "problems.jsonl") == problems


def test_data_that_is_all_poison_leaves_the_weights_alone(tmp_path, monkeypatch):
    r = poisoned(tmp_path, monkeypatch, white=23, on_nonfinite="skip", total_nimg=40)
    monkeypatch.setattr("fewstep.data.prepare.to_float", lambda x: torch.ones(x.shape))
    with pytest.raises(FewstepError, match="every step was skipped"):
        go(r, tmp_path / "run")
    fresh = replace(r, lr=LearningRate(1e-60))  # nothing in float32
    with pytest.raises(FewstepError, match="every step was skipped"):
        go(fresh, tmp_path / "fresh")
    a, b = (load(f"{tmp_path / name}:online").sha256 for name in ("run", "fresh"))
    assert a == b
    assert snapshot.read(tmp_path / "run" / "state.safetensors").header["state"]["skipped"] == 5
    assert rows(tmp_path / "run" / "log.jsonl") == []


@pytest.mark.parametrize("peak", [1e30, 1e37])
@pytest.mark.parametrize("optimizer", ["adam", "radam"])
def test_a_learning_rate_far_too_large_leaves_a_finite_state(data, tmp_path, peak, optimizer):
    r = recipe(
        data,
        lr=LearningRate(peak),
        optimizer=Optimizer(optimizer),
        snapshot_nimg=0,
        evaluation=Evaluation(),
        grid_nimg=0,
    )
    with pytest.raises(
        FewstepError, match=r"the consistency term is (nan|inf) for 8 of 8 images after \d+ images.*lower --lr.peak"
    ) as caught:
        go(r, tmp_path)
    state = snapshot.read(tmp_path / "state.safetensors")
    assert all(t.isfinite().all() for t in state.tensors.values())
    assert "saved at" in str(caught.value)
    with pytest.raises(FewstepError, match="the consistency term is"):  # resumable, though it helps nobody
        go(r, tmp_path, resume=True)


def test_weights_that_overflowed_never_replace_the_last_good_state(data, tmp_path, monkeypatch):
    r = recipe(data, grid_nimg=0, evaluation=Evaluation())
    steps = module.training_steps

    def sick(state, *args):
        for step in steps(state, *args):
            if step.nimg == 40:
                next(iter(state.parameters().values())).data[0] = float("inf")
            yield replace(step, problem="sick") if step.nimg == 40 else step

    monkeypatch.setattr(module, "training_steps", sick)
    with pytest.raises(
        FewstepError,
        match=r"^sick, stage 1; the weights overflowed before, so .* keeps its last good state: start again",
    ):
        go(r, tmp_path)
    state = snapshot.read(tmp_path / "state.safetensors")
    assert state.header["state"]["nimg"] == 24
    assert all(t.isfinite().all() for t in state.tensors.values())
    assert all(torch.isfinite(p).all() for p in load(f"{tmp_path}:ema-0.5").denoiser.parameters())


def test_the_stage_that_is_named_is_the_one_the_step_was_in(tmp_path, monkeypatch, data):
    r = recipe(data, snapshot_nimg=0, grid_nimg=0, evaluation=Evaluation())
    steps = module.training_steps

    def sick(state, *args):
        for step in steps(state, *args):
            yield replace(step, problem="sick") if step.nimg == 32 else step  # images 24 to 32 are the first of stage 1

    monkeypatch.setattr(module, "training_steps", sick)
    with pytest.raises(FewstepError, match=r"^sick, stage 1; saved at 24 images"):
        go(r, tmp_path)


# -------------------------------------------------------------------------------------------------------- full disk

RUST = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    "victim", ["000000000048.safetensors", "ema-0.5", "best", "state", "000000000048.png", "log.jsonl", "metrics"]
)
def test_a_full_disk_anywhere_loses_nothing(uninterrupted, data, tmp_path, victim):
    """From 40 images on, the victim cannot be written; what was there stays, and after a resume nothing is missing."""
    full = []
    with pytest.MonkeyPatch.context() as patch:
        keep, save_file, write_bytes = Keeper.keep, snapshot.save_file, type(tmp_path).write_bytes

        def fill(self, step):
            full.append(step.nimg) if step.nimg > 40 else None
            keep(self, step)

        def save(tensors, path, metadata):
            save_file(tensors, path, metadata=metadata)
            if full and victim in str(path):
                raise RUST

        def write(self, content):
            write_bytes(self, content[: len(content) // 2] if full and victim in str(self) else content)
            if full and victim in str(self):
                raise ENOSPC

        opened = type(tmp_path).open

        def half_open(self, mode="r", *args, **kwargs):
            file = opened(self, mode, *args, **kwargs)
            return HalfWritten(file) if full and mode == "a" and victim in str(self) else file

        patch.setattr(Keeper, "keep", fill)
        patch.setattr(snapshot, "save_file", save)
        patch.setattr(type(tmp_path), "write_bytes", write)
        patch.setattr(type(tmp_path), "open", half_open)
        with pytest.raises(FewstepError, match="the disk is full") as caught:
            go(recipe(data), tmp_path / "run")
        assert victim in str(caught.value)
        assert "\n" not in str(caught.value)
    assert full
    out = tmp_path / "run"
    sound(out)
    assert not list(out.rglob("*.part"))
    assert snapshot.read(out / "state.safetensors").header["state"]["nimg"] == {"metrics": 48, "best": 48}.get(
        victim, 24
    )
    go(recipe(data), out, resume=True)
    assert_same(everything(out), uninterrupted[0])


def test_a_disk_that_is_full_from_the_start_says_so(data, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(ENOSPC))
    with pytest.raises(FewstepError, match=r"the disk is full: .*recipe.json was not written"):
        go(recipe(data), tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------- pictures


def test_a_grid_shows_the_first_average_on_the_fixed_noise(uninterrupted, data):
    _, out = uninterrupted
    model = load(f"{out}:power-0.1")
    generator = Generator(model.denoiser, (1, 8, 8), 3)
    halves = [
        grid(to_uint8(torch.cat(list(generator(model.info.sampler(n), 24, GRID_SEED, [0, 1, 2])))), 3) for n in (1, 2)
    ]
    with Image.open(out / "samples" / "000000000096.png") as picture:
        assert picture.tobytes() == beside(halves).tobytes()
