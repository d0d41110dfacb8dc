"""The file of a bank, written in a stream: a safetensors file of `base` [P] float32, `deltas` [K, P], for int8 `scales`
[K, P/1024], and what is not combined as `copied.NAME`. Its metadata say what it is made of, with a SHA-256 of every part.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save
from torch import Tensor

from fewstep.console import ProgressLine
from fewstep.snapshots.format import stamped, weights_hash
from fewstep.snapshots.layout import entries_of, flatten, is_combined
from fewstep.snapshots.products import BLOCK, DTYPES, Storage, encode
from fewstep.snapshots.sources import Source, read_checkpoint
from fewstep.types import FewstepError

FORMAT = "fewstep-bank/1"
UNKNOWN = "0" * 64  # a SHA-256 while the file is being written


def estimate_bytes(k: int, parameters: int, storage: Storage) -> int:
    """Bytes on disk of a bank of k checkpoints, but for its header (some hundred bytes each) and what is copied."""
    scales = k * -(-parameters // BLOCK) * 4 if storage == "int8" else 0
    return parameters * 4 + k * parameters * DTYPES[storage].itemsize + scales


def write(
    new: Path, files: Sequence[Path], headers: Sequence[dict[str, Any]], storage: Storage, batch: int, quiet: bool
) -> None:
    """The bank of these checkpoints, each read once, in order; the hashes in its header are filled in at the end."""
    last, k = read_checkpoint(files[-1]), len(files)
    entries = entries_of(last.tensors)
    size = sum(torch.Size(entry.shape).numel() for entry in entries)
    if size == 0:
        raise FewstepError(f"{files[-1]} has no floating tensors: there is nothing to combine")
    copied = {name: tensor.clone() for name, tensor in last.tensors.items() if not is_combined(name, tensor)}
    check_space(new.parent, estimate_bytes(k, size, storage) + sum(tensor.nbytes for tensor in copied.values()))
    base, row = torch.empty(size), torch.empty(size)
    flatten(last.tensors, entries, base, files[-1])
    told = [header.get("model", {}) for header in headers]
    sources = [
        Source(str(file), UNKNOWN, model.get("nimg", i), model.get("weights", ""))
        for i, (file, model) in enumerate(zip(files, told, strict=True))
    ]
    rows, table = [UNKNOWN] * k, [asdict(entry) for entry in entries]
    what = {"storage": storage, "batch": batch, "entries": table, "last": headers[-1]}
    sums = {"base": sha256(base), "copied": weights_hash(copied), "rows": rows}

    def header() -> str:
        return stamped({**what, "sources": [asdict(source) for source in sources], "hashes": sums})

    layout = Layout(k, size, storage, save(copied))
    with new.open("wb") as file, ProgressLine("bank", k, unit="checkpoints", quiet=quiet) as line:
        begin = layout.begin(file, header())
        put(file, begin["base"], base)
        for i, path in enumerate(files):
            stored = read_checkpoint(path) if i < k - 1 else last
            flatten(stored.tensors, entries, row, path)
            values, scales = encode(row.sub_(base), storage)
            put(file, begin["deltas"] + i * values.nbytes, values)
            put(file, begin.get("scales", 0) + i * scales.nbytes, scales)
            sources[i], rows[i] = replace(sources[i], sha256=stored.weights_sha256), sha256(values, scales)
            line.advance(1)
        file.seek(0)
        assert layout.begin(file, header()) == begin


def check_space(folder: Path, need: int) -> None:
    """FewstepError unless so many bytes are free."""
    free = shutil.disk_usage(folder).free
    if need > free:
        raise FewstepError(
            f"the bank needs {need / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB free: free some space, use int8, "
            "or combine fewer checkpoints"
        )


def put(file: BinaryIO, place: int, tensor: Tensor) -> None:
    """Write a tensor's bytes there, if it has any."""
    if tensor.numel():
        file.seek(place)
        file.write(raw(tensor))


@dataclass(frozen=True)
class Layout:
    """Where what lies in the file: header, copied tensors, padding, base, scales, deltas (which begin on 64 bytes)."""

    k: int
    size: int
    storage: Storage
    copied: bytes
    """a safetensors file of its own, whose table and bytes become part of ours"""

    def begin(self, file: BinaryIO, metadata: str) -> dict[str, int]:
        """Write header and copied tensors; returns where each other tensor begins."""
        length = int.from_bytes(self.copied[:8], "little")
        table = json.loads(self.copied[8 : 8 + length])
        table = {f"copied.{name}": place for name, place in table.items() if name != "__metadata__"}
        end = len(self.copied) - 8 - length
        blocks = -(-self.size // BLOCK) if self.storage == "int8" else 0
        room = -(end + 4 * self.size + 4 * self.k * blocks) % 64
        kind = {"bf16": "BF16", "fp32": "F32", "int8": "I8"}[self.storage]
        parts = [("padding", "U8", [room], 1), ("base", "F32", [self.size], 4), ("scales", "F32", [self.k, blocks], 4)]
        parts += [("deltas", kind, [self.k, self.size], DTYPES[self.storage].itemsize)]
        begin = {}
        for name, dtype, shape, width in parts:
            if name != "scales" or blocks:
                begin[name], last = end, end + width * torch.Size(shape).numel()
                table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, last]}
                end = last
        text = json.dumps({"__metadata__": {FORMAT: metadata}, **table}).encode()
        text += b" " * (-(8 + len(text)) % 64)
        file.write(len(text).to_bytes(8, "little") + text + self.copied[8 + length :] + bytes(room))
        return {name: 8 + len(text) + place for name, place in begin.items()}


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().data


def sha256(*tensors: Tensor) -> str:
    """Over the bytes of the tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(raw(tensor))
    return digest.hexdigest()
