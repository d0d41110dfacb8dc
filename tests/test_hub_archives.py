"""PyTorch archives of OpenAI and FastGen: their networks written anew over their names must equal what is imported."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fewstep.hub.archives import karras, openai_config, openai_names, openai_tensors, read_archive
from fewstep.hub.folders import read_folder
from fewstep.networks import Architecture, EDMUNet, Stock
from fewstep.networks.edm2_unet import EDM2UNet
from fewstep.networks.stock import Scaled
from fewstep.types import FewstepError
from test_edm_unet import randomised, ref_unet, tiny

WIDTHS, LAYERS, CLASSES, SIDE = (32, 64, 128), 2, 5, 8  # attention at 64 and 128: one head and two
LABEL = torch.tensor([0, 4, 2])
CLASSIFIER = {"input_blocks.0.0.weight": torch.zeros(4, 3, 3, 3), "time_embed.0.weight": torch.zeros(16, 4)}


# ------------------------------------------------------------------------------------- OpenAI's network over its names


def residual_shapes(name, cin, cout, emb, scale_shift=True):
    yield f"{name}.in_layers.0", (cin,)
    yield f"{name}.in_layers.2", (cout, cin, 3, 3)
    yield f"{name}.emb_layers.1", (cout * (1 + scale_shift), emb)
    yield f"{name}.out_layers.0", (cout,)
    yield f"{name}.out_layers.3", (cout, cout, 3, 3)
    if cin != cout:
        yield f"{name}.skip_connection", (cout, cin, 1, 1)


def attention_shapes(name, c):
    return [(f"{name}.norm", (c,)), (f"{name}.qkv", (3 * c, c, 1, 1)), (f"{name}.proj_out", (c, c, 1, 1))]


def module_shapes(widths, layers, attention, scale_shift=True):
    """(module, shape of its weight) of their UNetModel; attention: its levels."""
    emb, c, last = 4 * widths[0], widths[0], len(widths) - 1
    residual = lambda *args: residual_shapes(*args, emb, scale_shift)  # noqa: E731
    yield from [("time_embed.0", (emb, c)), ("time_embed.2", (emb, emb)), ("input_blocks.0.0", (c, 3, 3, 3))]
    skips, i = [c], 1
    for level, width in enumerate(widths):
        for _ in range(layers):
            yield from residual(f"input_blocks.{i}.0", c, width)
            c, i = width, i + 1
            if level in attention:
                yield from attention_shapes(f"input_blocks.{i - 1}.1", c)
            skips.append(c)
        if level < last:
            yield from residual(f"input_blocks.{i}.0", c, c)
            skips.append(c)
            i += 1
    yield from [*residual("middle_block.0", c, c), *attention_shapes("middle_block.1", c)]
    yield from residual("middle_block.2", c, c)
    i = 0
    for level in range(last, -1, -1):
        for k in range(layers + 1):
            yield from residual(f"output_blocks.{i}.0", c + skips.pop(), widths[level])
            c = widths[level]
            if level in attention:
                yield from attention_shapes(f"output_blocks.{i}.1", c)
            if level and k == layers:
                yield from residual(f"output_blocks.{i}.{1 + (level in attention)}", c, c)
            i += 1
    yield from [("out.0", (c,)), ("out.2", (3, c, 3, 3))]


def openai_state(widths=WIDTHS, layers=LAYERS, attention=(1, 2), classes=CLASSES, scale_shift=True, device="cpu"):
    """Random tensors under their names; no branch is near zero."""
    g = None if device == "meta" else torch.Generator().manual_seed(0)
    state = {}
    for name, shape in module_shapes(widths, layers, attention, scale_shift):
        draw = torch.randn(shape, generator=g, device=device)
        state[f"{name}.weight"] = 1 + 0.3 * draw if len(shape) == 1 else draw / math.prod(shape[1:]) ** 0.5
        state[f"{name}.bias"] = 0.3 * torch.randn(shape[:1], generator=g, device=device)
    if classes:
        state["label_emb.weight"] = torch.randn(classes, 4 * widths[0], generator=g, device=device)
    return state


def norm(s, name, x):
    groups = x.reshape(x.shape[0], 32, -1)
    var, mean = torch.var_mean(groups, dim=-1, keepdim=True, correction=0)
    x = ((groups - mean) / (var + 1e-5).sqrt()).reshape(x.shape)
    return x * s[f"{name}.weight"].reshape(-1, 1, 1) + s[f"{name}.bias"].reshape(-1, 1, 1)


def conv(s, name, x):
    weight = s[f"{name}.weight"]
    return F.conv2d(x, weight, s[f"{name}.bias"], padding=weight.shape[-1] // 2)


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def silu(x):
    return x * torch.sigmoid(x)


def halve(x):
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


def double(x):
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


def residual(s, name, x, emb, resample=lambda x: x):
    h = conv(s, f"{name}.in_layers.2", resample(silu(norm(s, f"{name}.in_layers.0", x))))
    told = linear(s, f"{name}.emb_layers.1", silu(emb))[..., None, None]
    if told.shape[1] == h.shape[1]:  # LSUN
        h = norm(s, f"{name}.out_layers.0", h + told)
    else:
        scale, shift = told.chunk(2, 1)
        h = norm(s, f"{name}.out_layers.0", h) * (1 + scale) + shift
    h = conv(s, f"{name}.out_layers.3", silu(h))
    x = resample(x)
    return h + (conv(s, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in s else x)


def attend(s, name, x):
    n, c, h, w = x.shape
    q, k, v = conv(s, f"{name}.qkv", norm(s, f"{name}.norm", x)).reshape(n, 3, c // 64, 64, h * w).unbind(1)
    weight = torch.einsum("nhcq,nhck->nhqk", q, k).div(8).softmax(-1)
    return x + conv(s, f"{name}.proj_out", torch.einsum("nhqk,nhck->nhcq", weight, v).reshape(x.shape))


def openai_unet(s, x, t, label, levels, layers, attention):
    """UNetModel of the paper's code at time t [n]; the sinusoids are float32 in theirs too."""
    half = s["time_embed.0.weight"].shape[1] // 2
    angle = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    emb = torch.hstack([angle.cos(), angle.sin()]).to(x.dtype)
    emb = linear(s, "time_embed.2", silu(linear(s, "time_embed.0", emb)))
    if label is not None:
        emb = emb + s["label_emb.weight"][label]
    h = conv(s, "input_blocks.0.0", x)
    skips, i = [h], 1
    for level in range(levels):
        for _ in range(layers):
            h = residual(s, f"input_blocks.{i}.0", h, emb)
            h = attend(s, f"input_blocks.{i}.1", h) if level in attention else h
            skips.append(h)
            i += 1
        if level < levels - 1:
            h = residual(s, f"input_blocks.{i}.0", h, emb, halve)
            skips.append(h)
            i += 1
    h = residual(s, "middle_block.2", attend(s, "middle_block.1", residual(s, "middle_block.0", h, emb)), emb)
    i = 0
    for level in range(levels - 1, -1, -1):
        for k in range(layers + 1):
            h = residual(s, f"output_blocks.{i}.0", torch.hstack([h, skips.pop()]), emb)
            h = attend(s, f"output_blocks.{i}.1", h) if level in attention else h
            if level and k == layers:
                h = residual(s, f"output_blocks.{i}.{1 + (level in attention)}", h, emb, double)
            i += 1
    assert not skips
    return conv(s, "out.2", silu(norm(s, "out.0", h)))


def openai_denoiser(s, x, sigma, label, sigma_min, **spec):
    """Their KarrasDenoiser (arXiv:2303.01469, appendix C): sigma_min > 0 is their boundary condition."""
    sigma = sigma.reshape(-1, 1, 1, 1)
    total = (sigma**2 + 0.25).sqrt()
    raw = openai_unet(s, x / total, 1000 * 0.25 * torch.log(sigma.flatten() + 1e-44), label, **spec)
    shifted = sigma - sigma_min
    return shifted * 0.5 / total * raw + 0.25 / (shifted**2 + 0.25) * x


def saved(tmp_path, content, name="cd_tiny.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def imported(foreign, dtype=torch.float32):
    net = foreign.architecture.build().eval()
    net.load_state_dict(foreign.tensors)
    return net.to(dtype)


def inputs(dtype, side=SIDE):
    g = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.05, 0.8, 20.0], dtype=dtype)
    x = 0.5 * torch.randn(3, 3, side, side, generator=g, dtype=torch.float64).to(dtype)
    return x + sigma.reshape(-1, 1, 1, 1) * torch.randn(3, 3, side, side, generator=g, dtype=torch.float64).to(
        dtype
    ), sigma


@pytest.mark.parametrize(("name", "sigma_min"), [("cd_tiny.pt", 0.002), ("ct-tiny.pt", 0.002), ("edm_tiny_ema.pt", 0)])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_openai_equals_its_formulas(tmp_path, name, sigma_min, dtype, within):
    state = openai_state()
    foreign = read_archive(saved(tmp_path, state, name), resolution=SIDE)
    x, sigma = inputs(dtype)
    with torch.no_grad():
        out = imported(foreign, dtype)(x, sigma, LABEL)
        spec = {"levels": 3, "layers": LAYERS, "attention": (1, 2), "sigma_min": sigma_min}
        theirs = openai_denoiser({k: v.to(dtype) for k, v in state.items()}, x, sigma, LABEL, **spec)
    assert (out - x).std() > 0.1
    assert (out - theirs).abs().max() <= within
    assert foreign.kind == ("diffusion" if name.startswith("edm") else "consistency")
    assert foreign.architecture.sigma_min == sigma_min
    assert foreign.clip_denoised
    assert "MIT" in foreign.lineage[0]


@pytest.mark.parametrize(
    ("widths", "attention", "layers", "classes", "scale_shift"),
    [
        (WIDTHS, (), 1, 0, True),
        (WIDTHS, (2,), 1, 3, False),
        ((32, 32, 64), (2,), 3, 0, False),
        ((64,), (0,), 2, 2, True),
    ],
)
def test_openai_configuration_is_read_from_names_and_shapes(tmp_path, widths, attention, layers, classes, scale_shift):
    state = openai_state(widths, layers, attention, classes, scale_shift)
    foreign = read_archive(saved(tmp_path, state), resolution=SIDE)
    assert (foreign.architecture.shape, foreign.architecture.num_classes) == ((3, SIDE, SIDE), classes)
    x, sigma = inputs(torch.float32)
    label = LABEL.clamp(max=classes - 1) if classes else None
    spec = {"levels": len(widths), "layers": layers, "attention": attention, "sigma_min": 0.002}
    with torch.no_grad():
        out = imported(foreign)(x, sigma, label)
        torch.testing.assert_close(out, openai_denoiser(state, x, sigma, label, **spec), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("published", "side", "count"),
    [(((192, 384, 576, 768), 3, (1, 2, 3), 1000), 64, 295_899_267),
     (((256, 256, 512, 512, 1024, 1024), 2, (3, 4, 5), 0, False), 256, 526_304_771)],
)  # fmt: skip
def test_openai_networks_fit_as_published(published, side, count):
    """ADM on ImageNet-64: the 295.9M parameters of EDM's paper. LSUN-256 has no scale_shift."""
    state = openai_state(*published, device="meta")
    config = openai_config(state, None, "test")
    network = Stock("UNet2DModel", json.dumps(config), Scaled(1000.0))
    own = Architecture(network, (3, side, side), published[3]).skeleton().state_dict()
    found = openai_tensors(state, openai_names(config, state))
    assert {name: tensor.shape for name, (_, tensor) in found.items()} == {name: t.shape for name, t in own.items()}
    assert sum(t.numel() for t in own.values()) == sum(t.numel() for t in state.values()) == count


def test_an_archive_is_the_network_of_the_diffusers_folder(tmp_path):
    """What diffusers' own pipelines of these weights become, to the last tensor and constant."""
    from diffusers import CMStochasticIterativeScheduler, UNet2DModel

    foreign = read_archive(saved(tmp_path, openai_state()), resolution=SIDE)
    unet = imported(foreign).network.unet
    assert isinstance(unet, UNet2DModel)
    unet.save_pretrained(tmp_path / "pipeline" / "unet")
    CMStochasticIterativeScheduler().save_pretrained(tmp_path / "pipeline" / "scheduler")
    (tmp_path / "pipeline" / "model_index.json").write_text('{"_class_name": "ConsistencyModelPipeline"}')
    folder = read_folder(tmp_path / "pipeline" / "unet")
    x, sigma = inputs(torch.float32)
    with torch.no_grad():
        assert torch.equal(imported(foreign)(x, sigma, LABEL), imported(folder)(x, sigma, LABEL))
    assert (folder.architecture.sigma_min, folder.clip_denoised) == (0.002, foreign.clip_denoised)


def test_every_tensor_of_theirs_is_in_the_table(tmp_path):
    state = openai_state()
    keys = read_archive(saved(tmp_path, state), resolution=SIDE).keys
    assert {key.theirs for key in keys} == set(state)
    thirds = [key for key in keys if key.theirs == "middle_block.1.qkv.weight"]
    assert [key.ours[-11:] for key in thirds] == ["to_q.weight", "to_k.weight", "to_v.weight"]
    assert all(key.remark == "a third" and key.shape == (128, 128) for key in thirds)
    assert not any(key.remark for key in keys if ".qkv." not in key.theirs)


def test_the_second_step_of_the_authors_scripts(tmp_path):
    at = lambda name: read_archive(saved(tmp_path, openai_state(), name), resolution=SIDE).second_sigma  # noqa: E731
    assert at("cd_imagenet64_lpips.pt") == pytest.approx(karras(22 / 39)) == pytest.approx(1.38, abs=0.01)
    assert at("ct_imagenet64.pt") == pytest.approx(karras(106 / 200)) == pytest.approx(1.92, abs=0.01)
    assert at("cd_mine.pt") is None
    assert (karras(0.0), karras(1.0)) == (pytest.approx(80), pytest.approx(0.002))


def test_what_openai_networks_cannot_be(tmp_path):
    tried = lambda state, **kw: read_archive(saved(tmp_path, state), resolution=SIDE, **kw)  # noqa: E731
    learned = openai_state() | {"out.2.weight": torch.zeros(6, 32, 3, 3), "out.2.bias": torch.zeros(6)}
    with pytest.raises(FewstepError, match="learn_sigma"):
        tried(learned)
    with pytest.raises(FewstepError, match="resblock_updown=False"):
        tried(openai_state() | {"input_blocks.3.0.op.weight": torch.zeros(1)})
    with pytest.raises(FewstepError, match="holds fewer"):  # before memory is taken for them
        tried({"output_blocks.1000000000.1.in_layers.0.weight": torch.zeros(1)} | openai_state((64,), 1, ()))
    with pytest.raises(FewstepError, match="3 levels"):
        read_archive(saved(tmp_path, openai_state()))


# ------------------------------------------------------------------------------------------------- strictness and kinds


def test_missing_and_left_over_tensors_are_errors_unless_not_strict(tmp_path):
    state = openai_state() | {"middle_block.3.weight": torch.zeros(2)}
    bias = state.pop("output_blocks.0.0.in_layers.0.bias")
    path = saved(tmp_path, state)
    with pytest.raises(FewstepError) as error:
        read_archive(path, resolution=SIDE)
    assert "middle_block.3.weight" in str(error.value)
    assert "up_blocks.0.resnets.0.norm1.bias" in str(error.value)
    foreign = read_archive(path, strict=False, resolution=SIDE)
    assert torch.equal(foreign.tensors["network.unet.up_blocks.0.resnets.0.norm1.bias"], torch.zeros_like(bias))
    assert {key.theirs for key in foreign.keys if key.remark.startswith("unknown")} == {"middle_block.3.weight"}


def test_a_configuration_that_cannot_be_read_names_the_tensor(tmp_path):
    state = openai_state()
    del state["out.2.weight"]
    with pytest.raises(FewstepError, match=r"lacks out\.2\.weight"):
        read_archive(saved(tmp_path, state), resolution=SIDE)


def test_kind_is_asked_for_when_the_name_does_not_tell(tmp_path):
    path = saved(tmp_path, openai_state(), "model060000.pt")
    with pytest.raises(FewstepError, match="--kind"):
        read_archive(path, resolution=SIDE)
    assert read_archive(path, kind="diffusion", resolution=SIDE).architecture.sigma_min == 0
    assert read_archive(path, kind="consistency", resolution=SIDE).architecture.sigma_min == 0.002


def test_the_stated_kind_wins_over_the_name(tmp_path):
    assert read_archive(saved(tmp_path, openai_state()), kind="diffusion", resolution=SIDE).kind == "diffusion"


# ---------------------------------------------------------------------------------------------- what is not a model


@pytest.mark.parametrize(
    "content", [{"conv.weight": torch.zeros(2)}, {"a": {"b": torch.zeros(2)}}, [torch.zeros(2)], {}, CLASSIFIER]
)
def test_an_unknown_family_is_none(tmp_path, content):
    assert read_archive(saved(tmp_path, content)) is None


class Mine:
    """What runs when it is unpickled leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_an_archive_runs(tmp_path, zipped):
    path, ran = tmp_path / "cd_evil.pt", tmp_path / "ran"
    torch.save(openai_state() | {"evil": Mine(ran)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FewstepError, match="holds more than tensors"):
        read_archive(path, resolution=SIDE)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists()


def test_truncated_and_other_files_are_refused(tmp_path):
    path = saved(tmp_path, openai_state())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FewstepError, match=r"cd_tiny\.pt"):
        read_archive(path)
    path.write_text("no archive")
    with pytest.raises(FewstepError, match=r"cd_tiny\.pt"):
        read_archive(path)
    with pytest.raises(FewstepError, match=r"gone\.pt"):
        read_archive(tmp_path / "gone.pt")


def test_old_archives_without_zip_are_read(tmp_path):
    path = tmp_path / "cd_old.pt"
    torch.save(openai_state(), path, _use_new_zipfile_serialization=False)
    new = read_archive(saved(tmp_path, openai_state()), resolution=SIDE).tensors
    old = read_archive(path, resolution=SIDE).tensors
    assert all(torch.equal(new[name], old[name]) for name in new)


# ---------------------------------------------------------------------------------------------------------- FastGen


def fastgen_state(style="ddpm++", classes=5, seed=0, **changes):
    """EDM's names as FastGen saves them, and the network they belong to."""
    net = randomised(tiny(style, **changes).build((3, 8, 8), classes), seed)
    logvar = {"model.logvar_linear.weight": torch.ones(1, 8), "model.logvar_linear.bias": torch.ones(1)}
    return {f"model.{name}": tensor.clone() for name, tensor in net.state_dict().items()} | logvar


@pytest.mark.parametrize("style", ["ddpm++", "ncsn++"])
@pytest.mark.parametrize(("classes", "augment"), [(5, 9), (0, 0)])
def test_fastgen_equals_its_formulas(tmp_path, style, classes, augment):
    state = fastgen_state(style, classes, attention=(4, 2), augment_dim=augment)
    foreign = read_archive(saved(tmp_path, state, "edm-cifar10-32x32-cond-vp.pth"))
    network = foreign.architecture.network
    expected = {"channels": 8, "multipliers": (2, 1, 2), "blocks": 1, "attention": (4, 2), "style": style}
    assert network == EDMUNet(**expected, augment_dim=augment, dropout=0.0)
    assert foreign.architecture == Architecture(network, (3, 8, 8), classes, 0.5, 0.0)
    assert foreign.kind == "diffusion"
    x, sigma = inputs(torch.float32)
    label = LABEL if classes else None
    s, total = sigma.reshape(-1, 1, 1, 1), (sigma.reshape(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
    bare = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    with torch.no_grad():
        raw = ref_unet(network, bare, x / total, sigma.log() / 4, label)
        out = imported(foreign)(x, sigma, label)
    theirs = 0.25 / (s**2 + 0.25) * x + 0.5 * s / total * raw
    assert (out - x).std() > 0.1
    torch.testing.assert_close(out, theirs, atol=1e-5, rtol=1e-5)
    left_out = {key.theirs for key in foreign.keys if not key.ours}
    assert left_out == {"model.logvar_linear.weight", "model.logvar_linear.bias"}


def test_of_a_fastgen_checkpoint_the_first_ema_is_taken(tmp_path):
    nets = {"net": fastgen_state(seed=0), "ema_9999": fastgen_state(seed=1), "ema_5": fastgen_state(seed=2)}
    content = {"model": nets, "optimizer": {"net": {"state": {}}}, "scheduler": None, "iteration": 7}
    path = saved(tmp_path, content, "0000007.pth")
    with pytest.raises(FewstepError, match="--kind"):
        read_archive(path)
    foreign = read_archive(path, kind="consistency")
    assert foreign.architecture.sigma_min == 0
    assert not foreign.clip_denoised
    first = "dec.8x8_aux_conv.weight"
    assert torch.equal(foreign.tensors[f"network.{first}"], nets["ema_9999"][f"model.{first}"])
    assert "model.ema_9999 was taken, not model.net, model.ema_5" in foreign.notes[-1]
    del nets["ema_9999"], nets["ema_5"]
    alone = read_archive(saved(tmp_path, content, "0000007.pth"), kind="consistency")
    assert torch.equal(alone.tensors[f"network.{first}"], nets["net"][f"model.{first}"])
    assert len(alone.notes) == 1


def adm_state():
    """(the tensors under EDM's names for ADM as FastGen saves them, the same network under OpenAI's)."""
    openai = openai_state((128, 256), 1, (1,), CLASSES)
    modules = {
        "time_embed.0": "map_layer0", "time_embed.2": "map_layer1", "input_blocks.0.0": "enc.8x8_conv", "out.0": "out_norm",
        "out.2": "out_conv", "input_blocks.1.0": "enc.8x8_block0", "input_blocks.2.0": "enc.4x4_down",
        "input_blocks.3.0": "enc.4x4_block0", "middle_block.0": "dec.4x4_in0", "middle_block.2": "dec.4x4_in1",
        "output_blocks.0.0": "dec.4x4_block0", "output_blocks.1.0": "dec.4x4_block1", "output_blocks.1.2": "dec.8x8_up",
        "output_blocks.2.0": "dec.8x8_block0", "output_blocks.3.0": "dec.8x8_block1",
        "input_blocks.3.1": "enc.4x4_block0", "middle_block.1": "dec.4x4_in0", "output_blocks.0.1": "dec.4x4_block0",
        "output_blocks.1.1": "dec.4x4_block1",
    }  # fmt: skip
    parts = {
        "in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "out_layers.0": "norm1",
        "out_layers.3": "conv1", "skip_connection": "skip", "norm": "norm2", "qkv": "qkv", "proj_out": "proj",
    }  # fmt: skip
    state = {"model.map_label.weight": openai["label_emb.weight"].T.contiguous()}
    for name, tensor in openai.items():
        module, _, leaf = name.rpartition(".")
        outer = max((m for m in modules if f"{module}.".startswith(f"{m}.")), key=len, default="")
        inner = parts.get(module.removeprefix(outer).removeprefix("."), "")
        if inner == "qkv":  # q, k, v of a channel side by side
            tensor = tensor.reshape(3, -1, *tensor.shape[1:]).transpose(0, 1).flatten(0, 1)
        if outer:
            state[f"model.{modules[outer]}{'.' * bool(inner)}{inner}.{leaf}"] = tensor
    for name in ("enc.4x4_down.conv0", "enc.4x4_down.skip", "dec.8x8_up.conv0", "dec.8x8_up.skip"):
        state[f"model.{name}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    assert len(state) == len(openai) + 4
    return state | {"model.logvar_linear.weight": torch.ones(1, 128), "model.logvar_linear.bias": torch.ones(1)}, openai


def test_fastgen_adm_equals_its_formulas(tmp_path):
    state, openai = adm_state()
    foreign = read_archive(saved(tmp_path, state, "edm-imagenet-64x64-cond-adm.pth"))
    assert (foreign.architecture.shape, foreign.architecture.num_classes) == ((3, 8, 8), CLASSES)
    x, sigma = inputs(torch.float64)
    s, total = sigma.reshape(-1, 1, 1, 1), (sigma.reshape(-1, 1, 1, 1) ** 2 + 0.25).sqrt()
    with torch.no_grad():
        doubled = {name: tensor.double() for name, tensor in openai.items()}
        raw = openai_unet(doubled, x / total, sigma.log() / 4, LABEL, levels=2, layers=1, attention=(1,))
        out = imported(foreign, torch.float64)(x, sigma, LABEL)
    assert (out - (0.25 / (s**2 + 0.25) * x + 0.5 * s / total * raw)).abs().max() <= 1e-11
    assert {key.theirs for key in foreign.keys} == set(state)
    assert "non-commercial" in foreign.lineage[0]


@pytest.mark.parametrize("trained", [False, True])
def test_fastgen_edm2_is_the_network_of_its_tensors(tmp_path, trained):
    """Its trainer saves the gains with an axis of one element."""
    network = EDM2UNet(channels=64, multipliers=(1, 2), blocks=1, attention=(4,))
    own = Architecture(network, (3, 8, 8), 5).build().state_dict()
    state = {name.replace("network.", "unet."): tensor for name, tensor in own.items()}
    state = {name: t.reshape(1) if trained and name.endswith("_gain") else t for name, t in state.items()}
    extra = {"logvar_fourier.freqs": torch.ones(4), "logvar_linear.weight": torch.ones(1, 4)}
    content = {"model": {"net": state | extra}} if trained else state | extra
    foreign = read_archive(saved(tmp_path, content, "edm2-img64-s-fid.pth"))
    assert foreign.architecture == Architecture(network, (3, 8, 8), 5)
    assert foreign.tensors.keys() == own.keys()
    assert all(torch.equal(foreign.tensors[name], tensor) for name, tensor in own.items())
    assert (foreign.kind, len(foreign.notes)) == ("diffusion", 1)


def test_fastgen_networks_that_are_not_supported_are_named(tmp_path):
    state = fastgen_state()
    two_times = state | {"model.map_layer0.weight": torch.zeros(32, 16)}
    with pytest.raises(FewstepError, match="r_timestep"):
        read_archive(saved(tmp_path, two_times, "edm-x.pth"))
    with pytest.raises(FewstepError, match="8 pixels"):
        read_archive(saved(tmp_path, state, "edm-x.pth"), resolution=16)
    del state["model.enc.8x8_block0.norm0.bias"]
    with pytest.raises(FewstepError, match="missing in the source"):
        read_archive(saved(tmp_path, state, "edm-x.pth"))
