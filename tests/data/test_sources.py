"""Documents out of whatever a folder holds."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from gemstill.core.config import parse
from gemstill.core.errors import Error
from gemstill.data.sources import Source, decode, read_source, source_files

TEXT = "Grüße, 世界!\r\nEin Satz mit Umlauten: äöüß.\n"
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x10" + random.Random(0).randbytes(500)


def texts(source: Source | Path, counts: Counter[str] | None = None) -> dict[str, str]:
    return {document.id: document.text for document in read_source(source, counts)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(TEXT.encode(encoding))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT.encode(encoding)))
    assert texts(tmp_path) == {"a.txt": TEXT, "b.txt.gz": TEXT}, "marks are dropped, line ends kept"


@pytest.mark.parametrize("mark", [b"\xff\xfe", b"\xfe\xff"])
def test_both_byte_orders_of_utf_16(mark: bytes) -> None:
    order = "le" if mark == b"\xff\xfe" else "be"
    assert decode(mark + TEXT.encode(f"utf-16-{order}")) == TEXT


def test_latin_1_is_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "old.txt").write_bytes("Grüße aus Köln\n".encode("latin-1"))
    counts: Counter[str] = Counter()
    assert texts(tmp_path, counts) == {"old.txt": "Grüße aus Köln\n"}
    assert counts == {"files": 1, "latin-1": 1}


def test_binary_and_empty_files_are_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(PNG)
    (tmp_path / "noise").write_bytes(random.Random(1).randbytes(4000).replace(b"\0", b"\1"))
    (tmp_path / "half.txt").write_bytes(b"\xff\xfea")  # a mark, and half a character
    (tmp_path / "control.txt").write_bytes(b"\1\2\3\4 valid utf-8, no text")
    (tmp_path / "nothing.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_bytes(b" \n\t\n")
    (tmp_path / "text.txt").write_text("text")
    counts: Counter[str] = Counter()
    assert texts(tmp_path, counts) == {"text.txt": "text"}
    assert counts["binary"] == 4
    assert counts["empty"] == 2
    assert counts["files"] == 7


def test_a_stray_nul_does_not_make_a_text_binary(tmp_path: Path) -> None:
    text = "a text of some length with\0one NUL in it, as old terminals and bad exports leave them there\n"
    (tmp_path / "a.txt").write_text(text, newline="")
    assert texts(tmp_path) == {"a.txt": text}


def test_jsonl(tmp_path: Path) -> None:
    rows = [{"text": TEXT, "n": 1}, {"text": "zwei\0"}, {"text": ""}, {"text": "surrogate \ud800 alone"}]
    lines = "\n\n".join(json.dumps(row) for row in rows) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    counts: Counter[str] = Counter()
    found = texts(tmp_path, counts)
    due = {1: TEXT, 3: "zwei\0", 7: "surrogate \ufffd alone"}
    assert found == {f"{name}:{line}": text for name in ("a.jsonl", "b.jsonl.gz") for line, text in due.items()}
    assert counts == {"files": 2, "empty": 2}
    assert texts(tmp_path / "a.jsonl") == {f"a.jsonl:{line}": text for line, text in due.items()}


def test_other_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "here"}\n')
    assert texts(Source(tmp_path, field="content")) == {"a.jsonl:1": "here"}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{broken", r"a\.jsonl:2: is no JSON record"),
        ('{"txt": "x"}', r"a\.jsonl:2: has no text in its field 'text' \(it has 'txt'\)"),
        ('{"text": 3}', "has no text in its field"),
        ('"text"', "no record at all"),
        ("[" * 100_000, r"a\.jsonl:2"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, match: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + line + "\n")
    with pytest.raises(Error, match=match):
        texts(tmp_path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
@pytest.mark.parametrize("damage", ["cut", "no gzip", "flipped"])
def test_a_damaged_gzip_is_named(tmp_path: Path, name: str, damage: str) -> None:
    data = bytearray(gzip.compress(json.dumps({"text": random.Random(0).randbytes(999).hex()}).encode()))
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    (tmp_path / name).write_bytes({"cut": data[:-20], "no gzip": b"plain text", "flipped": data}[damage])
    with pytest.raises(Error, match=rf"{name}: is no whole gzip file"):
        texts(tmp_path)


def test_pattern_exclusions_and_hidden_files(tmp_path: Path) -> None:
    for name in ("a.py", "b.txt", "c.py.gz", "test/d.py", "deep/er/e.py", ".git/f.py", "deep/.g.py", "old_1/h.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(b"x") if name.endswith("gz") else b"x")
    source = Source(tmp_path, pattern="**/*.py", exclude=["test", "old_*"])
    assert list(texts(source)) == ["a.py", "c.py.gz", "deep/er/e.py"]


@pytest.mark.parametrize(
    ("pattern", "due"),
    [
        ("**/*", ["a.py", "b/a.py", "b/c/a.py", "b/c/d.txt"]),
        ("**", ["a.py", "b/a.py", "b/c/a.py", "b/c/d.txt"]),
        ("*", ["a.py"]),
        ("*/*.py", ["b/a.py"]),
        ("b/**/*.py", ["b/a.py", "b/c/a.py"]),
        ("**/c/?.[pt]*", ["b/c/a.py", "b/c/d.txt"]),
    ],
)
def test_patterns(tmp_path: Path, pattern: str, due: list[str]) -> None:
    for name in ("a.py", "b/a.py", "b/c/a.py", "b/c/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = [path.relative_to(tmp_path).as_posix() for path in source_files(Source(tmp_path, pattern=pattern))]
    assert found == due


def test_order_is_by_name_not_by_file_system(tmp_path: Path) -> None:
    names = [f"{number}.txt" for number in range(30)]
    random.Random(0).shuffle(names)
    for name in names:
        (tmp_path / name).write_text(name)
    assert list(texts(tmp_path)) == sorted(names)


def test_read_counts_every_byte(tmp_path: Path) -> None:
    for name in ("a.txt", "b.jsonl", "c.jsonl.gz"):
        data = "".join(json.dumps({"text": "x" * 999}) + "\n" for _ in range(50)).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    total = sum(path.stat().st_size for path in source_files(Source(tmp_path)))
    assert sum(document.read for document in read_source(tmp_path)) == total


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(Error, match="no file matches"):
        texts(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Error, match="no file matches"):
        texts(tmp_path)
    with pytest.raises(Error, match="no such file or folder"):
        texts(tmp_path / "missing")
    with pytest.raises(Error, match="pattern"):
        texts(Source(tmp_path, pattern="/absolute"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(Error, match=r"a\.txt: cannot be read"):
        texts(tmp_path)


def test_source_from_a_recipe() -> None:
    source = parse(Source, {"path": "books", "exclude": ["drafts"]}, ["field=body"])
    assert source == Source(Path("books"), exclude=["drafts"], field="body")
    assert source.describe()["name"] == "books"
