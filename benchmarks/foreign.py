"""Other people's diffusion model as a start: a DDPM of diffusers on digits, imported, sampled, tuned by ECT.

    python benchmarks/foreign.py --seeds 0 1 2 --jobs 2 --out benchmarks/results/DATE-foreign.json

Per seed and prediction (epsilon, v): a stock class-conditional UNet2DModel (209k parameters, the time embedding as it comes) is
trained by diffusers' own DDPMScheduler for the images that `benchmarks/methods.py` gives its own diffusion model (38,400; Adam,
batch and rate of the digits preset; EMA 0.99 is what is saved), written by save_pretrained, and never touched again. Then

- `ddim`: samples of stock diffusers' DDIM (eta 0, trailing steps), 50 evaluations,
- `ours`: samples of the imported D(x, sigma) by DPM-Solver++ at 9 and 17 and Heun at 49 evaluations,
- `exact` (epsilon only): ECT without the bound that fewstep sets on the network's amplification (docs/log.md),
- `ect`: ECT from it (76,800 images, digits preset), weights and second sigma chosen on other noise, at 1 and 2 steps,
- `check`: what the import's self-check says of the folder, and of a copy whose scheduler names the other prediction.

Frechet distance on the digits features against digits[train], n = 3000, three noise seeds, as in methods.py, whose `ect` row
(from our own diffusion model) is what to compare with.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor

from fewstep.data import BatchOrder, open_images, preparation, to_uint8
from fewstep.importing import import_model
from fewstep.metrics import Moments
from fewstep.model import load
from fewstep.recipes import recipe as get_recipe
from fewstep.samplers import DPMSolver, Heun
from fewstep.train_cli import inherit
from methods import AVERAGES, CACHE, SETTINGS, Setting, Yardstick, pixel_yardstick, recipe_for, trained
from tasks import Task, Value, carry_out, spread

PREDICTIONS = ("epsilon", "v_prediction")
OTHER = {"epsilon": "v_prediction", "v_prediction": "epsilon"}
DDIM_STEPS = (50,)


def stock(setting: Setting) -> Any:
    """The network of methods.py's digits as a stock UNet2DModel."""
    from diffusers import UNet2DModel

    net = setting.network
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=tuple(net.channels * m for m in net.multipliers),
        layers_per_block=net.layers, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"), downsample_type="resnet", upsample_type="resnet",
        resnet_time_scale_shift="scale_shift", attention_head_dim=net.head_dim, norm_num_groups=net.norm_groups,
        num_class_embeds=10,
    )  # fmt: skip


def pretrain(folder: Path, prediction: str, setting: Setting, seed: int) -> None:
    """A DDPM by diffusers' scheduler: x_t = add_noise(x, eps, t), mean squared error; saved as a DDPMPipeline."""
    from diffusers import DDPMPipeline, DDPMScheduler

    torch.manual_seed(seed)
    net, scheduler = stock(setting), DDPMScheduler(prediction_type=prediction)
    plan = get_recipe("edm", "digits")
    optimizer = torch.optim.Adam(net.parameters(), plan.lr.peak)
    average = [p.detach().clone() for p in net.parameters()]
    for done, (x, label) in enumerate(batches(setting, plan.batch_size, seed)):
        t, eps = torch.randint(0, 1000, (len(x),)), torch.randn_like(x)
        noisy: Any = scheduler.add_noise(x, eps, t)  # type: ignore[arg-type]
        target: Any = eps if prediction == "epsilon" else scheduler.get_velocity(x, eps, t)  # type: ignore[arg-type]
        loss = (net(noisy, t, class_labels=label).sample - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch._foreach_lerp_(average, list(net.parameters()), 0.01 if done > 100 else 0.5)
    with torch.no_grad():
        for p, mean in zip(net.parameters(), average, strict=True):
            p.copy_(mean)
    DDPMPipeline(net.eval(), scheduler).save_pretrained(folder)


def batches(setting: Setting, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x [n, 1, 8, 8] in [-1, 1] and labels, as many as methods.py's pretrain sees."""
    images = open_images(setting.data).split("train", setting.data.heldout)
    assert images.labels is not None
    order, ready = BatchOrder(len(images), seed), preparation(images)
    for nimg in range(0, setting.pretrain_nimg, size):
        rows = order.indices(nimg, size)
        yield ready(images.pixels(rows), seed, nimg), images.labels[rows]


def ddim(folder: Path, steps: int, yardstick: Yardstick, num: int) -> float:
    """The Frechet distance of stock diffusers' deterministic samples."""
    from diffusers import DDIMScheduler, UNet2DModel

    net: Any = UNet2DModel.from_pretrained(folder / "unet").eval()
    scheduler: Any = DDIMScheduler.from_pretrained(folder / "scheduler", timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(steps)
    generator, features = torch.Generator().manual_seed(0), []
    for _ in range(0, num, 500):
        x = torch.randn(500, 1, 8, 8, generator=generator)
        label = torch.randint(0, 10, (500,), generator=generator)
        with torch.inference_mode():
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t, class_labels=label).sample, t, x, eta=0.0).prev_sample
        features.append(yardstick.extractor(to_uint8(x)))
    return yardstick.reference.frechet.distance(Moments.of(torch.cat(features)))


def one(prediction: str, setting: Setting, seed: int, work: Path) -> Value:
    """Pre-trained, imported, sampled, tuned."""
    folder = work / f"{prediction}-{seed}"
    if not (folder / "model_index.json").exists():
        pretrain(folder, prediction, setting, seed)
    yardstick = pixel_yardstick("digits", setting)
    held = replace(setting.data, heldout=0.0)
    told = import_model(folder, work / f"{prediction}-{seed}-imported", data=held, overwrite=True, quiet=True)
    wrong = work / f"{prediction}-{seed}-misnamed"
    shutil.copytree(folder, wrong, dirs_exist_ok=True)
    file = wrong / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": OTHER[prediction]}))
    misnamed = import_model(wrong, work / f"{prediction}-{seed}-wrong", data=held, overwrite=True, quiet=True)

    model = load(folder)
    samplers = {"dpm 9": DPMSolver.karras(9), "dpm 17": DPMSolver.karras(17), "heun 49": Heun.karras(25)}
    ours = {name: yardstick.distance(model, sampler, (0, 1, 2), setting.num)[0] for name, sampler in samplers.items()}
    ours["heun 1 step"] = yardstick.distance(model, Heun.karras(1), (0, 1, 2), setting.num)[0]
    base = recipe_for("ect", setting, setting.rest_nimg, seed)
    recipe = replace(inherit(base, model), averages=AVERAGES)
    exact = replace(recipe, network=model.info.architecture.network)
    unbounded = {}
    if prediction == "epsilon":
        trained(exact, work / f"{prediction}-{seed}-exact", folder)
        unbounded = {"exact": yardstick.measure(work / f"{prediction}-{seed}-exact")["fd"]}
    spent = trained(recipe, work / f"{prediction}-{seed}-ect", folder)
    return {
        **unbounded,
        "prediction": prediction, "seed": seed, **spent, **yardstick.measure(work / f"{prediction}-{seed}-ect"),
        "ours": ours, "ddim": {str(k): ddim(folder, k, yardstick, setting.num) for k in DDIM_STEPS},
        "check": told["check"]["verdict"] or "fine", "check_misnamed": misnamed["check"]["verdict"] or "fine",
    }  # fmt: skip


def table(runs: dict[str, Value]) -> Value:
    """Per prediction, over seeds."""
    rows = {}
    for prediction in PREDICTIONS:
        of = [run for run in runs.values() if run["prediction"] == prediction]
        if of:
            rows[prediction] = {
                **{f"{part} {k}": spread([r[part][k] for r in of]) for part in ("ours", "ddim") for k in of[0][part]},
                **{f"ect {k} step": spread([r["fd"][k] for r in of]) for k in ("1", "2")},
                **{f"exact {k} step": spread([r["exact"][k] for r in of]) for k in ("1", "2") if "exact" in of[0]},
                "second_sigma": [r["second_sigma"] for r in of], "seeds": [r["seed"] for r in of],
                "check": [r["check"] for r in of], "check_misnamed": [r["check_misnamed"] for r in of],
            }  # fmt: skip
    return {"table": rows}


@dataclass(frozen=True)
class Arguments:
    out: Path
    """the JSON file; finished runs that it holds are not repeated"""
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1
    """runs at a time, one thread each"""
    work: Path = CACHE / "foreign"
    """where the folders go"""
    nimg: int | None = None
    """images of pre-training, twice as many of tuning; None: the setting's"""
    num: int | None = None
    """samples per noise seed; None: the setting's"""


def main(arguments: Arguments) -> None:
    """Run what is missing, then print the table."""
    torch.set_num_threads(1)
    setting = SETTINGS["digits"]
    if arguments.nimg:
        setting = replace(setting, pretrain_nimg=arguments.nimg, rest_nimg=2 * arguments.nimg)
    if arguments.num:
        setting = replace(setting, num=arguments.num, search_num=arguments.num)
    arguments.work.mkdir(parents=True, exist_ok=True)
    tasks = {
        f"{prediction}/{seed}": Task(one, (prediction, setting, seed, arguments.work))
        for seed in arguments.seeds
        for prediction in PREDICTIONS
    }
    header = {
        "what": "A stock DDPM of diffusers on digits, imported and tuned by ECT: Frechet distances",
        "command": "python benchmarks/foreign.py " + " ".join(sys.argv[1:]), "settings": asdict(setting),
    }  # fmt: skip
    result = carry_out(tasks, arguments.out, header, arguments.jobs, table)
    for prediction, row in result["table"].items():
        print(prediction)
        for name, value in row.items():
            print(
                f"  {name}: {value['mean']:.3g} {value['values']}" if isinstance(value, dict) else f"  {name}: {value}"
            )
    for name, problem in result["failures"].items():
        print(f"FAILED {name}: {problem}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
