"""From what a source stores to uint8 pixels, by one policy, and between uint8 and the [-1, 1] that networks see.

The first image decides: greyscale (Pillow's mode L) gives one channel, everything else RGB; later images follow it.
Images are turned as their EXIF orientation says, and what is transparent shows white.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewstep.types import FewstepError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")  # Pillow knows some that start other programs; these do not


@dataclass(frozen=True)
class Source:
    """Images as they are stored: `read(i)` is a file's bytes or a uint8 array [h, w] or [h, w, 3]."""

    name: str
    keys: list[str]
    read: Callable[[int], Any]
    labels: Sequence[Any] | np.ndarray | None = None
    class_names: tuple[str, ...] = ()


def reason(error: Exception) -> str:
    """What an exception says, in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def to_float(pixels: UInt8[Tensor, "*dims"]) -> Float32[Tensor, "*dims"]:
    """0..255 -> [-1, 1]."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_uint8(samples: Float[Tensor, "*dims"]) -> UInt8[Tensor, "*dims"]:
    """[-1, 1] -> 0..255, clamped and rounded: to_uint8(to_float(u)) == u."""
    return ((samples.to(torch.float32) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def opened(source: Source, i: int) -> Image.Image:
    """Image i, upright and opaque; greyscale stays mode L."""
    where = f"{source.name}: image {source.keys[i]}"
    try:
        raw = source.read(i)
        if isinstance(raw, np.ndarray):
            return Image.fromarray(raw)
        image = Image.open(BytesIO(raw), formats=FORMATS)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        cause = f"not {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise FewstepError(f"{where} cannot be read ({cause}); repair or remove it") from error
    if image.mode.startswith(("I", "F")):
        raise FewstepError(f"{where} has more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
    return on_white(image) if image.has_transparency_data else image


def on_white(image: Image.Image) -> Image.Image:
    """The image over white, for the colours beneath transparent pixels are whatever a program left there."""
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("L" if image.mode == "L" else "RGB")


def fit(image: Image.Image, side: int) -> Image.Image:
    """The largest central square, resized: by the mean of pixels if it is a whole multiple, else Lanczos."""
    crop = min(image.size)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    square = image.crop((left, top, left + crop, top + crop))
    method = Image.Resampling.BOX if crop % side == 0 else Image.Resampling.LANCZOS
    return square if crop == side else square.resize((side, side), method)


class Decoder:
    """Row numbers of a source -> pixels. Without a resolution, all images must be squares of one size."""

    def __init__(self, source: Source, resolution: int | None) -> None:
        first = opened(source, 0)
        self.source, self.resolution, self.size = source, resolution, first.size
        self.mode = "L" if first.mode == "L" else "RGB"
        self.shape = (len(self.mode), resolution or first.height, resolution or first.height)
        self.one(0)

    def one(self, i: int) -> np.ndarray:
        """Image i, [c, h, w]."""
        image, keys = opened(self.source, i), self.source.keys
        if self.resolution is None and (image.size != self.size or image.width != image.height):
            sizes = {keys[0]: self.size, keys[i]: image.size}
            found = " and ".join(f"{key} is {width}x{height}" for key, (width, height) in sizes.items())
            remedy = "make them squares of one size, e.g. with --data.resolution 32"
            raise FewstepError(f"{self.source.name}: {found}; {remedy}")
        pixels = np.asarray(fit(image.convert(self.mode), self.shape[1]))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def __call__(
        self, rows: Int64[Tensor, " m"], progress: Callable[[int, int], None] | None = None
    ) -> UInt8[Tensor, "m c h w"]:
        """The pixels of these rows; threads share the work, in at most 100 pieces, if there are many."""
        numbers = rows.tolist()
        pixels = np.empty((len(numbers), *self.shape), np.uint8)
        piece = ceil(len(numbers) / 100) or 1

        def fill(begin: int) -> int:
            end = min(begin + piece, len(numbers))
            for k in range(begin, end):
                pixels[k] = self.one(numbers[k])
            return end

        with ThreadPoolExecutor(os.cpu_count()) if len(numbers) > 32 else nullcontext() as pool:
            for done in (pool.map if pool else map)(fill, range(0, len(numbers), piece)):
                if progress is not None:
                    progress(done, len(numbers))
        return torch.from_numpy(pixels)
