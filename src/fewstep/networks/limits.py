"""The limits every network configuration has; the messages name the option."""

from collections.abc import Sequence

from fewstep.types import FewstepError


def check_positive(config: object, names: Sequence[str]) -> None:
    """FewstepError unless each of these fields is 1 or more."""
    for name in names:
        if getattr(config, name) < 1:
            option = f"--network.{name.replace('_', '-')}"
            raise FewstepError(f"{option} must be 1 or more, got {getattr(config, name)}")


def check_multipliers(multipliers: Sequence[int]) -> None:
    """FewstepError unless there is a level, and every level has a width."""
    if not multipliers or min(multipliers) < 1:
        raise FewstepError(f"--network.multipliers needs one number from 1 on for each level, got {multipliers}")


def check_dropout(dropout: float) -> None:
    """FewstepError unless it is a probability that leaves something."""
    if not 0 <= dropout < 1:
        raise FewstepError(f"--network.dropout must be 0 or more and below 1, got {dropout}")
