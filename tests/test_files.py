"""Files: whole or not at all, whatever happens while they are written."""

import errno
import json
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.files import append_jsonl, atomic_write, read_json, read_jsonl, write_json
from fewstep.types import FewstepError

FULL_DISK = {
    "ENOSPC": OSError(errno.ENOSPC, "No space left on device"),
    "EDQUOT": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


def raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def content_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_atomic_write_makes_folders_and_leaves_only_the_file(tmp_path):
    for content in (b"one", "two", lambda new: new.write_bytes(b"three")):
        atomic_write(tmp_path / "a" / "b", content)
    assert content_of(tmp_path / "a") == {"b": b"three"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_atomic_write_follows_the_umask_even_if_the_writer_does_not(tmp_path, umask):
    def private(new):
        new.write_bytes(b"")
        new.chmod(0o600)

    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "f", private)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", FULL_DISK.values(), ids=FULL_DISK)
@pytest.mark.parametrize("where", ["mkdir", "content", "fsync", "replace"])
def test_full_disk_keeps_the_old_file_and_says_so(tmp_path, monkeypatch, where, error):
    path, fail = tmp_path / "file", raiser(error)
    path.write_bytes(b"old")

    def half(new):
        new.with_name(".tmp123456").write_bytes(b"of a library")
        new.write_bytes(b"ne")
        fail()

    if where == "mkdir":
        monkeypatch.setattr("pathlib.Path.mkdir", fail)
    elif where != "content":
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(FewstepError, match=r"the disk is full: .*/file was not written") as caught:
        atomic_write(path, half if where == "content" else b"new")
    assert "\n" not in str(caught.value)
    assert content_of(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), ZeroDivisionError(), KeyboardInterrupt()])
def test_any_other_error_passes_and_leaves_nothing(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")

    def half(new):
        new.write_bytes(b"ne")
        raise error

    with pytest.raises(type(error)):
        atomic_write(tmp_path / "file", half)
    assert content_of(tmp_path) == {"file": b"old"}


def test_json_files_round_trip_and_broken_ones_are_refused(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1, 2.5, None, "é"]})
    assert read_json(tmp_path / "a.json") == {"x": [1, 2.5, None, "é"]}
    (tmp_path / "broken.json").write_text('{"x": ')
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name, words in {"broken": "not valid JSON", "binary": "not valid JSON", "none": "does not exist"}.items():
        with pytest.raises(FewstepError, match=words):
            read_json(tmp_path / f"{name}.json")


ROWS = [{"nimg": 1, "text": "a\nb\u2028 é"}, {"nimg": 2, "text": "}"}, {"nimg": 30, "losses": {"x": 0.1}}]


def test_jsonl_round_trip_and_a_missing_file_has_no_rows(tmp_path):
    assert read_jsonl(tmp_path / "log") == []
    for row in ROWS:
        append_jsonl(tmp_path / "log", row)
    assert read_jsonl(tmp_path / "log") == ROWS


@given(st.integers(0, 200))
def test_a_log_cut_anywhere_loses_only_the_row_that_was_cut(tmp_path_factory, cut):
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    path = tmp_path_factory.mktemp("cut") / "log"
    path.write_text(text[:cut])
    whole = [json.loads(line) for line in text[:cut].split("\n")[:-1]]
    rows = read_jsonl(path)
    assert rows[: len(whole)] == whole
    assert rows in (whole, ROWS[: len(whole) + 1])  # a row that lacks only its newline is whole


def test_a_log_on_a_full_disk_says_so(tmp_path):
    with pytest.raises(FewstepError, match="the disk is full: /dev/full could not grow"):
        append_jsonl(type(tmp_path)("/dev/full"), {"x": 1})
    with pytest.raises(IsADirectoryError):
        append_jsonl(tmp_path, {"x": 1})
