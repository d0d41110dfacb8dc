"""Banks of checkpoints: the combination is the formula, to each storage's accuracy, and what is not as it was is refused."""

import json
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.model import load
from fewstep.snapshots import (
    Bank,
    checkpoint_files,
    estimate_bytes,
    exact,
    read_checkpoint,
    weights_hash,
    write,
)
from fewstep.snapshots.products import BLOCK, CPU_CHUNK, encode, multiply
from fewstep.types import FewstepError

K = 7
SHAPES = {"a.weight": (40, 30), "a.bias": (40,), "b.scale": (), "c.weight": (9, 5, 3, 3), "empty": (0, 4)}


def trajectory(k=K, seed=0, shapes=SHAPES, dtype=torch.float32):
    """State dicts of a drifting random walk: relative differences of 1e-2 to 1e-1, one tensor that never moves."""
    g = torch.Generator().manual_seed(seed)
    start = {n: torch.randn(s, generator=g) * 0.1 for n, s in shapes.items()}
    drift = {n: torch.randn(s, generator=g) * 0.002 for n, s in shapes.items()}
    walk = {n: torch.zeros(s) for n, s in shapes.items()}
    made = []
    for i in range(k):
        walk = {n: w + 0.001 * torch.randn(w.shape, generator=g) for n, w in walk.items()}
        tensors = {n: (start[n] + i * drift[n] + walk[n]).to(dtype) for n in shapes}
        tensors["still"] = torch.tensor([1.5, -0.0, 0.0, -3e-5], dtype=dtype)
        tensors["norm.running_var"] = torch.rand(4, generator=g)
        tensors["norm.num_batches_tracked"] = torch.tensor(10 * i)
        tensors["mask"] = torch.tensor([True, i % 2 == 0, False])
        made.append(tensors)
    return made


def saved(folder, states, ours=True):
    """Files of the state dicts, as fewstep snapshots or as foreign safetensors."""
    folder.mkdir(exist_ok=True, parents=True)
    files = [folder / f"{10 * i:012d}.safetensors" for i in range(len(states))]
    for i, (file, tensors) in enumerate(zip(files, states, strict=True)):
        if ours:
            write(file, tensors, {"model": {"nimg": 100 * i, "weights": "online"}, "best": {}})
        else:
            save_file(tensors, file)
    return files


def signed(m, k, seed=0, largest=6.0):
    """Coefficients of either sign whose largest magnitude is 6, in rows that sum to 1."""
    g = torch.Generator().manual_seed(seed)
    c = torch.randn(m, k, generator=g, dtype=torch.float64)
    c = c - c.mean(1, keepdim=True)
    c = c / c.abs().amax(1, keepdim=True) * (largest - 1)
    return c + 1 / k


def vertex(i, k=K):
    return torch.eye(k, dtype=torch.float64)[i : i + 1]


def by_hand(states, c):
    """theta(c) in float64 as the paper writes it, sum_i c_i theta_i."""
    names = [*sorted(SHAPES), "still"]
    return {n: sum(w * s[n].double() for w, s in zip(c.tolist(), states, strict=True)) for n in names}


def bits(tensors):
    return {
        n: (t.dtype, tuple(t.shape), t.contiguous().reshape(-1).view(torch.uint8).tolist()) for n, t in tensors.items()
    }


@pytest.fixture
def states():
    return trajectory()


@pytest.fixture
def files(tmp_path, states):
    return saved(tmp_path / "run", states)


def built(files, tmp_path, storage="fp32", **options):
    return Bank.build(files, tmp_path / "bank.safetensors", storage, quiet=True, **options)


# ---------------------------------------------------------------------------------------------------- combinations

# Relative to float64, for coefficients up to 6 in magnitude, on the trajectory above.
ACCURACY = {"fp32": 1e-7, "bf16": 1.5e-3, "int8": 8e-3}


@pytest.mark.parametrize("storage", ACCURACY)
def test_combine_is_the_papers_sum(tmp_path, states, files, storage):
    bank, c = built(files, tmp_path, storage), signed(5, K)
    for row, flat in zip(c, bank.combine(c), strict=True):
        made, true = bank.tensors(flat), by_hand(states, row)
        off = sum((made[n].double() - t).square().sum() for n, t in true.items()).sqrt()
        assert off < ACCURACY[storage] * sum(t.square().sum() for t in true.values()).sqrt()


def test_exact_is_the_papers_sum_in_float64_and_the_tensors_dtype(states, files, tmp_path):
    bank, c = built(files, tmp_path, "int8"), signed(1, K)[0]
    made = bank.exact(c)
    assert made.keys() == states[0].keys()
    for name, true in by_hand(states, c).items():
        torch.testing.assert_close(made[name], true.float(), rtol=1e-6, atol=1e-7)
    again = exact([s.path for s in bank.sources], [s.sha256 for s in bank.sources], c)
    assert weights_hash(again) == weights_hash(made)


@pytest.mark.parametrize("storage", ACCURACY)
def test_the_last_checkpoint_is_exact_and_what_never_moves_stays_to_the_bit(tmp_path, states, files, storage):
    bank = built(files, tmp_path, storage)
    assert bits(bank.tensors(bank.combine(vertex(K - 1))[0])) == bits(states[-1])
    assert bits(bank.exact(vertex(K - 1)[0])) == bits(states[-1])
    c = signed(3, K)
    for row, flat in zip(c, bank.combine(c), strict=True):
        for made in (bank.tensors(flat), bank.exact(row)):
            assert bits({"still": made["still"]}) == bits({"still": states[0]["still"]})


def test_vertices_give_back_the_checkpoints(tmp_path, states, files):
    bank = built(files, tmp_path)
    for i in range(K):
        flat, made = bank.combine(vertex(i))[0], bank.exact(vertex(i)[0])
        for name in SHAPES:
            torch.testing.assert_close(bank.tensors(flat)[name], states[i][name], rtol=0, atol=1e-7)
            assert torch.equal(made[name], states[i][name])  # differences of two float32 are exact in float64 here


def test_what_is_no_weight_is_copied_from_the_last(tmp_path, states, files):
    bank = built(files, tmp_path)
    names = {"norm.running_var", "norm.num_batches_tracked", "mask"}
    assert bank.copied.keys() == names
    assert {entry.name for entry in bank.entries} == {*SHAPES, "still"}
    for made in (bank.tensors(bank.combine(signed(1, K))[0]), bank.exact(signed(1, K)[0])):
        assert all(torch.equal(made[name], states[-1][name]) for name in names)
        assert {n: (t.dtype, t.shape) for n, t in made.items()} == {n: (t.dtype, t.shape) for n, t in states[0].items()}


def test_half_and_double_precision_sources(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        states = trajectory(dtype=dtype)
        bank, c = built(saved(tmp_path / str(dtype), states), tmp_path), signed(1, K)
        made, flat = bank.exact(c[0]), bank.tensors(bank.combine(c)[0])
        for name, true in by_hand(states, c[0]).items():
            assert torch.equal(made[name], true.to(dtype)) or dtype == torch.float64
            torch.testing.assert_close(
                made[name].double(), true, rtol=1e-2 if dtype.itemsize == 2 else 1e-12, atol=1e-12
            )
            torch.testing.assert_close(flat[name].double(), true, rtol=0, atol=1e-6)


@pytest.mark.parametrize("storage", ACCURACY)
def test_rows_do_not_depend_on_which_are_kept_or_on_threads(tmp_path, storage):
    states = trajectory(3, shapes={"w": (CPU_CHUNK + 777,)})
    bank, c = built(saved(tmp_path / "run", states), tmp_path, storage), signed(4, 3)
    whole = bank.combine(c)
    assert torch.equal(bank.combine(c, rows=[2, 0]), whole[[2, 0]])
    assert bank.combine(c, rows=[]).shape == (0, bank.size)
    out = torch.full((4, bank.size), float("nan"))
    assert bank.combine(c, out=out) is out
    assert torch.equal(out, whole)
    exactly, threads = weights_hash(bank.exact(c[0])), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(bank.combine(c), whole)
        assert weights_hash(bank.exact(c[0])) == exactly
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for wrong in (torch.empty(3, bank.size), torch.empty(4, bank.size, dtype=torch.float64)):
        with pytest.raises(FewstepError, match="out must be float32"):
            bank.combine(c, out=wrong)


def test_a_bank_keeps_its_combinations_when_moved(tmp_path, files):
    bank, c = built(files, tmp_path), signed(2, K)
    assert torch.equal(bank.to("cpu").combine(c), bank.combine(c))


@pytest.mark.gpu
@pytest.mark.parametrize("storage", ACCURACY)
def test_cuda_combines_as_the_cpu_does_there_or_in_a_stream(tmp_path, files, storage):
    bank, c = built(files, tmp_path, storage), signed(3, K)
    there = bank.to("cuda")
    streamed = replace(there, deltas=bank.deltas)
    for other in (there, streamed):
        torch.testing.assert_close(other.combine(c).cpu(), bank.combine(c), rtol=0, atol=1e-6)
        assert torch.equal(other.combine(c, rows=[1]), other.combine(c)[1:2])
        torch.testing.assert_close(other.gram(), bank.gram(), rtol=1e-4, atol=1e-8)


def test_gram_holds_the_inner_products_of_the_differences(tmp_path, states, files):
    bank = built(files, tmp_path)
    rows = torch.stack([torch.cat([s[e.name].double().reshape(-1) for e in bank.entries]) for s in states])
    torch.testing.assert_close(bank.gram(), (rows - rows[-1]) @ (rows - rows[-1]).T, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("m", "k", "w"), [(1, 1, 1), (16, 100, 1500), (200, 100, 130), (3, 7, 512), (0, 7, 600)])
def test_products_in_blocks_of_columns(m, k, w):
    g = torch.Generator().manual_seed(0)
    rows, chunk, out = torch.randn(m, k, generator=g), torch.randn(k, w, generator=g), torch.empty(m, w)
    multiply(rows, chunk, out)
    torch.testing.assert_close(out.double(), rows.double() @ chunk.double(), rtol=0, atol=1e-4)


def test_int8_is_within_half_a_step_of_each_block():
    row = torch.randn(3 * BLOCK + 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 0, 3 * BLOCK + 5)
    row[BLOCK : 2 * BLOCK] = 0
    values, scales = encode(row, "int8")
    for i, block in enumerate(row.split(BLOCK)):
        stored = values[i * BLOCK : (i + 1) * BLOCK].float() * scales[i]
        assert (stored - block).abs().max() <= block.abs().max() / 127 * 0.5001


def test_coefficients_that_make_no_weights_are_refused(tmp_path, files):
    bank = built(files, tmp_path)
    good = signed(2, K)
    for wrong, words in {
        "sum to 1, these sum to 1.0001": good + torch.tensor([[0.0], [1e-4 / K]]).double() * torch.ones(K),
        "7 checkpoints": good[:, 1:],
        "not finite": good.clone().fill_(float("nan")),
    }.items():
        with pytest.raises(FewstepError, match=wrong):
            bank.combine(words)
        with pytest.raises(FewstepError, match=wrong):
            bank.exact(words[-1])
    bank.combine(good + 1e-8)  # rounding is none of the user's business


# -------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("storage", ACCURACY)
def test_the_file_is_valid_safetensors_of_the_size_told(tmp_path, states, files, storage):
    bank = built(files, tmp_path, storage, batch=128)
    plain = load_file(bank.path)
    assert plain["deltas"].shape == (K, bank.size)
    assert {n.removeprefix("copied.") for n in plain} - {"base", "deltas", "scales", "padding"} == bank.copied.keys()
    assert torch.equal(plain["base"], torch.cat([states[-1][e.name].reshape(-1) for e in bank.entries]))
    header = int.from_bytes(bank.path.read_bytes()[:8], "little")
    copied = sum(t.nbytes for t in bank.copied.values())
    assert bank.nbytes == 8 + header + copied + len(plain["padding"]) + estimate_bytes(K, bank.size, storage)
    assert bank.deltas.values.data_ptr() % 2 == 0
    assert (len(bank), bank.batch, bank.storage) == (K, 128, storage)
    assert bank.nimg == tuple(range(0, 100 * K, 100))
    assert [(s.path, s.sha256, s.weights) for s in bank.sources] == [
        (str(f), weights_hash(s), "online") for f, s in zip(files, states, strict=True)
    ]
    assert bank.header["model"]["nimg"] == 100 * (K - 1)
    bank.check()
    bank.verify()


@pytest.mark.parametrize("storage", ACCURACY)
def test_a_flipped_bit_in_the_bank_is_noticed(tmp_path, storage):
    """All but the padding is under a checksum; a flip in safetensors' own table that reads at all reads the same."""
    path = built(saved(tmp_path / "run", trajectory(2)), tmp_path, storage).path
    whole, same, silent = path.read_bytes(), sorted(map(str, bits(load_file(path)).values())), []
    start = 8 + int.from_bytes(whole[:8], "little")
    padding = range(*(start + place for place in json.loads(whole[8:start])["padding"]["data_offsets"]))
    for place in [*range(0, 8 * start, 101), *range(8 * start, 8 * len(whole), 1999)]:
        broken = bytearray(whole)
        broken[place // 8] ^= 1 << place % 8
        path.write_bytes(broken)
        with suppress(FewstepError):
            Bank.open(path).check()
            silent += [place // 8] * (place // 8 >= start)
            assert place // 8 >= start or sorted(map(str, bits(load_file(path)).values())) == same
    assert [place for place in silent if place not in padding] == []


def test_opening_what_is_no_bank(tmp_path, files):
    with pytest.raises(FewstepError, match="is not a bank"):
        Bank.open(files[0])
    with pytest.raises(FewstepError, match="does not exist"):
        Bank.open(tmp_path / "none.safetensors")
    bank = built(files, tmp_path)
    with pytest.raises(FewstepError, match="not a fewstep snapshot"):
        load(bank.path)
    bank.path.write_bytes(bank.path.read_bytes()[:-100])
    with pytest.raises(FewstepError, match=r"damaged.*build the bank again"):
        Bank.open(bank.path)


# ------------------------------------------------------------------------------------------------------ the sources


def test_altered_or_missing_sources_are_found(tmp_path, states, files):
    bank = built(files, tmp_path)
    write(files[2], states[3], {"model": {"nimg": 200, "weights": "online"}})
    files[4].unlink()
    with pytest.raises(
        FewstepError, match=r"(?s)2 of 7 sources.*build the bank again.*020.safetensors was.*040.* not exist"
    ):
        bank.verify()
    for i, words in ((2, "was altered"), (4, "does not exist")):
        with pytest.raises(FewstepError, match=words):
            bank.exact((vertex(i) + vertex(K - 1))[0] / 2)
    bank.exact((vertex(0) + vertex(K - 1))[0] / 2)  # those of coefficient 0 take no part
    assert torch.isfinite(bank.combine(signed(1, K))).all()
    bank.check()


def test_checkpoints_of_different_networks_are_refused_with_a_table(tmp_path, states):
    states[1]["a.bias"] = torch.zeros(41)
    states[2] = {n: t for n, t in states[2].items() if n != "mask"}
    states[3]["more"] = torch.zeros(2)
    states[4]["a.weight"] = states[4]["a.weight"].half()
    files = saved(tmp_path / "run", states)
    with pytest.raises(FewstepError) as caught:
        built(files, tmp_path)
    rows = [line.split("  ") for line in str(caught.value).split("\n  ")[2:]]
    assert rows == [
        [files[1].name, "a.bias", "float32[41]", "float32[40]"],
        [files[2].name, "mask", "missing", "bool[3]"],
        [files[3].name, "more", "float32[2]", "missing"],
        [files[4].name, "a.weight", "float16[40, 30]", "float32[40, 30]"],
    ]
    save_file({"other": torch.ones(1)}, files[5])
    with pytest.raises(FewstepError, match=f"and {4 + 1 + len(states[0]) - 8} more$"):
        built(files, tmp_path)
    assert not (tmp_path / "bank.safetensors").exists()


def test_what_cannot_be_banked_is_refused_and_nothing_is_left(tmp_path, states, monkeypatch):
    files = saved(tmp_path / "run", states)
    with pytest.raises(FewstepError, match="at least 2"):
        built(files[:1], tmp_path)
    for bad in (float("nan"), float("inf")):
        states[3]["c.weight"][1, 2, 0, 0] = bad
        saved(tmp_path / "run", states)
        with pytest.raises(FewstepError, match=r"030.safetensors: c.weight is not finite"):
            built(files, tmp_path)
    save_file({"n": torch.ones(3, dtype=torch.int64)}, tmp_path / "int.safetensors")
    with pytest.raises(FewstepError, match="nothing to combine"):
        built([tmp_path / "int.safetensors"] * 2, tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(FewstepError, match=r"needs 0.0 GB and .* has 0.0 GB free"):
        built(files[:2], tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"run", "int.safetensors"}


def test_a_damaged_checkpoint_is_noticed_while_building(tmp_path, states):
    files = saved(tmp_path / "run", states)
    broken = bytearray(files[1].read_bytes())
    broken[-5] ^= 1
    files[1].write_bytes(broken)
    with pytest.raises(FewstepError, match=r"010.safetensors is damaged"):
        built(files, tmp_path)


def test_foreign_files_combine_as_ours_do(tmp_path, states):
    """Plain safetensors, PyTorch archives of three layouts, diffusers folders of one file and of shards."""
    ours = built(saved(tmp_path / "ours", states), tmp_path)
    c = signed(2, K)
    same = ours.combine(c)
    kinds = {
        "plain": lambda path, s: save_file(s, f"{path}.safetensors") or f"{path}.safetensors",
        "flat": lambda path, s: archive(f"{path}.pt", s),
        "nested": lambda path, s: archive(f"{path}.pth", {"state_dict": s, "epoch": 3, "args": {"lr": 0.1}}),
        "old": lambda path, s: archive(f"{path}.ckpt", {"ema": s}, _use_new_zipfile_serialization=False),
        "diffusers": lambda path, s: diffusers(path, s, 1),
        "sharded": lambda path, s: diffusers(path, s, 2),
    }
    for kind, make in kinds.items():
        (tmp_path / kind).mkdir()
        files = [make(tmp_path / kind / f"step{i}", s) for i, s in enumerate(states)]
        bank = Bank.build(files, tmp_path / f"{kind}.safetensors", "fp32", quiet=True)
        assert torch.equal(bank.combine(c), same), kind
        assert bank.header == {}
        assert bank.nimg == tuple(range(K))
        assert [s.sha256 for s in bank.sources] == [s.sha256 for s in ours.sources]
        assert weights_hash(bank.exact(c[0])) == weights_hash(ours.exact(c[0]))


def archive(path, content, **options):
    torch.save(content, path, **options)
    return path


def diffusers(path, tensors, shards):
    path.mkdir()
    (path / "config.json").write_text("{}")
    stem, names = "diffusion_pytorch_model", sorted(tensors)
    for k in range(shards):
        part = f"-{k + 1:05d}-of-{shards:05d}" * (shards > 1)
        save_file({n: tensors[n] for n in names[k::shards]}, path / f"{stem}{part}.safetensors")
    if shards > 1:
        table = {n: f"{stem}-{k + 1:05d}-of-{shards:05d}.safetensors" for k in range(shards) for n in names[k::shards]}
        (path / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return path


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_archives_that_do_not_hold_one_dict_of_tensors_are_refused(tmp_path):
    w = {"w": torch.ones(2)}
    for name, content, words in (
        ("trap", {"w": torch.ones(2), "x": Trap(tmp_path / "sprung")}, "more than tensors"),
        ("two", {"model": w, "ema": w}, "it has model, ema"),
        ("none", {"a": 1}, "it has none"),
        ("bare", torch.ones(2), "it has none"),
    ):
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(FewstepError, match=words):
            read_checkpoint(tmp_path / f"{name}.pt")
    (tmp_path / "text.pt").write_text("hello")
    shutil.copy(tmp_path / "two.pt", tmp_path / "disguised.safetensors")
    write(tmp_path / "state.safetensors", w, {"state": {"nimg": 1}})
    for name, words in {
        "text.pt": "pt",
        "disguised.safetensors": "is a pickle",
        "state.safetensors": "training state",
    }.items():
        with pytest.raises(FewstepError, match=words):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_which_checkpoints_the_arguments_mean(tmp_path, states):
    run = saved(tmp_path / "run" / "snapshots", states)
    (tmp_path / "run" / "recipe.json").write_text("{}")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for step in (1, 2, 10, 20, 3):
        archive(foreign / f"step{step}.pt", states[0])
    (foreign / "notes.txt").write_text("")
    folder = diffusers(tmp_path / "pipe", states[0], 1)
    assert checkpoint_files([tmp_path / "run"]) == run
    assert [p.stem for p in checkpoint_files([str(foreign)])] == ["step1", "step2", "step3", "step10", "step20"]
    assert checkpoint_files([run[3], folder, run[1]]) == [run[3], folder, run[1]]
    assert checkpoint_files([tmp_path / "run"], 100, 400) == run[1:5]
    assert checkpoint_files([tmp_path / "run"], last_nimg=500, every=2) == run[1:6:2]
    assert checkpoint_files([tmp_path / "run"], every=3) == run[::3]
    assert checkpoint_files([tmp_path / "run"], every=4) == [run[2], run[6]]
    for sources, limits, words in (
        ([tmp_path / "none"], {}, "does not exist"),
        ([run[0]], {}, "at least 2"),
        ([], {}, "give a run directory, or checkpoint files"),
        ([foreign / f"step{i}.pt" for i in (1, 10, 2)], {}, "the shell's order"),
        ([tmp_path / "run"], {"first_nimg": 600}, "1 checkpoint"),
        ([foreign], {"first_nimg": 1}, "does not tell its images seen"),
        ([folder, run[1]], {"last_nimg": 10**9}, "does not tell its images seen"),
        ([tmp_path / "run"], {"every": 0}, "--every"),
        ([tmp_path], {}, "holds no checkpoint"),
    ):
        with pytest.raises(FewstepError, match=words):
            checkpoint_files(sources, **limits)
