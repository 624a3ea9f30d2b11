"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemstill.core import files
from gemstill.core.errors import Error


def test_a_file_and_a_folder_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    files.write(path, "one")
    files.write(path, b"two")
    assert path.read_text() == "two"
    for text in ("one", "two"):
        with files.writing(tmp_path / "folder", folder=True) as temporary:
            (temporary / text).write_text(text)
    assert [item.name for item in (tmp_path / "folder").iterdir()] == ["two"]
    assert sorted(item.name for item in tmp_path.iterdir()) == ["folder", "new"]


@pytest.mark.parametrize("folder", [False, True])
def test_a_failed_write_leaves_what_was_there(tmp_path: Path, folder: bool) -> None:
    path = tmp_path / "out"
    with files.writing(path, folder=folder) as temporary:
        (temporary / "x" if folder else temporary).write_text("good")

    def fail() -> None:
        with files.writing(path, folder=folder) as temporary:
            (temporary / "x" if folder else temporary).write_text("bad")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (path / "x" if folder else path).read_text() == "good"
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_a_crash_between_the_two_renames_of_a_folder_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with files.writing(path, folder=True) as temporary:
        (temporary / "x").write_text("old")
    os.rename(path, tmp_path / "model.old")  # what a process leaves that dies there
    (tmp_path / "model.partial").mkdir()
    files.recover(path)
    assert (path / "x").read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["model"]


def test_places_that_cannot_be_written_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Error, match="cannot be written"):
        files.write(tmp_path / "file" / "inside", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(Error, match="is a folder where a file should be written"):
        files.write(tmp_path / "folder", "x")
    with (
        pytest.raises(Error, match="is a file where a folder should be written"),
        files.writing(tmp_path / "file", folder=True),
    ):
        pass

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(Error, match=r"No space left on device.*free some space"):
        files.write(tmp_path / "new", "x")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["file", "folder"]


def test_json(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"é": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"é": [1, None]}
    with pytest.raises(Error, match="cannot be read"):
        files.read_json(tmp_path / "none.json")
    for bad in (b"{", b"\xff", b"[" * 100_000):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(Error, match="is not valid JSON"):
            files.read_json(tmp_path / "bad.json")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert files.sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_lock_keeps_other_processes_out_and_dies_with_its_own(tmp_path: Path) -> None:
    hold = f"from gemstill.core.files import locked\nwith locked({str(tmp_path)!r}): print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"held"
        refused = pytest.raises(Error, match=f"another process .number {other.pid}. is at work here")
        with refused, files.locked(tmp_path):
            pass
        other.kill()
    with files.locked(tmp_path):
        pass
