"""Images as rows: the bundled digits, .npz, parquet and Hugging Face data sets. Nothing is ever unpickled."""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fewstep.data.decode import Source, reason
from fewstep.types import FewstepError


def digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, 0..16 scaled to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return array_rows("digits", np.round(bunch.images * 255 / 16).astype(np.uint8), bunch.target)


def array_rows(name: str, images: np.ndarray, labels: np.ndarray | None) -> Source:
    """The rows of an array [n, h, w] or [n, h, w, 3]; their keys are their numbers."""
    return Source(name, [str(i) for i in range(len(images))], images.__getitem__, labels)


def npz(path: Path) -> Source:
    """uint8 images ([n, h, w], [n, h, w, c] or [n, c, h, w]) and perhaps integer labels [n], under the usual names."""
    try:
        with np.load(path, allow_pickle=False) as file:
            images = next((file[name] for name in ("images", "x", "arr_0") if name in file), None)
            labels = next((file[name] for name in ("labels", "label", "y", "arr_1") if name in file), None)
        if isinstance(images, bytes) or isinstance(labels, bytes):  # what numpy makes of a member that is no array
            raise ValueError("a member is no array")
    except Exception as error:  # numpy raises half a dozen kinds on a broken archive
        cause = pickled_or_broken(path, error)
        raise FewstepError(f"{path} cannot be read ({cause}); save uint8 arrays with numpy.savez") from error
    if images is None or images.dtype != np.uint8:
        found = "no array named images, x or arr_0" if images is None else f"images of type {images.dtype}"
        raise FewstepError(f"{path} has {found}; save uint8 images, 0..255, under the name images")
    return array_rows(path.stem, channels_last(images, path), labels)


def pickled_or_broken(path: Path, error: Exception) -> str:
    """Why numpy cannot read an .npz: to numpy, every file that it does not recognise is a pickle."""
    if isinstance(error, OSError) and error.errno:
        return reason(error)
    archive = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        pickle = file.read(1) == b"\x80"
    if "pickle" in str(error) and (archive or pickle):
        return "it holds pickled objects, which are never loaded"
    return reason(error) if archive else "it is not a whole .npz archive"


def channels_last(images: np.ndarray, path: Path) -> np.ndarray:
    """[n, h, w] or [n, h, w, 3] from any of the three layouts; a shape that could be two of them is refused."""
    if images.ndim == 3:
        return images
    last, first = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (3, 1))
    if last == first:
        problem = "is ambiguous between" if last else "is neither [n, h, w] nor"
        layouts = "[n, h, w, c] and [n, c, h, w], c = 1 or 3"
        raise FewstepError(f"the shape {list(images.shape)} of the images in {path} {problem} {layouts}; reshape them")
    images = images if last else images.transpose(0, 2, 3, 1)
    return images[..., 0] if images.shape[3] == 1 else images


def parquet(path: Path) -> Source:
    """One parquet file, or all shards in a folder, sorted: the image format of the Hugging Face hub.

    Parquet has no random access, so the encoded images stay in memory; a zip suits a set that is larger than that.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    chunks: list[Any] = []
    keys: list[str] = []
    labels: list[Any] = []
    for shard in sorted(path.glob("*.parquet")) if path.is_dir() else [path]:
        try:
            with pq.ParquetFile(shard) as file:
                schema = file.schema_arrow
                column = image_column(shard, schema.names)
                table = file.read([name for name in (column, "label") if name in schema.names])
            images = table[column]
            chunks += (pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images).chunks
        except (pa.ArrowException, OSError) as error:
            raise FewstepError(f"{shard} is not readable as parquet ({reason(error)}); download it again") from error
        keys += [f"{shard.name}:{row}" for row in range(len(table))]
        labels += table["label"].to_pylist() if "label" in schema.names else []
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    names = tuple(features.get("label", {}).get("names") or ())
    encoded = pa.chunked_array(chunks) if chunks else []
    return Source(
        path.absolute().name.removesuffix(".parquet"), keys, lambda i: encoded[i].as_py(), labels or None, names
    )


def hugging_face(text: str) -> Source:
    """hf:NAME[:SPLIT], through the `datasets` package and its cache."""
    try:
        import datasets
    except ImportError:
        raise FewstepError(f"{text} needs the `datasets` package: pip install 'fewstep[hf]'") from None
    name, _, split = text.removeprefix("hf:").partition(":")
    try:
        table = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # offline, unknown name, unknown split: each has its own exception
        remedy = f"python -c \"import datasets; datasets.load_dataset('{name}')\""
        raise FewstepError(f"{text}: {reason(error)}; offline? first run, with a network: {remedy}") from error
    column = image_column(text, table.column_names)
    files = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def read(i: int) -> bytes:
        entry = files[i][column]
        return entry["bytes"] or Path(entry["path"]).read_bytes()

    labels = list(table["label"]) if "label" in table.column_names else None
    class_names = tuple(getattr(table.features.get("label"), "names", None) or ())
    return Source(name, [str(i) for i in range(len(table))], read, labels, class_names)


def image_column(source: object, columns: Sequence[str]) -> str:
    """The column that holds the images."""
    column = next((name for name in ("img", "image") if name in columns), None)
    if column is None:
        raise FewstepError(f"{source} has no column img or image, only {', '.join(columns)}; rename the right one")
    return column
