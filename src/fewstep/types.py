"""Shapes, the Denoiser protocol, the user's error, and the only broadcasting helper.

Time t *is* the noise level sigma in EDM units (Karras et al. 2022): x_t = x + t * noise, with data scaled so that its
standard deviation is sigma_data (0.5). It is never an index 0..999 and never a fraction 0..1.
"""

from typing import Protocol, TypeAlias, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

Sample: TypeAlias = Float[Tensor, " n *dims"]
Times: TypeAlias = Float[Tensor, " n"]
PerSample: TypeAlias = Float[Tensor, " n"]
Labels: TypeAlias = Int[Tensor, " n"] | None


class FewstepError(ValueError):
    """Something the user can put right. The message is one line that says what to do; the CLI exits with code 2."""


@runtime_checkable
class Denoiser(Protocol):
    """D(x; t, label): an estimate of the clean x [n, *dims] from x at noise level t [n] (EDM sigma, t > 0).

    For a consistency model this is the consistency function f (arXiv:2303.01469). D(x, 0) = x by definition: nobody
    calls a denoiser at t = 0.
    """

    def __call__(self, x: Sample, t: Times, label: Labels = None, /) -> Sample: ...


def like(t: Float[Tensor, " n"], x: Float[Tensor, " n *dims"]) -> Tensor:
    """t [n] with as many trailing axes of length one as x [n, *dims] has, so that t * x broadcasts per sample."""
    return t.reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
