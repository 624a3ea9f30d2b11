"""One vocabulary in three spellings gives one answer; what is no vocabulary is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from gemstill.core.errors import Error
from gemstill.text.tokenizer import LITTLE, SPACE, Tokenizer
from gemstill.text.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Vocabulary
from tests.text import texts
from tests.text.conftest import corpus
from tests.text.ways import every_way, ids_of

LONGEST = 31  # spaces, newlines or tabs in one symbol


def with_symbols(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary with what Gemma's has beside letters, and like Gemma's with no piece for a single tab."""
    pieces = ["\u0b95" if piece == "\t" else piece for piece in vocabulary.pieces]
    runs = [character * size for character in f"\n\t{SPACE}" for size in range(2, LONGEST + 1)]
    symbols = ["<b>", "</b>", "<table>", "</table>", "\n", *runs]
    more = [*texts.STEERING, *symbols]
    old = {piece: number for number, piece in enumerate(pieces)}
    types = list(vocabulary.types)
    for piece in more:
        if piece in old and piece in symbols:
            types[old[piece]] = USER_DEFINED
    fresh = [piece for piece in more if piece not in old]
    return replace(
        vocabulary,
        pieces=[*pieces, *fresh],
        scores=[*vocabulary.scores, *[0.0] * len(fresh)],
        types=[*types, *(USER_DEFINED if piece in symbols else CONTROL for piece in fresh)],
    )


@pytest.fixture(scope="module")
def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return with_symbols(tokenizer.vocabulary())


@pytest.fixture(scope="module")
def place(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("symbols")
    (place / "tokenizer.json").write_bytes(vocabulary.to_tokenizer_json())
    return place


@pytest.fixture(scope="module")
def ways(place: Path) -> dict[str, Tokenizer]:
    return every_way(Tokenizer.open(place / "tokenizer.json"), place)


@pytest.fixture(scope="module")
def referee(ways: dict[str, Tokenizer], place: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(place / "tokenizer.model"))


@settings(max_examples=400, deadline=None)
@given(text=texts.hard)
def test_ids_are_sentencepieces_in_every_way(ways: dict[str, Tokenizer], referee, text: str) -> None:
    """Control tokens spelled in a text and runs longer than any symbol too."""
    assert referee.encode(text) == ids_of(ways, text)


@settings(max_examples=300, deadline=None)
@given(text=texts.hard.filter(lambda text: not texts.steers(text)))
def test_the_made_tokenizer_json_is_read_alike_by_others(ways: dict[str, Tokenizer], place: Path, text: str) -> None:
    assert others(place).encode(text, add_special_tokens=False).ids == ids_of(ways, text)


def others(place: Path, cache: dict[Path, tokenizers.Tokenizer] = {}) -> tokenizers.Tokenizer:  # noqa: B006
    return cache.setdefault(place, tokenizers.Tokenizer.from_file(str(place / "made.json")))


def test_real_text(ways: dict[str, Tokenizer], referee) -> None:
    for document in corpus():
        if SPACE not in document:
            assert referee.encode(document) == ids_of(ways, document)


def test_symbols_are_cut_out_the_longest_first(ways: dict[str, Tokenizer], vocabulary: Vocabulary) -> None:
    pieces = [vocabulary.pieces[id] for id in ids_of(ways, "a" + " " * (LONGEST + 2) + "b\n\n\n</table>")]
    assert pieces == ["a", SPACE * LONGEST, SPACE * 2, "b", "\n\n\n", "</table>"]


def test_control_tokens_are_text_and_are_never_offered(ways: dict[str, Tokenizer], vocabulary: Vocabulary) -> None:
    control = {number for number, kind in enumerate(vocabulary.types) if kind in (CONTROL, UNKNOWN)}
    for way in ways.values():
        assert way.control_ids == control
        for token in texts.STEERING:
            assert not control & set(way.encode(f"a{token}b"))
            assert way.encode(token, special=True) == [vocabulary.pieces.index(token)]


@pytest.mark.parametrize("token", ["<start_of_turn>", "<mask>", "<unused7>", "[@BOS@]"])
def test_what_steers_is_control_even_where_a_file_calls_it_a_symbol(vocabulary: Vocabulary, token: str) -> None:
    """Gemma's SentencePiece model and tokenizer.json do: a user could type a turn's end."""
    types = list(vocabulary.types)
    types[vocabulary.pieces.index(token)] = USER_DEFINED
    assert replace(vocabulary, types=types) == vocabulary


def test_every_spelling_says_the_same(vocabulary: Vocabulary, ways: dict[str, Tokenizer]) -> None:
    assert Vocabulary.from_sentencepiece(vocabulary.to_sentencepiece()) == vocabulary
    for way in ways.values():
        again = way.vocabulary()
        assert (again.pieces, again.types, again.merges()) == (vocabulary.pieces, vocabulary.types, vocabulary.merges())
        assert (again.bos_id, again.eos_id, again.unk_id, again.pad_id) == (2, 1, 3, 0)
    assert ways["made tokenizer.json"].data == ways["GGUF"].data == ways["tokenizer.model"].data
    assert "  " in vocabulary.for_gguf()


def test_a_tokenizer_json_like_the_published(place: Path, ways: dict[str, Tokenizer], tmp_path: Path) -> None:
    """There the tab's byte is spelled as a tab and runs of tabs are left to the merges, the first of them."""
    data = json.loads((place / "tokenizer.json").read_text())
    model = data["model"]
    model["vocab"]["\t"], runs = (
        model["vocab"].pop("<0x09>"),
        [run for run in model["vocab"] if run.strip("\t") == "" and run != "\t"],
    )
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in runs]
    pairs = [[run[:cut], run[cut:]] for run in sorted(runs, key=len) for cut in range(1, len(run))]
    model["merges"] = [*pairs, *model["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    published = Tokenizer.open(tmp_path)
    assert published.vocabulary() == ways["made tokenizer.json"].vocabulary()
    for text in ("\t", "\t\t", "a\t\t\tb", "\t" * 30, "\t \t\n"):
        assert published.encode(text) == ids_of(ways, text)


def test_a_folder_with_tokenizer_model_alone(ways: dict[str, Tokenizer], place: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((place / "tokenizer.model").read_bytes())
    opened = Tokenizer.open(tmp_path)
    opened.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    ]  # fmt: skip
    assert Tokenizer.open(tmp_path / "saved").fingerprint == opened.fingerprint
    assert (tmp_path / "saved" / "tokenizer.model").read_bytes() == (place / "tokenizer.model").read_bytes()


def test_transformers_reads_what_we_save(ways: dict[str, Tokenizer], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ways["GGUF"].save(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(auto) == ways["GGUF"].vocab_size
    for text in ("  a   b", " " * 40, "\t\t\t\n\n<b>x</b>", corpus()[0]):
        assert auto(text, add_special_tokens=False).input_ids == ids_of(ways, text)


def test_scores_come_from_the_tokenizer_model_beside(folder: Path, tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    for piece in model.pieces:
        piece.score *= 3
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert Tokenizer.open(tmp_path).vocabulary().scores == [piece.score for piece in model.pieces]
    assert (
        Tokenizer.open(tmp_path / "tokenizer.json").vocabulary().merges()
        == Tokenizer.open(folder).vocabulary().merges()
    )


def test_what_no_sentencepiece_model_says_is_refused_as_one(folder: Path, tmp_path: Path) -> None:
    fast = tokenizers.ByteLevelBPETokenizer()
    fast.train_from_iterator(corpus(), vocab_size=400, special_tokens=["<s>", "</s>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(Error, match="not made from a SentencePiece model"):
        Tokenizer.open(tmp_path).vocabulary()
    data = json.loads((folder / "tokenizer.json").read_text())
    del data["model"]["merges"][5]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(Error, match="merges"):
        Tokenizer.open(tmp_path).vocabulary()


def small(**changes: Any) -> Vocabulary:
    pieces: list[Any] = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "a",
        "b",
        "ab",
    ]
    types = [CONTROL, CONTROL, CONTROL, UNKNOWN, *[BYTE] * 256, NORMAL, NORMAL, NORMAL]
    fields = {"pieces": pieces, "scores": [0.0] * len(pieces), "types": types}
    ids = {"bos_id": 2, "eos_id": 1, "unk_id": 3, "pad_id": 0}
    return Vocabulary(**{**fields, **ids, **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pieces": []}, "0 pieces"),
        ({"scores": [0.0]}, "1 scores"),
        ({"scores": [float("nan")] * 263}, "not a number"),
        ({"types": [9] * 263}, "no type of piece 9"),
        ({"types": [BYTE] * 263}, "byte piece"),
        ({"pieces": ["a"] * 263}, "'a' is there twice"),
        ({"pieces": [b"\xff"] + [str(n) for n in range(262)], "types": [NORMAL] * 263}, "not UTF-8"),
        ({"pieces": ["\ud800"] + [str(n) for n in range(262)], "types": [NORMAL] * 263}, "not UTF-8"),
        ({"pieces": [""] + [str(n) for n in range(262)], "types": [NORMAL] * 263}, "empty or has more"),
        ({"pieces": ["a" * 9999] + [str(n) for n in range(262)], "types": [NORMAL] * 263}, "empty or has more"),
        ({"bos_id": 263}, "bos_id is 263"),
        ({"pad_id": -2}, "pad_id is -2"),
    ],
)
def test_what_is_no_vocabulary(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(Error, match=match):
        small(**changes)


def test_without_beginning_or_end_no_tokenizer() -> None:
    assert Tokenizer.from_vocabulary(small()).encode("ab") == [262]
    with pytest.raises(Error, match="beginning and end"):
        Tokenizer.from_vocabulary(small(bos_id=-1))


def test_an_unused_place_for_padding_is_the_end(folder: Path) -> None:
    opened = Tokenizer.from_vocabulary(small(pad_id=-1))
    assert opened.pad_id == opened.eos_id == 1


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("trainer_spec.model_type", 1, "kind BPE"),  # unigram
        ("normalizer_spec.add_dummy_prefix", True, "changes a text"),
        ("normalizer_spec.remove_extra_whitespaces", True, "changes a text"),
        ("normalizer_spec.precompiled_charsmap", b"map", "changes a text"),
    ],
)
def test_sentencepiece_models_of_another_kind(folder: Path, field: str, value: Any, match: str) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((folder / "tokenizer.model").read_bytes())
    part, name = field.split(".")
    setattr(getattr(model, part), name, value)
    with pytest.raises(Error, match=match):
        Vocabulary.from_sentencepiece(model.SerializeToString())


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_models_are_refused_or_work(data: st.DataObject) -> None:
    good = small().to_sentencepiece()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = data.draw(
        st.sampled_from([
            good[:place],
            good[:place] + bytes([good[place] ^ 1 << data.draw(st.integers(0, 7))]) + good[place + 1 :],
            good[:place] + b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f" + good[place:],
            good[:place] + b"\x0a\xff\xff\xff\xff\x07" + good[place:],
        ])
    )  # fmt: skip
    try:
        opened = Tokenizer.from_vocabulary(Vocabulary.from_sentencepiece(bad))
    except Error:
        return
    assert all(0 <= id < opened.vocab_size for id in opened.encode("ab ba\n</b>"))


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"<html>", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"{}"])
def test_what_is_no_model_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(Error, match=r"tokenizer\.model"):
        Tokenizer.open(tmp_path)


def test_chat_templates_beside(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    settings_file, file = tmp_path / "tokenizer_config.json", tmp_path / "chat_template.jinja"
    read = [("[]", None), ("{}", None), ('{"chat_template": 3}', None), ('{"chat_template": "one"}', "one")]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    read.append((json.dumps({"chat_template": named}), "two"))
    for content, expected in read:
        settings_file.write_text(content)
        assert Tokenizer.open(tmp_path).chat_template == expected
    file.write_text("three")
    assert Tokenizer.open(tmp_path).chat_template == "three"
    Tokenizer.open(tmp_path).save(tmp_path / "saved")
    assert Tokenizer.open(tmp_path / "saved").chat_template == "three"
    for content in (b"x" * (1 << 21), b"\xff"):
        file.write_bytes(content)
        with pytest.raises(Error, match="chat_template"):
            Tokenizer.open(tmp_path)


def test_much_text_at_once_is_cut_where_nothing_changes(ways: dict[str, Tokenizer]) -> None:
    fresh = Tokenizer.open(ways["tokenizer.json"].source)
    text = "".join(part for part in corpus() if SPACE not in part)
    assert len(text) > LITTLE
    assert fresh.encode(text) == ways["tokenizer.model"].encode(text)
