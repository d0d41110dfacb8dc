"""`fewstep encode`: images through a VAE into shards of latents, once and for all; a kill loses one shard at most.

A shard is a function of its images and the options, and is there whole or not at all: going on after a kill gives the
same bytes. The layout is described in fewstep.data.latents.
"""

import hashlib
import json
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fewstep import codec
from fewstep._version import __version__
from fewstep.console import ProgressLine, say
from fewstep.data import DataSpec, Images, LatentSpace, open_images, to_float
from fewstep.data.latent_space import check_scale
from fewstep.data.latents import DTYPES, KEYS, MANIFEST, OF_MODEL, PLAN, VERSION
from fewstep.data.order import prefetched
from fewstep.environment import pick_device
from fewstep.files import atomic_write, read_json, write_json
from fewstep.interrupts import Interrupted
from fewstep.latent_statistics import Moments, read_statistics
from fewstep.latents import DEFAULT_VAE, VAE, load_vae
from fewstep.model import find, read_info
from fewstep.noise import permutation, philox
from fewstep.rundir import RunDir
from fewstep.snapshots import format as snapshot
from fewstep.snapshots.sources import read_foreign_header
from fewstep.types import FewstepError

STATISTICS: Final = "statistics.safetensors"
PROBED: Final = 64  # images on which statistics from a file are tried before the work


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What decides the bytes of the shards, besides images and VAE."""

    flip: bool = True
    """encode every image mirrored, too"""
    single_sample: bool = False
    """keep one posterior sample, as sLCT's authors do, in place of mean and log variance"""
    dtype: Literal["fp16", "fp32"] = "fp16"
    shard_size: int = 1024
    """images"""
    seed: int = 0
    """of single samples"""

    def __post_init__(self) -> None:
        if self.shard_size < 1 or self.seed < 0:
            raise FewstepError(
                f"--shard-size must be 1 or more and --seed 0 or more, got {self.shard_size} and {self.seed}"
            )


def encode(
    data: DataSpec, out: str | Path, vae: str = DEFAULT_VAE, encoding: Encoding | None = None, *,
    statistics: str = "channel", sigma_data: float = 0.5, device: str = "auto", batch: int = 16, overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Encode all images of a source into the folder `out`, which is a data source itself then; returns what was done.

    Goes on where an earlier call was stopped, and repairs damaged shards. statistics: channel, element, a file of mean
    and std, or a model of latents, to tune it on its own scale; another choice than before needs no new encoding.
    FewstepError for bad input, Interrupted on Ctrl-C.
    """
    if batch < 1:
        raise FewstepError(f"--batch must be 1 or more, got {batch}")
    network = load_vae(vae, pick_device(device))
    images = open_images(replace(data, streamed=True))
    if images.space:
        raise FewstepError(f"{data.source} holds latents already: give the images")
    task = Encoder(images, network, encoding or Encoding(), Path(out), batch, quiet)
    space = space_of_model(statistics, task)
    if space:
        given = torch.tensor(space.mean, dtype=torch.float64), torch.tensor(space.std, dtype=torch.float64)
        sigma_data, statistics = space.sigma_data, f"{OF_MODEL}{statistics}"
    elif statistics in ("channel", "element"):
        given = None
    else:
        given = read_statistics(statistics, task.shape)
        task.probe(task.space(*given, sigma_data), statistics)
    directory = RunDir(task.out)
    try:
        task.claim(directory, overwrite)
        shards, moments = task.carry_out()
        mean, std = given or (moments.channels() if statistics == "channel" else (moments.mean, moments.std))
        space = task.space(mean, std, sigma_data)
        task.finish(replace(data, streamed=None), space, moments, shards, statistics)
        open_images(DataSpec(str(out)))  # the scale of what was stored
    except KeyboardInterrupt:
        raise Interrupted(signal.SIGINT, f"whole shards are kept in {out}; the same command goes on") from None
    finally:
        directory.release()
    return {
        "out": str(out), "images": len(images), "shape": list(task.shape), "flips": task.encoding.flip,
        "posterior": not task.encoding.single_sample, "shards": len(shards), "bytes": sum(s["bytes"] for s in shards),
        "vae": network.name, "vae_sha256": network.sha256, "statistics": statistics,
        "channel_mean": moments.channels()[0].tolist(), "channel_std": moments.channels()[1].tolist(),
    }  # fmt: skip


def space_of_model(statistics: str, task: "Encoder") -> LatentSpace | None:
    """The latents of the model that --statistics names; None where it names none. FewstepError for another VAE or size."""
    path = Path(statistics).expanduser()
    stored = path.suffix == ".safetensors" and path.is_file() and snapshot.peek(path, snapshot.FORMAT)
    if not path.is_dir() and not (stored and "model" in stored):
        return None
    file = find(path)
    space = read_info(read_foreign_header(file), file).latents
    if space is None or (space.vae_sha256, space.shape) != (task.vae.sha256, task.shape):
        what = "of images" if space is None else f"of latents of {space.vae} at {space.resolution} pixels"
        raise FewstepError(
            f"--statistics {statistics} is a model {what}: give its own VAE with --vae and its size with --resolution"
        )
    return space


@dataclass(frozen=True)
class Encoder:
    """One encoding in its folder."""

    images: Images
    vae: VAE
    encoding: Encoding
    out: Path
    batch: int
    quiet: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.vae.latent_shape(self.images.shape[-1])

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of a row, (F, P, H, W)."""
        c, h, w = self.shape
        return 1 + self.encoding.flip, c * (1 if self.encoding.single_sample else 2), h, w

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.encoding.dtype]

    @property
    def shards(self) -> list[range]:
        """The images of each."""
        size, n = self.encoding.shard_size, len(self.images)
        return [range(i, min(i + size, n)) for i in range(0, n, size)]

    def file(self, k: int) -> Path:
        return self.out / f"latents-{k:05d}.safetensors"

    def identity(self) -> dict[str, Any]:
        """What decides the shards' bytes; the VAE and the images may lie in another place."""
        same = {"vae_sha256": self.vae.sha256, "images": self.images.fingerprint, "stored": list(self.stored)}
        return {**same, **asdict(self.encoding)}

    @property
    def stamp(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def space(self, mean: Tensor, std: Tensor, sigma_data: float) -> LatentSpace:
        return LatentSpace(
            self.vae.name, self.vae.sha256, self.images.shape[-1], self.shape, tuple(mean.flatten().tolist()),
            tuple(std.flatten().tolist()), sigma_data, self.images.shape[0],
        )  # fmt: skip

    def claim(self, directory: RunDir, overwrite: bool) -> None:
        """Own the folder: begin, go on with the same encoding, or replace another if told so. Never by guess."""
        plan, identity = self.out / PLAN, self.identity()
        if not plan.exists() and self.out.exists() and any(f.name != ".lock" for f in self.out.iterdir()):
            raise FewstepError(f"{self.out} is not empty and holds no latents: choose another OUT")
        self.out.mkdir(parents=True, exist_ok=True)
        directory.take_lock()
        for folder in directory.leftovers():
            shutil.rmtree(folder, ignore_errors=True)
        before = read_json(plan) if plan.exists() else identity
        if before != identity and not overwrite:
            names = {"vae_sha256": "VAE", "images": "images", "stored": "shape"}
            other = ", ".join(names.get(k, k) for k in identity if before.get(k) != identity[k])
            raise FewstepError(
                f"{self.out} holds latents made with another {other}: choose another OUT, or give --overwrite to replace them"
            )
        if before != identity:
            (self.out / MANIFEST).unlink(missing_ok=True)
            for file in self.out.glob("latents-*.safetensors"):
                file.unlink()
        self.check_space()
        write_json(plan, identity)

    def check_space(self) -> None:
        """Say what the latents will take; FewstepError if the disk has no room for it."""
        row = torch.Size(self.stored).numel() * self.dtype.itemsize
        need = row * len(self.images) + len(self.shards) * 16 * torch.Size(self.shape).numel()
        there = sum(file.stat().st_size for file in self.out.glob("latents-*.safetensors"))
        disk = shutil.disk_usage(self.out)
        free = disk.free + there
        what = f"{len(self.images):,} images of {self.images.shape[-1]} x {self.images.shape[-1]}"
        if disk.total and need > free:  # some network file systems know no sizes: all are 0 there
            raise FewstepError(
                f"the latents of {what} need {need / 1e9:,.2f} GB but {self.out} has room for {free / 1e9:,.2f} GB: choose "
                "another OUT, or give --no-flip or --single-sample, each of which halves them"
            )
        if not self.quiet:
            size = " x ".join(map(str, self.shape))
            say(f"{what} -> latents of {size}, {need / 1e9:,.3g} GB in {len(self.shards)} shards")

    def carry_out(self) -> tuple[list[dict[str, Any]], Moments]:
        """Make the shards that are not there; returns what the manifest says of all, and their moments."""
        found = {k: entry for k in range(len(self.shards)) if (entry := self.intact(k))}
        todo = [k for k in range(len(self.shards)) if k not in found]
        done = sum(len(self.shards[k]) for k in found)
        if found and not self.quiet:
            say(f"{len(found)} of {len(self.shards)} shards are there and whole")
        line = ProgressLine("encode", len(self.images), done, quiet=self.quiet)
        with line, closing(prefetched(self.reader(todo), ahead=2)) as pixels:
            for k in todo:
                found[k] = self.make(k, pixels, line)
        shards = [found[k][0] for k in range(len(self.shards))]
        return shards, Moments.merged(found[k][1] for k in range(len(self.shards)))

    def cuts(self, k: int) -> list[range]:
        """The batches of a shard: they begin anew with each, so that they are the same wherever a run goes on."""
        rows = self.shards[k]
        return [rows[i : i + self.batch] for i in range(0, len(rows), self.batch)]

    def reader(self, todo: Sequence[int]) -> Any:
        """make(i): the rows and pixels of the batch number i of these shards; None beyond the last."""
        batches = [cut for k in todo for cut in self.cuts(k)]
        return lambda i: self.images.pixels(batches[i]) if i < len(batches) else None

    def make(self, k: int, pixels: Iterator[Tensor], line: ProgressLine) -> tuple[dict[str, Any], Moments]:
        """Encode and write one shard."""
        parts = []
        for rows, images in zip(self.cuts(k), islice(pixels, len(self.cuts(k))), strict=True):
            parts.append(self.rows(images, rows))
            line.advance(len(rows))
        latents = torch.cat(parts)
        moments = Moments.of(latents, self.shape[0])
        tensors = {"latents": latents, "mean": moments.mean, "m2": moments.m2}
        digest = snapshot.write(self.file(k), tensors, {"encoding": self.stamp, "shard": k})
        return self.entry(k, digest), moments

    def rows(self, images: Tensor, numbers: Sequence[int]) -> Float[Tensor, "n f p h w"]:
        """What is stored of these images."""
        x = to_float(images)
        ways = []
        for way, seen in enumerate([x, x.flip(-1)] if self.encoding.flip else [x]):
            mean, log_variance = (part.cpu() for part in self.vae.encode(seen))
            if self.encoding.single_sample:
                streams = [philox(self.encoding.seed, "posterior", i, way) for i in numbers]
                noise = torch.stack([torch.from_numpy(s.standard_normal(mean.shape[1:], dtype="f4")) for s in streams])
                ways.append(mean + (log_variance / 2).exp() * noise)
            else:
                ways.append(torch.cat([mean, log_variance], 1))
        stored = torch.stack(ways, 1).to(self.dtype)
        bad = (~stored.isfinite()).flatten(1).any(1).nonzero()
        if len(bad):
            key = self.images.keys[int(numbers[int(bad[0])])]
            raise FewstepError(
                f"{self.vae.name} encodes {key} to values that are not finite in {self.encoding.dtype}: give --dtype fp32, or "
                "remove the image"
            )
        assert stored.shape[1:] == self.stored
        return stored

    def entry(self, k: int, digest: str) -> dict[str, Any]:
        """What the manifest says of a shard."""
        file = self.file(k)
        return {"file": file.name, "rows": len(self.shards[k]), "bytes": file.stat().st_size, "sha256": digest}

    def intact(self, k: int) -> tuple[dict[str, Any], Moments] | None:
        """A shard that is there, checked against its checksums; None: it has to be made."""
        if not self.file(k).exists():
            return None
        try:
            stored = snapshot.read(self.file(k))
        except FewstepError:
            say(f"{self.file(k)} is damaged: encoding it again")
            return None
        if (stored.header.get("encoding"), stored.header.get("shard")) != (self.stamp, k):
            return None
        rows = len(self.shards[k]) * (1 + self.encoding.flip)
        return self.entry(k, stored.weights_sha256), Moments(rows, stored.tensors["mean"], stored.tensors["m2"])

    def probe(self, space: LatentSpace, statistics: str) -> None:
        """Try statistics from a file on a few images before hours are spent."""
        few = permutation(0, 0, len(self.images))[:PROBED].sort().values
        parts = [self.vae.encode(to_float(self.images.pixels(rows))) for rows in few.split(self.batch)]
        means, log_variances = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        check_scale(space, means, log_variances.exp(), statistics)

    def finish(
        self, data: DataSpec, space: LatentSpace, moments: Moments, shards: list[dict[str, Any]], statistics: str
    ) -> None:
        """The files beside the shards; the manifest last, for it says that all is there."""
        local = Path(data.source).expanduser()
        labels = None if self.images.labels is None else self.images.labels.tolist()
        names = {"keys": self.images.keys, "labels": labels, "class_names": self.images.class_names}
        atomic_write(self.out / KEYS, json.dumps(names))
        snapshot.write(self.out / STATISTICS, {"mean": moments.mean, "std": moments.std}, {"latents": moments.n})
        channel_mean, channel_std = (values.tolist() for values in moments.channels())
        spec = replace(data, source=str(local.resolve()) if local.exists() and data.source != "digits" else data.source)
        manifest = {
            "fewstep": __version__, "version": VERSION, "name": self.images.name, "data": codec.encode(spec),
            "space": codec.encode(space), "statistics": statistics,
            "channel": {"mean": channel_mean, "std": channel_std}, "scaling_factor": self.vae.scaling_factor,
            "stored": list(self.stored), "dtype": self.encoding.dtype, "rows": self.encoding.shard_size, "shards": shards,
        }  # fmt: skip
        write_json(self.out / MANIFEST, manifest)
