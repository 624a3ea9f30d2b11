"""Find documents that are nearly copies of held-out ones."""

from __future__ import annotations

import zlib
from collections import defaultdict

import numpy as np
import numpy.typing as npt

WORDS = 6  # words in a shingle
SHARED = 0.5  # two documents are near copies when they share this part of the smaller one's shingles

Hashes = npt.NDArray[np.uint64]


def shingles(text: str) -> Hashes:
    """The distinct runs of `WORDS` words of a text, as sorted 64-bit hashes; one shingle for shorter texts."""
    words = np.array([zlib.crc32(word.encode()) for word in text.lower().split()], dtype=np.uint64)
    width = max(1, min(WORDS, len(words)))
    hashes = np.zeros(max(0, len(words) - width + 1), dtype=np.uint64)
    for shift in range(width):
        hashes = (hashes ^ words[shift : shift + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)


class NearCopies:
    """Held-out documents, to be asked whether another document is a near copy of one of them.

    Exact: shingles shared are counted for every pair, by an index from shingle to document; there is
    no sketch to miss one. Memory is about 100 bytes a held-out word: for corpora whose held-out part
    is some hundred megabytes at most.
    """

    def __init__(self) -> None:
        self._owners: defaultdict[int, list[int]] = defaultdict(list)
        self._sizes: list[int] = []

    def add(self, text: str) -> None:
        """Take a held-out document in."""
        found = shingles(text)
        for shingle in found.tolist():
            self._owners[shingle].append(len(self._sizes))
        self._sizes.append(len(found))

    def has(self, text: str) -> bool:
        """Whether `text` shares at least `SHARED` of the smaller one's shingles with some document taken in."""
        found = shingles(text)
        shared: defaultdict[int, int] = defaultdict(int)
        for shingle in found.tolist():
            for owner in self._owners.get(shingle, ()):
                shared[owner] += 1
        return any(count >= SHARED * min(len(found), self._sizes[owner]) for owner, count in shared.items())
