"""Every recipe: the laws it must keep, and the papers' tables (shared/spec/ect.md) typed a second time."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from fewstep import codec, recipes
from fewstep.ema import ConstantEMA, PowerEMA
from fewstep.networks import MLP, Architecture, EDMUNet, UNet
from fewstep.objectives import (
    EDM,
    Consistency,
    ContinuousSchedule,
    Denoising,
    Diffusion,
    DimensionScale,
    Everywhere,
    GridPairs,
    InverseGap,
    LogNormal,
    Networks,
    PseudoHuber,
    SquaredL2,
    UniformIndex,
    Unit,
)
from fewstep.progress import Doubling, Progress, SquareRoot, Stages
from fewstep.recipe import Optimizer, Recipe
from fewstep.types import FewstepError

EVERY = [(name, preset) for name in recipes.names() for preset in recipes.presets(name)]
FRACTIONS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999)
every_recipe = pytest.mark.parametrize(("name", "preset"), EVERY)


def tiny(recipe, shape=(2,)):
    """The recipe's denoiser on vectors, or on 8x8 images, with output weights that are not zero."""
    network = MLP(width=16, dropout=0.2)
    if len(shape) == 3:
        network = UNet(8, (1, 2), 1, (4,), 8, dropout=0.2, norm_groups=8)
    classes = 3 if recipe.conditional else 0
    model = Architecture(network, shape, classes, recipe.sigma_data, recipe.sigma_min).build().train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def batch(recipe, shape=(2,), n=32):
    x = 0.5 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(n) % 3 if recipe.conditional else None


def total_loss(recipe, nets, x, label, fraction):
    progress = Progress(int(fraction * recipe.total_nimg), recipe.total_nimg)
    return torch.stack(list(recipe.objective(nets, x, label, progress, seed=7).values())).sum()


def gradients(loss, model):
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)


# ---------------------------------------------------------------------------------------------------------- every one


def test_there_are_recipes_with_presets():
    assert set(recipes.names()) >= {"edm", "ect", "ict", "ct"}
    for name in recipes.names():
        assert next(iter(recipes.presets(name))) == "default"
        assert recipes.recipe(name) == recipes.recipe(name, "default")
        assert recipes.recipe(name).name == name
        assert "arXiv:" in recipes.module(name).__doc__


@every_recipe
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_times_are_finite_with_t_above_r_and_r_not_negative(name, preset, fraction):
    recipe = recipes.recipe(name, preset)
    progress = Progress(int(fraction * recipe.total_nimg), recipe.total_nimg)
    t, r = recipe.objective.pairs(4000, progress, torch.Generator().manual_seed(3))
    assert t.isfinite().all()
    assert (r >= 0).all()
    assert (r < t).all()
    assert ((r == 0).any().item(), (r == 0).all().item()) == {
        "never": (False, False), "sometimes": (True, False), "always": (True, True)
    }[recipe.objective.pairs.zero(progress)]  # fmt: skip


@every_recipe
def test_loss_and_gradients_are_finite_and_a_detached_copy_as_target_changes_nothing(name, preset):
    recipe = recipes.recipe(name, preset)
    model, (x, label) = tiny(recipe), batch(recipe)
    for fraction in FRACTIONS:
        loss = total_loss(recipe, Networks(model), x, label, fraction)
        other = total_loss(recipe, Networks(model, target=copy.deepcopy(model)), x, label, fraction)
        assert loss.isfinite()
        assert loss > 0
        assert torch.equal(loss, other)
        for mine, theirs in zip(gradients(loss, model), gradients(other, model), strict=True):
            assert mine.isfinite().all()
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", recipes.names())
def test_a_tiny_unet_learns_a_little_from_every_method(name):
    recipe = recipes.recipe(name, "digits")
    model, (x, label) = tiny(recipe, (1, 8, 8)), batch(recipe, (1, 8, 8), 16)
    optimizer = recipe.optimizer.build(model.parameters())
    optimizer.param_groups[0]["lr"] = 2e-4
    losses = []
    for _ in range(12):  # the same batch, noise and dropout again and again
        optimizer.zero_grad()
        loss = total_loss(recipe, Networks(model), x, label, 0.3)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@every_recipe
def test_json_round_trip_is_the_same_recipe(name, preset):
    recipe = recipes.recipe(name, preset)
    assert codec.decode(json.loads(json.dumps(codec.encode(recipe)))) == recipe


@every_recipe
def test_a_preset_can_be_trained_as_it_stands(name, preset):
    recipe = recipes.recipe(name, preset)
    assert recipe.total_nimg % recipe.batch_size == 0
    assert recipe.kind == ("diffusion" if name == "edm" else "consistency")
    assert isinstance(recipe.optimizer.build([torch.nn.Parameter(torch.ones(1))]), torch.optim.Optimizer)
    size = recipe.data.resolution or (8 if recipe.data.source == "digits" else 32)
    architecture = Architecture(recipe.network, (3, size, size), 10 if recipe.conditional else 0)
    assert sum(p.numel() for p in architecture.skeleton().parameters()) > 1e5


# ------------------------------------------------------------------------------------------------------------- tables


def only_term(recipe, kind):
    (term,) = recipe.objective.terms.values()
    assert type(term) is kind
    assert (term.where, term.scale) == (Everywhere(), 1.0)
    return term


ECT_TABLE = {  # batch, iterations, optimizer, lr, decay, q, stages, c, P, dropout, its highest resolution, averages, precision
    "cifar10-200k": (128, 200_000, "radam", (0.9, 0.999), 1e-4, 0, 2, 8, 0, (-1.1, 2.0), 0.20, None, [0.9999], "fp32"),
    "cifar10-1hour": (128, 8_000, "radam", (0.9, 0.999), 1e-4, 0, 256, 1, 0, (-1.1, 2.0), 0.20, None, [0.9993], "fp32"),
    **{
        f"imagenet64-{size}": (
            batch, 100_000, "adam", (0.9, 0.99), lr, 2000, 4, 4, 0.06, (-0.8, 1.6), dropout, 16, [0.01, 0.05, 0.10], "tf32"
        )
        for size, batch, lr, dropout in (
            ("s", 128, 0.0010, 0.4), ("m", 128, 0.0009, 0.5), ("l", 128, 0.0008, 0.5), ("xl", 128, 0.0007, 0.5),
            ("xl-1024", 1024, 0.0007, 0.5),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", ECT_TABLE)
def test_ect_presets_are_the_papers_table(preset):
    batch, steps, optimizer, betas, lr, decay, q, stages, c, times, dropout, highest, averages, precision = ECT_TABLE[
        preset
    ]
    recipe, imagenet = recipes.recipe("ect", preset), preset.startswith("imagenet")
    assert (recipe.batch_size, recipe.total_nimg) == (batch, batch * steps)
    assert recipe.optimizer == Optimizer(optimizer, betas=betas, eps=1e-8, weight_decay=0.0)
    assert (recipe.lr.peak, recipe.lr.warmup_nimg, recipe.lr.decay_nimg) == (lr, 0, decay * batch)
    law = recipe.objective.pairs
    assert law == ContinuousSchedule(LogNormal(*times), q=float(q), k=8.0, b=1.0, stages=Stages(stages))
    stage_length = recipe.total_nimg // stages // batch
    assert stage_length == (8_000 if preset == "cifar10-1hour" else 25_000)
    term = only_term(recipe, Consistency)
    assert term.distance == PseudoHuber(c=float(c), over="sum")
    assert term.weighting == (EDM(0.5) if imagenet else InverseGap())
    assert (recipe.network.dropout, recipe.network.dropout_max_resolution) == (dropout, highest)
    kind, key = (PowerEMA, "std") if imagenet else (ConstantEMA, "decay")
    assert all(type(law) is kind for law in recipe.averages)
    assert sorted(getattr(law, key) for law in recipe.averages) == averages
    assert recipe.precision == precision
    assert recipe.second_sigma == (1.526 if imagenet else 0.821)
    assert recipe.conditional == imagenet
    assert (recipe.sigma_data, recipe.sigma_min, recipe.target_decay) == (0.5, 0.0, None)
    assert recipe.starts_from


def test_ect_published_figures_are_the_papers():
    figures = {
        "cifar10-200k": ["4.54 / 2.20", "3.86 / 2.15", "3.60 / 2.11"],
        "cifar10-1hour": ["2.73", "8.14 / 2.77 / 2.70 / 2.45"],
        "imagenet64-s": ["5.51 / 3.18"],
        "imagenet64-m": ["3.67 / 2.35"],
        "imagenet64-l": ["3.55 / 2.14"],
        "imagenet64-xl": ["3.35 / 1.96"],
        "imagenet64-xl-1024": ["2.49 / 1.67"],
    }
    for preset, numbers in figures.items():
        assert all(n in recipes.recipe("ect", preset).published for n in numbers)


def test_cifar10_networks_are_the_papers():
    ddpm, ncsn = EDMUNet(dropout=0.20), EDMUNet(style="ncsn++")
    assert sum(p.numel() for p in Architecture(ddpm, (3, 32, 32)).skeleton().parameters()) == 55_733_891
    assert recipes.recipe("ect", "cifar10-200k").network == recipes.recipe("ect", "cifar10-1hour").network == ddpm
    assert recipes.recipe("ict", "cifar10").network == replace(ncsn, dropout=0.3)
    assert recipes.recipe("ct", "cifar10").network == replace(ncsn, dropout=0.0)
    assert recipes.recipe("edm", "cifar10").network == EDMUNet(dropout=0.13)
    widths = {"s": 192, "m": 256, "l": 320, "xl": 384}
    for size, channels in widths.items():
        network = recipes.recipe("ect", f"imagenet64-{size}").network
        shape = (network.channels, network.multipliers, network.blocks, network.attention)
        assert shape == (channels, (1, 2, 3, 4), 3, (16, 8))
    arch = Architecture(recipes.recipe("ect", "imagenet64-s").network, (3, 64, 64), 1000)
    assert round(sum(p.numel() for p in arch.skeleton().parameters()) / 1e6) == 280  # EDM2-S


@pytest.mark.parametrize("preset", ["default", "cifar10"])
def test_ict_is_the_papers(preset):
    recipe = recipes.recipe("ict", preset)
    grid, term = recipe.objective.pairs.grid, only_term(recipe, Consistency)
    assert type(recipe.objective.pairs) is GridPairs
    assert (grid.intervals, grid.sigma_min, grid.sigma_max, grid.rho) == (Doubling(10, 1280), 0.002, 80.0, 7.0)
    assert recipe.objective.pairs.density == LogNormal(-1.1, 2.0)
    assert term.distance == PseudoHuber(DimensionScale(0.00054), over="sum")
    assert term.weighting == InverseGap()
    assert (recipe.optimizer, recipe.lr.peak) == (Optimizer("radam"), 1e-4)
    assert recipe.averages == (ConstantEMA(0.99993),)
    assert (recipe.target_decay, recipe.sigma_min, recipe.second_sigma) == (None, 0.002, 0.821)
    assert recipe.network.dropout == 0.3
    if preset == "cifar10":
        assert "2.83 / 2.46" in recipe.published
        assert "2.51 / 2.24" in recipe.published


@pytest.mark.parametrize("preset", ["default", "cifar10"])
def test_ct_is_the_papers(preset):
    recipe = recipes.recipe("ct", preset)
    grid, term = recipe.objective.pairs.grid, only_term(recipe, Consistency)
    assert (grid.intervals, grid.sigma_min, grid.sigma_max, grid.rho) == (SquareRoot(2, 150), 0.002, 80.0, 7.0)
    assert recipe.objective.pairs.density == UniformIndex()
    assert (term.distance, term.weighting) == (SquaredL2(over="mean"), Unit())
    assert (recipe.target_decay.grid, recipe.target_decay.mu0) == (SquareRoot(2, 150), 0.9)
    assert (recipe.optimizer.name, recipe.lr.peak, recipe.lr.decay_nimg, recipe.sigma_min) == ("radam", 4e-4, 0, 0.002)
    if preset == "cifar10":
        assert (recipe.batch_size, recipe.total_nimg) == (512, 512 * 800_000)
        assert "8.70 / 5.83" in recipe.published


@pytest.mark.parametrize("preset", ["default", "digits", "cifar10"])
def test_edm_is_the_papers(preset):
    recipe = recipes.recipe("edm", preset)
    term = only_term(recipe, Denoising)
    assert recipe.objective.pairs == Diffusion(LogNormal(-1.2, 1.2))
    assert (type(term.distance), term.weighting, recipe.sigma_data, recipe.sigma_min) == (SquaredL2, EDM(0.5), 0.5, 0.0)


# ------------------------------------------------------------------------------------------------------------ refused


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(FewstepError, match=r"choose from.*ect"):
        recipes.recipe("etc")
    with pytest.raises(FewstepError, match=r"choose from.*cifar10-1hour"):
        recipes.recipe("ect", "cifar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_nimg": 0}, "--total-nimg"),
        ({"batch_size": 0}, "--batch-size"),
        ({"log_nimg": 0}, "--log-nimg"),
        ({"microbatch": 0}, "--microbatch"),
        ({"averages": (ConstantEMA(0.9), ConstantEMA(0.9))}, "same name"),
    ],
)
def test_recipes_that_cannot_run_are_refused_with_the_flag(change, message):
    recipe = recipes.recipe("ect")
    assert isinstance(recipe, Recipe)
    with pytest.raises(FewstepError, match=message):
        replace(recipe, **change)
