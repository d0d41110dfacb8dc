"""A combination to the bit, from the checkpoints themselves: how a published result is rebuilt from its coefficients."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float64
from torch import Tensor

from fewstep.snapshots.format import Stored
from fewstep.snapshots.layout import is_combined
from fewstep.snapshots.sources import read_checkpoint
from fewstep.types import FewstepError


@torch.no_grad()
def exact(
    files: Sequence[str | Path], sha256s: Sequence[str], coefficients: Float64[Tensor, " k"]
) -> dict[str, Tensor]:
    """theta(c) = theta_K + sum_i c_i (theta_i - theta_K) in float64, then each tensor in its own dtype.

    Products and sums are separate elementwise operations, each rounded by IEEE 754, in the order of the files: the same
    bits on any machine and number of threads. One file is held at a time, and one whose coefficient is 0 is not read. What
    is not combined comes from the last. FewstepError: a file is missing or not the one of that SHA-256.
    """
    check_coefficients(coefficients[None], len(files))
    base = verified(files[-1], sha256s[-1]).tensors
    combined = [name for name, tensor in base.items() if is_combined(name, tensor)]
    minus = {name: torch.zeros_like(base[name], dtype=torch.float64) for name in combined}
    for file, sha256, c in zip(files[:-1], sha256s, coefficients.tolist(), strict=False):
        if c == 0:
            continue
        tensors = verified(file, sha256).tensors
        for name in combined:
            minus[name].sub_((tensors[name].double() - base[name].double()).mul_(c))
    # theta - (-sum) keeps the sign of a zero that is the same in all files, which theta + sum would lose
    made = {name: (base[name].double() - minus[name]).to(base[name].dtype) for name in combined}
    return {name: made[name] if name in made else tensor.clone() for name, tensor in base.items()}


def verified(file: str | Path, sha256: str) -> Stored:
    """The checkpoint, which must be the one of that SHA-256."""
    stored = read_checkpoint(file)
    if stored.weights_sha256 != sha256:
        raise FewstepError(f"{file} was altered: restore the checkpoint with the SHA-256 {sha256[:12]}...")
    return stored


def check_coefficients(coefficients: Float64[Tensor, "m k"], k: int) -> None:
    """FewstepError unless the rows are k finite numbers that sum to 1."""
    if coefficients.shape[1] != k:
        raise FewstepError(f"{coefficients.shape[1]} coefficients for {k} checkpoints: give one for each")
    if not coefficients.isfinite().all():
        raise FewstepError("a coefficient is not finite: give finite numbers that sum to 1")
    sums, room = coefficients.sum(1), 1e-6 * coefficients.abs().sum(1).clamp_min(1)
    if ((sums - 1).abs() > room).any():
        worst = sums[(sums - 1).abs().argmax()].item()
        raise FewstepError(f"coefficients must sum to 1, these sum to {worst:.9g}: divide them by their sum")


__all__ = ["check_coefficients", "exact"]
