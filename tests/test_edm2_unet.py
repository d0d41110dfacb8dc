"""EDM2's network against its formulas, its magnitudes, its forced normalisation, and its pickles."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from fewstep.hub.edm2 import from_module
from fewstep.hub.unpickle import Module
from fewstep.networks import Architecture
from fewstep.networks.edm2_unet import Block, EDM2UNet, MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalise
from fewstep.types import FewstepError

LABEL = torch.tensor([0, 4, 2])


def tiny(**changes):
    """Three levels of different widths, two heads and four, a decoder's attention in every block at 4x4."""
    return EDM2UNet(
        **{"channels": 8, "multipliers": (2, 1, 3), "blocks": 1, "attention": (4,), "head_dim": 4, **changes}
    )


def randomised(net, seed=0):
    """The net with gains that leave nothing at zero, weights of any magnitude."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            draw = torch.randn(p.shape, generator=g)
            p.copy_(0.5 + 0.2 * draw if name.endswith("gain") else draw * (0.5 + torch.rand([], generator=g)))
    return net.eval()


def inputs(dtype=torch.float64, n=3, c=3, side=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, c, side, side, generator=g).to(dtype), torch.log(torch.logspace(-2, 1.5, n)).to(dtype) / 4


# ---------------------------------------------------------------------------------- the network, written a second time


def unit(x, dims):
    return x / (1e-4 + x.square().mean(dims, keepdim=True).sqrt())


def ref_weight(w, key):
    weight = w[f"{key}.weight"]
    return unit(weight, tuple(range(1, weight.ndim))) / weight[0].numel() ** 0.5


def ref_conv(w, key, x):
    weight = ref_weight(w, key)
    return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


def ref_silu(x):
    return x / (1 + torch.exp(-x)) / 0.596


def ref_sum(a, b, t):
    return torch.lerp(a, b, t) / ((1 - t) ** 2 + t**2) ** 0.5


def ref_attention(w, key, x, head_dim):
    n, c, h, width = x.shape
    qkv = ref_conv(w, f"{key}.attn_qkv", x).flatten(2)
    q, k, v = (unit(qkv[:, i::3].reshape(n, -1, head_dim, h * width), 2) for i in range(3))
    weights = torch.einsum("nhcq,nhck->nhqk", q, k).div(math.sqrt(head_dim)).softmax(-1)
    a = torch.einsum("nhqk,nhck->nhcq", weights, v).reshape(n, c, h, width)
    return ref_sum(x, ref_conv(w, f"{key}.attn_proj", a), 0.3)


def ref_block(w, key, x, emb, cfg, clip=256):
    has_skip = f"{key}.conv_skip.weight" in w
    if key.startswith("enc"):
        x = unit(ref_conv(w, f"{key}.conv_skip", x) if has_skip else x, 1)
    gain = 1 + w[f"{key}.emb_gain"] * (emb @ ref_weight(w, f"{key}.emb_linear").T)
    y = ref_conv(w, f"{key}.conv_res0", ref_silu(x)) * gain[:, :, None, None]
    y = ref_conv(w, f"{key}.conv_res1", ref_silu(y))
    if key.startswith("dec") and has_skip:
        x = ref_conv(w, f"{key}.conv_skip", x)
    x = ref_sum(x, y, 0.3)
    x = ref_attention(w, key, x, cfg.head_dim) if f"{key}.attn_qkv.weight" in w else x
    return x.clip(-clip, clip)


def ref_cat(a, b, t):
    na, nb = a.shape[1], b.shape[1]
    scale = math.sqrt((na + nb) / ((1 - t) ** 2 + t**2))
    return torch.hstack([scale / math.sqrt(na) * (1 - t) * a, scale / math.sqrt(nb) * t * b])


def ref_unet(cfg, w, x, c_noise, label=None):
    side, levels = x.shape[-1], len(cfg.multipliers)
    emb = torch.cos(torch.outer(c_noise, w["emb_fourier.freqs"]) + w["emb_fourier.phases"]) * 2**0.5
    emb = emb @ ref_weight(w, "emb_noise").T
    if label is not None:
        table = ref_weight(w, "emb_label")
        emb = ref_sum(emb, table[:, label].T * table.shape[1] ** 0.5, cfg.label_balance)
    emb = ref_silu(emb)
    h = ref_conv(w, f"enc.{side}x{side}_conv", torch.hstack([x, torch.ones_like(x[:, :1])]))
    skips = [h]
    for level in range(levels):
        r = side // 2**level
        if level:
            n, c = h.shape[:2]
            h = ref_block(w, f"enc.{r}x{r}_down", h.reshape(n, c, r, 2, r, 2).mean((3, 5)), emb, cfg)
            skips.append(h)
        for i in range(cfg.blocks):
            h = ref_block(w, f"enc.{r}x{r}_block{i}", h, emb, cfg)
            skips.append(h)
    for level in range(levels - 1, -1, -1):
        r = side // 2**level
        if level == levels - 1:
            h = ref_block(w, f"dec.{r}x{r}_in1", ref_block(w, f"dec.{r}x{r}_in0", h, emb, cfg), emb, cfg)
        else:
            h = ref_block(w, f"dec.{r}x{r}_up", h.repeat_interleave(2, 2).repeat_interleave(2, 3), emb, cfg)
        for i in range(cfg.blocks + 1):
            h = ref_block(w, f"dec.{r}x{r}_block{i}", ref_cat(h, skips.pop(), cfg.concat_balance), emb, cfg)
    assert not skips
    return w["out_gain"] * ref_conv(w, "out_conv", h)


SHAPES = [{}, {"blocks": 2, "attention": (8, 2)}, {"label_balance": 0.2, "concat_balance": 0.7, "multipliers": (1, 2)}]


@pytest.mark.parametrize("num_classes", [0, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_network_equals_its_formulas(num_classes, shape, dtype, within):
    cfg = tiny(**shape)
    net = randomised(cfg.build((3, 8, 8), num_classes)).to(dtype)
    x, c_noise = inputs(dtype)
    label = LABEL if num_classes else None
    with torch.no_grad():
        out, expected = net(x, c_noise, label), ref_unet(cfg, dict(net.state_dict()), x, c_noise, label)
    assert out.dtype == dtype
    assert out.std() > 0.1
    assert (out - expected).abs().max() <= within


def test_activations_are_clipped_to_256():
    block = Block(tiny(), 4, 8, 8).double()
    x = 1e4 * torch.randn(2, 8, 4, 4, dtype=torch.float64)
    w = {f"dec.{k}": v for k, v in block.state_dict(prefix="x.").items()}
    emb = torch.randn(2, 24, dtype=torch.float64)
    with torch.no_grad():
        out = block(x, emb)
        assert out.abs().max() == 256
        torch.testing.assert_close(out, ref_block(w, "dec.x", x, emb, tiny()))
        assert ref_block(w, "dec.x", x, emb, tiny(), clip=math.inf).abs().max() > 256


# ---------------------------------------------------------------------------------------------------------- magnitudes


def test_the_operations_keep_unit_magnitude():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 512, 8, 8, generator=g), torch.randn(2, 128, 8, 8, generator=g)
    assert mp_silu(a).square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert mp_sum(a[:, :128], b, 0.3).std() == pytest.approx(1, abs=0.01)
    both = mp_cat(a, b, 0.5)
    assert both.square().mean().sqrt() == pytest.approx(1, abs=0.01)
    assert both[:, :512].square().sum() == pytest.approx(float(both[:, 512:].square().sum()), rel=0.02)  # an equal say
    assert MPConv(512, 256, 3)(a)[..., 1:-1, 1:-1].std().item() == pytest.approx(1, abs=0.02)


def test_every_block_preserves_magnitude_at_initialisation():
    torch.manual_seed(0)
    net = EDM2UNet(channels=64, multipliers=(1, 2), blocks=2, attention=(8,)).build((3, 16, 16), 5).eval()
    seen = {}
    for name, module in net.named_modules():
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda m, i, out, name=name: seen.update({name: float(out.square().mean().sqrt())})
            )
    with torch.no_grad():
        out = net(torch.randn(8, 3, 16, 16), torch.randn(8), torch.arange(8) % 5)
    assert len(seen) == 2 + 1 + 2 + 2 + 1 + 6
    assert all(0.8 < magnitude < 1.25 for magnitude in seen.values()), seen
    assert not out.any()  # the gain begins at zero: D = c_skip x


def test_the_noise_embedding_has_unit_magnitude():
    torch.manual_seed(0)
    embedded = MPFourier(192)(torch.linspace(-1.5, 1.1, 500))
    assert embedded.square().mean().sqrt() == pytest.approx(1, abs=0.02)


# ------------------------------------------------------------------------------------------------- forced normalisation


def trained(**changes):
    net = tiny(**changes).build((3, 8, 8), 5)
    return randomised(net).train()


def magnitudes(net):
    return torch.cat(
        [m.weight.detach().flatten(1).square().mean(1).sqrt() for m in net.modules() if isinstance(m, MPConv)]
    )


def test_training_sets_weights_to_unit_magnitude_and_keeps_the_function():
    net = trained().double()
    x, c_noise = inputs()
    before = net.eval()(x, c_noise, LABEL).detach()
    assert (magnitudes(net) - 1).abs().max() > 0.1
    out = net.train()(x, c_noise, LABEL)
    torch.testing.assert_close(magnitudes(net), torch.full_like(magnitudes(net), 1 - 1e-4), atol=1e-12, rtol=0)
    assert (out - before).abs().max() < 2e-3  # EPS = 1e-4 in some thirty layers, of weights far from 1
    torch.testing.assert_close(net.eval()(x, c_noise, LABEL), out, atol=1e-12, rtol=0)


@pytest.mark.parametrize("drift", [0.0, 1e-6])
def test_weights_of_unit_magnitude_stay_to_the_last_bit(drift):
    net = trained()
    x, c_noise = inputs(torch.float32)
    first = net(x, c_noise, LABEL)
    with torch.no_grad():
        net.out_conv.weight.mul_(1 + drift)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    second = net(x, c_noise, LABEL)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert torch.equal(first, second) == (drift == 0)


def test_a_row_of_zeros_stays_finite():
    net = trained()
    with torch.no_grad():
        net.out_conv.weight[0] = 0
    assert net(*inputs(torch.float32), LABEL).isfinite().all()


def test_neither_evaluation_nor_passes_without_gradient_write_weights():
    net = trained()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    x, c_noise = inputs(torch.float32)
    with torch.no_grad():
        net(x, c_noise, LABEL)
    with torch.inference_mode():
        net(x, c_noise, LABEL)
        net.eval()(x, c_noise, LABEL)
    net.eval()(x, c_noise, LABEL).sum().backward()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    net.train()(x, c_noise, LABEL)
    assert not torch.equal(net.out_conv.weight, before["out_conv.weight"])


@pytest.mark.parametrize("how", ["foreach", "fused", "single"])
def test_two_passes_in_a_step_and_the_next_step(how):
    """Both passes must be differentiable together, and each optimizer's step noticed."""
    net = trained()
    x, c_noise = inputs(torch.float32)
    options = {"foreach": {"foreach": True}, "fused": {"fused": True}, "single": {"foreach": False}}[how]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, **options)
    for _ in range(3):
        first, second = net(x, c_noise, LABEL), net(x, c_noise - 0.1, LABEL)
        assert (magnitudes(net) - 1).abs().max() < 1e-3
        optimizer.zero_grad()
        (first - second).square().mean().backward()
        optimizer.step()
        assert (magnitudes(net) - 1).abs().max() > 1e-3
    assert torch.equal(net(x, c_noise, LABEL), net(x, c_noise, LABEL))


def test_the_gradient_is_that_of_the_function_and_orthogonal_to_the_weights():
    net = trained().double()
    x, c_noise = inputs()
    net(x, c_noise, LABEL).square().mean().backward()
    expected = {name: p.grad for name, p in net.named_parameters()}
    w = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    ref_unet(tiny(), w | dict(net.named_buffers()), x, c_noise, LABEL).square().mean().backward()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, w[name].grad, atol=1e-10, rtol=1e-8)
        if name.endswith("weight"):  # normalised: a change of magnitude changes nothing but by EPS
            flat, along = w[name].flatten(1), gradient.flatten(1)
            assert ((flat * along).sum(1).abs() <= 1e-3 * flat.norm(dim=1) * along.norm(dim=1) + 1e-12).all()


def test_copies_are_independent_and_normalise_on_their_own():
    net = trained()
    x, c_noise = inputs(torch.float32)
    net(x, c_noise, LABEL)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    mine = magnitudes(net)
    assert other(x, c_noise, LABEL).shape == x.shape
    assert (magnitudes(other) - 1).abs().max() < 1e-3
    assert torch.equal(magnitudes(net), mine)


def test_frozen_weights_are_never_written():
    net = trained().requires_grad_(False)
    before = net.out_conv.weight.clone()
    x, c_noise = inputs(torch.float32)
    net(x, c_noise, LABEL)
    assert torch.equal(net.out_conv.weight, before)


def test_distributed_data_parallel_trains_it(tmp_path):
    net = trained()
    alone = copy.deepcopy(net)
    x, c_noise = inputs(torch.float32)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(net)
        for model in (wrapped, alone):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                (model(x, c_noise, LABEL) - model(x, c_noise - 0.1, LABEL).detach()).square().mean().backward()
                optimizer.step()
    finally:
        dist.destroy_process_group()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), alone.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ names, sizes, dropout


@pytest.mark.parametrize(
    ("channels", "millions"), [(128, 124.7), (192, 280.2), (256, 497.8), (320, 777.5), (384, 1119.3), (448, 1523.2)]
)
def test_parameter_counts_of_the_paper(channels, millions):
    with torch.device("meta"):
        net = EDM2UNet(channels=channels).build((4, 64, 64), 1000)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def public_names(num_classes):
    """Of a two-level network of widths (8, 16), one block, attention at 4x4, listed from the rules."""

    def block(name, skip=False, attn=False):
        parts = ["conv_res0", "conv_res1", "emb_linear"] + ["conv_skip"] * skip + ["attn_qkv", "attn_proj"] * attn
        return {f"{name}.{part}.weight" for part in parts} | {f"{name}.emb_gain"}

    names = {"out_gain", "out_conv.weight", "emb_fourier.freqs", "emb_fourier.phases", "emb_noise.weight"}
    names |= {"enc.8x8_conv.weight"} | ({"emb_label.weight"} if num_classes else set())
    names |= block("enc.8x8_block0") | block("enc.4x4_down") | block("enc.4x4_block0", skip=True, attn=True)
    names |= block("dec.4x4_in0", attn=True) | block("dec.4x4_in1") | block("dec.8x8_up")
    for i in range(2):
        names |= block(f"dec.4x4_block{i}", skip=True, attn=True) | block(f"dec.8x8_block{i}", skip=True)
    return names


@pytest.mark.parametrize("num_classes", [0, 3])
def test_state_dict_has_the_public_names(num_classes):
    state = tiny(multipliers=(1, 2)).build((3, 8, 8), num_classes).state_dict()
    assert set(state) == public_names(num_classes)
    assert state["out_gain"].shape == state["dec.8x8_up.emb_gain"].shape == ()
    assert state["enc.8x8_conv.weight"].shape == (8, 4, 3, 3)
    assert state["enc.4x4_block0.conv_res0.weight"].shape == (16, 16, 3, 3)  # after conv_skip
    assert state["dec.4x4_block1.conv_res0.weight"].shape == (16, 16 + 8, 3, 3)


def test_dropout_only_up_to_a_resolution():
    net = tiny(dropout=0.4, dropout_max_resolution=4).build((3, 8, 8), 0)
    rates = {name: block.dropout.p for name, block in net.named_modules() if isinstance(block, Block)}
    assert {name.split(".")[1].split("x")[0] for name, p in rates.items() if p == 0.4} == {"4", "2"}
    assert {name.split(".")[1].split("x")[0] for name, p in rates.items() if p == 0} == {"8"}
    x, c_noise = inputs(torch.float32)
    net = randomised(net)
    assert torch.equal(net(x, c_noise), net(x, c_noise))
    assert not torch.equal(net.train()(x, c_noise), net(x, c_noise))


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"head_dim": 5}, "head-dim"), ({"channels": 0}, "channels"), ({"multipliers": ()}, "multipliers"),
     ({"label_balance": 1.5}, "label-balance"), ({"dropout": 1.0}, "dropout")],
)  # fmt: skip
def test_what_cannot_be_built(changes, said):
    with pytest.raises(FewstepError, match=said):
        tiny(**changes).build((3, 8, 8), 0)


def test_labels_must_fit_the_network():
    x, c_noise = inputs(torch.float32)
    with pytest.raises(FewstepError, match="labels"):
        tiny().build((3, 8, 8), 5)(x, c_noise)
    with pytest.raises(FewstepError, match="labels"):
        tiny().build((3, 8, 8), 0)(x, c_noise, LABEL)


# ------------------------------------------------------------------------------------------------------------- pickles

ARGUMENTS = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 5, "use_fp16": True, "sigma_data": 0.5, "logvar_channels": 16,
    "model_channels": 8, "channel_mult": [2, 1, 3], "channel_mult_noise": None, "channel_mult_emb": None, "num_blocks": 1,
    "attn_resolutions": [4], "label_balance": 0.5, "concat_balance": 0.5, "channels_per_head": 4,
    "resample_filter": [1, 1], "res_balance": 0.3, "attn_balance": 0.3, "clip_act": 256,
}  # fmt: skip


def precond(seed=0, drop=(), **changes):
    """What an unpickled Precond is: arguments and tensors under EDM2's names."""
    net = randomised(tiny().build((3, 8, 8), 5), seed)
    state = {f"unet.{name}": tensor for name, tensor in net.state_dict().items() if name not in drop}
    state |= {"logvar_fourier.freqs": torch.ones(16), "logvar_linear.weight": torch.ones(1, 16)}
    return Module("Precond", ARGUMENTS | changes, state)


def test_a_pickle_becomes_the_same_denoiser():
    module = precond()
    foreign = from_module(module, Path("edm2.pkl"))
    assert foreign.architecture == Architecture(tiny(), (3, 8, 8), 5, 0.5)
    assert (foreign.kind, from_module(module, Path("edm2.pkl"), kind="consistency").kind) == (
        "diffusion",
        "consistency",
    )
    assert "non-commercial" in foreign.lineage[0]
    assert {key.theirs for key in foreign.keys} == set(module.tensors)
    assert {key.theirs for key in foreign.keys if not key.ours} == {"logvar_fourier.freqs", "logvar_linear.weight"}
    denoiser = foreign.architecture.build().eval()
    denoiser.load_state_dict(foreign.tensors)
    x, c_noise = inputs()
    sigma = (4 * c_noise).exp()
    s = sigma.reshape(-1, 1, 1, 1)
    w = {name.removeprefix("unet."): tensor.double() for name, tensor in module.tensors.items()}
    with torch.no_grad():
        raw = ref_unet(tiny(), w, x / (s**2 + 0.25).sqrt(), c_noise, LABEL)
        out = denoiser.double()(x, sigma, LABEL)
    assert (out - (0.25 * x / (s**2 + 0.25) + 0.5 * s / (s**2 + 0.25).sqrt() * raw)).abs().max() < 1e-10


def test_arguments_of_edm2_and_ect():
    network = lambda **kw: from_module(precond(**kw), Path("a.pkl")).architecture.network  # noqa: E731
    assert network(dropout=0.4, dropout_res=4) == tiny(dropout=0.4, dropout_max_resolution=4)
    assert network(dropout=0.4, dropout_res=0) == tiny(dropout=0.4)
    assert network(label_balance=0.0).label_balance == 0
    assert network(channel_mult_noise=2, channel_mult_emb=3) == tiny()
    assert from_module(precond(sigma_data=1.0), Path("a.pkl")).architecture.sigma_data == 1.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"resample_filter": [1, 3, 3, 1]}, "resample_filter"), ({"res_balance": 0.5}, "res_balance=0.5"),
     ({"clip_act": None}, "clip_act"), ({"channel_mult_emb": 4}, "channel_mult_emb=4"),
     ({"rotary": True}, "rotary"), ({"img_resolution": "8"}, "img_resolution=8"), ({"img_channels": "3"}, "types"),
     ({"num_blocks": 10**9}, "num_blocks"), ({"model_channels": 4096}, "holds"),
     ({"model_channels": 16}, "do not fit")],
)  # fmt: skip
def test_arguments_that_are_not_supported_are_named(changes, said):
    with pytest.raises(FewstepError, match=said):
        from_module(precond(**changes), Path("a.pkl"))


def test_a_pickle_must_be_whole_and_a_precond():
    with pytest.raises(FewstepError, match=r"emb_noise\.weight.*missing"):
        from_module(precond(drop=("emb_noise.weight",)), Path("a.pkl"))
    assert from_module(precond(drop=("emb_noise.weight",)), Path("a.pkl"), strict=False)
    with pytest.raises(FewstepError, match="img_channels"):
        from_module(Module("Precond", {"img_resolution": 8, "label_dim": 0}), Path("a.pkl"))
    with pytest.raises(FewstepError, match="EDMPrecond"):
        from_module(Module("EDMPrecond"), Path("a.pkl"))


def test_gains_of_one_element_are_scalars():
    module = precond()
    module.tensors["unet.out_gain"] = module.tensors["unet.out_gain"].reshape(1)
    assert from_module(module, Path("a.pkl")).tensors["network.out_gain"].shape == ()


def test_normalise_is_computed_in_float32():
    x = torch.full((1, 1024), 300.0, dtype=torch.float16)  # the sum of squares is beyond float16
    assert normalise(x, (1,)).dtype == torch.float16
    torch.testing.assert_close(normalise(x, (1,)), torch.ones_like(x))
