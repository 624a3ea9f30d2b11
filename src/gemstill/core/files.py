"""Files that are there whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gemstill.core.errors import Error

TEMPORARY = ".partial"


def fsync(path: Path) -> None:
    """Force a file's or a folder's contents to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _publish(temporary: Path, path: Path) -> None:
    if temporary.is_dir():
        for item in sorted(temporary.rglob("*")):
            fsync(item)
    fsync(temporary)
    if path.is_dir():
        # A folder cannot be renamed over a full one: the old one steps aside for an instant and
        # `recover` puts it back should the process die in that instant.
        aside = path.with_name(path.name + ".old")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
        os.rename(temporary, path)
        fsync(path.parent)
        shutil.rmtree(aside)
    else:
        os.replace(temporary, path)
    fsync(path.parent)


def recover(path: Path) -> None:
    """Put a folder back that a process died in the middle of replacing, and drop what it left half done."""
    aside = path.with_name(path.name + ".old")
    if aside.exists():
        if path.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, path)
    temporary = path.with_name(path.name + TEMPORARY)
    if temporary.is_dir():
        shutil.rmtree(temporary)
    elif temporary.exists():
        temporary.unlink()


@contextmanager
def writing(path: str | Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well it is synced and renamed to `path`.

    Raises:
        Error: the place cannot be written (no such parent, read-only, disk full), or holds
            something of the wrong kind. Nothing is left behind then, and what was at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.is_dir() != folder:
            kinds = ("a folder", "a file") if folder is False else ("a file", "a folder")
            what = f"is {kinds[0]} where {kinds[1]} should be written"
            raise Error(what, where=path, fix="move it away or name another place")
        recover(path)
        if folder:
            temporary.mkdir()
        yield temporary
        _publish(temporary, path)
    except OSError as error:
        _discard(temporary)
        raise unwritable(path, error) from error
    except BaseException:
        _discard(temporary)
        raise


def unwritable(path: object, error: OSError) -> Error:
    """The Error for a place that could not be written, with the system's own reason."""
    fix = "free some space or name another place" if error.errno == 28 else "name a place you can write to"
    return Error(f"cannot be written ({error.strerror or error})", where=path, fix=fix)


def _discard(temporary: Path) -> None:
    if temporary.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with suppress(OSError):  # it may never have come into being; the first fault is the one to tell
            temporary.unlink(missing_ok=True)


def write(path: str | Path, data: bytes | str) -> None:
    """Write `data` to `path`, whole or not at all. Raises Error as `writing` does."""
    with writing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises Error when it is missing, unreadable or no JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path) from error
    except (ValueError, RecursionError) as error:
        raise Error(f"is not valid JSON ({error})", where=path) from error


def cached(name: str) -> Path:
    """Where something that can be made again is kept under `name`: $XDG_CACHE_HOME/gemstill, else ~/.cache/gemstill."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemstill" / name


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold `folder` (made if missing) for this process alone; the lock dies with the process.

    Raises:
        Error: another process holds it.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open(folder / ".lock", "a+")  # noqa: SIM115 - closed by the block below
    except OSError as error:
        raise unwritable(folder, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            what = f"another process (number {owner}) is at work here"
            raise Error(what, where=folder, fix="wait for it or end it") from None
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        yield
