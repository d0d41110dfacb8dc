"""The EDM U-Nets against their formulas: the laws of resampling, then a second implementation in plain functions."""

import math

import pytest
import torch
import torch.nn.functional as F

from fewstep.networks.edm_unet import Block, EDMUNet, downsample, low_pass, upsample
from fewstep.types import FewstepError

STYLES = ["ddpm++", "ncsn++"]
FILTERS = {"ddpm++": [0.5, 0.5], "ncsn++": [0.125, 0.375, 0.375, 0.125]}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(style, **changes):
    """Three levels of different widths, so that every skip and every auxiliary convolution has its own shape."""
    return EDMUNet(
        **{"channels": 8, "multipliers": (2, 1, 2), "blocks": 1, "attention": (4,), "style": style, **changes}
    )


def randomised(net, seed=0):
    """The net with weights that leave no branch near zero (at initialisation most of them are)."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if p.ndim > 1:
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.3 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return net.eval()


def inputs(n=3, c=3, side=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, c, side, side, generator=g), torch.log(torch.logspace(-2, 1.5, n)) / 4


# ------------------------------------------------------------------------------------------------ laws of resampling


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_a_constant(taps):
    f = low_pass(taps)
    up = upsample(torch.full((1, 2, 8, 8), 0.7), f)
    torch.testing.assert_close(f.sum(), torch.tensor(1.0))
    torch.testing.assert_close(up[..., 2:-2, 2:-2], torch.full((1, 2, 12, 12), 0.7))
    torch.testing.assert_close(downsample(up, f)[..., 1:-1, 1:-1], torch.full((1, 2, 6, 6), 0.7))


def test_box_filter_is_nearest_and_average():
    x = torch.randn(2, 3, 8, 8)
    f = low_pass((1, 1))
    torch.testing.assert_close(upsample(x, f), F.interpolate(x, scale_factor=2, mode="nearest"))
    torch.testing.assert_close(downsample(x, f), F.avg_pool2d(x, 2))
    torch.testing.assert_close(downsample(upsample(x, f), f), x)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_up_is_four_times_the_adjoint_of_down(taps):
    f = low_pass(taps)
    x, y = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4, 4)
    torch.testing.assert_close((downsample(x, f) * y).sum() * 4, (x * upsample(y, f)).sum(), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------- the network, written a second time


def ref_filter(x, taps):
    """x [n,c,h,w] correlated with the separable filter, no padding: the sum of shifted copies."""
    k = len(taps)
    x = sum(t * x[:, :, i : x.shape[2] - k + 1 + i] for i, t in enumerate(taps))
    return sum(t * x[..., i : x.shape[3] - k + 1 + i] for i, t in enumerate(taps))


def ref_up(x, taps):
    n, c, h, w = x.shape
    sparse = torch.zeros(n, c, 2 * h, 2 * w)
    sparse[..., ::2, ::2] = x
    right = len(taps) // 2 - 1
    return 4 * ref_filter(F.pad(sparse, (len(taps) // 2, right) * 2), taps)  # symmetric taps


def ref_down(x, taps):
    return ref_filter(F.pad(x, ((len(taps) - 1) // 2,) * 4), taps)[..., ::2, ::2]


def ref_conv(w, key, x, extra=0):
    weight = w[f"{key}.weight"]
    return F.conv2d(x, weight, w[f"{key}.bias"], padding=weight.shape[-1] // 2 + extra)


def ref_norm(w, key, x):
    n, c, h, width = x.shape
    groups = x.reshape(n, min(32, c // 4), -1)
    var, mean = torch.var_mean(groups, dim=-1, keepdim=True, correction=0)
    x = ((groups - mean) / (var + 1e-6).sqrt()).reshape(n, c, h, width)
    return x * w[f"{key}.weight"].reshape(-1, 1, 1) + w[f"{key}.bias"].reshape(-1, 1, 1)


def silu(x):
    return x / (1 + torch.exp(-x))


def ref_attention(w, key, x):
    n, c, h, width = x.shape
    qkv = ref_conv(w, f"{key}.qkv", ref_norm(w, f"{key}.norm2", x)).flatten(2)
    q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
    attn = torch.einsum("ncq,nck->nqk", q, k).div(math.sqrt(c)).softmax(-1)
    a = torch.einsum("nqk,nck->ncq", attn, v).reshape(n, c, h, width)
    return (ref_conv(w, f"{key}.proj", a) + x) / math.sqrt(2)


def ref_block(w, key, x, emb, resample=lambda x: x, attention=False):
    h = ref_conv(w, f"{key}.conv0", resample(silu(ref_norm(w, f"{key}.norm0", x))))
    h = h + (emb @ w[f"{key}.affine.weight"].T + w[f"{key}.affine.bias"]).reshape(*h.shape[:2], 1, 1)
    h = ref_conv(w, f"{key}.conv1", silu(ref_norm(w, f"{key}.norm1", h)))
    skip = ref_conv(w, f"{key}.skip", resample(x)) if f"{key}.skip.weight" in w else x
    x = (h + skip) / math.sqrt(2)
    return ref_attention(w, key, x) if attention else x


def ref_embedding(cfg, w, c_noise, label):
    if cfg.style == "ddpm++":
        half = cfg.channels // 2
        freqs = torch.exp(-math.log(10000) * torch.linspace(0, 1, half))
    else:
        freqs = 2 * math.pi * w["map_noise.freqs"]
    angle = torch.outer(c_noise, freqs)
    emb = torch.hstack([torch.sin(angle), torch.cos(angle)])
    if label is not None:
        table = w["map_label.weight"]
        emb = emb + table[:, label].T * table.shape[1] ** 0.5 + w["map_label.bias"]
    for layer in ("map_layer0", "map_layer1"):
        emb = silu(emb @ w[f"{layer}.weight"].T + w[f"{layer}.bias"])
    return emb


def ref_unet(cfg, w, x, c_noise, label=None):
    taps, levels, side = FILTERS[cfg.style], len(cfg.multipliers), x.shape[-1]
    emb = ref_embedding(cfg, w, c_noise, label)
    pyramid, h = x, ref_conv(w, f"enc.{side}x{side}_conv", x)
    skips = [h]
    for level in range(levels):
        r = side // 2**level
        if level:
            h = ref_block(w, f"enc.{r}x{r}_down", h, emb, lambda x: ref_down(x, taps))
            if cfg.style == "ncsn++":
                wide = ref_conv(w, f"enc.{r}x{r}_aux_residual", pyramid, extra=1)
                h = pyramid = (h + ref_filter(wide, taps)[..., ::2, ::2]) / math.sqrt(2)
            skips.append(h)
        for i in range(cfg.blocks):
            h = ref_block(w, f"enc.{r}x{r}_block{i}", h, emb, attention=r in cfg.attention)
            skips.append(h)
    for level in range(levels - 1, -1, -1):
        r = side // 2**level
        if level == levels - 1:
            h = ref_block(w, f"dec.{r}x{r}_in0", h, emb, attention=True)
            h = ref_block(w, f"dec.{r}x{r}_in1", h, emb)
        else:
            h = ref_block(w, f"dec.{r}x{r}_up", h, emb, lambda x: ref_up(x, taps))
        for i in range(cfg.blocks + 1):
            attention = i == cfg.blocks and r in cfg.attention
            h = ref_block(w, f"dec.{r}x{r}_block{i}", torch.hstack([h, skips.pop()]), emb, attention=attention)
    assert not skips
    return ref_conv(w, f"dec.{side}x{side}_aux_conv", silu(ref_norm(w, f"dec.{side}x{side}_aux_norm", h)))


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", [{"multipliers": (2, 1, 2), "attention": (4,)}, {"blocks": 2, "attention": (8, 2)}])
def test_network_equals_its_formulas(style, num_classes, shape):
    cfg = tiny(style, **shape)
    net = randomised(cfg.build((3, 8, 8), num_classes))
    x, c_noise = inputs()
    label = torch.tensor([0, 4, 2]) if num_classes else None
    with torch.no_grad():
        out = net(x, c_noise, label)
        expected = ref_unet(cfg, dict(net.state_dict()), x, c_noise, label)
    assert out.std() > 0.1
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------- the public interface


def expected_keys(style, side, blocks, attention, num_classes):
    """The keys of a two-level network of widths (8, 16) over channels 8, listed from the rules."""

    def block(name, skip=False, attn=False, resampled=False):
        parts = ["norm0", "conv0", "affine", "norm1", "conv1"] + ["skip"] * skip + ["norm2", "qkv", "proj"] * attn
        keys = {f"{name}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
        return keys | ({f"{name}.{part}.resample_filter" for part in ("conv0", "skip")} if resampled else set())

    top, low = f"{side}x{side}", f"{side // 2}x{side // 2}"
    at_top, at_low = side in attention, side // 2 in attention
    keys = {f"map_layer{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")} | {"map_augment.weight"}
    keys |= {"map_label.weight", "map_label.bias"} if num_classes else set()
    keys |= {f"enc.{top}_conv.weight", f"enc.{top}_conv.bias"}
    keys |= {f"dec.{top}_aux_{part}.{kind}" for part in ("norm", "conv") for kind in ("weight", "bias")}
    keys |= block(f"enc.{low}_down", skip=True, resampled=True) | block(f"dec.{top}_up", skip=True, resampled=True)
    keys |= block(f"dec.{low}_in0", attn=True) | block(f"dec.{low}_in1")
    for i in range(blocks):
        keys |= block(f"enc.{top}_block{i}", attn=at_top) | block(f"enc.{low}_block{i}", skip=i == 0, attn=at_low)
    for i in range(blocks + 1):
        last = i == blocks
        keys |= block(f"dec.{top}_block{i}", skip=True, attn=last and at_top)
        keys |= block(f"dec.{low}_block{i}", skip=True, attn=last and at_low)
    if style == "ncsn++":
        keys |= {"map_noise.freqs"} | {f"enc.{low}_aux_residual.{k}" for k in ("weight", "bias", "resample_filter")}
    return keys


@pytest.mark.parametrize(("num_classes", "attention"), [(0, (4,)), (3, (8,))])
@pytest.mark.parametrize("style", STYLES)
def test_state_dict_has_the_public_keys(style, num_classes, attention):
    net = tiny(style, multipliers=(1, 2), blocks=2, attention=attention).build((3, 8, 8), num_classes)
    state = net.state_dict()
    assert set(state) == expected_keys(style, 8, 2, attention, num_classes)
    f = len(FILTERS[style])
    assert state["enc.4x4_down.conv0.resample_filter"].shape == (1, 1, f, f)
    assert state["map_augment.weight"].shape == (16 if style == "ncsn++" else 8, 9)


def test_cifar10_has_the_public_parameter_count_and_never_looks_at_values():
    count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
    with torch.device("meta"):
        assert count(EDMUNet().build((3, 32, 32), 0)) == 55_733_891
        net = EDMUNet().build((3, 32, 32), 10)
        assert count(net) == 55_733_891 + 11 * 128
        out = net(torch.empty(2, 3, 32, 32), torch.empty(2), torch.empty(2, dtype=torch.int64))  # no values to look at
    assert out.shape == (2, 3, 32, 32)


@pytest.mark.parametrize("style", STYLES)
def test_output_starts_near_zero(style):
    net = tiny(style).build((3, 8, 8), 0).eval()
    assert net(*inputs()).abs().max() < 1e-3


# -------------------------------------------------------------------------------------------------- training with it


@pytest.mark.parametrize("style", STYLES)
def test_gradients_reach_every_parameter_but_the_augmentation(style):
    net = randomised(tiny(style).build((3, 8, 8), 5)).train()
    net(*inputs(), torch.tensor([0, 4, 2])).square().mean().backward()
    for name, p in net.named_parameters():
        if name == "map_augment.weight":
            assert not p.requires_grad
            assert p.grad is None
        else:
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name


def test_dropout_only_at_low_resolution():
    net = tiny("ncsn++", dropout=0.3, dropout_max_resolution=8).build((3, 16, 16), 0)
    ps = {name: block.dropout.p for name, block in net.named_modules() if isinstance(block, Block)}
    assert len(ps) == 15
    for name, p in ps.items():
        assert p == (0.0 if "16x16" in name else 0.3), name
    everywhere = tiny("ncsn++", dropout=0.3).build((3, 16, 16), 0)
    assert {m.p for m in everywhere.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize("style", STYLES)
def test_bfloat16_autocast_stays_close(style):
    net = randomised(tiny(style).build((3, 8, 8), 0))
    with torch.no_grad():
        full = net(*inputs())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = net(*inputs())
    assert (half.float() - full).norm() < 0.03 * full.norm()


# ------------------------------------------------------------------------------------------------------------ errors


def test_errors_say_what_to_do():
    with pytest.raises(FewstepError, match="square"):
        EDMUNet().build((3, 32, 16), 0)
    with pytest.raises(FewstepError, match="multiple of 4"):
        EDMUNet().build((3, 30, 30), 0)
    with pytest.raises(FewstepError, match=r"--network\.channels a multiple of 32"):
        EDMUNet(channels=36).build((3, 32, 32), 0)
    with pytest.raises(FewstepError, match="pass a label"):
        tiny("ddpm++").build((3, 8, 8), 5)(*inputs())
    with pytest.raises(FewstepError, match="unconditional"):
        tiny("ddpm++").build((3, 8, 8), 0)(*inputs(), torch.tensor([0, 1, 2]))
