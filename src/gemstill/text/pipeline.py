"""Which parts a stranger's tokenizer.json may be made of: those whose work is bounded by the text's length.

The `tokenizers` library runs whatever pipeline a file describes. Some of its parts can be told to grow a text
without end, to try a pattern for hours, or to ask for memory until the process is aborted, where no exception
helps. So a file is looked at before the library sees it, and what came of it before a text does.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

import tokenizers

from gemstill.core.errors import Error
from gemstill.text.words import SPACE

GROWTH = 64.0  # times as long as it was: the most that normalising or decoding may make a text
PARTS = 16  # in a row
# Patterns that are tried backwards and forwards are taken by name alone: whether one ends cannot be told from it.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}MANY"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
REGEXES = frozenset({_GPT2, _LLAMA.replace("MANY", "{1,3}"), _LLAMA.replace("MANY", "")})
# Parts by how many times as long they can make a text; Replace and Prepend are reckoned.
_GROWTH = {
    "normalizer": {
        "NFC": 3.0, "NFD": 4.0, "NFKC": 18.0, "NFKD": 18.0, "Lowercase": 2.0, "StripAccents": 1.0, "Strip": 1.0,
        "Nmt": 1.0, "BertNormalizer": 8.0, "ByteLevel": 2.0,
    },
    "pre_tokenizer": dict.fromkeys(
        ("ByteLevel", "Metaspace", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer",
         "UnicodeScripts", "Split"), 1.0,
    ),
    "decoder": dict.fromkeys(("ByteFallback", "Fuse", "ByteLevel", "Metaspace", "Strip"), 1.0),
}  # fmt: skip
# What spelling spaces as U+2581 and back looks like; and settings of a model with which it would do anything else.
_SPACE = {"String": " "}
NORMALIZER = {"type": "Replace", "pattern": _SPACE, "content": SPACE}
_DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
_OTHERWISE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
_ADDED = {"id", "content", "special"}
_NAMES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
# In JSON a letter can be spelled as its number, so that a search for a name does not find it: then all is read.
_SUSPECT = re.compile(rb'\\u00[2-7]|\{\s*"Regex"|:\s*"Precompiled"')


def check_file(data: bytes, where: object) -> None:
    """Refuse the bytes of a tokenizer.json over which the library would hang or abort while it reads them.

    Raises:
        Error: a pattern that is not one of `REGEXES`, a map of characters, or, in a file that spells letters by
            their numbers, a name that stands twice.
    """
    if not _SUSPECT.search(data):
        return  # nearly all files: reading them all would take memory several times their size
    try:
        tree = json.loads(data, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise Error(f"is not a tokenizer.json ({error})", where=where) from error
    rest = [tree.get(part) for part in (*_NAMES, "post_processor")] if isinstance(tree, dict) else []
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            if item.get("type") == "Precompiled":
                raise Error("normalises text by a map of characters, which is not supported", where=where)
            if "Regex" in item and item["Regex"] not in REGEXES:
                raise Error(f"cuts text by a pattern that is not known ({item['Regex']!r:.80})", where=where)
        rest += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()


def plain_state(data: bytes) -> dict[str, Any] | None:
    """The contents of a tokenizer.json that does what SentencePiece does to a text and no more, else None.

    That is a BPE with byte pieces whose spaces are spelled U+2581, as `Vocabulary.to_tokenizer_json` writes it and as
    Gemma's are published; merges come back as pairs. Whatever else it says, and whatever is not as the library
    would write it, is for the library to read.
    """
    try:
        state = json.loads(data, object_pairs_hook=_once)
        model, added = state["model"], state["added_tokens"]
        vocab, merges = model["vocab"], model["merges"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    pre = state.get("pre_tokenizer") or {"type": "Split", "pattern": _SPACE}
    plain = (
        isinstance(vocab, dict)
        and isinstance(merges, list)
        and isinstance(added, list)
        and (state.get("normalizer"), state.get("decoder")) == (NORMALIZER, _DECODER)
        and (pre.get("type"), pre.get("pattern")) == ("Split", _SPACE)
        and model.get("type") == "BPE"
        and model.get("byte_fallback") is True
        and not any(model.get(name) for name in _OTHERWISE)
        and all(type(number) is int for number in vocab.values())
        and all(isinstance(token, dict) and token.keys() >= _ADDED for token in added)
    )
    if not plain:
        return None
    if merges and isinstance(merges[0], str):  # as files had it until 2024
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    if not all(isinstance(m, list) and len(m) == 2 and type(m[0]) is type(m[1]) is str for m in merges):
        return None
    following = len(vocab)
    for token in added:  # the library numbers them itself
        number = vocab.get(token["content"])
        if token["id"] != (following if number is None else number):
            return None
        following += number is None
    model["merges"] = merges
    return cast(dict[str, Any], state)


def check_parts(fast: tokenizers.Tokenizer, where: object) -> None:
    """Refuse a tokenizer whose work would not be bounded by a text's length, or that would fail at some texts.

    Raises:
        Error: an unknown part, one that grows texts, a model that is not BPE or Unigram or has no unknown piece,
            ids that are not 0, 1, 2, … to the last.
    """
    size = fast.get_vocab_size()
    if None in map(fast.id_to_token, range(size)):  # then some id lies beyond, where a model has no row
        raise Error(f"has {size} pieces whose ids are not 0 to {size - 1}", where=where)
    for part, name in _NAMES.items():
        growth = _growth(_state(getattr(fast, part)), part, name, where)
        if growth > GROWTH:
            raise Error(f"its {part} may make a text {growth:.0f} times as long", where=where)
    model, kind = fast.model, type(fast.model).__name__
    if kind not in ("BPE", "Unigram"):
        raise Error(f"is of the kind {kind}; BPE and Unigram can be used", where=where)
    if kind == "BPE":
        if model.dropout:
            raise Error("gives other ids each time (dropout)", where=where)
        if model.unk_token is not None and model.token_to_id(model.unk_token) is None:
            raise Error(f"has no piece {model.unk_token!r:.40}, which it names as the unknown one", where=where)
        affixes = (model.continuing_subword_prefix or "") + (model.end_of_word_suffix or "")
        if len(affixes) > PARTS:
            raise Error("marks the parts of words by long texts", where=where)
    elif _state(model).get("unk_id") is None:
        raise Error("has no unknown piece", where=where)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice")
    return made


def _state(part: Any) -> dict[str, Any]:
    return {} if part is None else json.loads(part.__getstate__())


def _growth(state: dict[str, Any], part: str, name: str, where: object) -> float:
    """How many times as long a part can make a text. Raises Error for one that is not known."""
    kind = state.get("type")
    if kind is None:
        return 1.0
    if kind == "Sequence":
        parts = state[name]
        if len(parts) > PARTS:
            raise Error(f"its {part} has {len(parts)} parts, more than {PARTS}", where=where)
        growth = 1.0
        for each in parts:
            growth *= _growth(each, part, name, where)
        return growth
    pattern = state.get("pattern")
    if isinstance(pattern, dict) and not (pattern.get("String") or pattern.get("Regex") in REGEXES):
        raise Error(f"its {part} has a pattern that is not known ({pattern!r:.80})", where=where)
    if kind == "Replace" and part != "pre_tokenizer":
        found = str(pattern.get("String") or "x") if isinstance(pattern, dict) else "x"
        return max(1.0, len(str(state["content"]).encode()) / len(found.encode()))
    if kind == "Prepend" and part == "normalizer":
        return 1.0 + len(str(state["prepend"]))
    if kind not in _GROWTH[part]:
        raise Error(f"its {part} is {kind}, which is not supported", where=where)
    return _GROWTH[part][kind]
