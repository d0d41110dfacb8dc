"""Writing and reading files so that nothing already saved is ever lost or half-written."""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fewstep.types import FewstepError

PART = ".part"  # ends the name of the folder in which a file is written
FULL = {errno.ENOSPC, errno.EDQUOT}


def atomic_write(path: Path, content: bytes | str | Callable[[Path], None]) -> None:
    """Write a file whole or not at all: in a folder beside it, flushed to the disk, then renamed over the old one.

    `content` may be a function that writes the file at the path it is given. A full disk leaves the old file as it was
    and raises FewstepError. Whatever a killed process leaves behind, safetensors' own temporary file too, is in the folder.
    """
    folder = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    new = folder / path.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(new)
        else:
            new.write_bytes(content.encode() if isinstance(content, str) else content)
        new.chmod(folder.stat().st_mode & 0o666)  # as the umask says: safetensors lets nobody but the owner read
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except Exception as error:
        if getattr(error, "errno", None) in FULL or any(f"os error {number}" in str(error) for number in FULL):
            raise FewstepError(
                f"the disk is full: {path} was not written (what was saved before is intact); free some space, then go on"
            ) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def whole_folder(out: Path, own: Collection[str], mark: str, overwrite: bool, fill: Callable[[Path], None]) -> None:
    """A folder that is there whole or not at all: filled beside its place, then renamed.

    FewstepError unless `out` is empty, or holds the file `mark` of an earlier one and overwrite is given. Then what is not
    among the names `own` stays where it is.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (overwrite and (out / mark).is_file()))):
        again = ", or replace it with --overwrite" if (out / mark).is_file() else ""
        raise FewstepError(f"{out} is not empty: choose another OUT{again}")
    new, old = (out.with_name(f".{out.name}.{os.getpid()}{end}") for end in (PART, ".old"))
    try:
        new.mkdir(parents=True)
        fill(new)
        if out.exists():
            os.replace(out, old)
        os.replace(new, out)
        for kept in list(old.iterdir()) if old.exists() else ():
            if kept.name not in own:
                os.replace(kept, out / kept.name)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise FewstepError(f"{out} was not written ({error}): free some space or choose another OUT") from error
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        shutil.rmtree(new, ignore_errors=True)


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
        if error.errno in FULL:
            raise FewstepError(f"the disk is full: {path} could not grow; free some space, then go on") from error
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
