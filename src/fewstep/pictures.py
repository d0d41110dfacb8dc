"""Grids of samples as PNG."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from fewstep.files import atomic_write

CELL = 40  # pixels a small image is enlarged to at least (by whole numbers, nearest neighbour)


def grid(images: UInt8[Tensor, "n c h w"], columns: int = 8, gap: int = 2, cell: int = CELL) -> Image.Image:
    """Images [n, C, H, W] in rows of `columns` on white; images smaller than `cell` are enlarged by a whole number."""
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    if array.shape[-1] == 1:
        array = array.repeat(3, axis=-1)
    scale = max(1, -(-cell // array.shape[2]))
    array = array.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = array.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(array):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return Image.fromarray(canvas)


def png(image: Image.Image) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically."""
    atomic_write(path, png(image))


def beside(images: Sequence[Image.Image], gap: int = 24) -> Image.Image:
    """Pictures in one row, tops aligned, on white."""
    width = sum(i.width for i in images) + gap * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + gap
    return canvas
