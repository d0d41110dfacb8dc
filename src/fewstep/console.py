"""What a person sees while something long runs: one refreshing line on stderr with rate and ETA."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVERY = 15.0  # seconds between lines where stderr is not a terminal


def say(message: str) -> None:
    """One line to stderr; results go to stdout."""
    print(message, file=sys.stderr, flush=True)


class ProgressLine:
    """A context manager: `advance(n)` images, `note(text)` beside them. A plain line now and then outside a terminal."""

    def __init__(self, title: str, total: int, done: int = 0, unit: str = "img", quiet: bool = False):
        self.title, self.total, self.done, self.unit, self.quiet = title, total, done, unit, quiet
        self.began = self.last = time.monotonic()
        self.first, self.text = done, ""
        console = Console(stderr=True)
        self.live = None if quiet or not console.is_terminal else Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
            console=console, refresh_per_second=4, speed_estimate_period=60,
        )  # fmt: skip
        self.task = (
            self.live.add_task(escape(title), total=total, completed=done, rate="", note="") if self.live else None
        )

    def __enter__(self) -> "ProgressLine":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()
        elif not self.quiet:
            self.plain()

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)

    def note(self, text: str) -> None:
        self.text = text

    def advance(self, n: int) -> None:
        """n more units are done."""
        self.done += n
        if self.live and self.task is not None:
            rate = f"{self.rate:,.0f} {self.unit}/s"
            self.live.update(self.task, completed=self.done, rate=rate, note=escape(self.text))
        elif not self.quiet and time.monotonic() - self.last > EVERY:
            self.plain()

    def finish(self) -> None:
        """It ended before its total, and as it should."""
        self.total = self.done
        if self.live and self.task is not None:
            self.live.update(self.task, total=self.total)

    def plain(self) -> None:
        self.last = time.monotonic()
        left = (self.total - self.done) / max(self.rate, 1e-9)
        eta = f" in {self.last - self.began:.0f} s" if self.done >= self.total else f", ETA {left:.0f} s"
        eta = eta if self.done > self.first else ""
        counts = f"{self.done:,}/{self.total:,} {self.unit}, {self.rate:,.0f} {self.unit}/s{eta}"
        say(f"{self.title}: {counts} {self.text}".rstrip())
