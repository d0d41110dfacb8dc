"""Snapshots and models on disk: what is written comes back, and whatever is not that is refused in one line."""

import json
import os
import pickle
import struct
import zipfile
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import codec
from fewstep.ema import ConstantEMA, PowerEMA
from fewstep.files import write_json
from fewstep.model import ModelInfo, find, load, load_weights, save_model, store_second_sigma
from fewstep.networks import MLP, Architecture
from fewstep.recipes.ect import ect
from fewstep.samplers import FewStep, Heun
from fewstep.snapshots import format as snapshot
from fewstep.types import FewstepError

INFO = ModelInfo(Architecture(MLP(8, 2), (1, 2, 2), 3), "consistency", class_names=("zero", "1", "éa"), nimg=7)


def tensors():
    g = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 4, generator=g),
        "half": torch.randn(5, generator=g).bfloat16(),
        "count": torch.tensor([2**40, -1]),
        "scalar": torch.tensor(0.5),
        "step": torch.tensor(3, dtype=torch.int64),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
        "rows": torch.arange(6.0).reshape(2, 3).t(),  # not contiguous
    }


def bits(t):
    return t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist()


def write(path, header=None):
    return snapshot.write(path, tensors(), {"x": 1} if header is None else header)


def test_round_trip_of_every_kind_of_tensor(tmp_path):
    digest = write(tmp_path / "a.safetensors", {"x": [1, {"y": "é\n\u2028\\"}]})
    stored = snapshot.read(tmp_path / "a.safetensors")
    assert {n: bits(t) for n, t in stored.tensors.items()} == {n: bits(t) for n, t in tensors().items()}
    assert stored.header == {"x": [1, {"y": "é\n\u2028\\"}], "weights_sha256": digest}
    assert stored.weights_sha256 == digest == snapshot.weights_hash(tensors())
    assert snapshot.read_header(tmp_path / "a.safetensors") == stored.header
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_no_tensors_at_all(tmp_path):
    snapshot.write(tmp_path / "a.safetensors", {}, {})
    assert snapshot.read(tmp_path / "a.safetensors").tensors == {}


def test_the_same_content_is_the_same_bytes(tmp_path):
    """safetensors keeps its metadata in a hash map that is ordered at random: several keys would differ from file to file."""
    for k in range(12):
        snapshot.write(tmp_path / str(k), dict(reversed(tensors().items())) if k % 2 else tensors(), {"a": 1, "b": 2})
    assert len({(tmp_path / str(k)).read_bytes() for k in range(12)}) == 1


def test_the_weights_hash_sees_name_dtype_shape_and_bits_but_no_order():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {**base, "a": torch.zeros(3, 2)},
        {**base, "a": torch.zeros(2, 3, dtype=torch.int32)},
        {**base, "a": torch.tensor([[0.0, 0, 0], [0, 0, -0.0]])},
        {"a": base["a"]},
    ]
    assert len({snapshot.weights_hash(t) for t in [base, *others]}) == 6
    assert snapshot.weights_hash(dict(reversed(base.items()))) == snapshot.weights_hash(base)


# -------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("stride", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_a_file_is_noticed(tmp_path, stride):
    """Header length, JSON with its padding, our header, data: nothing is silent, and nothing but FewstepError."""
    path = tmp_path / "a.safetensors"
    write(path)
    whole = path.read_bytes()
    silent = []
    for place in range(0, len(whole) * 8, stride):
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        with suppress(FewstepError):
            snapshot.read(path)
            silent.append(place)
    assert silent == []


def test_flips_in_the_padding(tmp_path):
    """The only bytes that no checksum covers are the spaces after the JSON, and safetensors wants them to be white.

    One flipped bit of a space is no white space; two may be (a tab), and then the content is what it was.
    """
    path, most = tmp_path / "a.safetensors", b""
    for extra in range(8):
        snapshot.write(path, {"a": torch.ones(1)}, {"x": "." * extra})
        header = path.read_bytes()[:-4]
        most = max(most, header, key=lambda h: len(h) - len(h.rstrip()))
    places = range(len(most.rstrip()), len(most))
    assert len(places) == 7
    for place in places:
        for mask in (m for m in range(1, 256) if m.bit_count() == 1 or (m.bit_count() == 2 and place % 3 == 0)):
            path.write_bytes(most[:place] + bytes([most[place] ^ mask]) + most[place + 1 :] + struct.pack("<f", 1.0))
            if most[place] ^ mask in b"\t\r\n":
                assert snapshot.read(path).tensors["a"] == 1
            else:
                with pytest.raises(FewstepError):
                    snapshot.read(path)


def test_every_truncation_and_any_appendix_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path)
    whole = path.read_bytes()
    for broken in [
        *(whole[:n] for n in (*range(20), *range(20, len(whole), 17), len(whole) - 1)),
        whole + b"\0",
        whole + whole,
        b"\0" * 8,
        b"\0" * 4096,
    ]:
        path.write_bytes(broken)
        with pytest.raises(FewstepError):
            snapshot.read(path)
        with pytest.raises(FewstepError):
            load(path)


def test_files_of_other_kinds_are_refused_by_what_they_are(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    files = {}
    for protocol in range(6):
        files[f"p{protocol}.safetensors"] = pickle.dumps({"w": Trap()}, protocol)
    files["old.pkl"] = pickle.dumps(Trap(), 0)
    torch.save({"w": torch.ones(2)}, tmp_path / "torch.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "torch.ckpt")
    torch.save({"w": torch.ones(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    save_file({"w": torch.ones(2)}, tmp_path / "foreign.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "pt.safetensors", metadata={"format": "pt"})
    with zipfile.ZipFile(tmp_path / "zip.safetensors", "w") as archive:
        archive.writestr("a", "b")
    files |= {
        "empty.safetensors": b"",
        "text.safetensors": b"hello, I am a text\n" * 9,
        "x.png": b"\x89PNG\r\n\x1a\n" * 9,
    }
    files["json.safetensors"] = json.dumps(codec.encode(ect())).encode()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    pickles = {"torch.safetensors", "old.safetensors", "zip.safetensors"}
    told = {"foreign": "not a fewstep", "pt": "not a fewstep", "torch": "does not say what network", "old": "asks for"}
    pickles |= {f"p{k}.safetensors" for k in range(2, 6)}
    for path in [p for p in tmp_path.iterdir() if p.is_file()]:
        with pytest.raises(FewstepError) as caught:
            load(path)
        words = "is a pickle" if path.name in pickles else told.get(path.stem, "damaged")
        assert words in str(caught.value), (path.name, str(caught.value))
    assert not (tmp_path / "sprung").exists()


def test_a_sound_file_whose_length_begins_like_a_pickle_is_read(tmp_path):
    """The first byte of a safetensors file is the low byte of its header's length: 0x80, a pickle's first, in 1 of 32."""
    path, lengths = tmp_path / "a.safetensors", set()
    for n in range(0, 256, 8):
        snapshot.write(path, {"a": torch.ones(1)}, {"x": "." * n})
        lengths.add(path.read_bytes()[0])
        assert snapshot.read(path).tensors["a"] == 1
    assert lengths == set(range(0, 256, 8))


# --------------------------------------------------------------------------------------------------------- models


def saved(path, info=INFO, seed=0):
    net = info.architecture.build(seed)
    return net, save_model(path, net.state_dict(), info)


def test_a_model_comes_back_as_it_was(tmp_path):
    info = replace(INFO, best={"nimg": 7, "record": {"value": 1.5}}, initialised_from="abc", weights="ema-0.9")
    net, digest = saved(tmp_path / "m.safetensors", info)
    model = load(tmp_path / "m.safetensors")
    assert model.info == info
    assert model.sha256 == digest
    assert not model.denoiser.training
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    x, t, label = torch.randn(4, 1, 2, 2), torch.full((4,), 2.0), torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(model(x, t, label), net.eval()(x, t, label).detach(), rtol=0, atol=0)


def test_storing_a_second_sigma_changes_nothing_else(tmp_path):
    saved(tmp_path / "m.safetensors")
    model = load(tmp_path / "m.safetensors")
    store_second_sigma(model, 1.25)
    again = load(tmp_path / "m.safetensors")
    assert again.info == replace(INFO, second_sigma=1.25)
    assert again.sha256 == model.sha256
    assert again.info.sampler(2) == FewStep((80.0, 1.25))


def test_a_model_samples_in_its_own_way():
    assert isinstance(replace(INFO, kind="diffusion").sampler(18), Heun)
    assert INFO.sampler(1) == FewStep((80.0,))
    with pytest.raises(FewstepError, match="--steps"):
        INFO.sampler(0)


def test_labels_by_name_then_by_number():
    assert [INFO.label(x) for x in (None, "zero", "éa", "1", 0, "2", 2)] == [None, 0, 2, 1, 0, 2, 2]
    for wrong in ("3", 3, "-1", "nine", "", "²"):
        with pytest.raises(FewstepError, match="zero, 1, éa"):
            INFO.label(wrong)
    with pytest.raises(FewstepError, match="unconditional"):
        replace(INFO, architecture=replace(INFO.architecture, num_classes=0)).label(0)


def test_another_architecture_is_refused_naming_what_differs(tmp_path):
    net, _ = saved(tmp_path / "m.safetensors")
    for other, words in {
        MLP(16, 2): r"network.first.weight is \(8, 13\), needed \(16, 13\)",
        MLP(8, 3): r"network.rest.5.weight missing",
    }.items():
        own = replace(INFO.architecture, network=other).build()
        before = {n: t.clone() for n, t in own.state_dict().items()}
        with pytest.raises(FewstepError, match=words) as caught:
            load_weights(own, net.state_dict(), "SOURCE")
        assert str(caught.value).startswith("SOURCE is another architecture")
        assert all(torch.equal(before[n], t) for n, t in own.state_dict().items())
    unconditional = replace(INFO.architecture, num_classes=0).build()
    with pytest.raises(FewstepError, match=r"1 of 6 tensors differ: network.label.weight unexpected"):
        load_weights(unconditional, net.state_dict(), "SOURCE")


def test_a_file_that_lies_about_its_architecture_is_refused(tmp_path):
    net = INFO.architecture.build()
    info = replace(INFO, architecture=replace(INFO.architecture, network=MLP(16, 2)))
    save_model(tmp_path / "m.safetensors", net.state_dict(), info)
    with pytest.raises(FewstepError, match="another architecture"):
        load(tmp_path / "m.safetensors")


def test_models_of_other_versions_are_refused_in_one_line(tmp_path):
    net = INFO.architecture.build()
    good = {k: codec.encode(v) for k, v in vars(INFO).items() if k != "best"}
    foreign = {"is": "os:system", "command": "touch " + str(tmp_path / "sprung")}
    for change, words in [
        ({"novelty": 1}, "novelty"),
        ({"architecture": foreign}, "os is not part of fewstep"),
        ({"architecture": {"is": "fewstep.networks:Nothing"}}, "unknown to this version"),
    ]:
        snapshot.write(tmp_path / "m.safetensors", net.state_dict(), {"model": {**good, **change}})
        with pytest.raises(FewstepError, match=words) as caught:
            load(tmp_path / "m.safetensors")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_a_training_state_is_no_model(tmp_path):
    snapshot.write(tmp_path / "state.safetensors", {"model/w": torch.ones(1)}, {"state": {"nimg": 1}})
    with pytest.raises(FewstepError, match="holds a training state, not a model"):
        load(tmp_path / "state.safetensors")


def test_what_a_model_argument_finds(tmp_path):
    run = tmp_path / "a:b"
    with pytest.raises(FewstepError, match="does not exist"):
        load(run)
    with pytest.raises(FewstepError, match="does not exist"):
        load(f"{run}:online")
    run.mkdir()
    for text in (run, f"{run}:online", f"{run}:nonsense"):
        with pytest.raises(FewstepError, match="holds no model"):
            load(text)
    recipe = replace(ect(), averages=(PowerEMA(0.05), ConstantEMA(0.99), PowerEMA(0.01)))
    write_json(run / "recipe.json", codec.encode(recipe))
    for name in ("snapshots/000000000010", "snapshots/000000000200"):
        saved(run / f"{name}.safetensors")
    assert find(run).name == "000000000200.safetensors"
    with pytest.raises(FewstepError, match=r"has no weights called 'ema-0.99': it has online"):
        find(f"{run}:ema-0.99")
    for name in ("ema-0.99", "power-0.01", "power-0.05"):
        saved(run / f"averages/{name}.safetensors")
    stale = run / "averages" / ".power-0.001.safetensors.77.part"
    stale.mkdir()
    (stale / "power-0.001.safetensors").write_bytes(b"half")
    (run / "snapshots" / ".000000000300.safetensors.77.part").mkdir()
    assert find(run).stem == "power-0.05"  # the recipe's first, not the alphabet's
    assert find(f"{run}:ema-0.99").stem == "ema-0.99"
    assert find(f"{run}:online").name == "000000000200.safetensors"
    with pytest.raises(
        FewstepError, match=r"no weights called 'nonsense': it has power-0.05, ema-0.99, power-0.01, online"
    ):
        find(f"{run}:nonsense")
    saved(run / "averages/best.safetensors", replace(INFO, weights="power-0.01"))
    assert load(run).info.weights == "power-0.01"
    assert load(str(run)).path == run / "averages/best.safetensors"
    assert load(run / "snapshots/000000000010.safetensors").info.nimg == 7
    (run / "recipe.json").unlink()
    (run / "averages/best.safetensors").unlink()
    assert find(run).stem == "ema-0.99"


def test_the_file_is_plain_safetensors_for_everyone_else(tmp_path):
    net, digest = saved(tmp_path / "m.safetensors")
    plain = load_file(tmp_path / "m.safetensors")
    assert snapshot.weights_hash(plain) == digest
    assert plain.keys() == net.state_dict().keys()
    assert len(bytes.fromhex(digest)) == 32
