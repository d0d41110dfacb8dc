"""Does it learn? ECT on a 2-D swiss roll, then LCSC over its snapshots, judged on noise and points that neither saw.

The curriculum is cut to two stages, so that ECT ends biased: no average of its snapshots helps, a combination does.
Held-out 1-step energy distance over 5 training seeds x 2 search seeds: last snapshot 0.029 to 0.055, best EMA 0.031 to
0.052, LCSC 0.0041 to 0.0086, which is 0.11 to 0.30 of the better of the two.
"""

import numpy as np
import pytest
import torch
from sklearn.datasets import make_swiss_roll

from fewstep.combination import Plan, combine
from fewstep.fitness import Function
from fewstep.model import ModelInfo, load, save_model
from fewstep.networks import MLP, Architecture
from fewstep.noise import step_seed
from fewstep.objectives import Networks
from fewstep.progress import Progress
from fewstep.recipes.ect import objective as ect_objective
from fewstep.snapshots import Bank

STEPS, BATCH, EVERY = 1000, 256, 20


def swiss_roll(n=12_000, seed=0):
    """Points [n, 2] of standard deviation 0.5: 10,000 to train and search on, the others held out."""
    points = make_swiss_roll(n, noise=0.3, random_state=seed)[0][:, ::2]
    points = torch.from_numpy((0.5 * (points - points.mean(0)) / points.std(0)).astype(np.float32))
    return points[:10_000], points[10_000:]


def energy_distance(x, y):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of samples x [n, d], y [m, d], without bias: 0 if they are of one law."""
    within = [torch.cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    return float(2 * torch.cdist(x, y).mean() - sum(within))


def distance_to(points):
    """The user's function: the 1-step samples of a noise seed against points [n, 2]."""

    @torch.inference_mode()
    def distance(model, seed):
        noise = torch.randn(len(points), 2, generator=torch.Generator().manual_seed(seed))
        return energy_distance(model(80 * noise, torch.full((len(points),), 80.0)), points)

    return distance


def ect_snapshots(points, folder, seed=0):
    """Train, and keep the weights of every EVERY steps: the files, in order."""
    architecture, objective, files = Architecture(MLP(128, 3), (2,)), ect_objective(q=2.0, stages=2, c=0.03), []
    model = architecture.build(seed)
    optimizer, generator = torch.optim.RAdam(model.parameters(), lr=2e-3), torch.Generator().manual_seed(seed)
    for nimg in range(0, STEPS * BATCH, BATCH):
        x = points[torch.randint(len(points), (BATCH,), generator=generator)]
        losses = objective(Networks(model), x, None, Progress(nimg, STEPS * BATCH), step_seed(seed, nimg))
        optimizer.zero_grad()
        losses["consistency"].backward()
        optimizer.step()
        if (nimg // BATCH + 1) % EVERY == 0:
            files.append(folder / f"{nimg + BATCH:09d}.safetensors")
            save_model(files[-1], model.state_dict(), ModelInfo(architecture, "consistency", nimg=nimg + BATCH))
    return files


@pytest.mark.learning
def test_lcsc_of_a_swiss_roll_beats_the_best_ema_and_the_last_snapshot_held_out(tmp_path):
    training, heldout = swiss_roll()
    bank = Bank.build(files := ect_snapshots(training, tmp_path), tmp_path / "bank", batch=BATCH, quiet=True)
    result = combine(
        bank, load(files[-1]), Function("energy", distance_to(training[:1000])), Function("energy", distance_to(heldout)),
        tmp_path / "lcsc", Plan(budget=200, baselines=("ema",)), quiet=True,
    )  # fmt: skip
    found = {name: records[0]["value"] for name, records in result["records"].items()}
    assert found["last"] < 0.1  # the untrained network: 0.4
    assert found["lcsc"] < 0.5 * min(found["last"], found["ema"])
    assert found["lcsc"] < 0.015
    assert not result["gains"]["ema"]["within_noise"]
