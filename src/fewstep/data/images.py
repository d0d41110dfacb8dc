"""Images: a finite ordered set of uint8 images with stable names, however they are stored."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b, sha256
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from fewstep import codec
from fewstep.data.decode import Decoder, Source
from fewstep.data.files import ENDINGS, folder, zipped
from fewstep.data.latent_space import LatentSpace
from fewstep.data.latents import Encoded, is_encoded
from fewstep.data.tables import digits, hugging_face, npz, parquet
from fewstep.types import FewstepError

IN_MEMORY = 4 * 2**30  # bytes; larger sets are decoded on demand
READERS: dict[str, Callable[[Path], Source]] = {".zip": zipped, ".parquet": parquet, ".npz": npz}


@dataclass(frozen=True)
class DataSpec:
    """Where the images come from and how they are prepared."""

    source: str = "digits"
    """`digits` (bundled), a folder of images, FILE.zip, FILE.parquet or a folder of *.parquet, FILE.npz,
    hf:NAME[:SPLIT] for a Hugging Face data set (SPLIT is train if not given), or what `fewstep encode` wrote."""
    resolution: int | None = None
    """Center-crop to a square and resize to this many pixels. None: keep; all images must then be one square size."""
    flip: bool = False
    """Flip half of the images horizontally, at random, in training."""
    heldout: float = 0.1
    """Fraction of the images kept out of training, chosen by a hash of each image's name."""
    use_labels: bool = True
    """Use the class labels if the source has them."""
    streamed: bool | None = None
    """Decode images when they are needed. None: only if they would take 4 GiB or more in memory."""

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise FewstepError(f"resolution is {self.resolution}; give at least 1 pixel, e.g. --data.resolution 32")
        check_fraction(self.heldout)


@dataclass(frozen=True, eq=False)
class Images:
    """A finite ordered set of uint8 images, or of their latents, all of one shape [c, h, w].

    `keys` name the images and never depend on the machine: the path below the root for files, FILE:ROW for parquet,
    the row's number otherwise. `rows` says where in `fetch` they are, so a split shares its pixels with the whole.
    Latents have the keys, labels and name of the images they are of, so that they are split alike.
    """

    name: str
    shape: tuple[int, int, int]
    keys: list[str] = field(repr=False)
    labels: Int64[Tensor, " n"] | None = field(repr=False)
    class_names: tuple[str, ...] = field(repr=False)
    rows: Int64[Tensor, " n"] = field(repr=False)
    fetch: Callable[[Tensor], Tensor] = field(repr=False)
    space: LatentSpace | None = field(default=None, repr=False)
    """of latents; None: pixels"""
    encoded_from: DataSpec | None = None
    """where the images are that the latents are of"""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def num_classes(self) -> int:
        """0 without labels."""
        return len(self.class_names)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the shape, every key, the labels, and the space of latents. Pixels are not read."""
        labels = None if self.labels is None else self.labels.tolist()
        space = [codec.encode(replace(self.space, vae=""))] if self.space else []
        return sha256(json.dumps([self.shape, self.keys, labels, *space]).encode()).hexdigest()

    def pixels(
        self, indices: Sequence[int] | Int[Tensor, " m"]
    ) -> UInt8[Tensor, "m c h w"] | Float[Tensor, "m f p h w"]:
        """The images at these positions of the set; of latents the stored rows, for `preparation`."""
        return self.fetch(self.rows[torch.as_tensor(indices, dtype=torch.int64, device="cpu")])

    def split(self, which: Literal["train", "heldout", "all"], fraction: float) -> "Images":
        """The images whose key hashes to [0, fraction) ("heldout"), the others ("train"), or all of them.

        An image's side depends on its key alone: it is the same on every machine and stays when others come or go.
        """
        check_fraction(fraction)
        if which == "all" or (which == "train" and fraction == 0):
            return self
        held = torch.tensor([hash01(key) < fraction for key in self.keys])
        if held.all() or not held.any():
            sides = f"holding out {fraction} of {len(self)} images leaves one side empty"
            raise FewstepError(f"{self.name}: {sides}; change the held-out fraction or use more images")
        chosen = torch.nonzero(held if which == "heldout" else ~held)[:, 0]
        labels = None if self.labels is None else self.labels[chosen]
        return replace(self, keys=[self.keys[i] for i in chosen.tolist()], labels=labels, rows=self.rows[chosen])


def check_fraction(fraction: float) -> None:
    """Refuse a held-out fraction outside [0, 1)."""
    if not 0 <= fraction < 1:
        raise FewstepError(f"the held-out fraction is {fraction}; give 0 <= fraction < 1, e.g. --data.heldout 0.1")


def hash01(key: str) -> float:
    """A key's place in [0, 1], uniform over keys and the same everywhere."""
    digest = blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def open_images(spec: DataSpec, progress: Callable[[int, int], None] | None = None) -> Images:
    """All images of a source, unsplit: decoded into memory, or on demand if they are streamed.

    `progress(done, total)` is called at most 100 times, and only while images are decoded into memory.
    """
    if is_encoded(Path(spec.source).expanduser()):
        return open_latents(spec)
    source = open_source(spec.source)
    if not source.keys:
        raise FewstepError(f"{spec.source} holds no images ({' '.join(ENDINGS)}); is it the right place?")
    labels, class_names = checked_labels(source) if spec.use_labels else (None, ())
    decode, rows = Decoder(source, spec.resolution), torch.arange(len(source.keys))
    large = len(rows) * prod(decode.shape) >= IN_MEMORY
    streamed = large if spec.streamed is None else spec.streamed
    fetch = decode if streamed else decode(rows, progress).__getitem__
    return Images(source.name, decode.shape, source.keys, labels, class_names, rows, fetch)


def open_latents(spec: DataSpec) -> Images:
    """The latents in a folder; FewstepError where they are not what the spec asks for."""
    encoded = Encoded.open(Path(spec.source).expanduser())
    side = encoded.space.resolution
    if spec.resolution not in (None, side):
        raise FewstepError(
            f"{spec.source} holds latents of {side} x {side} images, not of {spec.resolution} x {spec.resolution}: leave "
            "out --data.resolution, or encode the images at that size"
        )
    if spec.flip and not encoded.flips:
        raise FewstepError(f"{spec.source} holds no flipped latents: leave out --data.flip, or fewstep encode --flip")
    labels = torch.tensor(encoded.labels) if spec.use_labels and encoded.labels else None
    return Images(
        encoded.name, encoded.space.shape, encoded.keys, labels, encoded.class_names if labels is not None else (),
        torch.arange(len(encoded.keys)), encoded, encoded.space, encoded.data,
    )  # fmt: skip


def originals(images: Images) -> Images:
    """The images that latents are of, of the same keys in the same order; images are returned as they are."""
    if images.encoded_from is None or images.space is None:
        return images
    spec = replace(images.encoded_from, use_labels=images.labels is not None, streamed=True)
    side, problem = images.space.resolution, ""
    try:
        whole = open_images(spec)
        place = {key: row for key, row in zip(whole.keys, whole.rows.tolist(), strict=True)}
        missing = [key for key in images.keys if key not in place]
        if missing:
            problem = f"{spec.source} lacks {len(missing)} of them, {missing[0]} for one"
        elif whole.shape != images.space.image_shape:
            problem = f"those in {spec.source} are {' x '.join(map(str, whole.shape))}"
    except FewstepError as error:
        problem = str(error)
    if problem:
        raise FewstepError(
            f"the images that the latents of {images.name} were encoded from are gone ({problem}): put them back, or repeat "
            f"`fewstep encode` with the place where they are now; to measure a model, give its --data images of {side} x {side}"
        )
    rows = torch.tensor([place[key] for key in images.keys], dtype=torch.int64)
    return replace(whole, keys=images.keys, labels=images.labels, rows=rows)


def open_source(text: str) -> Source:
    """The stored images that DataSpec.source means."""
    if text == "digits":
        return digits()
    if text.startswith("hf:"):
        return hugging_face(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return parquet(path) if any(path.glob("*.parquet")) else folder(path)
    if not path.exists() or path.suffix.lower() not in READERS:
        problem = "is of an unknown kind" if path.exists() else "does not exist"
        kinds = "digits, a folder, FILE.zip, FILE.parquet, FILE.npz or hf:NAME"
        raise FewstepError(f"{text} {problem}; --data.source takes {kinds}")
    return READERS[path.suffix.lower()](path)


def checked_labels(source: Source) -> tuple[Int64[Tensor, " n"] | None, tuple[str, ...]]:
    """The labels as integers 0..k-1 and the k class names. Classes without a name are called by their number."""
    if source.labels is None:
        return None, ()
    labels, remedy = list(source.labels), "correct the labels, or ignore them with --data.no-use-labels"
    if len(labels) != len(source.keys):
        raise FewstepError(f"{source.name} has {len(labels)} labels for {len(source.keys)} images; {remedy}")
    for key, label in zip(source.keys, labels, strict=True):
        if isinstance(label, bool) or not isinstance(label, int | np.integer) or label < 0:
            raise FewstepError(f"{source.name}: the label of {key} is {label}, not an integer >= 0; {remedy}")
    found = sorted({int(label) for label in labels})
    names = source.class_names or tuple(str(k) for k in range(len(found)))
    if found[-1] >= len(names):
        problem = f"label {found[-1]}, but its {len(names)} classes are 0..{len(names) - 1}"
        raise FewstepError(f"{source.name} has the {problem}; {remedy}")
    return torch.tensor(labels, dtype=torch.int64), names
