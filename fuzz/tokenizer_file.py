"""Mutations of tokenizer.json beyond those of any JSON: parts without bounds, vocabularies with holes."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz import raw, trees

DOUBLING = {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}
SLOW = [  # patterns that try every way to divide a run of one letter
    {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    for regex in ("(a+)+$", "(a|aa)+$", "(a*)*b", "(?:a+a+)+b", "(.*)*x", "((a{1,99}){1,99}){1,99}b", "(?=(a+)+b)", "[")
]
PARTS: dict[str, list[Any]] = {
    "normalizer": [
        DOUBLING, None, {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "x" * 10**6},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10**6}, {"type": "StripAccents"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}, {"type": "Sequence", "normalizers": []},
        {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁" * 10**6},
    ],
    "pre_tokenizer": [
        *SLOW, None, {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}, {"type": "WhitespaceSplit"},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False}, {"type": "Digits"},
        {"type": "FixedLength", "length": 0}, {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}] * 5000},
    ],
    "decoder": [
        None, {"type": "ByteFallback"}, {"type": "Strip", "content": "a", "start": 2**63 - 1, "stop": 2**31},
        {"type": "Replace", "pattern": {"String": ""}, "content": "x" * 10**6}, {"type": "CTC"}, {"type": "WordPiece"},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}, {"type": "Fuse"}, {"type": "BPEDecoder"},
        {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40},
    ],
    "post_processor": [
        None, {"type": "ByteLevel"}, {"type": "BertProcessing", "sep": ["x", 2**32 - 1], "cls": ["", 0]},
    ],
    "padding": [
        {"strategy": {"Fixed": size}, "direction": "Left", "pad_to_multiple_of": multiple, "pad_id": 2**32 - 1,
         "pad_type_id": 0, "pad_token": "x"}
        for size, multiple in ((2**31, None), (2**63 - 1, 2**31), (0, 0))
    ],
    "truncation": [
        {"direction": "Right", "max_length": size, "strategy": "LongestFirst", "stride": stride}
        for size, stride in ((0, 1), (1, 2**63 - 1), (2**63 - 1, 0))
    ],
}  # fmt: skip


def _tree(change: Callable[[Random, Any], None]) -> Callable[[Random, bytes], bytes]:
    def mutate(rng: Random, data: bytes) -> bytes:
        tree = json.loads(data)
        change(rng, tree)
        return json.dumps(tree).encode()

    mutate.__name__, mutate.__doc__ = change.__name__.strip("_"), change.__doc__
    return mutate


def _part(rng: Random, tree: Any) -> None:
    """A part of the pipeline is another of the library's, or one that never ends."""
    part = rng.choice(list(PARTS))
    tree[part] = rng.choice(PARTS[part])


def _ids(rng: Random, tree: Any) -> None:
    """Ids of the vocabulary are huge, equal, or further apart than one."""
    vocab = tree["model"]["vocab"]
    names = list(vocab)
    change = rng.randrange(4)
    if change == 0:
        vocab[rng.choice(names)] = rng.choice((*raw.EDGES, -1))
    elif change == 1:
        vocab[rng.choice(names)] = vocab[rng.choice(names)]
    elif change == 2:
        tree["model"]["vocab"] = {name: 1000 * id for name, id in vocab.items()}
    else:
        for name in rng.sample(names, min(len(names), rng.choice((1, 50)))):
            del vocab[name]


def _spelling(rng: Random, tree: Any) -> None:
    """A piece has another spelling."""
    vocab = tree["model"]["vocab"]
    old = rng.choice((*(name for name in vocab if name.startswith("<")), *list(vocab)[:20]))
    vocab[rng.choice(trees.TEXTS)] = vocab.pop(old)


def _merges(rng: Random, tree: Any) -> None:
    """Merges of pieces that are not there, of nothing, in another order or spelling."""
    merges = tree["model"]["merges"]
    odd = rng.choice((["x", "y"], ["", ""], [], ["a"], "a b c", "ab", " ", None, [1, 2], ["▁", "\0"], ["a", "b", "c"]))
    change = rng.randrange(4)
    if change == 0 and merges:
        merges[rng.randrange(len(merges))] = odd
    elif change == 1:
        rng.shuffle(merges)
    elif change == 2:
        merges *= rng.choice((2, 50))
    else:
        merges.append(odd)


def _added(rng: Random, tree: Any) -> None:
    """Added tokens: empty, twice, of ids that are none, very many, very long."""
    tokens = tree["added_tokens"]
    one = dict(rng.choice(tokens))
    wrong = {"content": rng.choice(trees.TEXTS), "id": rng.choice((*raw.EDGES, -1)), "special": rng.random() < 0.5}
    one |= {key: wrong[key] for key in wrong if rng.random() < 0.6}
    one |= {key: rng.random() < 0.5 for key in ("lstrip", "rstrip", "single_word", "normalized") if rng.random() < 0.3}
    if rng.random() < 0.1:
        tokens += [one | {"content": f"<x{n}>", "id": 10_000 + n} for n in range(20_000)]
    elif rng.random() < 0.5:
        tokens[rng.randrange(len(tokens))] = one
    else:
        tokens.append(one)


def _model(rng: Random, tree: Any) -> None:
    """The model is of another kind, or a setting of it is odd."""
    model = tree["model"]
    pieces = list(model["vocab"])
    bad = rng.choice((0.0, -1e308, 1e308))
    tree["model"] = rng.choice((
        {"type": "Unigram", "unk_id": rng.choice((0, 2**31, None)), "vocab": [[piece, bad] for piece in pieces],
         "byte_fallback": True},
        {"type": "WordLevel", "vocab": model["vocab"], "unk_token": rng.choice(("<unk>", "x"))},
        {"type": "WordPiece", "vocab": model["vocab"], "unk_token": "x", "continuing_subword_prefix": "#" * 999,
         "max_input_chars_per_word": rng.choice((0, 2**63))},
        *(model | odd for odd in (
            {"dropout": 1.0}, {"dropout": 2}, {"dropout": 0.5}, {"unk_token": "nope"}, {"unk_token": None},
            {"continuing_subword_prefix": "##"}, {"end_of_word_suffix": "x" * 999}, {"ignore_merges": True},
            {"byte_fallback": False}, {"fuse_unk": False}, {"vocab": {}}, {"merges": []}, {"type": "BPE2"},
        )),
    ))  # fmt: skip


MUTATORS = (
    _tree(_part), _tree(_part), _tree(_part), _tree(_ids), _tree(_spelling), _tree(_merges), _tree(_added),
    _tree(_model), *trees.MUTATORS,
)  # fmt: skip
