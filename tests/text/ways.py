"""One vocabulary opened in every way there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemstill.text.tokenizer import LITTLE, Tokenizer
from gemstill.text.vocabulary import Vocabulary


def every_way(tokenizer: Tokenizer, folder: Path) -> dict[str, Tokenizer]:
    """`tokenizer` (from a tokenizer.json) and what was made of it, by name; files go to `folder`."""
    vocabulary = tokenizer.vocabulary()
    (folder / "tokenizer.model").write_bytes(vocabulary.to_sentencepiece())
    (folder / "made.json").write_bytes(vocabulary.to_tokenizer_json())
    cut = Tokenizer.open(tokenizer.source)
    cut.encode("a " * LITTLE)  # much text at once: from now on it is cut into words
    assert cut._cut is not None
    library = Tokenizer.open(folder / "tokenizer.model")
    assert library._fast is not None  # from here on it encodes with that
    library._table = None  # and decodes
    fields = [piece.encode() for piece in vocabulary.for_gguf()]
    ids = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id)
    return {
        "tokenizer.json": tokenizer,
        "cut into words": cut,
        "kept on disk": kept(tokenizer.source, folder / "cache"),
        "tokenizer.model": Tokenizer.open(folder / "tokenizer.model"),
        "by the library": library,
        "GGUF": Tokenizer.from_vocabulary(Vocabulary(fields, vocabulary.scores, vocabulary.types, *ids)),
        "made tokenizer.json": Tokenizer.open(folder / "made.json"),
    }


def kept(source: Path, cache: Path) -> Tokenizer:
    """A tokenizer.json opened as a large one is, for the second time: what it says is found in `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setattr("gemstill.text.tokenizer.LARGE_FILE", 0)
        Tokenizer.open(source)
        patch.setattr("gemstill.text.tokenizer.plain_state", None)  # is not asked again
        opened = Tokenizer.open(source)
    assert opened._table is not None
    return opened


def ids_of(ways: dict[str, Tokenizer], text: str) -> list[int]:
    """The ids that all ways agree on, and that decode to the text."""
    ids = next(iter(ways.values())).encode(text)
    for name, way in ways.items():
        assert way.encode(text) == ids, name
        assert way.decode(ids) == text, name
    return ids


def write_gguf(vocabulary: Vocabulary, file: Path, architecture: str = "gemma2") -> None:
    """A GGUF file with a vocabulary and no weights."""
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.encode() for piece in vocabulary.for_gguf()])
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_pad_token_id(vocabulary.pad_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_unk_token_id(vocabulary.unk_id)
    writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
