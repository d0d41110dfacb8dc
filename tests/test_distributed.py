"""World size changes nothing but the time: processes that meet over gloo, on one machine."""

import json
import multiprocessing as mp
import socket
from datetime import timedelta

import numpy as np
import pytest
import torch

from fewstep import distributed
from fewstep.api import Plan, combine
from fewstep.snapshots import read
from test_combination import TINY, content, rows, snapshots

# A process's work, run by exec in a process that has imported fewstep and nothing of the tests.
GROUP = """
import json, os, sys
sys.modules["torch.utils.tensorboard"] = None
os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
import torch
torch.set_num_threads(1)
from fewstep import distributed
distributed.start(torch.device("cpu"))
"""

SUMS = """
assert (distributed.rank(), distributed.world()) == (rank, world)
tensors = [torch.tensor(1.0 + rank), torch.full((3,), 10.0 ** rank), torch.zeros(0), torch.ones(2, 3, 4) * rank,
           torch.arange(6.0).reshape(2, 3).t()]
views = list(tensors)
distributed.sum_over_ranks(t for t in tensors)
assert all(a is b for a, b in zip(tensors, views))
expected = [torch.tensor(3.0), torch.full((3,), 11.0), torch.zeros(0), torch.ones(2, 3, 4),
            2 * torch.arange(6.0).reshape(2, 3).t()]
assert all(torch.equal(a, b) for a, b in zip(tensors, expected)), tensors
told = [{"a": [1.5, None, "Größe"], "b": 0.1 + 0.2}, "x" * 3000 if world > 1 else ""]
assert distributed.gather(told[rank]) == told  # of unlike lengths; a float comes back to the bit
assert distributed.gather([]) == [[], []]
from fewstep.run import signalled
assert signalled([], torch.device("cpu")) == 0
assert signalled([15] if rank else [], torch.device("cpu")) == 15  # one process was told, all of them stop
distributed.barrier()
distributed.stop()
assert distributed.world() == 1
"""

TRAIN = """
from dataclasses import replace
from itertools import islice
from fewstep.data import BatchOrder, DataSpec, batches, open_images
from fewstep.ema import ConstantEMA
from fewstep.networks import Architecture, EDMUNet
from fewstep.objectives import *
from fewstep.progress import Constant, LearningRate
from fewstep.recipe import Optimizer, Recipe
from fewstep.snapshots import write
from fewstep.timesteps import LossVariance
from fewstep.training import TrainState, training_steps
objective = PairObjective(
    pairs=GridPairs(KarrasGrid(Constant(20.0)), density=LogNormal(-0.5, 1.0)),
    terms={"consistency": Consistency(distance=PseudoHuber(c=0.03), weighting=InverseGap()),
           "denoising": Denoising(distance=SquaredL2("mean"), weighting=EDM(), where=Below(0.6), scale=5.0)})
if special:  # optimal transport over the whole batch, c from the measured residual, times by the loss's variance
    term = replace(objective.terms["consistency"], distance=Cauchy(ResidualScale()))
    objective = replace(objective, coupling=MinibatchOT(over="world"), terms={**objective.terms, "consistency": term})
r = Recipe(name="test", objective=objective, network=EDMUNet(channels=8, multipliers=(1,), blocks=1, attention=(), dropout=0.0),
           data=DataSpec(data, flip=True), total_nimg=800, batch_size=12, microbatch=microbatch, lr=LearningRate(1e-3),
           averages=(ConstantEMA(0.5),), optimizer=Optimizer("adam", eps=1e-2), conditional=True,
           timesteps=LossVariance(weighted=True) if special else None)
images = open_images(r.data)
state = TrainState.create(r, Architecture(r.network, images.shape, 3), torch.device("cpu"))
place = (0, 1) if special else (distributed.rank(), distributed.world())
feed = batches(images, BatchOrder(len(images), 0), 0, 12, rank=place[0], world=place[1])
steps = list(islice(training_steps(state, r, feed), 4))
feed.close()
assert all(len(s.t) == 12 // world for s in steps)
tensors = {**state.tensors(), **{f"t/{k}": s.t for k, s in enumerate(steps)}}
write(Path(out) / f"{world}-{rank}.safetensors", tensors,
      {"losses": [s.losses for s in steps], "norms": [s.gradient_norm for s in steps]})
distributed.stop()
"""

RUN = """
from dataclasses import replace
import signal
from fewstep.data import DataSpec
from fewstep.ema import ConstantEMA
from fewstep.networks import MLP
from fewstep.progress import LearningRate
from fewstep.recipes.edm import edm
from fewstep.run import Interrupted, train
import fewstep.run
r = replace(edm(MLP(8, 2)), data=DataSpec(data), total_nimg=96, batch_size=8, averages=(ConstantEMA(0.9),),
            lr=LearningRate(1e-3), snapshot_nimg=24, grid_nimg=0, log_nimg=8)
if stop:
    keep = fewstep.run.Keeper.keep
    def told(self, step):
        keep(self, step)
        if step.nimg == 40 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)  # as one process of a group may be told alone
    fewstep.run.Keeper.keep = told
try:
    train(r, out, quiet=True, device="cpu", resume=resume)
    assert not stop
except Interrupted as end:
    assert stop and end.exit_code == 143 and "saved at 40 images" in str(end)
distributed.stop()
"""

SEARCH = """
from fewstep import combination
from fewstep.api import Plan, combine
combination.Combination.draw = lambda self, vector: None
records, mine = combination.Combination.records, []
combination.Combination.records = lambda self, name, *rest: mine.append(name) or records(self, name, *rest)
def search(name, resume):
    mine.clear()
    result = combine(run, out + name, Plan(**plans[name]), data=data, extractor="pixels", device="cpu", quiet=True,
                     resume=resume)
    assert result["chosen"] and result["records"]["lcsc"]
    distributed.barrier()
    return result
for name in plans:
    result = search(name, False)
    measured = distributed.gather(mine)  # each by one process, by turns, LCSC by the one that has its weights
    assert measured[0][0] == "lcsc" and 0 <= len(measured[0]) - len(measured[1]) <= 1, measured
    order = [n for pair in zip(measured[0], [*measured[1], None]) for n in pair if n]
    assert len(set(order)) == len(order) and set(result["records"]) <= set(order), measured
    file = Path(out + name, "evaluations.jsonl")
    rows = file.read_text().splitlines()
    kept = [json.loads(row)["report"].split("|")[0] for row in rows if "report" in json.loads(row)]
    assert kept == order, (kept, order)
    if name != "span":
        continue
    distributed.barrier()
    if rank == 0:  # as killed after three reports, the fourth half written
        file.write_text("\\n".join(rows[: len(rows) - len(order) + 3]) + "\\n" + rows[-1][:50])
        Path(out + name, "result.json").unlink()
    distributed.barrier()
    assert search(name, True)["records"] == result["records"]
    again = distributed.gather(mine)
    assert [n for pair in zip(again[0], [*again[1], None]) for n in pair if n] == order[3:], again
    assert file.read_text().splitlines() == rows
distributed.stop()
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(script, world, **names):
    """Run a script in `world` processes that know rank, world, port and these names; all of them must end well."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["fewstep.run", "torch._dynamo"])  # optimizers import the latter when first built
    port = free_port()
    code = "from pathlib import Path\n" + GROUP + script
    group = [
        context.Process(target=exec, args=(code, {"rank": rank, "world": world, "port": port, **names}))
        for rank in range(world)
    ]
    for process in group:
        process.start()
    for process in group:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in group] == [0] * world


@pytest.fixture
def data(tmp_path):
    g = np.random.default_rng(0)
    path = tmp_path / "data.npz"
    np.savez(path, images=g.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), labels=np.arange(40) % 3)
    return str(path)


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.delenv("WORLD_SIZE")
    assert distributed.start(torch.device("cpu")) == torch.device("cpu")
    assert (distributed.rank(), distributed.world()) == (0, 1)
    t = torch.tensor([1.0, 2.0])
    distributed.sum_over_ranks([t])
    distributed.barrier()
    distributed.stop()
    assert t.tolist() == [1.0, 2.0]


def test_the_others_wait_for_hours_while_rank_0_evaluates(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    calls = []
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *args, **options: calls.append((args, options)))
    distributed.start(torch.device("cpu"))
    assert calls == [(("gloo",), {"timeout": timedelta(hours=2)})]


def test_sums_over_two_processes():
    together(SUMS, 2)


@pytest.mark.parametrize("special", [False, True])
def test_two_processes_train_what_one_does(tmp_path, data, special):
    """Four steps with a masked term, flips, labels and Adam: the same times and losses, the same weights to 1e-6.

    special: also with what looks at the whole batch.
    """
    together(TRAIN, 1, out=str(tmp_path), data=data, microbatch=None, special=special)
    together(TRAIN, 2, out=str(tmp_path), data=data, microbatch=4, special=special)
    one, two, other = (read(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    for name, t in two.tensors.items():
        if name.startswith("t/"):
            assert torch.equal(torch.cat([t, other.tensors[name]]), one.tensors[name])
        else:
            assert torch.equal(t, other.tensors[name]), f"the processes differ in {name}"
            assert (t - one.tensors[name]).abs().max() <= 1e-6 * max(1, one.tensors[name].abs().max()), name
    for a, b in zip(one.header["losses"], two.header["losses"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert one.header["norms"] == pytest.approx(two.header["norms"], rel=1e-4)
    assert two.header["losses"] == other.header["losses"]


def test_a_run_of_two_processes_stops_resumes_and_ends_as_a_run_of_one(tmp_path, data):
    together(RUN, 1, out=str(tmp_path / "one"), data=data, stop=False, resume=False)
    together(RUN, 2, out=str(tmp_path / "two"), data=data, stop=True, resume=False)
    together(RUN, 2, out=str(tmp_path / "two"), data=data, stop=False, resume=True)
    one, two = (read(tmp_path / name / "state.safetensors") for name in ("one", "two"))
    assert two.header["state"]["nimg"] == 96
    for name, t in two.tensors.items():
        assert (t - one.tensors[name]).abs().max() <= 1e-5 * max(1, one.tensors[name].abs().max()), name
    rows = [
        [json.loads(line)["nimg"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    ]
    assert rows[0] == rows[1] == list(range(8, 97, 8))
    files = [{p.name for p in (tmp_path / name).rglob("*") if p.is_file()} for name in ("one", "two")]
    assert files[1] - files[0] == {"resumes.jsonl"}
    assert not files[0] - files[1]


def test_two_processes_search_what_one_does(tmp_path, monkeypatch):
    """The same result.json but for times, of a search whose scores are raced and of one that is told features; held-out
    numbers are shared, and a resume measures those that are missing."""
    monkeypatch.setattr("fewstep.combination.Combination.draw", lambda self, vector: None)
    run, images = snapshots(tmp_path / "snapshots"), str(tmp_path / "images.npz")
    np.savez(images, images=np.random.default_rng(0).integers(100, 200, (60, 4, 4, 1), dtype=np.uint8))
    plan = {**vars(TINY), "budget": 24, "baselines": ("ema", "random"), "search_seeds": 2}
    plans = {name: {**plan, "search": name} for name in ("evolution", "span")}
    together(SEARCH, 2, out=str(tmp_path / "two-"), run=str(run), data=images, plans=plans)
    for name, plan in plans.items():
        one, two = tmp_path / name, tmp_path / f"two-{name}"
        combine(run, one, Plan(**plan), data=images, extractor="pixels", device="cpu", quiet=True)
        assert content(two) == content(one)
        assert (two / "combined.safetensors").read_bytes() == (one / "combined.safetensors").read_bytes()
        one, two = ([row for row in rows(out) if "report" in row] for out in (one, two))
        assert two == one
