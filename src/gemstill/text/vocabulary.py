"""A SentencePiece vocabulary in its three spellings: tokenizer.model, tokenizer.json and the fields of a GGUF file."""

from __future__ import annotations

import importlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from operator import add, itemgetter
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from gemstill.core.errors import Error
from gemstill.text.words import SPACE

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # as SentencePiece and GGUF number them
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LONGEST_PIECE = 256  # characters; the cuts of a piece are tried one by one
START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
LARGEST = 256 << 20  # bytes of a file that we would call a vocabulary

# Gemma's files list these beside <table> and runs of spaces, as symbols that any text may hold. They steer the
# model, so they are control tokens here: what a user types stays text.
_STEERING = re.compile(
    r"<(pad|bos|eos|unk|mask|2mass|unused\d+|(start|end)_of_(turn|image)|image_soft_token)>"
    r"|\[@BOS@\]|\[multimodal\]|<\|.*\|>",
    re.DOTALL,
)
_RUNS = frozenset(character * size for character in f" \t\n{SPACE}" for size in range(2, LONGEST_PIECE + 1))


def steers(piece: str) -> bool:
    """Is `piece` spelled like a token that steers the model, whatever its file says of it?"""
    return _STEERING.fullmatch(piece) is not None


def whitespace_runs(user_defined: Iterable[str]) -> frozenset[str]:
    """Runs of one whitespace character that are user-defined symbols although a file may call them plain pieces.

    Gemma's tokenizer.json lists its runs of newlines and spaces as added tokens and leaves those of tabs to the
    merges; llama.cpp's converter does alike. In the SentencePiece model all of them are user-defined.
    """
    return _RUNS if any(piece in _RUNS for piece in user_defined) else frozenset()


@dataclass(frozen=True)
class Vocabulary:
    """Pieces with their scores and kinds, by id: all that SentencePiece's BPE knows.

    The two pieces side by side whose joint piece has the best score are merged first; user-defined symbols are cut
    out of the text before that, the longest that begins at a place; control tokens are never found in a text.
    """

    pieces: list[str]  # spelled with U+2581 for a space; bytes (UTF-8) and plain spaces are taken too
    scores: list[float]
    types: list[int]  # NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED or BYTE
    bos_id: int  # of these, -1 where there is none
    eos_id: int
    unk_id: int
    pad_id: int

    def __post_init__(self) -> None:
        """Bring spellings and types to the one form. Raises Error for what is no vocabulary."""
        size = len(self.pieces)
        if not size or not size == len(self.scores) == len(self.types):
            raise Error(f"{size} pieces, {len(self.scores)} scores, {len(self.types)} types", where="vocabulary")
        types = list(map(int, self.types))
        pieces = _spelled(self.pieces, types)
        if strange := set(types) - set(range(NORMAL, BYTE + 1)):
            raise Error(f"there is no type of piece {min(strange)}", where="vocabulary")
        if len(set(pieces)) != size:
            twice = next(piece for piece, count in Counter(pieces).items() if count > 1)
            raise Error(f"the piece {twice[:40]!r} is there twice", where="vocabulary")
        if not 0 < min(map(len, pieces)) <= max(map(len, pieces)) <= LONGEST_PIECE:
            raise Error(f"a piece is empty or has more than {LONGEST_PIECE} characters", where="vocabulary")
        scores = list(map(float, self.scores))
        if any(map(math.isnan, scores)):
            raise Error("a score is not a number", where="vocabulary")
        if not all(pieces[number] in _BYTE_VALUES for number, kind in enumerate(types) if kind == BYTE):
            raise Error("a byte piece is not spelled <0x00> to <0xFF>", where="vocabulary")
        for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
            number = getattr(self, name)
            if not -1 <= number < size:
                raise Error(f"{name} is {number}, there are {size} pieces", where="vocabulary")
            if number >= 0 and types[number] != UNKNOWN:
                types[number] = CONTROL
        if self.unk_id >= 0:
            types[self.unk_id] = UNKNOWN
        defined = [number for number, kind in enumerate(types) if kind == USER_DEFINED]
        for number in defined:
            if steers(pieces[number]):
                types[number] = CONTROL
        if runs := whitespace_runs(pieces[number] for number in defined):
            for number, piece in enumerate(pieces):
                if piece in runs and types[number] == NORMAL:
                    types[number] = USER_DEFINED
        for name, value in {"pieces": pieces, "scores": scores, "types": types}.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def from_sentencepiece(data: bytes, *, where: object = "tokenizer.model") -> Vocabulary:
        """Read a SentencePiece model. Raises Error where it is none, or not a BPE that takes text as it is."""
        model = _message()
        try:
            if len(data) > LARGEST:
                raise ValueError(f"{len(data)} bytes are too many")
            model.ParseFromString(data)
        except Exception as error:  # protobuf's own, of no base class that it promises
            raise Error(f"is not a SentencePiece model ({error})", where=where, fix="fetch the file again") from error
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        if not model.pieces or trainer.model_type != trainer.BPE:
            raise Error("is not a SentencePiece model of the kind BPE", where=where)
        if (
            normalizer.precompiled_charsmap
            or normalizer.add_dummy_prefix
            or normalizer.remove_extra_whitespaces
            or not normalizer.escape_whitespaces
            or trainer.treat_whitespace_as_suffix
        ):
            raise Error("changes a text before it encodes it, which Gemma's tokenizers do not", where=where)
        size = len(model.pieces)
        ids = (trainer.bos_id, trainer.eos_id, trainer.unk_id, trainer.pad_id)
        try:
            return Vocabulary(
                [piece.piece for piece in model.pieces],
                [piece.score for piece in model.pieces],
                [piece.type for piece in model.pieces],
                *(number if 0 <= number < size else -1 for number in ids),
            )
        except Error as error:
            raise Error(error.what, where=where) from error

    def to_sentencepiece(self) -> bytes:
        """The bytes of a tokenizer.model that gives the same ids; UNKNOWN has to be there once.

        Raises Error where it is not."""
        if [self.unk_id] != [number for number, kind in enumerate(self.types) if kind == UNKNOWN]:
            raise Error("a SentencePiece model needs exactly one <unk>", where="vocabulary")
        model = _message()
        for piece, score, kind in zip(self.pieces, self.scores, self.types, strict=True):
            model.pieces.add(piece=piece, score=score, type=kind)
        trainer, normalizer = model.trainer_spec, model.normalizer_spec
        trainer.model_type, trainer.vocab_size = trainer.BPE, len(self.pieces)
        trainer.byte_fallback, trainer.split_digits, trainer.allow_whitespace_only_pieces = self.has_bytes, True, True
        for name in ("bos", "eos", "unk", "pad"):
            number = getattr(self, f"{name}_id")
            setattr(trainer, f"{name}_id", number)
            if number >= 0:
                setattr(trainer, f"{name}_piece", self.pieces[number])
        normalizer.name = "identity"
        normalizer.add_dummy_prefix = normalizer.remove_extra_whitespaces = False
        normalizer.escape_whitespaces = True
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    def to_tokenizer_json(self) -> bytes:
        """The bytes of a tokenizer.json that gives the same ids."""
        text: str = self.fast().to_str(pretty=False)
        return text.encode()

    def for_gguf(self) -> list[str]:
        """The pieces as llama.cpp wants them: user-defined symbols, which it looks for in raw text, with spaces."""
        each = zip(self.pieces, self.types, strict=True)
        return [piece.replace(SPACE, " ") if kind == USER_DEFINED else piece for piece, kind in each]

    def merges(self) -> list[tuple[str, str]]:
        """Every pair of pieces that may be merged, the best joint piece first.

        SentencePiece merges the adjacent pair whose joint piece has the best score, whichever two pieces it is made
        of. A list with one pair a piece, as BPE training leaves it, gives other ids. Control tokens, byte pieces
        and user-defined symbols are neither made by merging nor merged, however they are spelled.
        """
        normal = {piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind == NORMAL}
        best = sorted(range(len(self.pieces)), key=lambda number: (-self.scores[number], number))
        found: list[tuple[str, str]] = []
        for piece in map(self.pieces.__getitem__, best):
            if piece in normal:
                for cut in range(1, len(piece)):
                    left = piece[:cut]
                    if left in normal and (right := piece[cut:]) in normal:
                        found.append((left, right))
        return found

    def fast(self) -> tokenizers.Tokenizer:
        """A tokenizer of the `tokenizers` library that gives the same ids."""
        unknown = self.pieces[self.unk_id] if self.unk_id >= 0 else None
        vocab = {piece: number for number, piece in enumerate(self.pieces)}
        model = BPE(vocab=vocab, merges=self.merges(), unk_token=unknown, fuse_unk=True, byte_fallback=self.has_bytes)
        fast = tokenizers.Tokenizer(model)
        fast.normalizer = normalizers.Replace(" ", SPACE)
        # Finds no space after the normaliser; there because transformers' Gemma class has it too.
        fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        fast.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
        if self.bos_id >= 0:
            bos = self.pieces[self.bos_id]
            fast.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, self.bos_id)]
            )
        fast.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in self.of_type(CONTROL, UNKNOWN)]
        )
        # A run of spaces is one only after the normaliser has made it U+2581.
        fast.add_tokens([AddedToken(token, normalized=SPACE in token) for token in self.of_type(USER_DEFINED)])
        return fast

    @property
    def has_bytes(self) -> bool:
        """Is there a piece for each byte, so that any text can be said?"""
        return self.types.count(BYTE) == len(BYTES)

    def of_type(self, *kinds: int) -> list[str]:
        """The pieces of these types."""
        return [piece for piece, kind in zip(self.pieces, self.types, strict=True) if kind in kinds]


_BYTE_VALUES = frozenset(BYTES)


def _message() -> Any:
    """An empty SentencePiece model. Imported here, since protobuf is for those who have such files."""
    module = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    return module.ModelProto()


def _spelled(pieces: Sequence[str | bytes], types: Sequence[int]) -> list[str]:
    """All pieces as text, a space in a user-defined one as U+2581. Raises Error where one is not UTF-8."""
    try:
        texts = [piece if isinstance(piece, str) else str(piece, "utf-8") for piece in pieces]
        "".join(texts).encode()  # a lone surrogate is text, and no UTF-8
    except UnicodeError as error:
        raise Error(f"a piece is not UTF-8 ({error})", where="vocabulary") from error
    for number, kind in enumerate(types):
        if kind == USER_DEFINED:
            texts[number] = texts[number].replace(" ", SPACE)
    return texts


def from_json(state: dict[str, Any], ids: Sequence[int], *, where: object) -> Vocabulary:
    """The vocabulary of a tokenizer.json that was made from a SentencePiece model; scores from the merges' order.

    state: the file's contents as the `tokenizers` library writes them. ids: of bos, eos, unk and pad.

    Raises:
        Error: it gives other ids than any SentencePiece model would (byte-level BPE, one merge a piece, …).
    """
    model: dict[str, Any] = state["model"]
    fix = "keep it as tokenizer.json, or use the tokenizer.model that it was made from"
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise Error("is not made from a SentencePiece model", where=where, fix=fix)
    numbers: dict[str, int] = model["vocab"] | {token["content"]: token["id"] for token in state["added_tokens"]}
    pieces = sorted(numbers, key=numbers.__getitem__)
    if list(map(numbers.__getitem__, pieces)) != list(range(len(pieces))):
        raise Error("its ids are not 0, 1, 2, …", where=where, fix=fix)
    added = {token["id"]: token for token in state["added_tokens"]}
    types = [_type(piece, added.get(number)) for number, piece in enumerate(pieces)]
    if "<0x00>" in numbers:
        # In Gemma's own tokenizer.json the byte of the tab is spelled as the tab, so that it can be merged.
        for byte, name in enumerate(BYTES):
            place = numbers["<0x00>"] + byte
            if name not in numbers and place < len(pieces) and pieces[place] == chr(byte):
                pieces[place], types[place] = name, BYTE
    vocabulary = Vocabulary(pieces, [0.0] * len(pieces), types, *ids)
    scores = _order(vocabulary, model["merges"])
    if scores is None:
        raise Error("its merges are not those of a SentencePiece model", where=where, fix=fix)
    return replace(vocabulary, scores=scores)


def _order(vocabulary: Vocabulary, merges: Sequence[Sequence[str]]) -> list[float] | None:
    """Scores with which `vocabulary` merges as `merges` (pairs, the best first) say; None where no scores would."""
    normal = {
        piece: number
        for number, (piece, kind) in enumerate(zip(vocabulary.pieces, vocabulary.types, strict=True))
        if kind == NORMAL
    }

    def numbers(pieces: Iterable[str]) -> NDArray[np.int64]:
        return np.fromiter(map(normal.get, pieces, repeat(-1)), np.int64, len(merges))

    left, right = (list(map(itemgetter(side), merges)) for side in (0, 1))
    made = numbers(map(add, left, right))
    plain = (numbers(left) >= 0) & (numbers(right) >= 0) & (made >= 0)
    # A merge of what is no plain piece never comes about only where its joint piece is cut out of the text before.
    cut_out = set(vocabulary.of_type(USER_DEFINED))
    if not all(left[place] + right[place] in cut_out for place in (~plain).nonzero()[0].tolist()):
        return None
    lengths = np.fromiter(map(len, left), np.int64, len(merges))[plain]
    made = made[plain]
    in_order, first = np.unique(made, return_index=True)
    ranked = np.full(len(vocabulary.pieces), len(made))
    ranked[in_order] = first
    by_id = np.fromiter(normal.values(), np.int64, len(normal))
    by_rank = by_id[np.argsort(ranked[by_id], kind="stable")]
    if np.array_equal(by_rank[: len(in_order)], in_order):
        by_rank = by_id  # as published: pieces stand in the order of their scores, the single characters too
    scores = np.zeros(len(vocabulary.pieces))
    scores[by_rank] = -np.arange(len(by_rank), dtype=np.float64)
    # Which of two pairs with the same joint piece comes first says nothing. All pairs there are, each of them once:
    pairs = np.sort(made * (LONGEST_PIECE + 1) + lengths)
    if (np.diff(scores[made]) > 0).any() or (np.diff(pairs) == 0).any() or len(pairs) != _count(normal):
        return None
    found: list[float] = (scores + 0.0).tolist()  # no -0.0
    return found


def _count(normal: Mapping[str, int]) -> int:
    """How many pairs of these pieces make one of them."""
    return sum(piece[:cut] in normal and piece[cut:] in normal for piece in normal for cut in range(1, len(piece)))


def _type(piece: str, added: dict[str, Any] | None) -> int:
    if added is not None:
        return CONTROL if added["special"] else USER_DEFINED
    return BYTE if piece in _BYTE_VALUES else NORMAL
