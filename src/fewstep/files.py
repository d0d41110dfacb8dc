"""Writing and reading files so that nothing already saved is ever lost or half-written."""

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.types import FewstepError


def atomic_write(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: into a sibling, flushed to the disk, then renamed over the old one.

    `content` may be a function that writes the sibling itself. A full disk leaves the old file as it was and raises
    FewstepError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if callable(content):
            content(sibling)
        else:
            sibling.write_bytes(content.encode() if isinstance(content, str) else content)
        with sibling.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            sibling.unlink()
        if getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error):
            raise FewstepError(
                f"the disk is full: {path} was not written (what was saved before is intact); free some space and resume"
            ) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Atomically, indented, with a final newline."""
    atomic_write(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The parsed file; FewstepError when it is missing or no JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FewstepError(f"{path} does not exist: is its folder a fewstep run?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FewstepError(f"{path} is not valid JSON ({error}): restore it or start a new run") from None


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One line at the end of a log."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise FewstepError(f"the disk is full: {path} could not grow; free some space and resume") from error
        raise


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line cut short by a kill is dropped. Missing: no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows
