"""EDM's pickles: what comes out is the same function, every tensor is accounted for, and nothing in a file is ever run."""

import builtins
import copyreg
import dataclasses
import functools
import importlib
import io
import operator
import os
import pickle
import subprocess
import sys
import types
import warnings
from collections import OrderedDict
from contextlib import suppress

import numpy as np
import pytest
import torch

from edm_reference import Persistent, denoised, dumps, old_format, precond, storage_bytes, weights
from fewstep import load
from fewstep.api import average
from fewstep.cli import main
from fewstep.hub.edm import read_edm
from fewstep.hub.unpickle import Array, Module, read_pickle
from fewstep.networks import EDMUNet, UNet
from fewstep.types import FewstepError

warnings.filterwarnings("ignore", message="TypedStorage is deprecated")

SMALL = {"img_resolution": 8, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
FOURIER = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
WIDE = {"img_resolution": 8, "model_channels": 128, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
CASES = {  # ADM or not, arguments
    "ddpm++": (False, SMALL),
    "ddpm++ with classes and augmentation": (
        False,
        SMALL | {"label_dim": 3, "augment_dim": 9, "attn_resolutions": [8]},
    ),
    "ncsn++": (False, SMALL | FOURIER | {"label_dim": 4, "channel_mult": [1, 2, 1], "img_resolution": 16}),
    "adm": (True, WIDE | {"augment_dim": 9}),
    "adm with classes": (True, WIDE | {"label_dim": 5, "attn_resolutions": [8, 4], "channel_mult": [1, 1]}),
}


@pytest.fixture
def sentinel(tmp_path):
    """A file that appears as soon as anything of a pickle runs."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists(), "something in the pickle was run"


def written(tmp_path, content, protocol=4):
    path = tmp_path / "network.pkl"
    path.write_bytes(content if isinstance(content, bytes) else dumps(content, protocol))
    return path


def small(state=None, **outer):
    """A whole snapshot of a small DDPM++, as EDM writes it."""
    model = precond(weights(False, SMALL) if state is None else state, SMALL, **outer)
    return {"ema": model, "loss_fn": Persistent("EDMLoss"), "augment_pipe": None, "dataset_kwargs": {"path": "x.zip"}}


def inputs(cfg, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.01, 1.3, 70.0])
    x = torch.randn(3, 3, cfg["img_resolution"], cfg["img_resolution"], generator=g) * (
        sigma.reshape(-1, 1, 1, 1) + 0.5
    )
    label = torch.tensor([0, 2, 1]) if cfg.get("label_dim") else None
    return x.to(dtype), sigma.to(dtype), label


# ---------------------------------------------------------------------------------------------------- the same function


@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_the_formulas_and_no_tensor_is_lost(case, tmp_path, sentinel):
    adm, cfg = CASES[case]
    state = weights(adm, cfg)
    source = f"open({str(sentinel)!r}, 'w')"
    model = precond(state, cfg, model="DhariwalUNet" if adm else "SongUNet", source=source, sigma_data=0.4)
    foreign = read_edm(written(tmp_path, {"ema": model}))
    assert isinstance(foreign.architecture.network, UNet if adm else EDMUNet)
    assert (foreign.kind, foreign.architecture.sigma_data, foreign.architecture.sigma_min) == ("diffusion", 0.4, 0.0)
    denoiser = foreign.architecture.build().eval()
    denoiser.load_state_dict(foreign.tensors)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        x, sigma, label = inputs(cfg, dtype)
        with torch.no_grad():
            out = denoiser.to(dtype)(x, sigma, label)
            expected = denoised({name: t.to(dtype) for name, t in state.items()}, cfg, adm, x, sigma, label, 0.4)
        print(f"{case} {dtype}: max abs diff {(out - expected).abs().max():.1e} of {expected.abs().max():.1f}")
        assert out.std() > 0.1
        torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)

    assert {key.theirs for key in foreign.keys} == {f"model.{name}" for name in state}
    assert {key.ours for key in foreign.keys if key.ours} == set(foreign.tensors)
    assert all(key.shape == state[key.theirs.removeprefix("model.")].shape for key in foreign.keys)
    taken = {key.theirs for key in foreign.keys if key.ours}
    lost = {name for name in state if f"model.{name}" not in taken}
    assert lost == {name for name in state if adm and ("resample_filter" in name or "augment" in name)}
    counted = sum(t.numel() for name, t in state.items() if name not in lost)
    assert sum(t.numel() for t in foreign.tensors.values()) == counted
    assert sum(t.double().sum() for t in foreign.tensors.values()) == pytest.approx(
        float(sum(t.double().sum() for name, t in state.items() if name not in lost)), rel=1e-9
    )
    if not adm:
        assert all(torch.equal(t, state[name.removeprefix("network.")]) for name, t in foreign.tensors.items())


def test_queries_keys_and_values_are_every_third_channel(tmp_path):
    _, cfg = CASES["adm with classes"]
    state = weights(True, cfg)
    foreign = read_edm(written(tmp_path, {"ema": precond(state, cfg, model="DhariwalUNet")}))
    own = foreign.tensors
    for i, letter in enumerate("qkv"):
        mine = own[f"network.unet.mid_block.attentions.0.to_{letter}.weight"]
        assert torch.equal(mine, state["dec.4x4_in0.qkv.weight"][i::3, :, 0, 0])
    assert torch.equal(own["network.unet.class_embedding.weight"], state["map_label.weight"].T)
    remarks = {key.theirs: key.remark for key in foreign.keys}
    assert remarks["model.dec.4x4_in0.qkv.bias"] == "every third channel"
    assert remarks["model.map_label.weight"] == "transposed"
    assert "constant" in remarks["model.dec.8x8_up.conv0.resample_filter"]


def test_half_precision_becomes_single(tmp_path):
    state = {name: t.half() for name, t in weights(False, SMALL).items()}
    foreign = read_edm(written(tmp_path, small(state)))
    assert {t.dtype for t in foreign.tensors.values()} == {torch.float32}
    assert torch.equal(foreign.tensors["network.map_layer0.weight"], state["map_layer0.weight"].float())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_python_3(protocol, tmp_path):
    state = weights(False, SMALL)
    path = written(tmp_path, {"ema": precond(state, SMALL)}, protocol)
    if protocol == 2:  # which writes bytes by calling an encoder: not a protocol of these files
        with pytest.raises(FewstepError, match=r"_codecs\.encode"):
            read_edm(path)
    else:
        assert torch.equal(read_edm(path).tensors["network.map_layer1.bias"], state["map_layer1.bias"])


# ------------------------------------------------------------------------------------------------- what it is taken for


def test_kind_lineage_and_notes_by_class(tmp_path):
    edm = read_edm(written(tmp_path, small()))
    ect = read_edm(written(tmp_path, small(kind="ECMPrecond", sigma_min=0.003)))
    assert (edm.kind, ect.kind) == ("diffusion", "consistency")
    assert "non-commercial" in edm.lineage[0]
    assert "from scratch" in ect.lineage[0]
    assert "EDMPrecond, SongUNet" in edm.source
    assert any("0.003" in note for note in ect.notes)
    assert not any("0.003" in note for note in edm.notes)
    assert ect.architecture.sigma_min == 0
    assert read_edm(written(tmp_path, small()), kind="consistency").kind == "consistency"


def test_the_moving_average_comes_first_and_a_note_says_so(tmp_path):
    online, ema = (precond(weights(False, SMALL, seed), SMALL) for seed in (1, 2))
    expected = dict(ema.named_parameters())["model.map_layer1.bias"]
    foreign = read_edm(written(tmp_path, {"net": online, "ema": ema}))
    assert torch.equal(foreign.tensors["network.map_layer1.bias"], expected)
    assert "'ema'" in foreign.notes[0]
    assert "'net'" in read_edm(written(tmp_path, {"net": online, "ema": None})).notes[0]
    assert read_edm(written(tmp_path, online)).notes == ()


def test_arguments_may_be_positional_or_left_out(tmp_path):
    _, cfg = CASES["ddpm++"]
    state = weights(False, cfg | {"model_channels": 128, "channel_mult": [1, 2, 2, 2], "num_blocks": 4}, 3)
    model = precond({}, cfg)
    model._init_kwargs, model._init_args = {}, (8, 3, 0, False, 0, 80.0, 0.7)
    assert read_pickle(written(tmp_path, model)).arguments["6"] == 0.7
    assert state["map_layer0.weight"].shape == (512, 128)
    whole = precond(weights(False, cfg), cfg)
    whole._init_kwargs, whole._init_args = {}, (8, 3, 0, False, 0, 80.0, 0.7)
    assert read_edm(written(tmp_path, whole)).architecture.sigma_data == 0.7
    del whole.model._init_kwargs["model_channels"]  # the default is 128, these weights are narrower
    with pytest.raises(FewstepError, match="describes a network of"):
        read_edm(written(tmp_path, whole))


@pytest.mark.parametrize("kind", ["VPPrecond", "VEPrecond", "iDDPMPrecond", "SomethingElse"])
def test_other_preconditionings_are_refused_by_name(kind, tmp_path):
    with pytest.raises(FewstepError, match=rf"{kind} with a SongUNet: supported are EDMPrecond .*ECMPrecond"):
        read_edm(written(tmp_path, small(kind=kind)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "EDM2UNet"}, "EDMPrecond with a EDM2UNet"),
        ({"kwargs": {"encoder_type": "skip"}}, "encoder_type=skip"),
        ({"kwargs": {"resample_filter": [1, 3, 3, 1]}}, "neither DDPM"),
        ({"kwargs": {"decoder_type": "skip"}}, "decoder_type=skip"),
        ({"kwargs": {"emb_norm": True}}, "emb_norm=True"),
        ({"kwargs": {"channel_mult_emb": 2}}, "channel_mult_emb=2"),
        ({"kwargs": {"learnable_scale": True}}, "learnable_scale"),
        ({"kwargs": {"model_channels": 10**9}}, "model_channels=1000000000"),
        ({"kwargs": {"channel_mult": [4096]}}, "channel_mult"),
        ({"kwargs": {"model_channels": 256, "channel_mult": [16, 32]}}, "describes a network of"),
        ({"kwargs": {"img_resolution": "8"}}, "img_resolution=8"),
        ({"kwargs": {"num_blocks": None}}, "num_blocks=.*NoneType"),
        ({"kwargs": {"model_channels": 1 << 20_000}}, "model_channels=.*int"),
        ({"kwargs": {"embedding_type": functools.reduce(lambda t, _: (t,), range(300), ())}}, "embedding_type=.*tuple"),
        ({"kwargs": {"decoder_type": torch.ones(2)}}, "decoder_type=.*Tensor"),
        ({"kwargs": {"out_channels": 6}}, "predicts 6 channels from 3"),
        ({"sigma_data": 0}, "sigma_data=0"),
        ({"sigma_data": float("nan")}, "sigma_data=nan"),
        ({"P_mean": 1}, "P_mean"),
    ],
)
def test_other_networks_are_refused(changes, told, tmp_path):
    kwargs = SMALL | changes.pop("kwargs", {})
    with pytest.raises(FewstepError, match=told):
        read_edm(written(tmp_path, {"ema": precond(weights(False, SMALL), kwargs, **changes)}))


@pytest.mark.parametrize(
    "kwargs", [{"model_channels": 64}, {"model_channels": 160}, {"channel_mult": [2, 2]}, {"out_channels": 6}]
)
def test_an_adm_that_diffusers_cannot_express_is_refused(kwargs, tmp_path):
    model = precond({}, WIDE | kwargs, model="DhariwalUNet")
    with pytest.raises(FewstepError, match=r"in steps of 64|predicts 6 channels from 3"):
        read_edm(written(tmp_path, {"ema": model}))


def test_pickles_are_loaded_combined_and_started_from_directly(tmp_path, capsys):
    states = [weights(False, SMALL), {name: 3 * t for name, t in weights(False, SMALL).items()}]
    for i, state in enumerate(states):
        (tmp_path / f"network-snapshot-{i:06d}.pkl").write_bytes(dumps({"ema": precond(state, SMALL)}))
    told = average([tmp_path], "uniform", tmp_path / "mean.safetensors")  # a folder of pickles, in order
    assert told["snapshots"] == 2
    mean, (first, *_) = load(tmp_path / "mean.safetensors"), states
    for name, tensor in first.items():
        if tensor.is_floating_point() and not name.endswith("resample_filter"):
            ours = mean.denoiser.state_dict()[f"network.{name.removeprefix('model.')}"]
            assert torch.allclose(ours, 2 * tensor.float(), atol=1e-6), name
    assert "CC BY-NC-SA" in mean.info.lineage[0]  # which every combination keeps
    start = str(tmp_path / "network-snapshot-000000.pkl")
    assert main(["train", "ect", "--preset", "cifar10-1hour", "--init", start, "--dry-run"]) == 0
    assert load(start).info.kind == "diffusion"
    capsys.readouterr()


def test_edm2_goes_to_its_own_reader(tmp_path, monkeypatch):
    def from_module(module, path, strict):
        assert (module.kind, path.name, strict) == ("Precond", "network.pkl", False)
        return dataclasses.replace(edm, notes=("its own",))

    edm = read_edm(written(tmp_path, small()))
    monkeypatch.setitem(sys.modules, "fewstep.hub.edm2", types.SimpleNamespace(from_module=from_module))
    whole = Persistent("Precond", {"img_resolution": 8})
    whole.unet = Persistent("UNet")
    foreign = read_edm(written(tmp_path, {"ema": whole}), strict=False, kind="consistency")
    assert foreign.kind == "consistency"
    assert foreign.notes == ("The network under 'ema' was taken.", "its own")


def test_another_filter_in_an_adm_is_refused(tmp_path):
    state = weights(True, WIDE)
    state["enc.4x4_down.skip.resample_filter"] *= 2
    with pytest.raises(FewstepError, match=r"enc\.4x4_down\.skip\.resample_filter"):
        read_edm(written(tmp_path, {"ema": precond(state, WIDE, model="DhariwalUNet")}))


def test_a_pickle_without_a_network_says_what_it_holds(tmp_path):
    for content in ({"step": 3, "state": {"a": torch.ones(2)}}, {1 << 20_000: 1}, [1, 2], None):
        with pytest.raises(FewstepError, match="holds no network under ema"):
            read_edm(written(tmp_path, content))


# ----------------------------------------------------------------------------------------------------- keys and damages


def test_missing_extra_and_misshapen_keys_are_a_table_or_told(tmp_path):
    state = weights(False, SMALL)
    del state["map_layer1.bias"]
    state["map_layer0.weight"] = torch.ones(64, 3)
    state["dec.extra.weight"] = torch.ones(7)
    path = written(tmp_path, small(state))
    with pytest.raises(FewstepError, match="3 of") as error:
        read_edm(path)
    for row in (
        r"-\s+network\.map_layer1\.bias\s+64\s+missing",
        r"model\.map_layer0\.weight\s+network\.map_layer0\.weight\s+64x3\s+here \(64, 16\)",
        r"model\.dec\.extra\.weight\s+-\s+7\s+unknown",
    ):
        assert error.match(row)
    foreign = read_edm(path, strict=False)
    assert {key.theirs or key.ours for key in foreign.keys if key.remark} == {
        "network.map_layer1.bias", "model.map_layer0.weight", "model.dec.extra.weight"
    }  # fmt: skip
    assert torch.equal(foreign.tensors["network.map_layer0.bias"], state["map_layer0.bias"])


def test_truncated_anywhere_or_garbage(tmp_path):
    whole = dumps(small())
    for end in [0, 1, 2, 11, 12, 100, 1000, *range(5000, len(whole), len(whole) // 7), len(whole) - 1]:
        with pytest.raises(FewstepError, match="no whole pickle"):
            read_edm(written(tmp_path, whole[:end]))
    rng = np.random.default_rng(0)
    for _ in range(200):
        with pytest.raises(FewstepError):
            read_edm(written(tmp_path, rng.bytes(200)))
    for trial in range(24):  # a few bytes changed: an error, or a network with another number in it
        broken = bytearray(whole)
        for at in rng.integers(len(whole), size=8) if trial % 2 else rng.integers(3000, size=3):
            broken[at] = rng.integers(256)
        with suppress(FewstepError):
            assert read_edm(written(tmp_path, bytes(broken))).tensors


def test_a_path_that_is_no_pickle(tmp_path):
    with pytest.raises(FewstepError, match="cannot be read"):
        read_pickle(tmp_path / "none.pkl")
    with pytest.raises(FewstepError, match="cannot be read"):
        read_pickle(tmp_path)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pkl")
    with pytest.raises(FewstepError, match="PyTorch archive"):
        read_pickle(tmp_path / "a.pkl")


# ------------------------------------------------------------------------------------------------------ values of a file


def test_plain_values_numbers_and_arrays_survive(tmp_path):
    content = {
        "a": [1, -2.5, None, True, "é", b"\0", (1, (2,)), 1 << 100, {3, "x"}], "d": OrderedDict(b=torch.arange(3)),
        "n": np.float32(1.25), "f": np.asfortranarray(np.arange(6, dtype=">i2").reshape(2, 3)), "t": torch.float16,
        "s": torch.ones(2, 3, dtype=torch.bfloat16).T, "v": torch.arange(24.0).reshape(4, 6)[1:3, ::2], "e": torch.zeros(0, 3),
        "device": torch.device("cuda", 1), "size": torch.Size([2, 3]), "bool": torch.tensor([True, False]),
    }  # fmt: skip
    read = read_pickle(written(tmp_path, content))
    assert read["a"] == content["a"]
    assert (read["n"], read["t"], read["device"], read["size"]) == (1.25, torch.float16, "cuda:1", (2, 3))
    assert isinstance(read["f"], Array)
    assert np.array_equal(read["f"].values, content["f"])
    for name in ("s", "v", "e", "bool"):
        assert torch.equal(read[name], content[name])
        assert read[name].dtype == content[name].dtype
    assert torch.equal(read["d"]["b"], torch.arange(3))


def test_modules_are_inert_and_have_the_state_dict_of_the_real_ones(tmp_path):
    real = torch.nn.Sequential(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Dropout(0.1)}))
    real.register_buffer("kept", torch.ones(1))
    real.register_buffer("dropped", torch.ones(1), persistent=False)
    read = read_pickle(written(tmp_path, real))
    assert type(read) is Module
    assert (read.kind, read.children["0"].children["b"].kind) == ("Sequential", "Dropout")
    assert read.children["0"].children["b"].attributes["p"] == 0.1
    assert read.state().keys() == real.state_dict().keys()
    assert all(torch.equal(tensor, real.state_dict()[name]) for name, tensor in read.state().items())


# -------------------------------------------------------------------------------------------------------- what is refused


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def calls(sentinel):
    """{pattern of the name that the file asks for: a call that would leave the sentinel}"""
    touch, code = f"touch {sentinel}", f"open({str(sentinel)!r}, 'w')"
    return {  # the older protocols have the names of Python 2
        r"posix\.system": Call(os.system, touch),
        r"(__builtin__|builtins)\.eval": Call(builtins.eval, code),
        r"(__builtin__|builtins)\.exec": Call(builtins.exec, code),
        r"(__builtin__|builtins)\.getattr": Call(getattr, "text", "upper"),
        r"(__builtin__|builtins)\.__import__": Call(__import__, "this"),
        r"io\.open": Call(open, str(sentinel), "w"),
        r"_?io\.FileIO": Call(io.FileIO, str(sentinel), "w"),
        r"(subprocess|commands)\.Popen": Call(subprocess.Popen, ["touch", str(sentinel)]),
        r"importlib\.import_module": Call(importlib.import_module, "antigravity"),
        r"torch\.serialization\.load": Call(torch.load, str(sentinel)),
        r"torch\.hub\.load": Call(torch.hub.load, "owner/name", "model"),
        r"operator\.attrgetter": Call(operator.attrgetter, "system"),
        r"functools\.partial": Call(functools.partial, Call(os.system, touch)),
        r"(copyreg|copy_reg)\.add_extension": Call(copyreg.add_extension, "os", "system", 200),
        r"_?pickle\.loads": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
    }


NAMES = list(calls("-"))
SYSTEM = NAMES[0]


def test_the_sentinel_works(tmp_path):
    pickle.loads(pickle.dumps(calls(tmp_path / "ran")[SYSTEM]))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", NAMES)
def test_calls_are_refused_by_name_wherever_they_stand(name, protocol, tmp_path, sentinel):
    call = calls(sentinel)[name]
    refused = rf"asks for {name}: .*nothing in it was run"
    with pytest.raises(FewstepError, match=refused):
        read_pickle(written(tmp_path, pickle.dumps(call, protocol)))
    if protocol == 4:
        module = torch.nn.Dropout()
        module.p = call
        evil = Persistent("EDMPrecond", {"img_resolution": call})
        for place in ([call], {"ema": call}, module, evil, OrderedDict(a=call), {"ema": Persistent("X", args=(call,))}):
            with pytest.raises(FewstepError, match=refused):
                read_edm(written(tmp_path, place))


def test_a_nested_storage_is_held_to_a_shorter_list(tmp_path, sentinel):
    load = torch.storage._load_from_bytes
    evil = calls(sentinel)[SYSTEM]
    plain = pickle.dumps(evil)
    good = storage_bytes([1.0])
    magic = len(pickle.dumps(0x1950A86A20F9469CFC6C, 2))
    later = good[:magic] + plain + good[magic:]
    for data in (plain, later, old_format(evil), old_format({"a": evil})):
        with pytest.raises(FewstepError, match=r"asks for posix\.system"):
            read_pickle(written(tmp_path, pickle.dumps(Call(load, data), 4)))
    for data in (old_format(OrderedDict(a=1)), pickle.dumps(Call(load, good), 4), storage_bytes([1.0], b"torch\nload")):
        with pytest.raises(FewstepError, match=r"asks for (collections|torch)\."):
            read_pickle(written(tmp_path, pickle.dumps(Call(load, data), 4)))
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    for data in (file.getvalue(), b"", old_format(torch.ones(2)), "text", None):
        with pytest.raises(FewstepError):
            read_pickle(written(tmp_path, pickle.dumps(Call(load, data), 4)))


LISTED = b"ctorch._utils\n_rebuild_tensor_v2\n"
DICT = b"ctorch.nn.modules.container\nModuleDict\n"


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (b"(X\x01\x00\x00\x00xios\nsystem\n.", r"os\.system"),  # INST
        (b"(cos\nsystem\nX\x01\x00\x00\x00xo.", r"os\.system"),  # OBJ
        (b"(" + DICT + b"o.", "old-style"),
        (b"(itorch.nn.modules.container\nModuleDict\n.", "old-style"),
        (b"(K\x01o.", "old-style"),
        (b"Pos.system\n.", "persistent id"),
        (b"X\x09\x00\x00\x00os.systemQ.", "persistent id"),
        (b"))tQ.", "no whole pickle|persistent id"),
        (b"\x82\xf0.", "extension code 240"),
        (b"\x83\xf0\x00.", "extension code 240"),
        (b"\x84\xf0\x00\x00\x00.", "extension code 240"),
        (b"\x8c\x1atorch.nn.modules.container\x8c\x13ModuleDict.__init__\x93.", r"ModuleDict\.__init__"),
        (b"\x8c\x0ctorch._utils\x8c\x0cx.y.__dict__\x93.", r"torch\._utils\.x\.y\.__dict__"),
        (b"ctorch\n_utils.os.system\n.", r"torch\._utils\.os\.system"),
        (b"\x8c\x05torchK\x01\x93.", "no whole pickle"),
        (b"cos\x1b[31m\nsystem\n.", r"os\?\[31m\.system"),  # nothing for the terminal
        (LISTED + b"}b.", "no whole pickle"),  # BUILD on an answer
        (LISTED + b"N}X\x08\x00\x00\x00__code__K\x01s\x86b.", "no whole pickle"),  # its slots
        (DICT + b"N}X\x08\x00\x00\x00__init__K\x01s\x86b.", "no whole pickle"),
        (DICT + b")\x81N}X\x04\x00\x00\x00fillK\x01s\x86b.", "no whole pickle"),
        (DICT + b")\x81}X\x08\x00\x00\x00_modulesK\x01sb.", "no whole pickle"),
        (DICT + b"K\x01\x85\x81.", "no whole pickle"),  # arguments of a class of torch.nn
        (DICT + b")}X\x01\x00\x00\x00kK\x01s\x92.", "keyword arguments"),
        (DICT + b"K\x01R.", "no whole pickle"),  # REDUCE with what is no tuple
        (DICT + b")RK\x01\x85R.", "no whole pickle"),  # a call of a module
        (b"K\x01)R.", "no whole pickle"),
        (b"X\x09\x00\x00\x00os.system)R.", "no whole pickle"),
        (b"K\x01)\x81.", "no whole pickle"),
        (LISTED + b")R.", "no whole pickle"),
        (LISTED + b"(K\x01K\x02K\x03K\x04tR.", "no whole pickle"),
        (b"ctorch.storage\n_load_from_bytes\n)R.", "no whole pickle"),
        (b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n}\x85R.", "no class"),
        (b"cnumpy\ndtype\nX\x01\x00\x00\x00O\x85R.", r"numpy\.dtype\(O\)"),
        (b"ccollections\nOrderedDict\n]K\x01a\x85R.", "no whole pickle"),
        (b"ccollections\nOrderedDict\n]))\x86a\x85R.", "neither text nor number"),
        (b"}))s.", "neither text nor number"),
        (b"}](K\x01K\x02us.", "no whole pickle"),
        (b"\x8f()\x90.", "neither text nor number"),
        (b"()\x91.", "no pickle of a model has"),  # FROZENSET
        (b"(d.", "no pickle of a model has"),
        (b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f.", "no pickle of a model has"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "no whole pickle"),  # BINBYTES8 of 2^63 - 1
        (b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.", "no whole pickle"),  # FRAME
        (b"\x80\x09.", "no whole pickle"),
        (b".", "no whole pickle"),
        (b"b.", "no whole pickle"),
        (b"K\x01K\x02b.", "no whole pickle"),
    ],
)
def test_odd_operations_are_refused(code, told, tmp_path, sentinel):
    copyreg.add_extension("os", "system", 240)
    try:
        copyreg._extension_cache[240] = os.system  # as if somebody had loaded it before
        with pytest.raises(FewstepError, match=told):
            read_pickle(written(tmp_path, code))
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg._extension_cache.pop(240, None)


def test_a_huge_memo_index_and_deep_nesting_take_no_memory_and_no_stack(tmp_path):
    assert read_pickle(written(tmp_path, b"K\x07r\xff\xff\xff\x7f.")) == 7
    with pytest.raises(FewstepError, match="holds no network"):
        read_edm(written(tmp_path, b")" + b"\x85" * 200_000 + b"."))
    with pytest.raises(FewstepError, match="neither text nor number"):
        read_pickle(written(tmp_path, b"})" + b"\x85" * 200_000 + b"K\x01s."))


def test_modules_that_contain_themselves_or_unfold(tmp_path):
    loop = torch.nn.ModuleDict()
    loop._modules["model"] = loop
    with pytest.raises(FewstepError, match="nested more than 32"):
        read_pickle(written(tmp_path, loop)).state()
    bomb = torch.nn.Dropout()
    for _ in range(30):
        bomb = torch.nn.ModuleList([bomb, bomb])
    with pytest.raises(FewstepError, match="one module in two places"):
        read_pickle(written(tmp_path, bomb))
    deep = torch.nn.Dropout()
    for _ in range(50):
        deep = torch.nn.ModuleList([deep])
    with pytest.raises(FewstepError, match="nested more than 32"):
        read_pickle(written(tmp_path, deep)).state()


def rebuilt(data, *view):
    return Call(
        torch._utils._rebuild_tensor_v2, Call(torch.storage._load_from_bytes, data), *view, False, OrderedDict()
    )


def test_a_handmade_storage_reads(tmp_path):
    content = rebuilt(storage_bytes([1.0, 2.0, 3.0]), 1, (2,), (1,))
    assert read_pickle(written(tmp_path, pickle.dumps(content, 4))).tolist() == [2.0, 3.0]


LIES = [
    {"count": 3}, {"count": 1}, {"count": -1}, {"count": 1 << 60}, {"stored": 3}, {"count": 3, "stored": 3},
    {"count": 1 << 60, "stored": 1 << 60}, {"keys": b"1"}, {"view": b"K\x01"}, {"kind": b"torch\nDoubleStorage"},
]  # fmt: skip
VIEWS = [  # offset, size, stride in a storage of two numbers
    (0, (3,), (1,)), (2, (1,), (1,)), (0, (2, 2), (1, 1)), (0, (1 << 40,), (0,)), (0, (2,), (1 << 50,)),
    (1, (2,), (-1,)), (-1, (1,), (1,)), (0, (-1,), (1,)), (0, (2,), (1, 1)), (0, (1.0,), (1,)), (0, [2], [1]),
    (0, (True,), (1,)), (1 << 70, (1,), (1,)), (0, (1 << 61, 0, 1 << 61), (1, 1, 1)), (None, (1,), (1,)),
]  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_storages_that_lie_about_their_size(lie, tmp_path):
    content = rebuilt(storage_bytes([1.0, 2.0], **lie), 0, (1,), (1,))
    with pytest.raises(FewstepError, match="no whole pickle"):
        read_pickle(written(tmp_path, pickle.dumps(content, 4)))


@pytest.mark.parametrize("view", VIEWS)
def test_views_beyond_their_storage(view, tmp_path):
    with pytest.raises(FewstepError, match="no whole pickle"):
        read_pickle(written(tmp_path, pickle.dumps(rebuilt(storage_bytes([1.0, 2.0]), *view), 4)))
