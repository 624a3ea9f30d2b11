"""llama.cpp gives the same ids, from a GGUF vocabulary made of ours."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import CONTROL
from gemstill.text.vocabulary import Vocabulary
from tests.text import texts
from tests.text.conftest import corpus
from tests.text.test_vocabulary import with_symbols
from tests.text.ways import write_gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    return llama_of(tokenizer.vocabulary(), tmp_path_factory)


def llama_of(vocabulary: Vocabulary, places: pytest.TempPathFactory):
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    file = places.mktemp("gguf") / "vocabulary.gguf"
    write_gguf(vocabulary, file)
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


@pytest.fixture(scope="module")
def symbols(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_vocabulary(with_symbols(tokenizer.vocabulary()))


@pytest.fixture(scope="module")
def llama_with_symbols(symbols: Tokenizer, tmp_path_factory: pytest.TempPathFactory):
    return llama_of(symbols.vocabulary(), tmp_path_factory)


@settings(max_examples=2000, deadline=None)
@given(text=texts.comparable | texts.spelled)
def test_ids_of_any_text(tokenizer: Tokenizer, llama, text: str) -> None:
    """Control tokens spelled in a text too: as text."""
    data = text.encode()
    assert llama.tokenize(data, add_bos=False, special=False) == tokenizer.encode(text)


@settings(max_examples=2000, deadline=None)
@given(text=texts.hard)
def test_ids_of_any_text_with_symbols(symbols: Tokenizer, llama_with_symbols, text: str) -> None:
    """Runs of spaces, tags and halves of them, cut out as user-defined tokens are there."""
    assert llama_with_symbols.tokenize(text.encode(), add_bos=False, special=False) == symbols.encode(text)


def test_ids_and_bytes_of_real_text(tokenizer: Tokenizer, llama) -> None:
    for document in corpus():
        ids = llama.tokenize(document.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(document)
        assert llama.detokenize(ids) == document.encode()


def test_control_tokens_of_templates(tokenizer: Tokenizer, llama) -> None:
    text = f"{CONTROL[4]}user\nhi{CONTROL[5]}\n"
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text, special=True)
