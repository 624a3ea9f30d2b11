"""The id code of a store: frequent ids in few bits.

Ids are ranked by how often they occur in the data set's text, and the ranks are cut into classes of
consecutive ranks, class c holding 2^widths[c] of them. An id is told by its class and its place within the
class, in widths[c] bits. A row's entries lie in the order of their ranks, so their classes only rise: they
are written in unary, a one for each entry of a class and a zero after each class (P. Elias, "Efficient
storage and retrieval by content and address of static files", 1974; R. Fano, 1971). A row of K entries so
takes K + C bits and their places, and the zeros tell where the next row begins.

It needs no decoding bit by bit: everything is found by counting and by cumulative sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from gemstill.core import files
from gemstill.core.errors import Error

FILE = "code.safetensors"
TOKENS = 1 << 24  # counted at most, from all over the data set
PIECES = 256
STEPS = 8  # places a power of two where a class may begin
MOST_CLASSES = 1024  # more than any number of entries makes worth while


class Text(Protocol):
    """What a code is made from: a data set (gemstill.data.dataset.TokenDataset is one)."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def read(self, start: int, stop: int) -> NDArray[Any]: ...


@dataclass(frozen=True)
class IdCode:
    """Which ids are frequent, and the classes of their ranks."""

    vocab_size: int
    order: NDArray[np.uint32]  # [M] the most frequent ids, the first first; all others follow in their own order
    widths: NDArray[np.uint8]  # [C] bits of a place within each class

    @cached_property
    def ids(self) -> NDArray[np.uint32]:
        """The id of each rank: [V]."""
        rest = np.ones(self.vocab_size, bool)
        rest[self.order] = False
        return np.concatenate([self.order, np.flatnonzero(rest).astype(np.uint32)])

    @cached_property
    def ranks(self) -> NDArray[np.uint32]:
        """The rank of each id: [V]."""
        ranks = np.empty(self.vocab_size, np.uint32)
        ranks[self.ids] = np.arange(self.vocab_size, dtype=np.uint32)
        return ranks

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """The first rank of each class: [C]."""
        sizes = np.left_shift(np.int64(1), self.widths.astype(np.int64))
        return sizes.cumsum() - sizes

    def classes(self, ranks: NDArray[Any]) -> NDArray[np.int64]:
        """The class of each of these ranks."""
        return np.searchsorted(self.first, ranks, side="right") - 1

    def to_bytes(self) -> bytes:
        """The content of code.safetensors."""
        return save({"order": self.order, "widths": self.widths})

    @staticmethod
    def read(folder: Path, vocab_size: int) -> IdCode:
        """The code of the store in `folder`. Raises Error when it is missing or no code of this vocabulary."""
        path = folder / FILE
        try:
            tensors = load(path.read_bytes())
            order, widths = tensors["order"], tensors["widths"]
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise Error(f"cannot be read ({error})", where=path, fix="fetch or make the store again") from error
        sound = order.dtype == np.uint32 and widths.dtype == np.uint8 and order.ndim == widths.ndim == 1
        sound = sound and len(np.unique(order)) == len(order) and int(order.max(initial=0)) < vocab_size
        sound = sound and 0 < len(widths) <= MOST_CLASSES and int(widths.max()) <= 24
        code = IdCode(vocab_size, order, widths)
        if not sound or int(code.first[-1]) + (1 << int(widths[-1])) < vocab_size:
            raise Error(f"is no code of {vocab_size} ids", where=path, fix="fetch or make the store again")
        return code

    @staticmethod
    def of(text: Text, entries: float) -> IdCode:
        """The code that suits a data set, for rows of about `entries` entries. A function of its arguments alone."""
        counts = np.zeros(text.vocab_size, np.int64)
        for piece in _pieces(text):
            counts += np.bincount(piece, minlength=text.vocab_size)
        order = np.argsort(-counts, kind="stable")
        # The list of frequent ids costs four bytes each: at most a sixteenth of a byte a token.
        known = min(int((counts > 0).sum()), max(1, text.num_tokens // 64))
        frequent = order[:known].astype(np.uint32)
        code = IdCode(text.vocab_size, frequent, np.zeros(1, np.uint8))
        return IdCode(text.vocab_size, frequent, best_widths(_expected(counts[code.ids]), entries))


def write(folder: Path, code: IdCode) -> None:
    """Write code.safetensors, whole or not at all."""
    files.write(folder / FILE, code.to_bytes())


def _pieces(text: Text) -> Iterator[NDArray[Any]]:
    """At most TOKENS tokens, in pieces from all over the data set."""
    size = -(-min(TOKENS, text.num_tokens) // PIECES)
    starts = np.linspace(0, text.num_tokens - size, PIECES).astype(np.int64).tolist()
    if text.num_tokens <= TOKENS:
        starts = list(range(0, text.num_tokens, size))
    for start in starts:
        yield np.asarray(text.read(start, min(start + size, text.num_tokens)))


def _expected(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often entries are of each rank, guessed from how often tokens are: nine times, and once of any rank."""
    share: NDArray[np.float64] = 0.9 * counts / max(1, counts.sum()) + 0.1 / len(counts)
    return share


def best_widths(share: NDArray[np.float64], entries: float) -> NDArray[np.uint8]:
    """The classes that take the fewest bits: a class costs a bit a row, a place its width.

    share: [V] of the entries that are of each rank. Dynamic programming over the places where a class may
    begin, STEPS in each power of two.
    """
    vocab = len(share)
    mass = np.concatenate([[0.0], share.cumsum()])
    most = max(0, (vocab - 1).bit_length())
    best: dict[int, tuple[float, int]] = {}

    def allowed(place: int) -> bool:
        return place % (1 << max(0, place.bit_length() - STEPS.bit_length())) == 0

    for place in range(vocab - 1, -1, -1):
        if not allowed(place):
            continue
        found = (np.inf, 0)
        for width in range(most + 1):
            end = place + (1 << width)
            if end < vocab and end not in best:
                continue
            tail = best[end][0] if end < vocab else 0.0
            found = min(found, (1 / entries + width * float(mass[min(end, vocab)] - mass[place]) + tail, width))
        best[place] = found
    widths, place = [], 0
    while place < vocab:
        widths.append(best[place][1])
        place += 1 << widths[-1]
    return np.array(widths, np.uint8)
