"""Reading what `fewstep encode` wrote: a folder of shards of posterior means and log variances.

latents.json          what it is: LatentSpace, DataSpec of the images, shards with their SHA-256; the last file written
keys.json             names, labels and class names of the images
latents-00000.safetensors ...   `latents` [rows, F, P, H, W], memory-mapped: see fewstep.data.prepare.Latents
statistics.safetensors          mean and std of every element, [C, H, W]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep import codec
from fewstep.data.latent_space import LatentSpace, check_scale
from fewstep.files import read_json
from fewstep.noise import permutation
from fewstep.types import FewstepError

MANIFEST: Final = "latents.json"
PLAN: Final = "encoding.json"  # there from the beginning
KEYS: Final = "keys.json"
VERSION: Final = 1
OF_MODEL: Final = "model "  # begins what the manifest calls statistics that are a model's
DTYPES: Final = {"fp16": torch.float16, "fp32": torch.float32}
CHECKED: Final = 512  # rows that the scale check looks at


def is_encoded(folder: Path) -> bool:
    """Whether it holds latents; FewstepError if they are unfinished."""
    if (folder / MANIFEST).is_file():
        return True
    if (folder / PLAN).is_file():
        raise FewstepError(f"{folder} is not wholly encoded: give the same `fewstep encode` again, and it goes on")
    return False


@dataclass(frozen=True, eq=False)
class Encoded:
    """A folder of latents."""

    path: Path
    name: str
    space: LatentSpace
    data: Any
    """the DataSpec of the images"""
    keys: list[str]
    labels: list[int] | None
    class_names: tuple[str, ...]
    stored: tuple[int, ...]
    """shape of a row, (F, P, H, W)"""
    dtype: torch.dtype
    rows: int
    """of each shard but the last"""
    shards: Sequence[dict[str, Any]]

    @classmethod
    def open(cls, path: Path) -> "Encoded":
        """Check all but the values: every shard is there and whole; a few hundred latents are of the statistics' scale."""
        told, keys = read_json(path / MANIFEST), read_json(path / KEYS)
        if told.get("version") != VERSION:
            raise FewstepError(
                f"{path} was encoded by another version of fewstep ({told.get('fewstep')}): use that one"
            )
        encoded = cls(
            path, told["name"], codec.decode(told["space"]), codec.decode(told["data"]), keys["keys"], keys["labels"],
            tuple(keys["class_names"]), tuple(told["stored"]), DTYPES[told["dtype"]], told["rows"],
            told["shards"],
        )  # fmt: skip
        if sum(shard["rows"] for shard in encoded.shards) != len(encoded.keys):
            raise FewstepError(f"{path}: {KEYS} and {MANIFEST} do not belong together; {encoded.remedy}")
        for shard in encoded.shards:
            file = path / shard["file"]
            if not file.is_file() or file.stat().st_size != shard["bytes"]:
                problem = "is not whole" if file.is_file() else "is missing"
                raise FewstepError(f"{file} {problem}; {encoded.remedy}")
        rows = encoded(permutation(0, 0, len(encoded.keys))[:CHECKED].sort().values)[:, 0]
        channels = encoded.space.shape[0]
        variances = rows[:, channels:].float().exp() if encoded.posterior else None
        if not str(told["statistics"]).startswith(OF_MODEL):  # whose convention need not be these data's own scale
            check_scale(encoded.space, rows[:, :channels], variances, str(path))
        return encoded

    @property
    def remedy(self) -> str:
        return "give the same `fewstep encode` again, which makes what is missing"

    @property
    def posterior(self) -> bool:
        """Whether rows are mean and log variance, not one sample."""
        return self.stored[1] == 2 * self.space.shape[0]

    @property
    def flips(self) -> bool:
        """Whether mirrored images are there too."""
        return self.stored[0] == 2

    @cached_property
    def maps(self) -> dict[int, Tensor]:
        """The shards that were touched."""
        return {}

    def __call__(self, rows: Int64[Tensor, " m"]) -> Float[Tensor, "m f p h w"]:
        """The stored rows, as they are stored (half precision, usually)."""
        values = torch.empty(len(rows), *self.stored, dtype=self.dtype)
        shard = rows // self.rows
        for k in shard.unique().tolist():
            mine = (shard == k).nonzero()[:, 0]
            values[mine] = self.mapped(k)[rows[mine] - k * self.rows]
        return values

    def mapped(self, k: int) -> Tensor:
        """A shard's latents, read from the disk where they are used."""
        if k not in self.maps:
            shard = self.shards[k]
            file = self.path / shard["file"]
            try:
                with safe_open(str(file), framework="pt") as opened:
                    ours = any(shard["sha256"] in text for text in (opened.metadata() or {}).values())
                    latents = opened.get_tensor("latents")
            except (OSError, SafetensorError) as error:
                raise FewstepError(f"{file} cannot be read ({error}); {self.remedy}") from None
            if not ours or latents.shape != (shard["rows"], *self.stored) or latents.dtype != self.dtype:
                raise FewstepError(f"{file} is not the shard that {MANIFEST} names; {self.remedy}")
            self.maps[k] = latents
        return self.maps[k]
