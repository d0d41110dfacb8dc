"""Ctrl-C and SIGTERM while training: the step in progress is finished and saved, on every process."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from fewstep import distributed
from fewstep.console import say


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the run is saved and can be resumed."""

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGINT and SIGTERM become entries of a list, so that the step in progress is finished and saved."""
    caught: list[int] = []
    first = 0.0
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if caught:  # asked twice: go at once; but torchrun and the terminal send one Ctrl-C several times
            if time.monotonic() - first > 3:
                raise KeyboardInterrupt
            return
        first = time.monotonic()
        caught.append(number)
        say(f"{signal.Signals(number).name}: finishing this step, then saving (again: stop at once)")

    old = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def signalled(caught: list[int], device: torch.device) -> int:
    """The signal that any process has caught, so that all of them stop after the same step; 0: none."""
    if distributed.world() == 1:
        return caught[0] if caught else 0
    numbers = torch.zeros(65, device=device)
    numbers[caught[0] if caught else 0] = 1
    distributed.sum_over_ranks([numbers])
    return int(numbers[1:].argmax()) + 1 if numbers[1:].any() else 0
