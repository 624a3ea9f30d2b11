"""Data files of benchmarks as records that know where they stand: .jsonl, .json, .csv, .tsv, each perhaps .gz."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gemstill.core.errors import Error
from gemstill.text.tokenizer import valid_text

T = TypeVar("T")
_AGAIN = "fetch it again"
PUBLISHED = "mend the line, or give the file as its makers publish it"
_KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "a group of fields"}


@dataclass(frozen=True)
class Record:
    """One item of a file. where: file and line (or the item's number) for messages. fix: what mends it."""

    fields: dict[str, Any]
    where: str
    fix: str = PUBLISHED

    def get(self, name: str, kind: type[T]) -> T:
        """The field `name`, which has to be of this kind.

        Raises:
            Error: it is missing or something else; the file, the line and the field are named.
        """
        if name not in self.fields:
            raise self.error(f"has no field '{name}'")
        value = self.fields[name]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise self.wrong(name, _KINDS[kind])
        return value

    def wrong(self, name: str, kind: str) -> Error:
        """An error about the field `name`, which should be `kind`, in words."""
        return self.error(f"has {self.fields[name]!r:.60} in field '{name}', which should be {kind}")

    def text(self, name: str) -> str:
        """The field `name`, a text; raises Error also for half a surrogate pair, which no UTF-8 text has."""
        return self._whole(name, self.get(name, str))

    def choice(self, name: str) -> str:
        """The field `name`, a text that a model can be asked for: not an empty one."""
        text = self.text(name)
        if not text.strip():
            raise self.error(f"has nothing in field '{name}', which should be a choice")
        return text

    def one_of(self, name: str, known: Sequence[str]) -> str:
        """The field `name`, one of the texts that are known for it."""
        if (text := self.text(name)) not in known:
            raise self.wrong(name, " or ".join(known))
        return text

    def texts(self, name: str) -> list[str]:
        """The field `name`, a list of texts."""
        values = self.get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"has {values!r:.60} in field '{name}', which should be a list of texts")
        return [self._whole(name, value) for value in values]

    def choices(self, name: str) -> list[str]:
        """The field `name`, a list of texts that a model can be asked for."""
        values = self.texts(name)
        if not values or not all(value.strip() for value in values):
            raise self.error(f"has {values!r:.60} in field '{name}', which should be choices, none of them empty")
        return values

    def _whole(self, name: str, text: str) -> str:
        if text != valid_text(text):
            raise self.error(f"has half a surrogate pair in field '{name}'")
        return text

    def error(self, what: str) -> Error:
        """An error about this record."""
        return Error(what, where=self.where, fix=self.fix)


def find(root: Path, pattern: str) -> list[Path]:
    """The files of `pattern` (a path under `root`, perhaps with *) in order; one that is also there as .gz once."""
    found: dict[str, Path] = {}
    for name in (f"{pattern}.gz", pattern):
        found |= {str(path).removesuffix(".gz"): path for path in root.glob(name) if path.is_file()}
    return [found[name] for name in sorted(found)]


def read_text(path: Path) -> str:
    """A text file, unpacked where it ends in .gz.

    Raises:
        Error: it cannot be read or unpacked, or is no UTF-8 text.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Error("is no whole gzip file", where=path, fix=_AGAIN) from error
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path, fix="mend its permissions") from error
    except UnicodeDecodeError as error:
        raise Error("is no UTF-8 text", where=path, fix=_AGAIN) from error
    if "\0" in text:  # holes of a file that was cut off, or another encoding
        raise Error("holds zero bytes, which no text has", where=path, fix=_AGAIN)
    return text


def read_records(path: Path) -> Iterator[Record]:
    """The items of a data file, in order. A .json file is a list, or an object whose "examples" or "Data" are one.

    Raises:
        Error: the file cannot be read or holds no item, or an item of it is none.
    """
    suffix, empty = Path(path.name.removesuffix(".gz")).suffix, True
    read = {".csv": _rows, ".tsv": _rows, ".jsonl": _lines}.get(suffix, _items)
    for record in read(path):
        empty = False
        yield record
    if empty:
        raise Error("holds no item", where=path, fix=_AGAIN)


def _rows(path: Path) -> Iterator[Record]:
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            record = Record({name: value for name, value in row.items() if value is not None}, _at(path, rows.line_num))
            if None in row:
                raise record.error("has more fields than the first line names")
            yield record
    except csv.Error as error:
        # `line_num` is the last line of the row before.
        raise Error(f"is no table ({error})", where=_at(path, rows.line_num + 1), fix=PUBLISHED) from error


def _lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield _record(_parsed(line, _at(path, number)), _at(path, number))


def _items(path: Path) -> Iterator[Record]:
    whole = _parsed(read_text(path), str(path))
    items = whole.get("examples", whole.get("Data")) if isinstance(whole, dict) else whole
    if not isinstance(items, list):
        raise Error("holds no list of items", where=path, fix='write [...] or {"examples": [...]}')
    for number, item in enumerate(items, 1):
        yield _record(item, f"{path}, item {number}")


def _at(path: Path, line: int) -> str:
    return f"{path}, line {line}"


def read_named(path: Path) -> Iterator[tuple[str, Record]]:
    """The items of a .json file that is an object of items, with their names. Raises Error as `read_records`."""
    whole = _parsed(read_text(path), str(path))
    if not isinstance(whole, dict):
        raise Error("holds no items by their names", where=path, fix='write {"name": {...}}')
    for name, item in whole.items():
        yield name, _record(item, f"{path}, item '{name}'")


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Error(f"is not valid JSON ({error})", where=where, fix=PUBLISHED) from error


def _record(item: Any, where: str) -> Record:
    if not isinstance(item, dict):
        raise Error("is no item with fields", where=where, fix="write an object: {...}")
    return Record(item, where)
