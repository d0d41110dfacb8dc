"""Latents: the posterior is what is cached, whatever stops the work; statistics are the samples'; nothing is guessed."""

import json
import os
import pickle
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import api, codec
from fewstep.cli import main
from fewstep.data import DataSpec, Images, LatentSpace, Prepare, open_images, originals, preparation, to_float, to_uint8
from fewstep.data.latent_space import check_scale
from fewstep.data.prepare import Latents, Pixels, flips
from fewstep.encoding import Encoding, encode
from fewstep.evaluation import Generator, reference_of
from fewstep.fitness import generator
from fewstep.interrupts import Interrupted
from fewstep.latent_statistics import Moments
from fewstep.latents import decoder, load_vae, loaded
from fewstep.metrics import load_extractor
from fewstep.model import Model, ModelInfo, check_latents, load, save_model
from fewstep.networks import MLP, Architecture
from fewstep.noise import NoiseStream, step_seed
from fewstep.objectives import EDM, Denoising, Diffusion, LogNormal, PairObjective, SquaredL2
from fewstep.recipe import Evaluation, Recipe
from fewstep.run import train
from fewstep.samplers import FewStep, few_step
from fewstep.snapshots import format as snapshot
from fewstep.types import FewstepError

N, SIDE, SHAPE = 30, 8, (4, 4, 4)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr("fewstep.rundir.environment", lambda device: {"device": device})
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def autoencoder(path: Path, seed: int = 0, **options) -> str:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4, **options,
        )  # fmt: skip
    vae.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def vae(tmp_path_factory) -> str:
    return autoencoder(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> str:
    """30 pictures of 8 x 8 in three classes, smooth and unlike their mirror images."""
    g, path = np.random.default_rng(0), tmp_path_factory.mktemp("images") / "pictures.npz"
    coarse = g.integers(0, 256, (N, 2, 4, 3)).repeat(4, 1).repeat(2, 2)
    np.savez(path, images=coarse.astype(np.uint8), labels=np.arange(N) % 3)
    return str(path)


def go(images, out, vae, statistics="channel", sigma_data=0.5, batch=4, overwrite=False, **options):
    how = Encoding(**{"shard_size": 8, **options})
    spec = DataSpec(images, resolution=SIDE)
    return encode(
        spec, out, vae, how, statistics=statistics, sigma_data=sigma_data, device="cpu", batch=batch, overwrite=overwrite,
        quiet=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def latents(images, vae, tmp_path_factory) -> Path:
    """Posteriors in float32, flipped too."""
    out = tmp_path_factory.mktemp("latents") / "posteriors"
    go(images, out, vae, dtype="fp32")
    return out


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def stored(source, **options) -> tuple[Images, torch.Tensor]:
    data = open_images(DataSpec(str(source), **options))
    return data, data.pixels(range(len(data)))


def posteriors(images: str, vae: str, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight from diffusers: mean and log variance."""
    x = to_float(open_images(DataSpec(images)).pixels(range(N)))
    with torch.no_grad():
        found = load_vae(vae).network.encode(x.flip(-1) if flip else x).latent_dist
    return found.mean, found.logvar


def files(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != ".lock"}


def refused(words: str):
    return pytest.raises(FewstepError, match=words)


# ---------------------------------------------------------------------------------------------------- what is stored


def test_a_row_is_the_posterior_of_the_image_and_of_its_mirror_image(images, vae, latents):
    data, rows = stored(latents)
    assert rows.shape == (N, 2, 8, 4, 4)
    for way in (0, 1):
        expected = torch.cat(posteriors(images, vae, bool(way)), 1)
        torch.testing.assert_close(rows[:, way], expected, rtol=1e-4, atol=1e-5)
    assert (rows[:, 0] - rows[:, 1]).abs().mean() > 0.05
    some = torch.tensor([29, 3, 8, 7, 3])
    assert torch.equal(data.pixels(some), rows[some])  # across shards, in any order


def test_latents_are_the_images_by_name_label_and_split(images, latents):
    pixels, encoded = open_images(DataSpec(images)), open_images(DataSpec(str(latents)))
    assert (encoded.name, encoded.keys, encoded.class_names) == (pixels.name, pixels.keys, pixels.class_names)
    assert torch.equal(encoded.labels, pixels.labels)
    assert (encoded.shape, pixels.shape) == (SHAPE, (3, SIDE, SIDE))
    for which in ("train", "heldout"):
        assert encoded.split(which, 0.3).keys == pixels.split(which, 0.3).keys
    without = open_images(DataSpec(str(latents), use_labels=False))
    assert (without.labels, without.class_names) == (None, ())
    part = originals(encoded.split("heldout", 0.3))
    assert torch.equal(part.pixels(range(len(part))), pixels.split("heldout", 0.3).pixels(range(len(part))))
    assert originals(pixels) is pixels
    assert originals(without).labels is None


def test_half_precision_rounds_and_changes_nothing_else(images, vae, latents, tmp_path):
    go(images, tmp_path / "half", vae)
    rows = stored(tmp_path / "half")[1]
    assert rows.dtype == torch.float16
    assert torch.equal(rows, stored(latents)[1].half())


def test_single_samples_are_of_the_posterior_and_do_not_depend_on_the_batch(images, vae, tmp_path):
    for name, batch, seed in (("a", 4, 0), ("b", 7, 0), ("c", 4, 1)):
        go(images, tmp_path / name, vae, batch=batch, single_sample=True, dtype="fp32", seed=seed)
    a, b, c = (stored(tmp_path / name)[1] for name in "abc")
    assert a.shape == (N, 2, 4, 4, 4)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    mean, log_variance = posteriors(images, vae)
    z = (a[:, 0] - mean) / (log_variance / 2).exp()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs(z.square().mean() - 1) < 5 * (2 / z.numel()) ** 0.5
    other = (c[:, 0] - mean) / (log_variance / 2).exp()
    mirror = (a[:, 1] - posteriors(images, vae, True)[0]) / (posteriors(images, vae, True)[1] / 2).exp()
    for another in (other, mirror):  # their noise is another
        assert abs((z * another).mean()) < 5 / z.numel() ** 0.5


def test_grey_images_are_shown_as_rgb_and_come_back_grey(vae, tmp_path):
    np.savez(tmp_path / "grey.npz", images=np.random.default_rng(1).integers(0, 256, (6, 8, 8), dtype=np.uint8))
    go(str(tmp_path / "grey.npz"), tmp_path / "out", vae, flip=False, dtype="fp32")
    data, rows = stored(tmp_path / "out")
    x = to_float(open_images(DataSpec(str(tmp_path / "grey.npz"))).pixels(range(6))).expand(-1, 3, -1, -1)
    with torch.no_grad():
        mean = load_vae(vae).network.encode(x).latent_dist.mean
        torch.testing.assert_close(rows[:, 0, :4], mean, rtol=1e-4, atol=1e-5)
        expected = load_vae(vae).network.decode(mean).sample.mean(1, keepdim=True)
    decode = decoder(data.space)
    torch.testing.assert_close(decode(data.space.normalise(mean)), expected, rtol=1e-4, atol=1e-4)
    assert data.space.image_shape == (1, 8, 8) == tuple(expected.shape[1:])


# -------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("statistics", ["channel", "element"])
def test_statistics_are_those_of_the_samples(images, vae, tmp_path, statistics, single):
    told = go(images, tmp_path / "out", vae, statistics=statistics, single_sample=single)
    data, rows = stored(tmp_path / "out")
    rows = rows.flatten(0, 1).double()
    mean, variance = rows[:, :4], rows[:, 4:].exp() if not single else torch.zeros(1, dtype=torch.float64)
    axes = (0, 2, 3) if statistics == "channel" else (0,)
    expected = mean.mean(axes)
    second = (mean.square() + variance).mean(axes) if not single else mean.square().mean(axes)
    std = (second - expected.square()).sqrt()
    found = (
        torch.tensor(values, dtype=torch.float64).reshape(std.shape) for values in (data.space.mean, data.space.std)
    )
    for value, right in zip(found, (expected, std), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-9, atol=1e-9)
    every = load_file(tmp_path / "out" / "statistics.safetensors")
    torch.testing.assert_close(every["mean"], mean.mean(0))
    torch.testing.assert_close(every["std"].square(), ((mean.square() + variance).mean(0) - mean.mean(0).square()))
    assert told["channel_mean"] == pytest.approx(mean.mean((0, 2, 3)).tolist())


def test_statistics_are_those_of_drawn_samples_too(latents):
    """The law of total variance, by drawing: 400 epochs of 60 posteriors."""
    data, rows = stored(latents)
    prepare = preparation(data, DataSpec(flip=True))
    drawn = torch.cat([prepare(rows, 0, N * epoch) for epoch in range(400)]).double()
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.full((4,), 0.5, dtype=torch.float64), rtol=0.02, atol=0)
    assert drawn.mean((0, 2, 3)).abs().max() < 0.02


def test_moments_do_not_depend_on_how_they_are_cut():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(200, 2, 6, 2, 2, generator=g) + 100
    whole = Moments.of(rows, 3)
    direct = rows.flatten(0, 1).double()
    torch.testing.assert_close(whole.mean, direct[:, :3].mean(0))
    torch.testing.assert_close(whole.m2 / whole.n, direct[:, :3].var(0, correction=0) + direct[:, 3:].exp().mean(0))
    for cut in (1, 7, 199):
        parts = Moments.merged(Moments.of(part, 3) for part in (rows[:cut], rows[cut:]))
        assert parts.n == whole.n == 400
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.m2, whole.m2, rtol=1e-9, atol=0)


def space(**changes) -> LatentSpace:
    plain = LatentSpace("v", "h", SIDE, SHAPE, (1.0, -2.0, 0.0, 30.0), (2.0, 0.1, 1.0, 7.0), 0.5)
    return replace(plain, **changes)


@pytest.mark.parametrize("elements", [False, True])
def test_normalising_is_affine_and_its_inverse_undoes_it(elements):
    g = torch.Generator().manual_seed(0)
    mean, std = torch.randn(SHAPE, generator=g), torch.rand(SHAPE, generator=g) + 0.1
    where = space(mean=tuple(mean.flatten().tolist()), std=tuple(std.flatten().tolist())) if elements else space()
    if not elements:
        mean, std = (torch.tensor(v)[:, None, None] for v in (where.mean, where.std))
    x = 1000 * torch.randn(5, *SHAPE, generator=g)
    torch.testing.assert_close(where.normalise(x), (x - mean) / std * 0.5)  # and nothing is clamped
    torch.testing.assert_close(where.denormalise(where.normalise(x)), x)
    assert codec.decode(json.loads(json.dumps(codec.encode(where)))) == where


def test_one_space_is_one_wherever_the_vae_lies():
    assert space().same_as(space(vae="elsewhere"))
    for other in ({"vae_sha256": "x"}, {"sigma_data": 1.0}, {"resolution": 16}, {"std": (2.0, 0.1, 1.0, 7.1)}):
        assert not space().same_as(space(**other))


# ------------------------------------------------------------------------------------------------------- preparation


def test_pixels_are_flipped_by_the_law_that_they_always_were():
    x = torch.randint(0, 256, (64, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    coins = torch.rand(64, generator=torch.Generator().manual_seed(step_seed(3, 640, "flip"))) < 0.5
    expected = torch.where(coins[:, None, None, None], to_float(x).flip(-1), to_float(x))
    assert torch.equal(Pixels(True)(x, 3, 640), expected)
    assert torch.equal(Pixels()(x, 3, 640), to_float(x))
    assert 15 < coins.sum() < 49
    halves = [Pixels(True)(part, 3, 640, rank, 2) for rank, part in enumerate(x.split(32))]
    assert torch.equal(torch.cat(halves), expected)
    assert isinstance(Pixels(), Prepare)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("flip", [False, True])
def test_a_rows_latent_is_the_same_at_any_world_size(images, vae, tmp_path, single, flip):
    go(images, tmp_path / "out", vae, single_sample=single, dtype="fp32")
    data, rows = stored(tmp_path / "out", flip=flip)
    prepare = preparation(data, DataSpec(flip=flip))
    assert isinstance(prepare, Prepare)
    whole = prepare(rows, 5, 90)
    assert whole.shape == (N, *SHAPE)
    for world in (2, 3):
        parts = [prepare(part, 5, 90, rank, world) for rank, part in enumerate(rows.chunk(world))]
        assert torch.equal(torch.cat(parts), whole)
    again, later, seeded = prepare(rows, 5, 90), prepare(rows, 5, 120), prepare(rows, 6, 90)
    assert torch.equal(again, whole)
    fixed = single and not flip
    assert (
        torch.equal(later, whole) == torch.equal(seeded, whole) == fixed
    )  # a posterior is drawn from again each epoch


def test_the_cached_flip_is_chosen_by_the_pixels_law(images, vae, tmp_path):
    go(images, tmp_path / "out", vae, single_sample=True, dtype="fp32")
    data, rows = stored(tmp_path / "out", flip=True)
    chosen = preparation(data, DataSpec(flip=True))(rows, 1, 300)
    coins = flips(N, 1, 300)
    for way in (0, 1):
        mine = coins == bool(way)
        assert mine.any()
        assert torch.equal(chosen[mine], data.space.normalise(rows[mine, way]))


def test_posterior_samples_have_the_posteriors_mean_and_variance(latents):
    data, rows = stored(latents)
    prepare = preparation(data)
    draws = torch.stack([data.space.denormalise(prepare(rows, 0, N * k)) for k in range(600)]).double()
    mean, std = rows[:, 0, :4].double(), (rows[:, 0, 4:].double() / 2).exp()
    z = (draws - mean) / std
    assert z.mean(0).abs().max() < 6 / 600**0.5
    assert (z.var(0) - 1).abs().max() < 6 * (2 / 600) ** 0.5
    assert abs((z[1:] * z[:-1]).mean()) < 5 / z.numel() ** 0.5
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / z.numel() ** 0.5
    assert torch.equal(prepare.means(rows), rows[:, 0, :4])


# ------------------------------------------------------------------------------------------- interrupted and repeated


def stop_after(monkeypatch, shards: int, error: BaseException) -> None:
    """`error` while the shard of that number is written."""
    write, count = snapshot.write, []

    def stopping(path, tensors, header):
        if "shard" in header:
            count.append(path)
            if len(count) > shards:
                raise error
        return write(path, tensors, header)

    monkeypatch.setattr(snapshot, "write", stopping)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("killed")])
def test_an_interrupted_encoding_goes_on_with_the_same_bytes(images, vae, latents, tmp_path, monkeypatch, error):
    out, calls = tmp_path / "out", []
    with monkeypatch.context() as patch:
        stop_after(patch, 2, error)
        with pytest.raises(Interrupted if isinstance(error, KeyboardInterrupt) else RuntimeError) as stopped:
            go(images, out, vae, dtype="fp32")
    if isinstance(error, KeyboardInterrupt):
        assert "the same command goes on" in str(stopped.value)
        assert stopped.value.exit_code == 130
    assert len(list(out.glob("latents-*.safetensors"))) == 2
    with refused("not wholly encoded"):
        open_images(DataSpec(str(out)))
    (out / ".latents-00002.safetensors.99.part").mkdir()
    monkeypatch.setattr("fewstep.encoding.to_float", lambda x: calls.append(len(x)) or to_float(x))
    go(images, out, vae, dtype="fp32")
    assert sum(calls) == N - 16  # the shards that were there were not made again
    assert files(out) == files(latents)


def test_a_damaged_or_foreign_shard_is_made_again(images, vae, latents, tmp_path):
    out = copied(latents, tmp_path / "out")
    content = bytearray((out / "latents-00001.safetensors").read_bytes())
    content[-5] ^= 1
    (out / "latents-00001.safetensors").write_bytes(content)
    shutil.copy(out / "latents-00000.safetensors", out / "latents-00002.safetensors")
    go(images, out, vae, dtype="fp32")
    assert files(out) == files(latents)


def test_other_statistics_and_another_place_of_the_images_need_no_new_encoding(
    images, vae, latents, tmp_path, monkeypatch
):
    out, moved = copied(latents, tmp_path / "out"), shutil.copy(images, tmp_path / "moved.npz")
    monkeypatch.setattr("fewstep.encoding.to_float", None)
    go(str(moved), out, vae, statistics="element", sigma_data=1.0, dtype="fp32")
    data = open_images(DataSpec(str(out)))
    assert len(data.space.mean) == 64
    assert data.space.sigma_data == 1.0
    assert data.encoded_from.source == str(moved)
    before = open_images(DataSpec(str(latents)))
    assert data.fingerprint != before.fingerprint
    (out / "latents.json").unlink()
    (out / "statistics.safetensors").rename(tmp_path / "own.safetensors")
    monkeypatch.undo()
    go(str(moved), out, vae, statistics=str(tmp_path / "own.safetensors"), sigma_data=1.0, dtype="fp32")
    assert open_images(DataSpec(str(out))).space == data.space  # a file's statistics are taken as they are


def test_a_folder_of_other_latents_is_never_mixed_with_these(images, vae, latents, tmp_path):
    out, other = copied(latents, tmp_path / "out"), autoencoder(tmp_path / "other", seed=1)
    before = files(out)
    changes = {"VAE": {"vae": other}, "shape, flip": {"flip": False}, "dtype": {"dtype": "fp16"}}
    for words, change in changes.items():
        with refused(f"latents made with another {words}: .*--overwrite"):
            go(**{"images": images, "out": out, "vae": vae, "dtype": "fp32", **change})
    np.savez(tmp_path / "fewer.npz", images=np.zeros((5, 8, 8, 3), np.uint8))
    with refused("another images"):
        go(str(tmp_path / "fewer.npz"), out, vae, dtype="fp32")
    assert files(out) == before
    go(images, out, other, overwrite=True, single_sample=True, flip=False, shard_size=20)
    assert sorted(f.name for f in out.glob("latents-*")) == ["latents-00000.safetensors", "latents-00001.safetensors"]
    assert stored(out)[1].shape == (N, 1, 4, 4, 4)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with refused("not empty and holds no latents"):
        go(images, tmp_path / "mine", vae, overwrite=True)


def test_a_full_disk_is_told_of_before_the_work(images, vae, tmp_path, monkeypatch):
    monkeypatch.setattr("fewstep.encoding.to_float", None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total used free")(1, 1, 30_000))
    with refused("30 images of 8 x 8 need .* GB but .* has room for 0.00 GB.*--no-flip or --single-sample"):
        go(images, tmp_path / "out", vae, dtype="fp32")


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("latents-00001.safetensors", None, "is missing"),
        ("latents-00001.safetensors", b"short", "is not whole"),
        ("latents.json", b"{}", "another version"),
        ("keys.json", b'{"keys": ["0"], "labels": null, "class_names": []}', "do not belong together"),
        ("latents.json", None, "not wholly encoded"),
    ],
)
def test_folders_that_are_not_whole_are_refused(latents, tmp_path, file, content, words):
    out = copied(latents, tmp_path / "out")
    (out / file).unlink()
    if content is not None:
        (out / file).write_bytes(content)
    with refused(words):
        open_images(DataSpec(str(out)))


def test_a_shard_in_anothers_place_is_refused(latents, tmp_path):
    out = copied(latents, tmp_path / "out")
    shutil.copy(out / "latents-00000.safetensors", out / "latents-00001.safetensors")
    with refused("latents-00001.safetensors is not the shard"):
        open_images(DataSpec(str(out)))


def test_what_the_latents_are_not_is_refused(images, vae, latents, tmp_path):
    with refused("latents of 8 x 8 images, not of 16 x 16"):
        open_images(DataSpec(str(latents), resolution=16))
    assert len(open_images(DataSpec(str(latents), resolution=8, flip=True))) == N
    go(images, tmp_path / "out", vae, flip=False)
    with refused("no flipped latents"):
        open_images(DataSpec(str(tmp_path / "out"), flip=True))
    data, rows = stored(tmp_path / "out")
    with refused("encoded without flips"):
        Latents(data.space, True)(rows, 0, 0)
    with refused("holds latents already"):
        go(str(latents), tmp_path / "again", vae)


def scaled(latents: Path, to: Path, factor: float, shift: float = 0.0) -> Path:
    """The folder, with statistics of latents times `factor`, moved by `shift` standard deviations."""
    out = copied(latents, to)
    told = json.loads((out / "latents.json").read_text())
    where = told["space"]
    where["mean"] = [factor * (m + shift * s) for m, s in zip(where["mean"], where["std"], strict=True)]
    where["std"] = [factor * s for s in where["std"]]
    (out / "latents.json").write_text(json.dumps(told))
    return out


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (0.18215, "is 5.* times .*statistics are of latents multiplied .*Stable Diffusion's 0.18215"),
        (1 / 0.18215, "is 0.1.* times .*these latents are multiplied .*Stable Diffusion's 0.18215"),
        (0.13025, "SDXL's 0.13025"),
        (1.5, "not of one scale"),
        (0.7, "not of one scale"),
    ],
)
def test_statistics_of_another_scale_are_refused_by_name(latents, tmp_path, factor, words):
    with refused(words):
        open_images(DataSpec(str(scaled(latents, tmp_path / "out", factor))))


def test_statistics_of_other_latents_are_refused_and_small_differences_are_not(latents, tmp_path):
    with refused("mean is 1 standard deviations from 0: the statistics are of other latents"):
        open_images(DataSpec(str(scaled(latents, tmp_path / "shifted", 1.0, 1.0))))
    for k, factor in enumerate((0.9, 1.1)):
        open_images(DataSpec(str(scaled(latents, tmp_path / str(k), factor))))
    with refused("not finite, or all the same"):
        check_scale(space(), torch.zeros(9, *SHAPE), None, "x")


def test_statistics_from_a_file_must_fit(images, vae, latents, tmp_path, monkeypatch):
    file, true = tmp_path / "own.safetensors", load_file(latents / "statistics.safetensors")
    mean, std = true["mean"], true["std"]
    monkeypatch.setattr("fewstep.encoding.Encoder.carry_out", lambda self: pytest.fail("work began"))
    for tensors, words in [
        ({"mean": mean[:3], "std": std[:3]}, "mean is 3 x 4 x 4, but the latents are 4 x 4 x 4: give 4 values"),
        ({"mean": mean, "std": std[..., :2].contiguous()}, "std is 4 x 4 x 2"),
        ({"mean": mean, "std": std.mean()}, "std is a number"),
        ({"mean": mean}, "no safetensors file with mean and std"),
        ({"mean": mean, "std": std.mean((1, 2))}, "64 means and 4 standard deviations"),
        ({"mean": mean, "std": 0 * std}, "not positive"),
        ({"mean": mean * torch.nan, "std": std}, "not finite"),
        (
            {"mean": 0.18215 * mean, "std": 0.18215 * std},
            "multiplied by the VAE's scaling factor .Stable Diffusion's 0.18215",
        ),
    ]:
        save_file(tensors, file)
        with refused(words):
            go(images, tmp_path / "out", vae, statistics=str(file))
    (tmp_path / "evil.safetensors").write_bytes(pickle.dumps([1]))
    for path, words in ((tmp_path / "evil.safetensors", "is a pickle"), ("per-pixel", "give channel, element, or")):
        with refused(words):
            go(images, tmp_path / "out", vae, statistics=str(path))
    assert not (tmp_path / "out").exists()


def test_options_that_make_no_sense_are_refused(images, vae, tmp_path):
    with refused("--batch must be 1"):
        go(images, tmp_path / "out", vae, batch=0)
    for options in ({"shard_size": 0}, {"seed": -1}):
        with refused("--shard-size must be 1 or more and --seed 0 or more"):
            go(images, tmp_path / "out", vae, **options)
    with refused("--resolution 7: .* multiples of 2 pixels, e.g. 8"):
        encode(DataSpec(images, resolution=7), tmp_path / "out", vae, device="cpu", quiet=True)
    grey = autoencoder(tmp_path / "grey", in_channels=1, out_channels=1)
    with refused("takes images of 1 channels, not 3"):
        go(images, tmp_path / "out2", grey)
    for bad in ({"mean": (0.0,) * 5}, {"std": (1.0,) * 5}, {"std": (0.0,) * 4}, {"sigma_data": 0.0}):
        with pytest.raises(FewstepError):
            space(**bad)


def test_what_overflows_half_precision_is_named(images, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(autoencoder(tmp_path / "vae"))
    with torch.no_grad():
        vae.quant_conv.bias[:4] += 1e5
    vae.save_pretrained(tmp_path / "far")
    with refused("encodes 0 to values that are not finite in fp16: give --dtype fp32"):
        go(images, tmp_path / "out", str(tmp_path / "far"))
    go(images, tmp_path / "out", str(tmp_path / "far"), dtype="fp32", overwrite=True)


# --------------------------------------------------------------------------------------------------------------- VAE


def test_a_vae_that_is_not_here_says_how_to_get_it(tmp_path, images):
    with refused("stabilityai/sd-vae-ft-ema is not on this machine.*hf download stabilityai/sd-vae-ft-ema"):
        load_vae("stabilityai/sd-vae-ft-ema")
    with refused("hf download some/pipeline`"):
        load_vae("some/pipeline/vae")
    for name in ("/nowhere/vae", "vae", "a/b/c/d", "../vae"):
        with refused("neither a folder here nor a name on the Hugging Face hub"):
            load_vae(name)


def test_only_whole_autoencoders_in_safetensors_are_loaded(vae, tmp_path):
    (tmp_path / "empty").mkdir()
    with refused("holds no AutoencoderKL in safetensors"):
        load_vae(str(tmp_path / "empty"))
    other = copied(Path(vae), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "_class_name": "VQModel"}))
    with refused("of the class VQModel"):
        load_vae(str(other))
    partial = copied(Path(vae), tmp_path / "partial")
    file = partial / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("decoder.conv_in.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with refused("do not fit its config.json"):
        load_vae(str(partial))
    pickled = copied(Path(vae), tmp_path / "pickled")
    (pickled / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, pickled / "diffusion_pytorch_model.bin")
    with refused("holds no AutoencoderKL in safetensors"):
        load_vae(str(pickled))


def test_a_vae_is_loaded_once_and_a_pipelines_is_found(vae, tmp_path):
    assert load_vae(vae) is load_vae(vae + "/") is load_vae(vae, "cpu")
    copied(Path(vae), tmp_path / "pipeline" / "vae")
    assert load_vae(str(tmp_path / "pipeline")).sha256 == load_vae(vae).sha256
    assert load_vae(vae).latent_shape(8) == SHAPE


def test_another_vae_in_the_place_of_the_first_is_refused(latents, vae, tmp_path):
    where = open_images(DataSpec(str(latents))).space
    assert where.vae == str(Path(vae).resolve())
    assert where.vae_sha256 == load_vae(vae).sha256
    place = copied(Path(vae), tmp_path / "vae")
    there = replace(where, vae=str(place))
    decoder(there)
    shutil.rmtree(place)
    with refused(f"the VAE {place} is neither a folder here"):
        decoder(there)
    loaded.cache_clear()
    autoencoder(place, seed=1)
    with refused(f"the VAE in {place} .* is not the one that the latents are of"):
        decoder(there)
    assert decoder(None) is None


# -------------------------------------------------------------------------------------------------- models of latents


def a_model(where: LatentSpace | None, fingerprint: str = "", classes: int = 3) -> Model:
    shape = where.shape if where else (3, SIDE, SIDE)
    net = Architecture(MLP(8, 2), shape, classes).build().eval().requires_grad_(False)
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.add_(0.1 * torch.randn(p.shape, generator=g))
    info = ModelInfo(
        Architecture(MLP(8, 2), shape, classes), "consistency", heldout=0.1, data_fingerprint=fingerprint, latents=where
    )
    return Model(net, info)


def test_samples_are_decoded_and_any_batch_gives_the_same(latents, vae):
    where = open_images(DataSpec(str(latents))).space
    (z,) = Generator(lambda x, t, label=None, /: 0.1 * x / 80, SHAPE)(FewStep((80.0,)), 5, seed=3)
    torch.testing.assert_close(z, 0.1 * NoiseStream(3).normal(range(5), SHAPE))
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (where.mean, where.std))
        expected = load_vae(vae).network.decode(z * std / 0.5 + mean).sample
    make = Generator(lambda x, t, label=None, /: 0.1 * x / 80, SHAPE, decode=decoder(where))
    for batch in (1, 2, 5):
        images = torch.cat(list(replace(make, batch=batch)(FewStep((80.0,)), 5, seed=3)))
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_decoding_in_pieces_is_decoding_and_nothing_is_clamped(latents, monkeypatch):
    decode = decoder(open_images(DataSpec(str(latents))).space)
    z = 50 * torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(0))
    whole = decode(z)
    monkeypatch.setattr("fewstep.latents.PIXELS_AT_A_TIME", 2 * SIDE * SIDE)
    torch.testing.assert_close(decode(z), whole, rtol=1e-4, atol=1e-3)
    near = decode(z.clamp(-5, 5))
    assert (near - whole).abs().amax((1, 2, 3)).min() > 0.01


def test_a_latent_model_is_stored_with_its_space_and_makes_images(latents, tmp_path):
    data = open_images(DataSpec(str(latents)))
    plain = a_model(data.space)
    save_model(tmp_path / "m.safetensors", plain.denoiser.state_dict(), plain.info)
    model = load(tmp_path / "m.safetensors")
    assert model.info.latents == data.space
    assert model.info.image_shape == (3, SIDE, SIDE)
    assert a_model(None).info.image_shape == (3, SIDE, SIDE)
    images = api.sample(model, steps=2, num=3, seed=4)
    assert images.shape == (3, 3, SIDE, SIDE)
    z = torch.cat(list(replace(generator(model), decode=None)(few_step(2), 3, 4)))
    assert torch.equal(images, to_uint8(decoder(data.space)(z)))


def test_a_latent_model_is_measured_against_the_images_themselves(images, latents):
    data, extractor = open_images(DataSpec(str(latents))), load_extractor("pixels")
    pixels = open_images(DataSpec(images))
    for which in ("train", "heldout"):
        ours, theirs = (reference_of(d, extractor, which, 0.3) for d in (data, pixels))
        assert (ours.name, ours.n, ours.sha256) == (theirs.name, theirs.n, theirs.sha256)
    model = a_model(data.space, data.fingerprint)
    assert model.info.trained_on(pixels)
    assert model.info.trained_on(data)
    assert not a_model(data.space, "other").info.trained_on(pixels)
    found = [api.measure_against(model, source, "pixels")[1] for source in (images, str(latents))]
    assert found[0].sha256 == found[1].sha256
    for source in (images, str(latents)):
        with refused("trained with 0.1 held out"):
            api.measure_against(model, source, "pixels", "heldout", 0.3)
        searched, reported = api.halves(model, source, extractor, 0.5)
        assert searched.n + reported.n == len(pixels.split("train", 0.1))
    (record,) = api.evaluate(model, str(latents), extractor="pixels", num=4, seeds=1)
    assert record.reference == "pictures[train]"


def test_originals_that_are_gone_are_told_of(images, vae, tmp_path):
    source = Path(shutil.copy(images, tmp_path / "pictures.npz"))
    go(str(source), tmp_path / "out", vae)
    data = open_images(DataSpec(str(tmp_path / "out")))
    with np.load(source) as whole:
        fewer = {"images": whole["images"][:10], "labels": whole["labels"][:10]}
    np.savez(source, **fewer)
    with refused("were encoded from are gone .*lacks 20 of them, 10 for one.*--data images of 8 x 8"):
        originals(data)
    source.unlink()
    with refused("are gone .*does not exist.*repeat `fewstep encode`"):
        reference_of(data, load_extractor("pixels"), "train", 0.1)
    assert len(data.pixels([0])) == 1  # training needs the latents alone


def test_recipe_and_start_must_go_with_the_latents(images, latents, tmp_path):
    data, pixels = open_images(DataSpec(str(latents))), open_images(DataSpec(images))
    check_latents(data, 0.5)
    check_latents(pixels, 0.7)
    check_latents(data, 0.5, a_model(replace(data.space, vae="moved")).info)
    check_latents(data, 0.5, a_model(None).info)
    with refused("standard deviation of 0.5, the recipe has sigma-data 1.0: give --sigma-data 0.5"):
        check_latents(data, 1.0)
    with refused("these data are of another VAE, size or statistics"):
        check_latents(data, 0.5, a_model(replace(data.space, sigma_data=0.4)).info)
    with refused("these data are images"):
        check_latents(pixels, 0.5, a_model(data.space).info)


def test_a_run_on_latents_draws_measures_resumes_and_samples_images(images, latents, tmp_path, capsys):
    term = Denoising(distance=SquaredL2(over="mean"), weighting=EDM(0.5))
    recipe = Recipe(
        name="test", objective=PairObjective(pairs=Diffusion(LogNormal(-1.2, 1.2)), terms={"denoising": term}),
        network=MLP(8, 2), conditional=True, data=DataSpec(str(latents), flip=True), total_nimg=24, batch_size=8,
        log_nimg=8, snapshot_nimg=8, grid_nimg=24, evaluation=Evaluation(every_nimg=24, extractor="pixels", num=6),
    )  # fmt: skip
    run = train(recipe, tmp_path / "run", device="cpu", quiet=True)
    model, data = load(tmp_path / "run"), open_images(DataSpec(str(latents)))
    assert model.info.latents == data.space
    assert model.info.architecture.shape == SHAPE
    assert len(list((tmp_path / "run" / "samples").glob("*.png"))) == 1
    (row, *_) = run.metrics()
    assert row["record"]["reference"] == "pictures[train]"
    out = tmp_path / "grid.png"
    assert main(["sample", str(tmp_path / "run"), "--num", "4", "--device", "cpu", "--out", str(out)]) == 0
    assert out.exists()
    capsys.readouterr()


# --------------------------------------------------------------------------------------------------------------- verb


def test_the_verb_encodes_and_prints_what_it_did(images, vae, latents, tmp_path, capsys):
    out = tmp_path / "out"
    args = ["encode", images, str(out), "--vae", vae, "--resolution", "8", "--shard-size", "8", "--batch", "4"]
    assert main([*args, "--dtype", "fp32", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert (told["images"], told["shape"], told["flips"], told["posterior"], told["shards"]) == (
        N,
        [4, 4, 4],
        True,
        True,
        4,
    )
    assert told["bytes"] == sum(file.stat().st_size for file in out.glob("latents-*"))
    assert "30 images of 8 x 8 -> latents of 4 x 4 x 4" in said.err
    assert files(out) == files(latents)
    assert main([*args, "--no-flip"]) == 2
    assert "another shape, flip, dtype" in capsys.readouterr().err
    assert main(["encode", str(latents), str(out), "--vae", vae, "--resolution", "8"]) == 2
    assert "holds latents already" in capsys.readouterr().err
