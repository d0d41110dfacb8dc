"""TCM's two halves: who answers for which noise level, and that one of them never changes."""

import json
import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from fewstep import codec
from fewstep.networks import MLP, Architecture, DiT, EDMUNet, Network, Spliced, UNet, inherited
from fewstep.types import Denoiser, FewstepError

TINY = UNet(channels=16, multipliers=(1, 2), layers=1, attention=(), head_dim=8, norm_groups=8, dropout=0.3)
INNER = [
    TINY,
    EDMUNet(channels=8, multipliers=(1,), blocks=1, attention=(), style="ncsn++", norm="nonscaling-layer"),
    DiT(width=16, depth=1, heads=2, dropout=0.3),
]
T = torch.tensor([0.01, 5.0, 1.0, 0.9, 80.0, 0.5])
ABOVE = T >= 1


def randomised(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def inputs(n=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.arange(n) % 3


def stage1(network):
    return randomised(Architecture(network, (1, 8, 8), 3).build())


def stage2(network, first, boundary=1.0):
    """The spliced denoiser that starts from a denoiser of `network`."""
    spliced = Spliced(network, boundary)
    model = Architecture(spliced, (1, 8, 8), 3).build()
    model.load_state_dict(spliced.start_from(first.state_dict()), strict=True)
    return model


@pytest.mark.parametrize("network", INNER)
def test_it_starts_as_the_model_of_stage_one_at_every_noise_level(network):
    first = stage1(network).eval()
    model = stage2(network, first).eval()
    x, label = inputs()
    assert torch.allclose(model(x, T, label), first(x, T, label), atol=1e-5)
    for t in (0.002, 0.5, 1.0, 80.0):
        assert torch.equal(model(x, torch.full((6,), t), label), first(x, torch.full((6,), t), label))


@pytest.mark.parametrize("network", INNER)
def test_each_row_is_answered_by_its_own_network(network):
    first = stage1(network).eval()
    model = stage2(network, first).eval()
    randomised(model, seed=2)  # the parameters are the trained network's alone
    changed = stage1(network).eval()
    changed.load_state_dict(
        {name.replace("trained.", ""): p for name, p in model.state_dict().items() if "network.trained." in name}
    )
    x, label = inputs()
    out = model(x, T, label)
    assert torch.allclose(out[ABOVE], changed(x, T, label)[ABOVE], atol=1e-5)
    assert torch.allclose(out[~ABOVE], first(x, T, label)[~ABOVE], atol=1e-5)
    assert not torch.allclose(changed(x, T, label), first(x, T, label), atol=1e-2)


@pytest.mark.parametrize("boundary", [0.05, 0.3, 1.0, 1.7, math.e, 10.0])
def test_the_boundary_itself_is_the_trained_networks(boundary):
    model = Architecture(Spliced(MLP(width=16), boundary), (2,)).build()
    nn.init.constant_(model.network.trained.rest[-1].bias, 1.0)
    nn.init.constant_(model.network.frozen.rest[-1].bias, -1.0)
    x = torch.zeros(6, 2)
    t = torch.tensor([boundary, math.exp(math.log(boundary)), 1.001 * boundary, 0.999 * boundary, 0.002, 80.0])
    t[1] = torch.tensor(boundary).log().exp()  # what a law of ln t makes of it
    seen = model(x, t)[:, 0] > 0
    assert seen.tolist() == [True, True, True, False, False, True]
    assert (model(x, t.double())[:, 0] > 0).tolist() == seen.tolist()


def test_only_the_rows_that_need_it_run_through_a_network():
    network = replace(TINY, dropout=0.0)
    model = stage2(network, stage1(network)).train()
    rows = {"trained": [], "frozen": []}
    for name, seen in rows.items():
        getattr(model.network, name).register_forward_hook(lambda _, args, out, seen=seen: seen.append(len(args[0])))
    x, label = inputs()
    for t in (T, torch.full((6,), 3.0), torch.full((6,), 0.1)):
        model(x, t, label)
    assert rows == {"trained": [3, 6], "frozen": [3, 6]}


@pytest.mark.parametrize("network", INNER)
def test_training_reaches_the_trained_network_only(network):
    first = stage1(network)
    model = stage2(network, first).train()
    frozen = {name: p.clone() for name, p in model.state_dict().items() if "network.frozen." in name}
    before = {name: p.clone() for name, p in model.state_dict().items() if "network.trained." in name}
    assert all(name.startswith("network.trained.") for name, _ in model.named_parameters())
    model.requires_grad_(True)  # as loading a model to train it does
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    x, label = inputs()
    for _ in range(3):
        optimizer.zero_grad()
        model(x, T, label).square().sum().backward()
        optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], p) for name, p in frozen.items())
    learned = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(torch.equal(after[name], before[name]) for name in learned) < len(learned) / 4
    low = torch.full((6,), 0.5)
    assert torch.equal(model(x, low, label), first.eval()(x, low, label))


@pytest.mark.parametrize("network", INNER)
def test_the_gradient_is_that_of_the_rows_above_the_boundary(network):
    network = replace(network, dropout=0.0)
    first = stage1(network).train()
    model = stage2(network, first).train()
    x, label = inputs()
    model(x, T, label).square().sum().backward()
    first(x[ABOVE], T[ABOVE], label[ABOVE]).square().sum().backward()
    expected = dict(first.named_parameters())
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name.replace("trained.", "")].grad, atol=1e-3, rtol=1e-3)


def test_the_frozen_network_never_drops_and_a_row_keeps_its_dropout_mask():
    model = stage2(TINY, stage1(TINY)).train()
    assert model.network.trained.training
    assert not any(module.training for module in model.network.frozen.modules())
    x, label = inputs()

    def out(t):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return model(x, t, label)

    high = torch.full((6,), 5.0)
    mixed, alone = out(torch.where(ABOVE, high, 0.5)), out(high)
    assert torch.allclose(mixed[ABOVE], alone[ABOVE], atol=1e-5)  # x_t's mask is x_r's, whoever else crossed over
    low = torch.full((6,), 0.5)
    assert torch.allclose(mixed[~ABOVE], model.eval()(x, low, label)[~ABOVE], atol=1e-5)
    assert not torch.allclose(alone, model(x, high, label), atol=1e-3)


def test_starting_from_a_spliced_model_keeps_both_of_its_networks():
    spliced = Spliced(TINY)
    model = randomised(stage2(TINY, stage1(TINY)), seed=5)
    tensors = model.state_dict()
    assert spliced.start_from(tensors) is tensors
    halves = spliced.start_from({"network.unet.conv_in.bias": torch.ones(2)})
    assert set(halves) == {"network.trained.unet.conv_in.bias", "network.frozen.unet.conv_in.bias"}


def test_low_precision_and_unlabelled_batches():
    model = randomised(Architecture(Spliced(replace(TINY, dropout=0.0)), (1, 8, 8)).build()).eval()
    x, _ = inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model(x, T)
    assert half.dtype == torch.float32
    assert (half - model(x, T)).norm() < 0.03 * half.norm()


def test_it_is_a_network_like_any_other():
    architecture = Architecture(Spliced(TINY, 0.8), (1, 8, 8), 3)
    assert codec.decode(json.loads(json.dumps(codec.encode(architecture)))) == architecture
    assert isinstance(architecture.network, Network)
    model, skeleton = architecture.build(), architecture.skeleton()
    assert isinstance(model, Denoiser)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    out = skeleton(
        torch.zeros(2, 1, 8, 8, device="meta"),
        torch.ones(2, device="meta"),
        torch.zeros(2, dtype=torch.int64, device="meta"),
    )
    assert out.shape == (2, 1, 8, 8)
    own = Architecture(TINY, (1, 8, 8), 3).skeleton()
    count = sum(p.numel() for p in own.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(t.numel() for t in model.state_dict().values()) == 2 * count


@dataclass(frozen=True)
class Bare:
    """A stranger's network without dropout."""

    width: int = 4

    def build(self, shape, num_classes):
        return nn.Identity()


def test_a_run_inherits_the_network_of_its_start_and_keeps_its_own_dropout():
    own, init = replace(TINY, dropout=0.1, dropout_max_resolution=4), replace(TINY, channels=32, dropout=0.4)
    kept = replace(init, dropout=0.1, dropout_max_resolution=4)
    assert inherited(own, init) == kept
    assert inherited(own, Bare(8)) == Bare(8)
    assert inherited(Bare(8), init) == init
    assert inherited(own, DiT(dropout=0.4)) == DiT(dropout=0.1)
    assert inherited(Spliced(own, 0.7), init) == Spliced(kept, 0.7)
    assert inherited(Spliced(own, 0.7), Spliced(init, 0.7)) == Spliced(kept, 0.7)
    with pytest.raises(FewstepError, match="stage 1"):
        inherited(own, Spliced(init))


@pytest.mark.parametrize("boundary", [0.0, -1.0, 80.0, math.nan, math.inf])
def test_impossible_boundaries_are_refused(boundary):
    with pytest.raises(FewstepError, match=r"--network.boundary"):
        Spliced(TINY, boundary)


def test_a_spliced_network_is_not_spliced_again():
    with pytest.raises(FewstepError, match="stage 1"):
        Spliced(Spliced(TINY))
