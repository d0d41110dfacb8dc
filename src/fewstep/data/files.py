"""Image files, loose in a folder or in one zip: the same files give the same images, keys and labels either way.

Labels come from `dataset.json` at the root, as EDM writes it: {"labels": [[file, label], ...]}, or {file: label}; null
means none. Without one, the top-level directories are the classes, sorted, if every image is in one and there are at
least two. Directories all named by five digits (00000, 00001, ...) are EDM's way to keep them short, not classes.
"""

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from threading import Lock
from typing import Any

from fewstep.data.decode import Source, reason
from fewstep.types import FewstepError

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def folder(path: Path) -> Source:
    """All image files below a folder."""
    keys = image_keys(file.relative_to(path).as_posix() for file in path.rglob("*"))
    file = path / "dataset.json"
    listing = file.read_bytes() if file.is_file() else None
    return labelled(path.absolute().name, keys, lambda i: (path / keys[i]).read_bytes(), listing)


def zipped(path: Path) -> Source:
    """All image files in a zip, which stays open; a lock lets many threads read it."""
    try:
        archive, lock = zipfile.ZipFile(path), Lock()
        listing = archive.read("dataset.json") if "dataset.json" in archive.namelist() else None
    except Exception as error:  # broken, encrypted, of an unknown compression: each has its own exception
        raise FewstepError(f"{path} is not a readable zip ({reason(error)}); make or download it again") from error
    keys = image_keys(archive.namelist())

    def read(i: int) -> bytes:
        with lock:
            return archive.read(keys[i])

    return labelled(path.stem, keys, read, listing)


def image_keys(names: Iterable[str]) -> list[str]:
    """The images, by their ending, sorted; without hidden files and the twins that macOS puts into zips."""
    hidden = (".", "__MACOSX")
    images = (name for name in names if name.lower().endswith(ENDINGS))
    return sorted(name for name in images if not any(part.startswith(hidden) for part in name.split("/")))


def labelled(name: str, keys: list[str], read: Callable[[int], bytes], listing: bytes | None) -> Source:
    """The source, with the labels of its listing or else of its directories."""
    if listing is not None:
        table = label_table(name, listing)
        return Source(name, keys, read, None if table is None else [table.get(key) for key in keys])
    tops = [key.partition("/")[0] for key in keys]
    number = {top: k for k, top in enumerate(sorted(set(tops)))}
    edm_layout = all(len(top) == 5 and top.isdecimal() for top in number)
    if len(number) < 2 or edm_layout or not all("/" in key for key in keys):
        return Source(name, keys, read)
    return Source(name, keys, read, [number[top] for top in tops], tuple(number))


def label_table(name: str, listing: bytes) -> dict[str, Any] | None:
    """{file: label} of a dataset.json, or None if it says that there are no labels."""
    try:
        content = json.loads(listing)
        table = content.get("labels", content)
        return None if table is None else dict(table)
    except (AttributeError, TypeError, ValueError) as error:
        form = f'of the form {{"labels": [[file, label], ...]}} ({reason(error)})'
        raise FewstepError(f"the dataset.json of {name} is not {form}; correct or remove it") from error
