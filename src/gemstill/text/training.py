"""Train a tokenizer with SentencePiece and save it for everyone who may open it."""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.text.settings import for_transformers
from gemstill.text.tokenizer import FILES, Tokenizer, valid_text
from gemstill.text.vocabulary import END_OF_TURN, START_OF_TURN, Vocabulary

CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>", START_OF_TURN, END_OF_TURN)  # their ids are their places
SENTENCE = 4000  # characters in one training sentence; SentencePiece drops sentences that are too long
SAMPLE = 200_000_000  # characters SentencePiece is shown at most: it keeps them in memory several times over

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)


def train_tokenizer(
    texts: Iterable[str], folder: str | Path, vocab_size: int, *, multiple_of: int = 1, sample: int = SAMPLE
) -> Tokenizer:
    """Train a tokenizer on `texts` as the Gemma family's is made, and save it to `folder`.

    BPE with byte fallback, digits split, whitespace kept, no normalisation (Gemma 2 report, section
    2). `folder` gets tokenizer.model (SentencePiece, llama.cpp's converter), tokenizer.json
    (tokenizers) and tokenizer_config.json (transformers), which all give the same ids. The result is
    a function of the set of texts (more than `sample` characters: of a sample drawn by their hashes).

    Args:
        texts: documents of any length; lone surrogates count as U+FFFD.
        vocab_size: entries in all, controls and byte pieces included; rounded up to `multiple_of`.

    Raises:
        Error: no text, too little text for so many entries, or the folder cannot be written.
    """
    vocab_size = -(-vocab_size // multiple_of) * multiple_of
    smallest = len(CONTROL) + 256 + 1
    if vocab_size < smallest:
        raise Error(f"a vocabulary of {vocab_size} is too small", fix=f"ask for at least {smallest} entries")
    _check_folder(Path(folder))
    model = _train_sentencepiece(_sentences(_sampled(texts, sample)), vocab_size)
    vocabulary = Vocabulary.from_sentencepiece(model)
    with files.writing(folder, folder=True) as temporary:
        (temporary / "tokenizer.model").write_bytes(model)
        (temporary / "tokenizer.json").write_bytes(vocabulary.to_tokenizer_json())
        files.write_json(temporary / "tokenizer_config.json", for_transformers(vocabulary, CHAT_TEMPLATE))
    return Tokenizer.open(folder)


def _check_folder(folder: Path) -> None:
    """The folder is made whole or not at all, by replacing it: refuse one that holds other things."""
    others = sorted(path.name for path in folder.iterdir() if path.name not in FILES) if folder.is_dir() else []
    if others:
        fix = "name a folder for the tokenizer alone"
        raise Error(f"holds {others[0]!r}, which is no part of a tokenizer", where=folder, fix=fix)


def _sampled(texts: Iterable[str], limit: int) -> list[str]:
    """Documents of at most `limit` characters in all, those with the smallest hashes: no order, no bias."""
    heap: list[tuple[int, str]] = []
    size = 0
    for text in texts:
        text = valid_text(text)
        digest = hashlib.sha256(text.encode()).digest()
        heapq.heappush(heap, (-int.from_bytes(digest[:8], "big"), text))
        size += len(text)
        while size > limit and len(heap) > 1:
            size -= len(heapq.heappop(heap)[1])
    return [text for _, text in sorted(heap, reverse=True)]


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Cut texts near `SENTENCE` characters, before a space where there is one, so that no word is torn."""
    for text in texts:
        start = 0
        while len(text) - start > SENTENCE:
            cut = text.find(" ", start + SENTENCE // 2, start + SENTENCE)
            cut = cut if cut > start else start + SENTENCE
            yield text[start:cut]
            start = cut
        if start < len(text):
            yield text[start:]


def _train_sentencepiece(sentences: Iterator[str], vocab_size: int) -> bytes:
    """The bytes of a SentencePiece model. Raises Error, with the largest size possible, for too little text."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            byte_fallback=True,
            required_chars="\n\t",
            max_sentence_length=4 * SENTENCE + 1,
            pad_id=0,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            pad_piece=CONTROL[0],
            eos_piece=CONTROL[1],
            bos_piece=CONTROL[2],
            unk_piece=CONTROL[3],
            control_symbols=list(CONTROL[4:]),
            minloglevel=2,
        )
    except RuntimeError as error:
        fix = "give more text or ask for fewer entries"
        message = " ".join(str(error).split())
        raise Error(f"no vocabulary of {vocab_size} entries could be made of this text ({message})", fix=fix) from error
    return model.getvalue()
