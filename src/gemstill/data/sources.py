"""Documents from folders of text and from JSONL, compressed or not."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from gemstill.core.errors import Error
from gemstill.text.tokenizer import valid_text

RECORDS = (".jsonl", ".ndjson")
# Longest first: UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CONTROLS = re.compile(rb"[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]")  # without bell to carriage return, and escape
_CONTROLS_8BIT = re.compile(rb"[\x80-\x9f]")  # controls in Latin-1 too, so no text there either
BINARY_SHARE = 0.02  # of such bytes; compressed data has 10 % and more, text next to none


@dataclass(frozen=True)
class Source:
    """Where documents come from."""

    path: Path  # a folder, a text file, or JSONL; each may be compressed (.gz)
    pattern: str = "**/*"  # which files of a folder; matches name and name.gz alike
    exclude: list[str] = field(default_factory=list)  # file or folder names (with * and ?) to leave out
    field: str = "text"  # where a JSONL record keeps its text
    name: str = ""  # what to call it in the data set; the path's last part when empty

    def describe(self) -> dict[str, object]:
        """What the data set records of it: nothing that differs from machine to machine."""
        name = self.name or Path(self.path).resolve().name
        return {"name": name, "pattern": self.pattern, "exclude": sorted(self.exclude), "field": self.field}


class Document(NamedTuple):
    """One document. id: path inside the source, and the line for JSONL. read: bytes read from disk since the last."""

    id: str
    text: str
    read: int = 0


def source_files(source: Source) -> list[Path]:
    """The files of a source, in order of their names, hidden ones and those excluded left out.

    Raises:
        Error: there is no such path, or nothing matches.
    """
    root = Path(source.path)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise Error("there is no such file or folder", where=root, fix="check the path of the source")
    patterns = source.pattern.split("/")
    if not all(patterns):
        raise Error(f"pattern {source.pattern!r} cannot be used", where=root, fix="give one relative to the folder")

    def kept(name: str) -> bool:
        return not name.startswith(".") and not any(fnmatchcase(name, each) for each in source.exclude)

    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = filter(kept, folders)  # what is excluded is not even looked into
        inside = Path(folder).relative_to(root).parts
        for name in filter(kept, names):
            if _matches((*inside, name.removesuffix(".gz")), patterns) or _matches((*inside, name), patterns):
                found.append((*inside, name))
    files = [path for parts in sorted(found) if (path := root.joinpath(*parts)).is_file()]
    if not files:
        fix = "put text there, or widen the pattern"
        raise Error(f"no file matches {source.pattern!r}", where=root, fix=fix)
    return files


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a path, in parts, matches a pattern, in parts, where ** stands for any number of folders."""
    if not patterns or not parts:
        return not patterns and not parts
    if patterns[0] == "**":
        return len(patterns) == 1 or any(_matches(parts[skip:], patterns[1:]) for skip in range(len(parts)))
    return fnmatchcase(parts[0], patterns[0]) and _matches(parts[1:], patterns[1:])


def read_source(source: Source | str | Path, counts: Counter[str] | None = None) -> Iterator[Document]:
    """Yield the documents of a source, in order of their files' names.

    Texts keep their line ends and NUL characters; byte-order marks are dropped, lone surrogates become
    U+FFFD. A file that is no valid UTF-8, has no mark and no control characters is read as Latin-1.

    Args:
        counts: gets how many `files` were seen, how many were `binary` or, like single records,
            `empty`, and how many were `latin-1`. Binary and empty ones are skipped.

    Raises:
        Error: no such path, no files, an unreadable file, a JSONL line that is no record with text.
    """
    source = source if isinstance(source, Source) else Source(Path(source))
    counts = Counter() if counts is None else counts
    root = Path(source.path)
    for path in source_files(source):
        name = path.relative_to(root).as_posix() if path != root else path.name
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        counts["files"] += 1
        if plain.suffix in RECORDS:
            yield from _records(path, name, source.field, counts)
        else:
            data = _contents(path)
            text = decode(_unzipped(data, path) if plain != path else data, counts)
            if text is not None and text.strip():
                yield Document(name, text, len(data))
            elif text is not None:
                counts["empty"] += 1


def decode(data: bytes, counts: Counter[str] | None = None) -> str | None:
    """The text that a file's bytes spell, or None (and `binary` counted) when they are no text."""
    counts = Counter() if counts is None else counts
    encoding = next((encoding for mark, encoding in _MARKS if data.startswith(mark)), None)
    try:
        text = data.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        controls = len(_CONTROLS.findall(data)) + len(_CONTROLS_8BIT.findall(data))
        if encoding or b"\0" in data or controls > BINARY_SHARE * len(data):
            counts["binary"] += 1
            return None
        counts["latin-1"] += 1
        return data.decode("latin-1")
    if encoding in (None, "utf-8-sig") and len(_CONTROLS.findall(data)) > BINARY_SHARE * len(data):
        counts["binary"] += 1
        return None
    return text


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path) from error


def _unzipped(data: bytes, path: Path) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise Error(f"is no whole gzip file ({error})", where=path, fix="fetch it again or leave it out") from error


def _records(path: Path, name: str, key: str, counts: Counter[str]) -> Iterator[Document]:
    """The records of a JSONL file, line by line: files may be larger than memory."""
    position = 0
    try:
        with open(path, "rb") as raw:
            lines = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            for number, line in enumerate(lines, 1):
                text = _record_text(line, f"{path}:{number}", key)
                if text is not None and text.strip():
                    yield Document(f"{name}:{number}", text, raw.tell() - position)
                    position = raw.tell()
                elif text is not None:
                    counts["empty"] += 1
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Error(f"is no whole gzip file ({error})", where=path, fix="fetch it again or leave it out") from error
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path) from error


def _record_text(line: bytes, where: str, key: str) -> str | None:
    """The text of one line of JSONL, None for a blank line."""
    if not line.strip():
        return None
    try:
        record = json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError) as error:
        raise Error(f"is no JSON record ({error})", where=where, fix="mend or remove the line") from error
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        has = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "it is no record at all"
        raise Error(f"has no text in its field {key!r} ({has})", where=where, fix="name the field of the text")
    return valid_text(record[key])
