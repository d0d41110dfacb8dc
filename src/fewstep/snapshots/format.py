"""The snapshot file: tensors in safetensors, and in its metadata a JSON header with two SHA-256 sums.

`weights_sha256` is over the tensors and names the weights wherever a number is quoted for them; `header_sha256` is over
the header itself. One flipped bit anywhere is an error. Nothing is ever unpickled. The same tensors and header are the
same bytes: the metadata has one key only, for safetensors writes several in a random order.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fewstep.files import atomic_write
from fewstep.hub import mapped, weights_hash
from fewstep.types import FewstepError

FORMAT = "fewstep/1"
REMEDY = "use another snapshot of the run"


@dataclass(frozen=True)
class Stored:
    """What a file held."""

    tensors: dict[str, Tensor]
    header: dict[str, Any]
    weights_sha256: str


def write(path: Path, tensors: Mapping[str, Tensor], header: dict[str, Any]) -> str:
    """Store tensors with a JSON-able header, atomically; returns the weights' SHA-256."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    digest = weights_hash(plain)
    metadata = {FORMAT: stamped({**header, "weights_sha256": digest})}
    atomic_write(path, lambda sibling: save_file(plain, str(sibling), metadata=metadata))
    return digest


def read_header(path: Path) -> dict[str, Any]:
    """What the file says it is, without its tensors. FewstepError for anything but an intact fewstep file."""
    header = peek(path, FORMAT)
    if header is None:
        raise FewstepError(f"{path} is a safetensors file but not a fewstep snapshot: give one that fewstep saved")
    return header


def peek(path: Path, key: str, remedy: str = REMEDY) -> dict[str, Any] | None:
    """The checked header under that key of a safetensors file's metadata; None if it has none (a foreign file)."""
    if not path.is_file():
        raise FewstepError(f"{path} does not exist: give a run directory or a .safetensors snapshot")
    refuse_pickle(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise FewstepError(f"{path} is truncated or damaged ({error}): {remedy}") from None
    if key not in metadata:
        return None
    header_sha256, _, text = metadata[key].partition(" ")
    if hashlib.sha256(text.encode()).hexdigest() != header_sha256:
        raise FewstepError(f"{path} is damaged (its header does not match its checksum): {remedy}")
    return json.loads(text)


def stamped(header: Mapping[str, Any]) -> str:
    """The header as it stands in the metadata: its SHA-256, a space, its JSON."""
    text = json.dumps(header)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}"


def read(path: Path) -> Stored:
    """The whole file, checked against its checksums, on the CPU."""
    header = read_header(path)
    tensors = mapped(path, REMEDY)
    digest = weights_hash(tensors)
    if digest != header["weights_sha256"]:
        raise FewstepError(f"{path} is damaged (its weights do not match their checksum): {REMEDY}")
    return Stored(tensors, header, digest)


def refuse_pickle(path: Path) -> None:
    """FewstepError for pickles and PyTorch archives, which could run code when opened."""
    with path.open("rb") as file:
        start = file.read(9)
    archive = start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"
    archive &= (
        start[8:] != b"{"
    )  # 8 bytes of length, then JSON: a safetensors file, of whose lengths 1 in 32 begins with \x80
    if archive or path.suffix in {".pkl", ".pt", ".pth", ".ckpt"}:
        raise FewstepError(f"{path} is a pickle, which can run code when opened: fewstep reads .safetensors only")
