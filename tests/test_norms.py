"""The normalisations of sLCT's ablation: their formulas, and that they stand exactly where the group norms stood."""

import json
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import nn

from fewstep import codec
from fewstep.networks import Architecture, EDMUNet, Norm, UNet
from fewstep.networks.norms import SampleNorm, check_norm, in_place_of
from fewstep.types import FewstepError

NORMS = [norm for norm in get_args(Norm) if norm != "group"]
TINY = UNet(channels=16, multipliers=(1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8)
EDM = EDMUNet(channels=8, multipliers=(2, 1), blocks=1, attention=(4,), dropout=0.0)
NETWORKS = [TINY, EDM, replace(EDM, style="ncsn++")]


def inputs(n=3, c=3, side=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, c, side, side, generator=generator), torch.tensor([0.1, 1.0, 30.0])[:n]


def randomised(model):
    """No weight at zero, so that everything can be seen in the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def a_norm(norm, shape=(8, 3, 5)):
    """The module with random weights, in place of a GroupNorm of 4 groups."""
    return randomised(in_place_of(nn.GroupNorm(4, shape[0], eps=1e-3), norm, shape))


# ---------------------------------------------------------------------------------------------------------- formulas


def standardised(x, axes, eps, centre=True):
    mean = x.mean(axes, keepdim=True) if centre else 0
    return (x - mean) / ((x - mean).square().mean(axes, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("shape", [(8, 3, 5), (8, 6)])
@pytest.mark.parametrize("norm", NORMS)
def test_forward_is_the_formula(norm, shape):
    module = a_norm(norm, shape).double()
    x = 3 + 2 * torch.randn(4, *shape, dtype=torch.float64)
    axes = tuple(range(1, x.ndim))
    groups = x.reshape(4, 4, 2, *shape[1:])
    z = {
        "layer": lambda: standardised(x, axes, 1e-5),
        "nonscaling-layer": lambda: standardised(x, axes, 1e-5),
        "rms": lambda: standardised(x, axes, 1e-5, centre=False),
        "instance": lambda: standardised(x, axes[1:], 1e-5),
        "nonscaling-group": lambda: standardised(groups, (2, *(a + 1 for a in axes[1:])), 1e-3).reshape(x.shape),
    }[norm]()
    weight = 1 if norm.startswith("nonscaling") else module.weight
    bias = 0 if norm == "rms" else module.bias
    torch.testing.assert_close(module(x), z * weight + bias)


@pytest.mark.parametrize(
    ("norm", "weight", "bias"),
    [
        ("layer", (8, 3, 5), (8, 3, 5)),
        ("nonscaling-layer", None, (8, 3, 5)),
        ("rms", (8, 3, 5), None),
        ("instance", (8, 1, 1), (8, 1, 1)),
        ("nonscaling-group", None, (8, 1, 1)),
    ],
)
def test_parameters_are_those_of_the_table(norm, weight, bias):
    found = {name: tuple(p.shape) for name, p in a_norm(norm).named_parameters()}
    assert found == {name: shape for name, shape in {"weight": weight, "bias": bias}.items() if shape}


def test_nonscaling_layernorm_has_unit_moments_at_the_start_and_learns_only_its_bias():
    module = in_place_of(nn.GroupNorm(4, 8), "nonscaling-layer", (8, 3, 5))
    x = 7 + 5 * torch.randn(4, 8, 3, 5)
    y = module(x).flatten(1)
    torch.testing.assert_close(y.mean(1), torch.zeros(4), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(4), atol=1e-5, rtol=0)

    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(5):  # the loss asks for twice the scale, and cannot have it
        optimizer.zero_grad()
        (module(x) - 2 * x).square().mean().backward()
        optimizer.step()
    assert module.weight is None
    assert list(module.state_dict()) == ["bias"]
    assert (module.bias.grad != 0).all()
    y = (module(x) - module.bias).flatten(1)
    torch.testing.assert_close(y.var(1, correction=0), torch.ones(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_bfloat16_is_normalised_in_float32(norm):
    module = a_norm(norm)
    x = (100 + torch.randn(4, 8, 3, 5)).bfloat16()
    assert module(x).dtype == torch.bfloat16
    assert torch.equal(module(x), module(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), module(x.float()).bfloat16())


# --------------------------------------------------------------------------------------------------- in the networks


@pytest.mark.parametrize(
    ("network", "norm"),
    [*((network, "nonscaling-layer") for network in NETWORKS), *((TINY, norm) for norm in NORMS[:1] + NORMS[2:])],
)
def test_every_group_norm_is_replaced_and_nothing_else_changes(network, norm):
    group = Architecture(network, (3, 8, 8), 3).build(4).network
    other = Architecture(replace(network, norm=norm), (3, 8, 8), 3).build(4).network
    places = {name for name, module in group.named_modules() if isinstance(module, nn.GroupNorm)}
    assert {name for name, module in other.named_modules() if isinstance(module, SampleNorm)} == places
    assert not any(isinstance(module, nn.GroupNorm) for module in other.modules())
    before, after = group.state_dict(), other.state_dict()
    same = {name for name in before if name.rpartition(".")[0] not in places}
    assert same == {name for name in after if name.rpartition(".")[0] not in places}
    assert all(torch.equal(before[name], after[name]) for name in same)
    assert all(module.training for module in other.modules())


def test_shapes_follow_the_resolution_and_attention_normalises_positions_in_a_row():
    unet = Architecture(replace(TINY, norm="nonscaling-layer"), (1, 8, 8), 3).skeleton().network.unet
    shape = lambda name: tuple(unet.get_submodule(name).bias.shape)  # noqa: E731
    assert shape("conv_norm_out") == shape("down_blocks.0.resnets.0.norm1") == (16, 8, 8)
    assert shape("down_blocks.1.attentions.0.group_norm") == (32, 16)
    assert shape("up_blocks.0.resnets.0.norm1") == (64, 4, 4)  # with its skip
    edm = Architecture(replace(EDM, norm="nonscaling-layer"), (1, 8, 8)).skeleton().network
    assert tuple(edm.enc["4x4_block0"].norm2.bias.shape) == (8, 4, 4)
    assert tuple(edm.dec["8x8_aux_norm"].bias.shape) == (16, 8, 8)


@pytest.mark.parametrize("network", NETWORKS)
def test_untrained_networks_with_and_without_scale_are_the_same_function(network):
    """weight 1 and bias 0 everywhere: what differs is what can be learned."""
    (x, t), label = inputs(), torch.tensor([0, 1, 2])

    def out(norm, **changes):
        model = Architecture(replace(network, norm=norm, **changes), (3, 8, 8), 3).build().eval()
        with torch.no_grad():  # convolutions and the conditioning away from zero, alike in all
            for name, p in model.named_parameters():
                if "norm" not in name:
                    generator = torch.Generator().manual_seed(sum(map(ord, name)))
                    p.add_(0.1 * torch.randn(p.shape, generator=generator))
            return model(x, t, label)

    torch.testing.assert_close(out("nonscaling-group"), out("group"))
    torch.testing.assert_close(out("nonscaling-layer"), out("layer"))
    assert not torch.allclose(out("layer"), out("group"), atol=1e-3)
    if network is TINY:  # one group of all channels is a LayerNorm over [C, H, W], at the same eps
        torch.testing.assert_close(out("nonscaling-layer"), out("group", norm_groups=1))


@pytest.mark.parametrize(
    ("network", "norm"), [(TINY, "nonscaling-layer"), (NETWORKS[2], "nonscaling-layer"), (TINY, "rms")]
)
def test_networks_train_and_keep_samples_apart(network, norm):
    model = randomised(Architecture(replace(network, norm=norm), (3, 8, 8), 3).build())
    (x, t), label = inputs(), torch.tensor([0, 1, 2])
    out = model(x, t, label)
    assert torch.allclose(model(x[1:], t[1:], label[1:]), out[1:], atol=1e-5)
    out.square().sum().backward()
    norms = [m for m in model.modules() if isinstance(m, SampleNorm)]
    assert all((p.grad.isfinite() & (p.grad != 0)).any() for m in norms for p in m.parameters())


@pytest.mark.parametrize(("network", "norm"), [(TINY, "instance"), (TINY, "nonscaling-layer"), (EDM, "layer")])
def test_architectures_survive_json_and_have_a_skeleton(network, norm):
    architecture = Architecture(replace(network, norm=norm), (3, 8, 8), 3)
    assert codec.decode(json.loads(json.dumps(codec.encode(architecture)))) == architecture
    before = torch.get_rng_state()
    model, skeleton = architecture.build(2), architecture.skeleton()
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.is_meta for p in skeleton.parameters())
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert not any(t.is_meta for t in model.state_dict().values())


def test_what_cannot_be_normalised_is_refused():
    deep = UNet(channels=16, multipliers=(1, 1, 1, 1), layers=1, attention=(), head_dim=8, norm_groups=8)
    with pytest.raises(FewstepError, match=r"single pixel.*--network.multipliers"):
        Architecture(replace(deep, norm="instance"), (1, 8, 8)).skeleton()
    with pytest.raises(FewstepError, match=r"--network.norm 'batch'.*nonscaling-layer"):
        check_norm("batch")
