"""N-grams of normalised text, as hashes, and an index of the n-grams of benchmarks' items.

Normalised is: Unicode's NFKC, lower case, and of that letters and digits alone; what stands between is a boundary of
words. Two kinds of n-grams are taken of it: 13 words in a row (as for GPT-3, arXiv 2005.14165, appendix C), and 50
characters in a row without what stood between (as for GPT-4, arXiv 2303.08774, appendix C). The second also finds
what was set with other spaces or joined words, and text of scripts without spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WORDS, CHARACTERS = 13, 50  # in an n-gram
KINDS = ("words", "characters")
COMMON = 10  # items of a task: an n-gram of more is the task's own wording, not an item's
_BITS = 27  # of the table that tells quickly that a hash is none of the index's: 16 MiB of bits
_BASE = 0x9E3779B97F4A7C15 | 1  # odd, so that it has an inverse modulo 2^64
_INVERSE = pow(_BASE, -1, 1 << 64)

Words = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
_OTHER = re.compile(r"[^\w\x00-\x7f]|_")  # what is neither letter nor digit beyond ASCII
_KEPT = np.zeros(128, dtype=bool)
_KEPT[[*b"0123456789abcdefghijklmnopqrstuvwxyz"]] = True


class Normalised(NamedTuple):
    """Texts in a row.

    codes: [N] uint32, the code points kept. text: [N] int32, which text each is of. first: [N] bool, where words begin.
    """

    codes: npt.NDArray[np.uint32]
    text: npt.NDArray[np.int32]
    first: npt.NDArray[np.bool_]

    def spelled(self, start: int, stop: int) -> str:
        """The characters [start, stop), a space before each word."""
        codes, first = self.codes[start:stop].tolist(), self.first[start:stop].tolist()
        return "".join((" " if begins else "") + chr(code) for code, begins in zip(codes, first, strict=True)).strip()


class Grams(NamedTuple):
    """N-grams of one kind: their hashes [M], and the characters [start, stop) that each is, in `Normalised`."""

    hashes: Words
    start: Ints
    stop: Ints


def normalise(texts: Iterable[str]) -> Normalised:
    """The letters and digits of some texts, one after the other."""
    codes, owners, firsts = [], [], []
    for number, text in enumerate(texts):
        if text.isascii():
            points = np.frombuffer(text.lower().encode(), np.uint8)
            kept = _KEPT[points]
        else:
            text = _OTHER.sub(" ", unicodedata.normalize("NFKC", text).lower())
            points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
            kept = (points >= 128) | _KEPT[np.minimum(points, 127)]
        first = kept.copy()
        first[1:] &= ~kept[:-1]
        codes.append(points[kept].astype(np.uint32))
        firsts.append(first[kept])
        owners.append(np.full(len(codes[-1]), number, np.int32))
    if not codes:
        return Normalised(np.zeros(0, np.uint32), np.zeros(0, np.int32), np.zeros(0, bool))
    return Normalised(np.concatenate(codes), np.concatenate(owners), np.concatenate(firsts))


def grams(text: Normalised) -> dict[str, Grams]:
    """All n-grams that lie within one text, of each kind."""
    if not len(text.codes):
        empty = Grams(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, np.int64))
        return dict.fromkeys(KINDS, empty)
    sums = _sums(_mix(text.codes.astype(np.uint64) + np.uint64(1)))
    start = np.arange(max(0, len(text.codes) - CHARACTERS + 1))
    found = {"characters": _within(text, _spans(sums, start, start + CHARACTERS), start, start + CHARACTERS)}
    begins = np.flatnonzero(text.first)
    ends = np.append(begins[1:], len(text.codes))
    words = _sums(_mix(_spans(sums, begins, ends)))
    place = np.arange(max(0, len(begins) - WORDS + 1))
    hashes = _spans(words, place, place + WORDS)
    return {"words": _within(text, hashes, begins[place], ends[place + WORDS - 1]), **found}


def _within(text: Normalised, hashes: Words, start: Ints, stop: Ints) -> Grams:
    """Those n-grams that do not run from one text into the next."""
    inside = text.text[start] == text.text[stop - 1]
    if inside.all():
        return Grams(hashes, start, stop)
    return Grams(hashes[inside], start[inside], stop[inside])


def _mix(value: Words) -> Words:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = value ^ (value >> np.uint64(31))
    return mixed


def _powers(base: int, count: int) -> Words:
    powers = np.full(count, base, np.uint64)
    powers[0] = 1
    powered: Words = np.cumprod(powers, dtype=np.uint64)
    return powered


def _sums(values: Words) -> Words:
    """Σ v_i·B^i modulo 2^64 of the first n values, for n from 0 on: any span's hash is two of these away."""
    out = np.zeros(len(values) + 1, np.uint64)
    np.cumsum(values * _powers(_BASE, len(values)), dtype=np.uint64, out=out[1:])
    return out


def _spans(sums: Words, start: Ints, stop: Ints) -> Words:
    """Hashes of the spans [start, stop) of what `sums` is of: equal spans have equal ones, wherever they stand."""
    hashes: Words = (sums[stop] - sums[start]) * _powers(_INVERSE, len(sums))[start]
    return hashes


class Index:
    """The n-grams of items, to be asked which items share one with a text.

    texts: the texts of each item, none of whose n-grams run from one into another. tasks: which task each item is
    of. short: how many items have no n-gram of any kind, being too short. common: n-grams left out because more than
    COMMON items of one task have them.
    """

    def __init__(self, texts: Sequence[Sequence[str]], tasks: Sequence[int]) -> None:
        owners = np.array([item for item, parts in enumerate(texts) for _ in parts], np.int32)
        self._items = normalise(part for parts in texts for part in parts)
        self._of = {}
        seen = np.zeros(len(texts), bool)
        self.common = 0
        for kind, all_of in grams(self._items).items():
            owner = owners[self._items.text[all_of.start]] if len(all_of.hashes) else np.zeros(0, np.int32)
            seen[owner] = True
            order = np.argsort(all_of.hashes, kind="stable")
            hashes, owner = all_of.hashes[order], owner[order]
            once = np.ones(len(hashes), bool)  # an item's n-gram that comes in it several times counts once
            once[1:] = (hashes[1:] != hashes[:-1]) | (owner[1:] != owner[:-1])
            hashes, owner, order = hashes[once], owner[once], order[once]
            rare = _rare(hashes, np.asarray(tasks, np.int64)[owner])
            self.common += len(np.unique(hashes[~rare]))
            kept = order[rare]
            index = Grams(hashes[rare], all_of.start[kept], all_of.stop[kept])
            self._of[kind] = (index, owner[rare], _table(index.hashes))
        self.short = int((~seen).sum())

    def matches(self, texts: Sequence[str]) -> dict[tuple[int, int], dict[str, str]]:
        """What texts and items share: (text, item) -> kind -> the first such n-gram, as the text has it, normalised."""
        read = normalise(texts)
        found: dict[tuple[int, int], dict[str, str]] = {}
        for kind, all_of in grams(read).items():
            index, owners, table = self._of[kind]
            likely = np.flatnonzero(_listed(table, all_of.hashes))
            hashes = all_of.hashes[likely]
            low = np.searchsorted(index.hashes, hashes)
            hits = (
                np.flatnonzero(index.hashes[np.minimum(low, len(index.hashes) - 1)] == hashes)
                if len(owners)
                else low[:0]
            )
            high = np.searchsorted(index.hashes, hashes[hits], "right")
            for place, first, last in zip(likely[hits].tolist(), low[hits].tolist(), high.tolist(), strict=True):
                for entry in range(first, last):
                    of = found.setdefault((int(read.text[all_of.start[place]]), int(owners[entry])), {})
                    if kind not in of and self._same(kind, index, entry, read, all_of, place):
                        of[kind] = read.spelled(int(all_of.start[place]), int(all_of.stop[place]))
        return {pair: kinds for pair, kinds in found.items() if kinds}

    def _same(self, kind: str, index: Grams, entry: int, read: Normalised, all_of: Grams, place: int) -> bool:
        """Whether two n-grams of one hash are one."""
        ours, theirs = slice(index.start[entry], index.stop[entry]), slice(all_of.start[place], all_of.stop[place])
        if not np.array_equal(self._items.codes[ours], read.codes[theirs]):
            return False
        return kind == "characters" or np.array_equal(self._items.first[ours], read.first[theirs])


def _rare(hashes: Words, tasks: Ints) -> npt.NDArray[np.bool_]:
    """Which n-grams (one entry for each item that has it, hashes ascending) are in at most COMMON items of a task."""
    begins = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1])) if len(hashes) else np.zeros(0, np.int64)
    counts = np.diff(np.append(begins, len(hashes)))
    often = np.flatnonzero(np.repeat(counts > COMMON, counts))
    rare = np.ones(len(hashes), bool)
    _, group, sizes = np.unique(
        _mix(hashes[often] + tasks[often].astype(np.uint64)), return_inverse=True, return_counts=True
    )
    rare[often] = sizes[group] <= COMMON
    return rare


def _table(hashes: Words) -> npt.NDArray[np.uint8]:
    bits = np.zeros(1 << _BITS, bool)
    bits[(hashes >> np.uint64(64 - _BITS)).astype(np.int64)] = True
    return np.packbits(bits, bitorder="little")


def _listed(table: npt.NDArray[np.uint8], hashes: Words) -> npt.NDArray[np.bool_]:
    """Whether a hash may be one of the index's; it is none where this says no."""
    place = hashes >> np.uint64(64 - _BITS)
    listed: npt.NDArray[np.bool_] = (
        table[(place >> np.uint64(3)).astype(np.int64)] >> (place & np.uint64(7)).astype(np.uint8)
    ) & np.uint8(1) != 0
    return listed
