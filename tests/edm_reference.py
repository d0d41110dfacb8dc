"""EDM's networks a second time: shape tables, plain functions over tensors under EDM's names, and a writer of pickles.

Nothing is taken from anybody's code: the formulas are those of arXiv:2011.13456, 2105.05233 and 2206.00364 (tables 1, 7
and 8), names and channel order those of the public files.
"""

import io
import math
import pickle
import sys
import types
from contextlib import contextmanager

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------------- the pickles


class EasyDict(dict):
    pass


def _reconstruct_persistent_obj(meta):
    raise AssertionError("the reader must never call this")


EasyDict.__module__, _reconstruct_persistent_obj.__module__ = "dnnlib.util", "torch_utils.persistence"


class Persistent(torch.nn.Module):
    """Pickles as an object of torch_utils.persistence does."""

    def __init__(self, kind, kwargs=None, source="", args=()):
        super().__init__()
        self.kind, self.source, self._init_args, self._init_kwargs = kind, source, args, EasyDict(kwargs or {})

    def __reduce__(self):
        state = {name: value for name, value in self.__dict__.items() if name not in ("kind", "source")}
        meta = {"type": "class", "version": 6, "module_src": self.source, "class_name": self.kind, "state": state}
        return _reconstruct_persistent_obj, (EasyDict(meta),)


@contextmanager
def foreign_modules():
    """torch_utils.persistence and dnnlib.util as far as pickling needs them."""
    fakes = {
        name: types.ModuleType(name) for name in ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")
    }
    fakes["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    fakes["dnnlib.util"].EasyDict = EasyDict
    assert not fakes.keys() & sys.modules.keys()
    sys.modules.update(fakes)
    try:
        yield
    finally:
        for name in fakes:
            del sys.modules[name]


def dumps(content, protocol=4):
    with foreign_modules():
        return pickle.dumps(content, protocol)


def grown(module, state):
    """The module with the tensors of a state dict, in persistent submodules; enc and dec are torch.nn.ModuleDicts."""
    inner = {}
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = tensor
        elif head in ("resample_filter", "freqs"):
            module.register_buffer(head, tensor)
        else:
            module.register_parameter(head, torch.nn.Parameter(tensor, requires_grad=False))
    for head, held in inner.items():
        if head in ("enc", "dec"):
            child = torch.nn.ModuleDict()
        else:
            kinds = {"conv": "Conv2d", "skip": "Conv2d", "qkv": "Conv2d", "norm": "GroupNorm", "map_": "Linear"}
            child = Persistent(next((kind for start, kind in kinds.items() if head.startswith(start)), "UNetBlock"))
        module.add_module(head, grown(child, held))
    return module


def precond(state, kwargs, kind="EDMPrecond", model="SongUNet", source="", args=(), **outer):
    """A preconditioned network as EDM pickles it."""
    size = {"img_resolution": kwargs["img_resolution"], "label_dim": kwargs.get("label_dim", 0)}
    inside = {name: value for name, value in kwargs.items() if name not in size}
    whole = Persistent(kind, {**size, "img_channels": 3, "model_type": model, **inside, **outer}, source, args)
    whole.model = grown(Persistent(model, {"in_channels": 3, "out_channels": 3, **kwargs}, source), state)
    whole.register_buffer("scratch", torch.zeros(5), persistent=False)
    return whole.eval()


def storage_bytes(numbers, kind=b"torch\nFloatStorage", count=None, stored=None, key=b"0", keys=b"0", view=b"N"):
    """A FloatStorage in torch.save's old format, and lies about it."""
    count = len(numbers) if count is None else count
    head = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]
    text = lambda b: b"X" + len(b).to_bytes(4, "little") + b  # noqa: E731
    integer = b"\x8a\x08" + count.to_bytes(8, "little", signed=True)
    pid = b"\x80\x02(" + text(b"storage") + b"c" + kind + b"\n" + text(key) + text(b"cpu") + integer + view + b"tQ."
    length = (len(numbers) if stored is None else stored).to_bytes(8, "little")
    return b"".join([*head, pid, b"\x80\x02](" + text(keys) + b"e.", length, torch.tensor(numbers).numpy().tobytes()])


def old_format(tensor):
    """How PyTorch itself writes a storage within a plain pickle."""
    file = io.BytesIO()
    torch.save(tensor, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


# -------------------------------------------------------------------------------------------------------- random weights


def shapes(adm, cfg):
    """{name: shape} of SongUNet or DhariwalUNet, listed from the rules of the papers' tables 7 and 8 in EDM's names."""
    width, side, classes = cfg["model_channels"], cfg["img_resolution"], cfg.get("label_dim", 0)
    fourier = cfg.get("embedding_type") == "fourier"
    taps, noise, emb = len(cfg.get("resample_filter", (1, 1))), width * (1 + fourier), 4 * width
    found = {}

    def layer(name, *shape, bias=True):
        found[f"{name}.weight"] = shape
        if bias:
            found[f"{name}.bias"] = shape[:1]

    def block(name, cin, cout, attention=False, resampled=False):
        for norm, c in (("norm0", cin), ("norm1", cout)):
            layer(f"{name}.{norm}", c)
        layer(f"{name}.conv0", cout, cin, 3, 3)
        layer(f"{name}.affine", cout * (1 + adm), emb)
        layer(f"{name}.conv1", cout, cout, 3, 3)
        if cin != cout or (resampled and not adm):
            layer(f"{name}.skip", cout, cin, 1, 1)
        if resampled:
            found[f"{name}.conv0.resample_filter"] = found[f"{name}.skip.resample_filter"] = (1, 1, taps, taps)
        if attention:
            layer(f"{name}.norm2", cout)
            layer(f"{name}.qkv", 3 * cout, cout, 1, 1)
            layer(f"{name}.proj", cout, cout, 1, 1)

    if fourier:
        found["map_noise.freqs"] = (width,)
    if cfg.get("augment_dim"):
        layer("map_augment", noise, cfg["augment_dim"], bias=False)
    layer("map_layer0", emb, noise)
    layer("map_layer1", emb, emb)
    if classes:
        layer("map_label", emb if adm else noise, classes, bias=not adm)
    levels, skips, c, pyramid = list(enumerate(cfg["channel_mult"])), [], width, 3
    for level, multiplier in levels:
        r = f"{side >> level}x{side >> level}"
        if level == 0:
            layer(f"enc.{r}_conv", width, 3, 3, 3)
        else:
            block(f"enc.{r}_down", c, c, resampled=True)
            if fourier:
                layer(f"enc.{r}_aux_residual", c, pyramid, 3, 3)
                found[f"enc.{r}_aux_residual.resample_filter"] = (1, 1, taps, taps)
                pyramid = c
        skips.append(c)
        for i in range(cfg["num_blocks"]):
            block(f"enc.{r}_block{i}", c, width * multiplier, side >> level in cfg["attn_resolutions"])
            c = width * multiplier
            skips.append(c)
    for level, multiplier in levels[::-1]:
        r = f"{side >> level}x{side >> level}"
        if level == len(levels) - 1:
            block(f"dec.{r}_in0", c, c, attention=True)
            block(f"dec.{r}_in1", c, c)
        else:
            block(f"dec.{r}_up", c, c, resampled=True)
        for i in range(cfg["num_blocks"] + 1):
            attention = side >> level in cfg["attn_resolutions"] and (adm or i == cfg["num_blocks"])
            block(f"dec.{r}_block{i}", c + skips.pop(), width * multiplier, attention)
            c = width * multiplier
    layer("out_norm" if adm else f"dec.{side}x{side}_aux_norm", c)
    layer("out_conv" if adm else f"dec.{side}x{side}_aux_conv", 3, c, 3, 3)
    return found


def weights(adm, cfg, seed=0):
    """Random weights that leave no branch near zero; the filters are what they are."""
    g = torch.Generator().manual_seed(seed)
    taps = torch.tensor(cfg.get("resample_filter", (1, 1)), dtype=torch.float32)
    state = {}
    for name, shape in shapes(adm, cfg).items():
        noise = torch.randn(shape, generator=g)
        if name.endswith("resample_filter"):
            state[name] = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
        elif name.endswith("freqs"):
            state[name] = 4 * noise
        elif len(shape) > 1:
            state[name] = noise / math.prod(shape[1:]) ** 0.5
        else:
            state[name] = 0.3 * noise + ("norm" in name and name.endswith("weight"))
    return state


# ----------------------------------------------------------------------------------------------------------- the network


def correlated(x, taps):
    """x [n,c,h,w] with the separable filter of sum 1, no padding: the sum of shifted copies."""
    k, total = len(taps), sum(taps)
    x = sum(t / total * x[:, :, i : x.shape[2] - k + 1 + i] for i, t in enumerate(taps))
    return sum(t / total * x[..., i : x.shape[3] - k + 1 + i] for i, t in enumerate(taps))


def doubled(x, taps):
    n, c, h, w = x.shape
    sparse = x.new_zeros(n, c, 2 * h, 2 * w)
    sparse[..., ::2, ::2] = x
    return 4 * correlated(F.pad(sparse, (len(taps) // 2, len(taps) // 2 - 1) * 2), taps)


def halved(x, taps):
    return correlated(F.pad(x, ((len(taps) - 1) // 2,) * 4), taps)[..., ::2, ::2]


def silu(x):
    return x / (1 + torch.exp(-x))


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def conv(w, name, x, extra=0):
    weight = w[f"{name}.weight"]
    return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2 + extra)


def norm(w, name, x, eps):
    n, c, height, width = x.shape
    groups = x.reshape(n, min(32, c // 4), -1)
    var, mean = torch.var_mean(groups, dim=-1, keepdim=True, correction=0)
    x = ((groups - mean) / (var + eps).sqrt()).reshape(n, c, height, width)
    return x * w[f"{name}.weight"].reshape(-1, 1, 1) + w[f"{name}.bias"].reshape(-1, 1, 1)


def attended(w, name, x, heads, eps):
    """Channel (head, i, q k v) of the 1x1 convolution is the i-th of the head's queries, keys or values."""
    n, c, height, width = x.shape
    d = c // heads
    out = conv(w, f"{name}.qkv", norm(w, f"{name}.norm2", x, eps)).reshape(n, 3 * c, height * width)
    seen = []
    for head in range(heads):
        q, k, v = (out[:, 3 * head * d + j : 3 * (head + 1) * d : 3] for j in range(3))
        a = torch.softmax(torch.einsum("ncq,nck->nqk", q, k) / math.sqrt(d), dim=-1)
        seen.append(torch.einsum("nqk,nck->ncq", a, v))
    return conv(w, f"{name}.proj", torch.cat(seen, 1).reshape(n, c, height, width))


def block(w, name, x, emb, adm, resample=lambda x: x):
    eps, scale = (1e-5, 1) if adm else (1e-6, math.sqrt(0.5))
    h = conv(w, f"{name}.conv0", resample(silu(norm(w, f"{name}.norm0", x, eps))))
    told = linear(w, f"{name}.affine", emb)[:, :, None, None]
    if adm:
        gain, shift = told[:, : h.shape[1]], told[:, h.shape[1] :]
        h = silu(norm(w, f"{name}.norm1", h, eps) * (gain + 1) + shift)
    else:
        h = silu(norm(w, f"{name}.norm1", h + told, eps))
    x = resample(x)
    x = (conv(w, f"{name}.conv1", h) + (conv(w, f"{name}.skip", x) if f"{name}.skip.weight" in w else x)) * scale
    if f"{name}.qkv.weight" in w:
        x = (attended(w, name, x, x.shape[1] // 64 if adm else 1, eps) + x) * scale
    return x


def embedding(w, cfg, adm, c_noise, label, width):
    if "map_noise.freqs" in w:
        angle = 2 * math.pi * torch.outer(c_noise, w["map_noise.freqs"])
    else:  # frequencies are constants of float32
        half = width // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - (not adm))
        if adm:  # as is their product with the noise level
            angle = torch.outer(c_noise.float(), exponent.exp())
        else:
            angle = torch.outer(c_noise, ((1 / 10000) ** (torch.arange(half) / (half - 1))).to(c_noise.dtype))
    waves = [angle.cos(), angle.sin()] if adm else [angle.sin(), angle.cos()]
    emb = torch.cat(waves, dim=1).to(c_noise.dtype)
    onehot = None if label is None else F.one_hot(label, cfg["label_dim"]).to(c_noise.dtype)
    if onehot is not None and not adm:
        emb = emb + linear(w, "map_label", onehot * math.sqrt(cfg["label_dim"]))
    emb = linear(w, "map_layer1", silu(linear(w, "map_layer0", emb)))
    if onehot is not None and adm:
        emb = emb + linear(w, "map_label", onehot)
    return silu(emb)


def raw(w, cfg, adm, x, c_noise, label):
    """F(x, c_noise, label)"""
    taps, side, levels = cfg.get("resample_filter", (1, 1)), x.shape[-1], len(cfg["channel_mult"])
    emb = embedding(w, cfg, adm, c_noise, label, cfg["model_channels"])
    pyramid, h = x, conv(w, f"enc.{side}x{side}_conv", x)
    skips = [h]
    for level in range(levels):
        r = f"{side >> level}x{side >> level}"
        if level:
            h = block(w, f"enc.{r}_down", h, emb, adm, lambda x: halved(x, taps))
            if f"enc.{r}_aux_residual.weight" in w:
                wide = conv(w, f"enc.{r}_aux_residual", pyramid, extra=(len(taps) - 1) // 2)
                h = pyramid = (h + correlated(wide, taps)[..., ::2, ::2]) / math.sqrt(2)
            skips.append(h)
        for i in range(cfg["num_blocks"]):
            h = block(w, f"enc.{r}_block{i}", h, emb, adm)
            skips.append(h)
    for level in reversed(range(levels)):
        r = f"{side >> level}x{side >> level}"
        if level == levels - 1:
            h = block(w, f"dec.{r}_in1", block(w, f"dec.{r}_in0", h, emb, adm), emb, adm)
        else:
            h = block(w, f"dec.{r}_up", h, emb, adm, lambda x: doubled(x, taps))
        for i in range(cfg["num_blocks"] + 1):
            h = block(w, f"dec.{r}_block{i}", torch.cat([h, skips.pop()], 1), emb, adm)
    assert not skips
    last, eps = ("out_{}", 1e-5) if adm else (f"dec.{side}x{side}_aux_{{}}", 1e-6)
    return conv(w, last.format("conv"), silu(norm(w, last.format("norm"), h, eps)))


def denoised(w, cfg, adm, x, sigma, label=None, sigma_data=0.5):
    """D(x, sigma, label) of EDM's table 1."""
    t, total = sigma.reshape(-1, 1, 1, 1), (sigma**2 + sigma_data**2).sqrt().reshape(-1, 1, 1, 1)
    f = raw(w, cfg, adm, x / total, sigma.log() / 4, label)
    return sigma_data**2 / total**2 * x + t * sigma_data / total * f
