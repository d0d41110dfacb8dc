"""A disk that fills up while a log grows."""

import errno
from typing import IO

ENOSPC = OSError(errno.ENOSPC, "No space left on device")


class HalfWritten:
    """An open file of which the next write gets half onto the disk."""

    def __init__(self, file: IO[str]):
        self.file = file

    def __enter__(self) -> "HalfWritten":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, text: str) -> None:
        self.file.write(text[: len(text) // 2])
        raise ENOSPC
