"""llama.cpp gives the same ids, from a GGUF vocabulary made of tokenizer.model as its converter makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings

from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import CONTROL
from tests.text import texts
from tests.text.conftest import corpus

pytestmark = pytest.mark.slow


def write_vocabulary(folder: Path, file: Path) -> None:
    """A GGUF with a vocabulary and no weights."""
    gguf = pytest.importorskip("gguf")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    kinds = gguf.TokenType
    ids = range(model.get_piece_size())
    types = [
        kinds.UNKNOWN
        if model.is_unknown(id)
        else kinds.CONTROL
        if model.is_control(id)
        else kinds.BYTE
        if model.is_byte(id)
        else kinds.NORMAL
        for id in ids
    ]
    writer = gguf.GGUFWriter(file, "gemma2")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([model.id_to_piece(id).encode() for id in ids])
    writer.add_token_scores([model.get_score(id) for id in ids])
    writer.add_token_types(types)
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(folder: Path, tmp_path_factory: pytest.TempPathFactory):
    llama_cpp = pytest.importorskip("llama_cpp")
    file = tmp_path_factory.mktemp("gguf") / "vocabulary.gguf"
    write_vocabulary(folder, file)
    return llama_cpp.Llama(str(file), vocab_only=True, verbose=False)


@settings(max_examples=2000, deadline=None)
@given(text=texts.comparable | texts.spelled)
def test_ids_of_any_text(tokenizer: Tokenizer, llama, text: str) -> None:
    """Control tokens spelled in a text too: as text."""
    data = text.encode()
    assert llama.tokenize(data, add_bos=False, special=False) == tokenizer.encode(text)


def test_ids_and_bytes_of_real_text(tokenizer: Tokenizer, llama) -> None:
    for document in corpus():
        ids = llama.tokenize(document.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(document)
        assert llama.detokenize(ids) == document.encode()


def test_control_tokens_of_templates(tokenizer: Tokenizer, llama) -> None:
    text = f"{CONTROL[4]}user\nhi{CONTROL[5]}\n"
    assert llama.tokenize(text.encode(), add_bos=False, special=True) == tokenizer.encode(text, special=True)
