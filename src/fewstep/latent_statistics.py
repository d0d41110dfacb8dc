"""Mean and standard deviation of latents: measured, or read from a file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jaxtyping import Float, Float64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.snapshots import format as snapshot
from fewstep.types import FewstepError

ROWS: Final = 64  # summed at a time


@dataclass(frozen=True, eq=False)
class Moments:
    """Of latents drawn from n posteriors, element by element: mean and summed squared deviations, float64, mergeable.

    The variance is that of the samples: the mean of the posteriors' variances plus the variance of their means.
    """

    n: int
    mean: Float64[Tensor, "c h w"]
    m2: Float64[Tensor, "c h w"]

    @classmethod
    def of(cls, stored: Float[Tensor, "n f p h w"], channels: int) -> "Moments":
        """Of stored rows, mirrored ones included; the same for any number of rows that are read at a time."""
        parts = (cls.of_rows(rows.flatten(0, 1).double(), channels) for rows in stored.split(ROWS))
        return cls.merged(parts)

    @classmethod
    def of_rows(cls, rows: Float64[Tensor, "n p h w"], channels: int) -> "Moments":
        means, log_variances = rows[:, :channels], rows[:, channels:]
        mean = means.mean(0)
        m2 = (means - mean).square().sum(0)
        return cls(len(rows), mean, m2 + log_variances.exp().sum(0) if log_variances.shape[1] else m2)

    @classmethod
    def merged(cls, parts: "Iterator[Moments]") -> "Moments":
        """In order."""
        whole = next(parts)
        for part in parts:
            n, apart = whole.n + part.n, part.mean - whole.mean
            m2 = whole.m2 + part.m2 + apart.square() * (whole.n * part.n / n)
            whole = cls(n, whole.mean + apart * (part.n / n), m2)
        return whole

    @property
    def std(self) -> Float64[Tensor, "c h w"]:
        return (self.m2 / self.n).sqrt()

    def channels(self) -> tuple[Float64[Tensor, " c"], Float64[Tensor, " c"]]:
        """Mean and standard deviation of all values of a channel."""
        mean = self.mean.mean((1, 2))
        variance = self.std.square().mean((1, 2)) + (self.mean - mean[:, None, None]).square().mean((1, 2))
        return mean, variance.sqrt()


def read_statistics(text: str, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """mean and std of a safetensors file, of the channels or the elements of latents of this shape."""
    file = Path(text).expanduser()
    if not file.is_file():
        raise FewstepError(f"--statistics {text}: give channel, element, or a .safetensors file with mean and std")
    snapshot.refuse_pickle(file)
    try:
        with safe_open(str(file), framework="pt") as stored:
            found = {name: stored.get_tensor(name).double() for name in ("mean", "std")}
    except SafetensorError as error:
        raise FewstepError(
            f"--statistics {text} is no safetensors file with mean and std ({error}): write one"
        ) from None
    c, h, w = shape
    allowed = [(c,), (c, 1, 1), (1, c, 1, 1), (c, h, w), (1, c, h, w)]
    for name, tensor in found.items():
        if tuple(tensor.shape) not in allowed:
            raise FewstepError(
                f"--statistics {text}: {name} is {' x '.join(map(str, tensor.shape)) or 'a number'}, but the latents are "
                f"{c} x {h} x {w}: give {c} values (of the channels) or {c} x {h} x {w} (of the elements)"
            )
    return found["mean"], found["std"]
