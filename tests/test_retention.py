"""Snapshots as a bank-to-be: the newest N, the averages' own, the room that they take; the same after any kill."""

import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep import files
from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.estimate import estimate, size, summary
from fewstep.model import find, load
from fewstep.networks import MLP, Architecture
from fewstep.recipe import Evaluation
from fewstep.run import Keeper
from fewstep.rundir import RunDir
from fewstep.snapshots import estimate_bytes
from fewstep.types import FewstepError
from test_run import (  # its fixtures and its ways to die
    Stop,
    _quick,  # noqa: F401
    assert_same,
    data,  # noqa: F401
    everything,
    go,
    kill_at_moments,
    often,
    recipe,
    stop_after,
)

AVERAGES = ("power-0.1", "ema-0.5")
RING = {"snapshot_keep": 2, "snapshot_averages": True}


def kept(out, folder="snapshots"):
    return [int(file.stem) for file in sorted((out / folder).glob("*.safetensors"))]


@pytest.fixture(scope="module")
def ring(data, tmp_path_factory):  # noqa: F811
    """What an uninterrupted run leaves that keeps two snapshots, its averages' too, and where."""
    out = tmp_path_factory.mktemp("ring") / "whole"
    go(recipe(data, **RING), out)
    return everything(out), out


# ------------------------------------------------------------------------------------------------------ what is left


def test_the_newest_are_kept_and_nothing_else_changes(ring, data, tmp_path):  # noqa: F811
    found, out = ring
    go(recipe(data), tmp_path / "all")
    plain = everything(tmp_path / "all")
    assert kept(tmp_path / "all") == [24, 48, 72, 96]
    assert [kept(out, f) for f in ("snapshots", "averages/power-0.1", "averages/ema-0.5")] == [[72, 96]] * 3
    ours = {key for key in plain if key not in ("files", *(f"snapshots/{n:012d}.safetensors" for n in (24, 48)))}
    assert_same({key: found[key] for key in ours}, {key: plain[key] for key in ours})
    history = {
        f"averages/{name}{rest}" for name in AVERAGES for rest in ("", *(f"/{n:012d}.safetensors" for n in (72, 96)))
    }
    assert set(found["files"]) - set(plain["files"]) == history


def test_an_averages_snapshot_is_the_average_as_it_was_then(data, tmp_path):  # noqa: F811
    go(recipe(data, snapshot_averages=True), tmp_path / "run")
    for nimg in (24, 48, 72, 96):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, nimg)
            with pytest.raises(Stop):
                go(recipe(data), tmp_path / f"{nimg}")
        for name in AVERAGES:
            then = load(tmp_path / "run" / "averages" / name / f"{nimg:012d}.safetensors")
            assert then.sha256 == load(f"{tmp_path / str(nimg)}:{name}").sha256
            assert (then.info.weights, then.info.nimg) == (name, nimg)


def test_the_folders_of_averages_are_not_taken_for_models(ring):
    _, out = ring
    for name in ("best", *AVERAGES):
        assert find(f"{out}:{name}") == out / "averages" / f"{name}.safetensors"
    assert find(f"{out}:online") == out / "snapshots" / f"{96:012d}.safetensors"
    with pytest.raises(FewstepError, match=r"it has power-0.1, ema-0.5, best, online"):
        find(f"{out}:000000000096")


# ------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize("nimg", [40, 48, 72, 96])
def test_stopped_after_any_step_and_resumed_it_is_the_whole_run(ring, data, tmp_path, nimg):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, nimg)
        with pytest.raises(Stop):
            go(recipe(data, **RING), tmp_path)
    go(recipe(data, **RING), tmp_path, resume=True)
    assert_same(everything(tmp_path), ring[0])


@pytest.mark.parametrize("nimg", [72, 96])
def test_none_is_deleted_before_the_state_is_as_new(ring, data, tmp_path, nimg):  # noqa: F811
    save_state = RunDir.save_state

    def stop(self, state, *rest):
        if state.nimg == nimg:
            raise Stop
        save_state(self, state, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "save_state", stop)
        with pytest.raises(Stop):
            go(recipe(data, **RING), tmp_path)
    for folder in ("snapshots", *(f"averages/{name}" for name in AVERAGES)):
        assert kept(tmp_path, folder) == [nimg - 48, nimg - 24, nimg]
    go(recipe(data, **RING), tmp_path, resume=True)
    assert_same(everything(tmp_path), ring[0])


@pytest.mark.parametrize("nimg", [72, 96])
def test_a_run_killed_before_it_deleted_deletes_when_it_is_resumed(ring, data, tmp_path, nimg):  # noqa: F811
    def stop(self, keep):
        if kept(self.path)[-1:] == [nimg]:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDir, "thin", stop)
        with pytest.raises(Stop):
            go(recipe(data, **RING), tmp_path)
    assert len(kept(tmp_path)) == nimg // 24
    go(recipe(data, **RING), tmp_path, resume=True)
    assert_same(everything(tmp_path), ring[0])


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 6))])
def test_killed_while_writing_and_deleting_again_and_again(data, tmp_path, seed):  # noqa: F811
    r = replace(often(data), averages=(ConstantEMA(0.5),), **RING)
    go(r, tmp_path / "whole")
    assert kill_at_moments(tmp_path / "run", r, random.Random(seed)) >= 2
    assert_same(everything(tmp_path / "run"), everything(tmp_path / "whole"))


def test_leftovers_and_what_lies_beyond_the_state_are_removed(ring, data, tmp_path):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 56)
        with pytest.raises(Stop):
            go(recipe(data, **RING), tmp_path)
    (tmp_path / "averages" / "ema-0.5" / ".000000000056.safetensors.4242.part").mkdir()
    (tmp_path / "averages" / "ema-0.5" / "000000000099.safetensors").write_bytes(b"beyond the state")
    go(recipe(data, **RING), tmp_path, resume=True)
    assert_same(everything(tmp_path), ring[0])


# ----------------------------------------------------------------------------------------------------- changing one's mind


def test_a_resumed_run_may_keep_fewer_and_more(ring, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(ring[1], out)
    r = RunDir(out).recipe()
    go(replace(r, snapshot_keep=1, snapshot_averages=False), out, resume=True)
    assert [kept(out, f) for f in ("snapshots", "averages/power-0.1", "averages/ema-0.5")] == [[96]] * 3
    go(replace(r, snapshot_keep=0), out, resume=True)
    assert kept(out) == [96]


def test_overwriting_removes_the_averages_snapshots_and_nothing_else(ring, data, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    shutil.copytree(ring[1], out)
    mine = ["averages/ema-0.5/notes.txt", "averages/mine/1.safetensors"]
    (out / "averages" / "mine").mkdir()
    for name in mine:
        (out / name).write_text("mine")
    go(recipe(data), out, overwrite=True)
    assert all((out / name).read_text() == "mine" for name in mine)
    shutil.rmtree(out / "averages" / "mine")
    shutil.rmtree(out / "averages" / "ema-0.5")
    go(recipe(data), tmp_path / "new")
    assert_same(everything(out), everything(tmp_path / "new"))


@pytest.mark.parametrize("wrong", [{"snapshot_keep": -1}, {"averages": (), "snapshot_averages": True}])
def test_what_cannot_be_kept_is_refused(wrong):
    with pytest.raises(FewstepError, match="--snapshot-"):
        recipe("digits", **wrong)


# ----------------------------------------------------------------------------------------------------------- the room


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 60))
def test_snapshots_counts_those_that_are_made(total, batch, every):
    r = recipe("", total_nimg=total, batch_size=batch, snapshot_nimg=every)
    state, made = SimpleNamespace(nimg=0), 0
    while state.nimg < total:
        state.nimg += batch
        made += Keeper.due(SimpleNamespace(state=state, recipe=r), every)
    assert r.snapshots == made


@pytest.mark.parametrize("changes", [{}, RING, {"snapshot_keep": 3, "evaluation": Evaluation()}, {"snapshot_keep": 9}])
def test_disk_bytes_is_what_the_files_take_at_their_most(data, tmp_path, monkeypatch, changes):  # noqa: F811
    r = recipe(data, network=MLP(256, 3), grid_nimg=0, log_nimg=96, **changes)
    taken, replace_ = [], files.os.replace

    def spy(a, b):
        taken.append(sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")))
        replace_(a, b)

    monkeypatch.setattr(files.os, "replace", spy)
    go(r, tmp_path / "run")
    parameters = sum(p.numel() for p in load(tmp_path / "run").denoiser.parameters())
    assert max(taken) == pytest.approx(r.disk_bytes(parameters), rel=0.02)  # headers, biases' counters


def small(monkeypatch, free, total=10**12):
    monkeypatch.setattr("fewstep.rundir.shutil.disk_usage", lambda path: SimpleNamespace(free=free, total=total))


def test_a_disk_too_small_is_refused_before_anything_is_harmed(ring, data, tmp_path, monkeypatch):  # noqa: F811
    out = tmp_path / "run"
    shutil.copytree(ring[1], out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    r = recipe(data, network=MLP(2048, 2))
    needed = r.disk_bytes(sum(p.numel() for p in Architecture(r.network, (1, 8, 8), 3).build().parameters()))
    small(monkeypatch, 30_000_000)
    for how in ({}, {"overwrite": True}):
        with pytest.raises(FewstepError) as caught:
            go(r, out if how else tmp_path / "new", **how)
        assert f"needs up to {needed / 1e9:.2f} GB but" in str(caught.value)
        for words in ("has room for 0.03 GB", "--snapshot-nimg (24 makes 4 snapshots)", "--snapshot-keep N (now all)"):
            assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert {p.name for p in (tmp_path / "new").iterdir()} <= {".lock"}
    small(monkeypatch, needed)
    go(replace(r, total_nimg=8), tmp_path / "new")


def test_what_a_run_already_has_counts_as_room_for_it(data, tmp_path, monkeypatch):  # noqa: F811
    r = recipe(data, network=MLP(256, 3), total_nimg=16, **RING)
    go(r, tmp_path)
    needed = r.disk_bytes(sum(p.numel() for p in load(tmp_path).denoiser.parameters()))
    has = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    small(monkeypatch, needed - has - 1)
    with pytest.raises(FewstepError, match="--snapshot-keep N"):
        go(r, tmp_path, resume=True)
    small(monkeypatch, needed - has)
    go(r, tmp_path, resume=True)
    small(monkeypatch, 0, total=0)  # a file system that knows no sizes
    go(r, tmp_path, resume=True)


def test_the_estimate_tells_snapshots_disk_and_bank():
    r = recipe("digits", data=DataSpec("digits"), total_nimg=9_600, network=MLP(256, 2))
    architecture = Architecture(r.network, (1, 8, 8), 3)
    cost = estimate(r, architecture)
    parameters = cost["parameters"]
    assert cost["snapshots"] == 400
    assert cost["disk_bytes"] == r.disk_bytes(parameters) == 4 * parameters * (400 + 2 + 1 + 2 * 5)
    assert cost["bank_bytes"] == estimate_bytes(400, parameters, "bf16")
    fewer = estimate(replace(r, **RING), architecture)
    assert fewer["snapshots"] == 2
    assert fewer["disk_bytes"] == 4 * parameters * (3 * 3 + 2 + 1 + 2 * 5)
    text = summary(fewer)
    assert (
        f"disk    {size(fewer['disk_bytes'])} at most, for 2 snapshots, as many of each average, the averages" in text
    )
    assert f"bank    {size(fewer['bank_bytes'])} more for a search over these snapshots, in bf16" in text
    assert "bank" not in summary(estimate(replace(r, snapshot_nimg=0), architecture))
