"""DiT against a second implementation in plain functions, the paper's sizes, and the laws of its embeddings."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fewstep import codec
from fewstep.networks import NAMED, Architecture, DiT, Network, named
from fewstep.networks.dit import NoiseFeatures, positions
from fewstep.types import Denoiser, FewstepError

TINY = DiT(patch=2, width=16, depth=2, heads=2)


def inputs(n=3, c=4, side=8):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, c, side, side, generator=generator), torch.tensor([0.1, 1.0, 30.0])[:n]


def randomised(model, scale=0.2):
    """No weight at zero, so that everything can be seen in the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


# ------------------------------------------------------------------------------------------------- the whole network


def reference(net, config, x, c_noise, label):
    """F by arXiv:2212.09748, section 3.2 and figure 3, one sample, one token, one head at a time."""
    w = {name: p.detach() for name, p in net.state_dict().items()}
    p, d, hd = config.patch, config.width, config.width // config.heads

    def affine(name, v):
        return v @ w[name + ".weight"].T + w[name + ".bias"]

    def silu(v):
        return v / (1 + torch.exp(-v))

    def gelu(v):
        return v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))

    def norm(v):
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def attention(name, h):
        q, k, v = affine(name + ".qkv", h).split(d, dim=-1)
        heads = []
        for i in range(0, d, hd):
            scores = q[:, i : i + hd] @ k[:, i : i + hd].T / math.sqrt(hd)
            heads.append(scores.softmax(-1) @ v[:, i : i + hd])
        return affine(name + ".proj", torch.cat(heads, -1))

    outputs = []
    for image, c, y in zip(x, c_noise, label, strict=True):
        f = torch.tensor([2 * 0.01 ** (i / 127) for i in range(128)])
        told = affine("noise.3", silu(affine("noise.1", torch.cat([(c * f).sin(), (c * f).cos()]))))
        told = silu(told + w["label.weight"][y])
        side = image.shape[-1] // p
        tokens = [image[:, i * p : i * p + p, j * p : j * p + p].flatten() for i in range(side) for j in range(side)]
        h = affine("embed", torch.stack(tokens)) + positions(side, d)
        for b in range(config.depth):
            shift0, scale0, gate0, shift1, scale1, gate1 = affine(f"blocks.{b}.modulation", told).split(d)
            h = h + gate0 * attention(f"blocks.{b}", norm(h) * (1 + scale0) + shift0)
            hidden = gelu(affine(f"blocks.{b}.mlp.0", norm(h) * (1 + scale1) + shift1))
            h = h + gate1 * affine(f"blocks.{b}.mlp.3", hidden)
        shift, scale = affine("modulation", told).split(d)
        out = affine("last", norm(h) * (1 + scale) + shift).reshape(side, side, -1, p, p)
        outputs.append(out.permute(2, 0, 3, 1, 4).reshape(image.shape))
    return torch.stack(outputs)


@pytest.mark.parametrize(
    "config", [TINY, replace(TINY, patch=1, depth=1), replace(TINY, patch=4, heads=4, mlp_ratio=1.5)]
)
def test_network_is_the_papers(config):
    net = randomised(config.build((4, 8, 8), 3))
    (x, t), label = inputs(), torch.tensor([2, 0, 1])
    c_noise = t.log() / 4
    with torch.no_grad():
        torch.testing.assert_close(
            net(x, c_noise, label), reference(net, config, x, c_noise, label), atol=2e-4, rtol=1e-4
        )


def test_published_sizes():
    """The paper's appendix, latents of 4x32x32 in patches of 2: parameters [M] and multiply-adds [G]."""
    published = {"dit-s": (33, 6.06), "dit-b": (130, 23.01), "dit-l": (458, 80.71), "dit-xl": (675, 118.64)}
    for name, (parameters, operations) in published.items():
        model = Architecture(named(name), (4, 32, 32), 1000).skeleton().eval()
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.005)
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 4, 32, 32), torch.ones(1), torch.zeros(1, dtype=torch.int64))
        assert counter.get_total_flops() / 2e9 == pytest.approx(operations, rel=0.002)
    # ours learns no variance (4 of 8 output channels) and has no null class
    assert sum(p.numel() for p in Architecture(DiT(), (4, 32, 32), 1000).skeleton().parameters()) == 32_858_512


def test_a_fresh_denoiser_is_c_skip_x_and_takes_two_steps_to_hear_its_label():
    (x, t), label = inputs(), torch.tensor([0, 1, 2])
    model = Architecture(TINY, (4, 8, 8), 3).build()
    assert torch.equal(model(x, t, label), (0.25 / (t**2 + 0.25))[:, None, None, None] * x)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    heard = []
    for _ in range(3):
        with torch.no_grad():
            heard.append(not torch.equal(model(x, t, label), model(x, t, label.flip(0))))
        optimizer.zero_grad()
        (model(x, t, label) - torch.arange(3.0)[label, None, None, None]).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert heard == [False, False, True]  # the first step moves the last layer, the second the scales and gates


@pytest.mark.parametrize("norm", ["plain", "layer", "nonscaling-layer", "rms"])
def test_every_input_and_every_weight_reaches_the_output(norm):
    model = randomised(Architecture(replace(TINY, norm=norm), (4, 8, 8), 3).build())
    (x, t), label = inputs(), torch.tensor([0, 1, 2])
    out = model(x, t, label)
    for other in (model(x + 0.1, t, label), model(x, 1.5 * t, label), model(x, t, label.flip(0))):
        assert not torch.allclose(out, other, atol=1e-4)
    assert torch.allclose(model(x[1:], t[1:], label[1:]), out[1:], atol=1e-5)  # no sample sees another
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


def test_gradients_are_those_of_finite_differences():
    model = randomised(Architecture(replace(TINY, depth=1), (1, 4, 4)).build()).double()
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.3, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: model(x, t), x)


def test_only_the_position_embedding_tells_patches_apart():
    net = randomised(TINY.build((4, 8, 8), 0))
    x, t = inputs()
    moved = torch.roll(x, (2, 4), dims=(2, 3))  # by whole patches
    assert not torch.allclose(net(moved, t), torch.roll(net(x, t), (2, 4), dims=(2, 3)), atol=1e-3)
    net.position.zero_()
    assert torch.allclose(net(moved, t), torch.roll(net(x, t), (2, 4), dims=(2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "weights", "biases"), [("plain", 0, 0), ("layer", 5, 5), ("nonscaling-layer", 0, 5), ("rms", 5, 0)]
)
def test_norms_act_on_each_token_and_have_their_parameters(norm, weights, biases):
    net = replace(TINY, norm=norm).build((4, 8, 8), 0)
    names = [name for name, p in net.named_parameters() if "norm" in name and p.shape == (16,)]
    assert len(names) == weights + biases  # two blocks of two, and the last
    assert sum(name.endswith("bias") for name in names) == biases
    h = 3 + 2 * torch.randn(2, 5, 16)
    y = net.norm(h)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(2, 5), atol=1e-4, rtol=0)
    assert (y.mean(-1).abs() < 1e-5).all() == (norm != "rms")


def test_denoiser_stays_float32_under_bfloat16_autocast():
    (x, t), model = inputs(), randomised(Architecture(TINY, (4, 8, 8)).build(), 0.1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model(x, t)
    full = model(x, t)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).norm() < 0.02 * full.norm()


def test_dropout_is_for_training_only():
    (x, t), model = inputs(), randomised(Architecture(replace(TINY, dropout=0.5), (4, 8, 8)).build())
    with torch.no_grad():
        assert torch.equal(model(x, t), model(x, t))
        model.train()
        assert not torch.allclose(model(x, t), model(x, t), atol=1e-3)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5] * 4


# -------------------------------------------------------------------------------------------------------- embeddings


def test_noise_features_turn_at_most_half_a_radian_per_e_fold_of_sigma():
    sigma = torch.logspace(-2.7, 1.9, 50).double().requires_grad_()
    for feature in (features := NoiseFeatures()(sigma.log() / 4)).unbind(1):
        (slope,) = torch.autograd.grad(feature.sum(), sigma, retain_graph=True)
        assert (slope * sigma).abs().max() <= 0.5
    near, far = features[10], NoiseFeatures()((1.02 * sigma[10:11]).log() / 4)[0]
    assert (near - far).norm() < 0.01 * near.norm()
    assert (features[0] - features[-1]).norm() > 0.3 * features[0].norm()  # yet the ends are far apart


def test_position_embeddings_are_unit_sinusoids_whose_products_depend_on_the_offset_only():
    p = positions(5, 24).double()
    torch.testing.assert_close(p.square().sum(1), torch.full((25,), 12.0, dtype=torch.float64))
    products = (p @ p.T).reshape(5, 5, 5, 5)  # [row, column, row', column']
    torch.testing.assert_close(products[1:, 1:, 1:, 1:], products[:-1, :-1, :-1, :-1], atol=1e-5, rtol=0)
    assert (products.reshape(25, 25).fill_diagonal_(0) < 11.9).all()  # no two places look alike
    quarter = F.pad(torch.arange(5.0)[:, None].sin(), (0, 0))
    torch.testing.assert_close(positions(5, 24).reshape(5, 5, 24)[:, 0, :1], quarter)  # rows first, frequency 1


# ---------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("classes", [0, 3])
def test_weights_depend_on_the_seed_only_and_the_skeleton_has_their_shapes(classes):
    architecture = Architecture(replace(TINY, norm="nonscaling-layer"), (4, 8, 8), classes)
    assert codec.decode(json.loads(json.dumps(codec.encode(architecture)))) == architecture
    before = torch.get_rng_state()
    first, second, other = (architecture.build(seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    skeleton = architecture.skeleton()
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in first.items()}
    assert isinstance(skeleton, Denoiser)


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (replace(TINY, patch=3), (4, 8, 8), "--network.patch 3 must divide .* 8"),
        (TINY, (4, 8, 16), "square"),
        (TINY, (2,), "square"),
    ],
)
def test_images_that_do_not_fit_are_refused(config, shape, message):
    with pytest.raises(FewstepError, match=message):
        Architecture(config, shape).skeleton()


@pytest.mark.parametrize(
    ("wrong", "option"),
    [
        *(({name: 0}, name) for name in ("patch", "width", "depth", "heads")),
        ({"heads": 5}, "heads"),
        ({"width": 18, "heads": 2}, "width"),
        ({"mlp_ratio": 0.0}, "mlp-ratio"),
        ({"mlp_ratio": math.nan}, "mlp-ratio"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_impossible_values_are_refused_by_their_option(wrong, option):
    with pytest.raises(FewstepError, match=f"--network.{option}"):
        DiT(**wrong)


def test_labels_belong_to_conditional_networks_only():
    x, t = inputs()
    with pytest.raises(FewstepError, match="label"):
        TINY.build((4, 8, 8), 3)(x, t)
    with pytest.raises(FewstepError, match="unconditional"):
        TINY.build((4, 8, 8), 0)(x, t, torch.tensor([0, 1, 2]))


def test_networks_have_names():
    for name in NAMED:
        assert isinstance(named(name), Network)
    assert named("ncsn++").style == "ncsn++"
    with pytest.raises(FewstepError, match=r"unknown network 'vit'.*dit-s"):
        named("vit")
