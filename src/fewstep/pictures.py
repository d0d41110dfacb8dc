"""Grids of samples as PNG."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep.files import atomic_write

CELL = 40  # pixels a small image is enlarged to


def grid(images: UInt8[Tensor, "n c h w"], columns: int = 8, gap: int = 2, cell: int = CELL) -> Image.Image:
    """Images [n, C, H, W] in rows of `columns` on white; those smaller than `cell` are enlarged smoothly to about it."""
    array = images.permute(0, 2, 3, 1).cpu().numpy()
    n, height, width, channels = array.shape
    scale = max(1, round(cell / width))
    size = (width * scale, height * scale)
    rows = -(-n // columns)
    canvas = Image.new("RGB", (columns * (size[0] + gap) - gap, rows * (size[1] + gap) - gap), "white")
    for i, pixels in enumerate(array):
        picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        if scale > 1:
            picture = picture.resize(size, Image.Resampling.BICUBIC)
        canvas.paste(picture, (i % columns * (size[0] + gap), i // columns * (size[1] + gap)))
    return canvas


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


def captioned(pictures: Mapping[str, Image.Image], gap: int = 20, size: int = 17) -> Image.Image:
    """Pictures in one row, each under its caption, on white."""
    font, head = ImageFont.load_default(size), 2 * size
    under = []
    for caption, picture in pictures.items():
        canvas = Image.new("RGB", (picture.width, picture.height + head), "white")
        ImageDraw.Draw(canvas).text((picture.width // 2, head // 2), caption, "black", font, anchor="mm")
        canvas.paste(picture, (0, head))
        under.append(canvas)
    row = beside(under, gap)
    framed = Image.new("RGB", (row.width + 2 * gap, row.height + gap), "white")
    framed.paste(row, (gap, 0))
    return framed
