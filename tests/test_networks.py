"""Preconditioning's identities, the U-Net on diffusers, and how networks are built."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewstep.networks import MLP, Architecture, EDMUNet, Network, Preconditioned, UNet, coefficients
from fewstep.networks.unet import LOW_FREQUENCY
from fewstep.objectives import EDM
from fewstep.types import Denoiser, FewstepError

TINY = UNet(channels=16, multipliers=(1, 2), layers=1, attention=(4,), head_dim=8, norm_groups=8)
sigmas = st.floats(-9, 6).map(math.exp)


def count(module):
    return sum(p.numel() for p in module.parameters())


def inputs(shape=(1, 8, 8), n=3):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([0.1, 1.0, 30.0])[:n]


def randomised(model):
    """No weight at zero, so that everything can be seen in the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


class Affine(nn.Module):
    """F(x, c_noise) = 3 x + c_noise + 2."""

    def forward(self, x, c, label=None):
        return 3 * x + c.to(x.dtype)[:, None] + 2


# ---------------------------------------------------------------------------------------------------- preconditioning


@settings(deadline=None)
@given(sigmas, st.floats(0.05, 5))
def test_edm_coefficients_keep_unit_variance_and_amplify_errors_least(sigma, sd):
    c_skip, c_out, scale_in, c_noise = (c.item() for c in coefficients(torch.tensor([sigma], dtype=torch.float64), sd))
    assert scale_in**-2 * (sd**2 + sigma**2) == pytest.approx(1)  # unit input
    target = (1 - c_skip) ** 2 * sd**2 + c_skip**2 * sigma**2  # variance of c_out F = x - c_skip (x + sigma z)
    assert target == pytest.approx(c_out**2)  # unit target
    assert c_out**2 == pytest.approx(sigma**2 * sd**2 / (sigma**2 + sd**2))
    for other in (0.99 * c_skip, 1.01 * c_skip, c_skip + 0.01):  # c_skip makes c_out smallest
        assert (1 - other) ** 2 * sd**2 + other**2 * sigma**2 >= target
    assert c_noise == pytest.approx(math.log(sigma) / 4)
    weight = EDM(sd)(torch.tensor([sigma], dtype=torch.float64), torch.zeros(1).double()).item()
    assert weight * c_out**2 == pytest.approx(1)  # EDM's weighting is 1 / c_out^2


@settings(deadline=None)
@given(sigmas, st.floats(0.05, 5))
def test_shifted_coefficients_are_the_consistency_models_and_edms_at_sigma_min_zero(sigma, sd):
    t, low = torch.tensor([sigma], dtype=torch.float64), 0.002
    c_skip, c_out, scale_in, _ = (c.item() for c in coefficients(t, sd, low))
    assert c_skip == pytest.approx(sd**2 / ((sigma - low) ** 2 + sd**2))
    assert c_out == pytest.approx((sigma - low) * sd / math.sqrt(sigma**2 + sd**2))
    assert scale_in == pytest.approx(math.sqrt(sigma**2 + sd**2))


def test_denoiser_is_its_formula():
    x, t = inputs((4,))
    s = t[:, None]
    raw = 3 * x / (s**2 + 0.25).sqrt() + s.log() / 4 + 2
    expected = 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * raw
    assert torch.allclose(Preconditioned(Affine())(x, t), expected, rtol=1e-5)


@pytest.mark.parametrize("network", [MLP(width=16), TINY])
def test_boundary_the_denoiser_tends_to_x_at_zero_and_is_x_at_sigma_min_in_the_shifted_form(network):
    shape = (2,) if isinstance(network, MLP) else (1, 8, 8)
    x, ones = inputs(shape)[0], torch.ones(3)
    model = randomised(Architecture(network, shape).build()).eval()
    gaps = [(model(x, sigma * ones) - x).norm().item() for sigma in (1e-2, 1e-3, 1e-4)]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.5)  # linear in sigma
    assert gaps[2] < 3e-3 * x.norm()
    assert torch.equal(model(x, 1e-12 * ones), x)
    shifted = randomised(Architecture(network, shape, sigma_min=0.002).build()).eval()
    assert torch.equal(shifted(x, 0.002 * ones), x)
    assert not torch.equal(shifted(x, 0.003 * ones), x)


@pytest.mark.parametrize("network", [MLP(width=16), TINY])
def test_denoiser_stays_float32_under_bfloat16_autocast(network):
    shape = (2,) if isinstance(network, MLP) else (1, 8, 8)
    (x, t), model = inputs(shape), randomised(Architecture(network, shape).build()).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model(x, t)
    full = model(x, t)
    assert half.dtype == torch.float32
    assert not torch.equal(half, full)
    assert (half - full).norm() < 0.03 * full.norm()


# ----------------------------------------------------------------------------------------------------------- building


@pytest.mark.parametrize("network", [MLP(width=16), TINY, EDMUNet(channels=8, multipliers=(1,), blocks=1)])
def test_weights_depend_on_the_seed_only_and_no_generator_is_touched(network, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded CUDA"))
    architecture = Architecture(network, (1, 8, 8), 3)
    before = torch.get_rng_state()
    first = architecture.build(5).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    second, other = architecture.build(5).state_dict(), architecture.build(6).state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    skeleton = architecture.skeleton()
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in first.items()}
    assert all(p.is_meta for p in skeleton.parameters())
    assert isinstance(network, Network)
    assert isinstance(skeleton, Denoiser)


@pytest.mark.parametrize("network", [MLP(width=16), TINY])
def test_a_fresh_denoiser_is_c_skip_x(network):
    (x, t), model = inputs(), Architecture(network, (1, 8, 8)).build().eval()
    expected = 0.25 / (t**2 + 0.25)
    bias = [p for name, p in model.named_parameters() if name.endswith("bias")][-1]
    nn.init.zeros_(bias)
    assert torch.allclose(model(x, t), expected[:, None, None, None] * x, atol=1e-7)


def test_published_parameter_counts():
    adm = UNet(192, (1, 2, 3, 4), layers=3, attention=(32, 16, 8), head_dim=64)
    assert count(Architecture(adm, (3, 64, 64), 1000).skeleton()) == 295_897_731  # EDM's ImageNet-64: 295.9M
    assert count(Architecture(EDMUNet(), (3, 32, 32)).skeleton()) == 55_733_891


@pytest.mark.parametrize("network", [MLP(width=16), TINY])
def test_every_input_reaches_the_output(network):
    model = randomised(Architecture(network, (1, 8, 8), 3).build()).eval()
    (x, t), label = inputs(), torch.tensor([0, 1, 2])
    out = model(x, t, label)
    for other in (model(x + 0.1, t, label), model(x, 1.5 * t, label), model(x, t, label.flip(0))):
        assert not torch.allclose(out, other, atol=1e-4)
    assert torch.allclose(model(x[1:], t[1:], label[1:]), out[1:], atol=1e-5)  # no sample sees another


# --------------------------------------------------------------------------------------------------------------- U-Net


def test_masked_time_frequencies_stay_exactly_zero_under_adam_with_weight_decay():
    unet = Architecture(TINY, (1, 8, 8)).build().network.unet
    weight, mask = unet.time_embedding.linear_1.weight, unet.time_mask.bool()
    # sinusoid i of 8 turns 10000^(-i/8) rad per unit of the timestep 250 ln sigma
    assert mask.tolist() == [10000 ** (-i / 8) <= LOW_FREQUENCY for i in range(8)] * 2
    assert 250 * LOW_FREQUENCY == 0.5
    before = weight.detach().clone()
    assert (before[:, ~mask] == 0).all()
    assert (before[:, mask] != 0).all()
    nn.init.normal_(unet.conv_out.weight, std=0.1)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.RAdam):
        optimizer = kind(unet.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            unet(torch.randn(2, 1, 8, 8), torch.tensor([-300.0, 500.0])).sample.square().mean().backward()
            optimizer.step()
    assert (weight[:, ~mask] == 0).all()
    assert (weight[:, mask] != before[:, mask]).float().mean() > 0.9


def test_the_low_frequencies_that_remain_carry_the_variance_of_all():
    all_of_them = UNet(channels=128, multipliers=(1,), layers=1, attention=(), low_frequency_time=False)
    build = lambda config: Architecture(config, (1, 8, 8)).build().network.unet.time_embedding.linear_1.weight  # noqa: E731
    low, every = build(replace(all_of_them, low_frequency_time=True)), build(all_of_them)
    assert low.square().sum(1).mean().item() == pytest.approx(every.square().sum(1).mean().item(), rel=0.05)


def test_low_frequency_time_makes_neighbouring_noise_levels_look_alike():
    def change(low_frequency):
        config = UNet(
            channels=64, multipliers=(1,), layers=1, attention=(), head_dim=8, low_frequency_time=low_frequency
        )
        unet = Architecture(config, (1, 8, 8)).build().network.unet
        timesteps = 250 * torch.tensor([1.0, 1.02]).log()  # 2 % apart in sigma
        near, far = unet.time_embedding.linear_1(unet.time_proj(timesteps))
        return ((near - far).norm() / near.norm()).item()

    assert change(True) < 0.05
    assert change(False) > 0.5


def test_weights_are_a_stock_unet2dmodels():
    network = randomised(Architecture(TINY, (1, 8, 8), 3).build()).network
    stock = UNet2DModel(**network.unet.config)
    stock.load_state_dict(network.unet.state_dict(), strict=True)
    (x, t), label = inputs(), torch.tensor([0, 1, 2])
    c_noise = t.log() / 4
    with torch.no_grad():
        expected = stock.eval()(x, 1000 * c_noise, class_labels=label).sample
        assert torch.allclose(network.eval()(x, c_noise, label), expected, atol=1e-6)


@pytest.mark.parametrize("highest", [None, 16, 8, 4, 2])
def test_dropout_only_at_dropout_max_resolution_and_below(highest):
    config = UNet(16, (1, 1, 1), 1, (), 8, dropout=0.3, dropout_max_resolution=highest, norm_groups=8)
    unet = Architecture(config, (1, 16, 16)).build().network.unet
    places = [(16, unet.down_blocks[0]), (8, unet.down_blocks[1]), (4, unet.down_blocks[2]), (4, unet.mid_block),
              (4, unet.up_blocks[0]), (8, unet.up_blocks[1]), (16, unet.up_blocks[2])]  # fmt: skip
    for resolution, block in places:
        ps = {m.p for name, m in block.named_modules() if isinstance(m, nn.Dropout) and name.endswith("dropout")}
        assert ps == {0.3 if highest is None or resolution <= highest else 0.0}


@pytest.mark.parametrize(
    ("config", "shape", "message"),
    [
        (UNet(channels=20, multipliers=(1,)), (3, 8, 8), "multiples of --network.norm-groups 32"),
        (UNet(multipliers=(1, 1, 1)), (3, 30, 30), "multiple of 4"),
        (UNet(), (3, 32, 16), "square"),
        (UNet(), (2,), "square"),
        (UNet(channels=32, multipliers=(1,), attention=()), (1, 8, 8), "--network.head-dim 32"),
    ],
)
def test_networks_that_cannot_be_built_are_refused_with_the_fix(config, shape, message):
    with pytest.raises(FewstepError, match=message):
        Architecture(config, shape).skeleton()


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *((UNet, {name: 0}) for name in ("channels", "layers", "head_dim", "norm_groups")),
        *((EDMUNet, wrong) for wrong in ({"channels": 0}, {"channels": 6}, {"blocks": 0}, {"augment_dim": -1})),
        *((kind, {"multipliers": wrong}) for kind in (UNet, EDMUNet) for wrong in ((), (1, 0))),
        *((MLP, {name: 0}) for name in ("width", "depth")),
        *((kind, {"dropout": wrong}) for kind in (UNet, EDMUNet, MLP) for wrong in (-0.1, 1.0, math.nan)),
    ],
)
def test_impossible_values_are_refused_by_their_option(kind, wrong):
    option = "--network." + next(iter(wrong)).replace("_", "-")
    with pytest.raises(FewstepError, match=option) as caught:
        kind(**wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("network", [MLP(width=16), TINY, EDMUNet(channels=8, multipliers=(1,), blocks=1)])
def test_labels_belong_to_conditional_networks_only(network):
    x, t = inputs()
    with pytest.raises(FewstepError, match="label"):
        Architecture(network, (1, 8, 8), 3).build()(x, t)
    with pytest.raises(FewstepError, match="unconditional"):
        Architecture(network, (1, 8, 8)).build()(x, t, torch.tensor([0, 1, 2]))
