"""The table of a vocabulary against the `tokenizers` library, and what is kept of it on disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from gemstill.text.pipeline import plain_state
from gemstill.text.table import CROWDED, Table
from gemstill.text.tokenizer import LITTLE, SPACE, Tokenizer
from gemstill.text.vocabulary import BYTE, BYTES, CONTROL, NORMAL, UNKNOWN, Vocabulary
from tests.text import texts
from tests.text.conftest import corpus
from tests.text.ways import kept


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return tokenizer.vocabulary()


@pytest.fixture(scope="module")
def table(vocabulary: Vocabulary) -> Table:
    found = Table.of(vocabulary)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def library(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    return vocabulary.fast()


def test_it_says_what_the_vocabulary_says(table: Table, vocabulary: Vocabulary) -> None:
    assert table.vocabulary() == vocabulary
    assert [table.find(piece) for piece in vocabulary.pieces] == list(range(len(vocabulary.pieces)))
    assert [table.piece(number) for number in range(len(table))] == vocabulary.pieces
    assert {table.find(piece) for piece in ("", "no such piece", "\U0010ffff", f"{SPACE} ")} == {-1}
    again = Table.from_bytes(table.to_bytes())
    assert again is not None
    assert again.vocabulary() == vocabulary


@given(text=texts.anything | texts.composed | st.text("ab", max_size=40))
def test_it_merges_as_the_library_does(table: Table, library: tokenizers.Tokenizer, text: str) -> None:
    word = text.replace(" ", SPACE)
    assert table.merge(word) == [token.id for token in library.model.tokenize(word)]


# Few letters and many pieces, whose scores say nothing of their lengths: merges compete at every place.
@given(pieces=st.sets(st.text("abc", min_size=1, max_size=5)).map(sorted).flatmap(st.permutations),
       text=st.text("abcd", max_size=30))  # fmt: skip
def test_it_merges_any_vocabulary_as_the_library_does(pieces: list[str], text: str) -> None:
    controls = ["<pad>", "<eos>", "<bos>", "<unk>"]
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    all_pieces = [*controls, *BYTES, *pieces]
    vocabulary = Vocabulary(all_pieces, [-float(n // 2) for n in range(len(all_pieces))], types, 2, 1, 3, 0)
    table = Table.of(vocabulary)
    assert table is not None
    assert table.merge(text) == [token.id for token in vocabulary.fast().model.tokenize(text)]


@given(data=st.data())
def test_it_decodes_as_the_library_does(table: Table, library: tokenizers.Tokenizer, data: st.DataObject) -> None:
    """Broken UTF-8, control tokens and ids that there are not, too."""
    number = st.integers(0, len(table) + 3) | st.integers(4, 270)
    ids = data.draw(st.lists(number, max_size=30))
    for special in (True, False):
        assert table.decode(ids, special=special) == library.decode(ids, skip_special_tokens=not special)


def test_what_no_table_holds(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    types = [NORMAL if kind == BYTE else kind for kind in vocabulary.types]
    without = replace(vocabulary, types=types)
    assert Table.of(without) is None
    assert Tokenizer.from_vocabulary(without).encode("self") == Tokenizer.from_vocabulary(vocabulary).encode("self")
    monkeypatch.setattr("gemstill.text.table.crc32", lambda piece: 7)  # as a stranger could arrange it
    assert len(vocabulary.pieces) > CROWDED
    assert Table.of(vocabulary) is None


def test_damaged_copies_are_made_again(folder: Path, tmp_path: Path) -> None:
    source = folder / "tokenizer.json"
    expected = kept(source, tmp_path).encode(corpus()[0])
    [place] = (tmp_path / "gemstill").iterdir()
    good = place.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for bad in (b"", good[:40], good[:-1], bytes(flipped), good + b"x"):
        place.write_bytes(bad)
        assert Table.from_bytes(bad) is None
        assert kept(source, tmp_path).encode(corpus()[0]) == expected
        assert place.read_bytes() == good


def test_without_a_place_to_keep_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("gemstill.text.tokenizer.LARGE_FILE", 0)
    opened = Tokenizer.open(folder)
    assert opened._table is not None
    assert opened.encode("def f") == Tokenizer.from_vocabulary(opened.vocabulary()).encode("def f")


def changed(folder: Path, **model: Any) -> bytes:
    data = json.loads((folder / "tokenizer.json").read_text())
    for name, value in model.items():
        part = data if name in data else data["model"]
        part[name] = value(part.get(name)) if callable(value) else value
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": lambda old: {"type": "Sequence", "normalizers": [old, {"type": "Lowercase"}]}},
        {"normalizer": None},
        {"decoder": {"type": "Fuse"}},
        {"pre_tokenizer": {"type": "Digits", "individual_digits": True}},
        {"dropout": 0.1},
        {"ignore_merges": True},
        {"byte_fallback": False},
        {"type": "WordLevel"},
        {"merges": [["a"]]},
        {"merges": ["a b c"]},
        {"merges": 3},
        {"vocab": {"a": 1.5}},
        {"vocab": []},
        {"added_tokens": lambda old: [{**old[0], "id": 77}, *old[1:]]},
        {"added_tokens": [{"id": 0}]},
        {"added_tokens": [3]},
    ],
)
def test_whatever_else_a_file_says_is_the_librarys_to_read(folder: Path, changes: dict[str, Any]) -> None:
    assert plain_state((folder / "tokenizer.json").read_bytes()) is not None
    assert plain_state(changed(folder, **changes)) is None


def test_merges_in_their_old_spelling(folder: Path) -> None:
    old = changed(folder, merges=lambda pairs: [" ".join(pair) for pair in pairs])
    assert plain_state(old) == plain_state((folder / "tokenizer.json").read_bytes())


def test_merges_into_a_piece_that_is_none_are_refused(folder: Path, tmp_path: Path) -> None:
    """Gemma 2 merges "}" and "\\r\\r", which no list of symbols may take from it; a run of tabs is one."""
    data = json.loads((folder / "tokenizer.json").read_text())
    size = len(data["model"]["vocab"])
    data["model"]["vocab"] |= {"\r\r": size, "}\r\r": size + 1}
    data["model"]["merges"] += [["\r", "\r"], ["}", "\r\r"]]
    data["model"]["vocab"].setdefault("\r", size + 2)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    opened = [Tokenizer.open(tmp_path), kept(tmp_path / "tokenizer.json", tmp_path / "cache")]
    for text in ("}\r\r", "a\r\r\rb", "{\r\r\r\r}\r"):
        expected = raw.encode(text, add_special_tokens=False).ids
        assert [each.encode(text) for each in opened] == [expected] * 2


def test_a_normaliser_that_does_more_is_heard_in_long_texts_too(folder: Path, tmp_path: Path) -> None:
    more = {"normalizer": lambda old: {"type": "Sequence", "normalizers": [old, {"type": "Lowercase"}]}}
    (tmp_path / "tokenizer.json").write_bytes(changed(folder, **more))
    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "The Keeper said " * (LITTLE // 8)
    assert Tokenizer.open(tmp_path).encode(text) == raw.encode(text, add_special_tokens=False).ids


def test_after_much_text_the_library_is_loaded(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Tokenizer.from_vocabulary(vocabulary)
    first = ours.encode(corpus()[0][:1000])
    assert "_fast" not in vars(ours)
    monkeypatch.setattr("gemstill.text.tokenizer.PATIENCE", 1500)
    assert ours.encode(corpus()[0][:1000]) == first
    assert "_fast" in vars(ours)


@settings(max_examples=30)
@given(size=st.integers(1, 400))
def test_scores_need_not_differ(size: int) -> None:
    """Equal scores: the first piece is the better one."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, "a", "b", "ab", "ba"]
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[BYTE] * 256, *[NORMAL] * 4]
    vocabulary = Vocabulary(pieces, [0.0] * len(pieces), types, 2, 1, 3, 0)
    table = Table.of(vocabulary)
    assert table is not None
    assert table.merge("ab" * size) == [262] * size
    assert np.array_equal(np.sort(table.ranks), np.arange(len(pieces)))
