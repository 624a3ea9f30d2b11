"""A SentencePiece vocabulary in a few arrays: little text is encoded and decoded by it, and the library not loaded.

The `tokenizers` library needs 1.3 s and 100 MB for 262,144 entries; these arrays are there at once, in a tenth of it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from gemstill.text.vocabulary import BYTES, CONTROL, NORMAL, UNKNOWN, Vocabulary
from gemstill.text.words import SPACE

VERSION = 1  # of what is kept on disk, and of what it is made by
CROWDED = 64  # pieces in one bucket: a stranger could make all of them fall into the same
_DIGEST = hashlib.sha256().digest_size
_SPACE = SPACE.encode()
_IDS = ("bos_id", "eos_id", "unk_id", "pad_id")


@dataclass(frozen=True, eq=False)
class Table:
    """A `Vocabulary` that has all byte pieces, as arrays by id.

    text: the pieces in UTF-8, one after the other; offsets: [n + 1], where each begins. scores, types: as
    there. ranks: [n], the order in which pieces are made by merging. buckets, starts: ids by the CRC-32 of their
    pieces. named: the ids of bos, eos, unk and pad.
    """

    text: bytes
    offsets: NDArray[np.uint32]
    scores: NDArray[np.float64]
    types: NDArray[np.uint8]
    ranks: NDArray[np.uint32]
    buckets: NDArray[np.uint32]
    starts: NDArray[np.uint32]
    named: tuple[int, int, int, int]

    @staticmethod
    def of(vocabulary: Vocabulary) -> Table | None:
        """The table of a vocabulary; None where it lacks byte pieces, or where looking pieces up would take long."""
        if not vocabulary.has_bytes:
            return None
        pieces = [piece.encode() for piece in vocabulary.pieces]
        size = len(pieces)
        offsets = np.zeros(size + 1, np.uint32)
        offsets[1:] = np.cumsum(np.fromiter(map(len, pieces), np.int64, size))
        scores = np.array(vocabulary.scores)
        ranks = np.empty(size, np.uint32)
        ranks[np.argsort(-scores, kind="stable")] = np.arange(size, dtype=np.uint32)
        width = 1 << (size - 1).bit_length()
        place = np.fromiter(map(crc32, pieces), np.uint32, size) & np.uint32(width - 1)
        starts = np.zeros(width + 1, np.uint32)
        counts = np.bincount(place, minlength=width)
        if counts.max() > CROWDED:
            return None
        starts[1:] = np.cumsum(counts)
        buckets = np.argsort(place, kind="stable").astype(np.uint32)
        types = np.array(vocabulary.types, np.uint8)
        named = (vocabulary.bos_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.pad_id)
        return Table(b"".join(pieces), offsets, scores, types, ranks, buckets, starts, named)

    def to_bytes(self) -> bytes:
        """All of it, behind the SHA-256 of all of it."""
        arrays = {name: getattr(self, name) for name in _ARRAYS} | {"text": np.frombuffer(self.text, np.uint8)}
        data = save(arrays, metadata={"named": json.dumps(self.named)})
        return hashlib.sha256(data).digest() + data

    @staticmethod
    def from_bytes(data: bytes) -> Table | None:
        """What `to_bytes` wrote; None for anything else, or where a byte of it has changed."""
        digest, data = data[:_DIGEST], data[_DIGEST:]
        if hashlib.sha256(data).digest() != digest:
            return None
        arrays = load(data)
        length = int.from_bytes(data[:8], "little")
        named = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["named"])
        return Table(arrays.pop("text").tobytes(), named=tuple(named), **arrays)

    def __len__(self) -> int:
        return len(self.types)

    def piece(self, number: int) -> str:
        """The spelling of an entry."""
        return self._spelled(number).decode()

    def of_type(self, *kinds: int) -> dict[str, int]:
        """Spelling -> id of all entries of these types."""
        return {self.piece(number): number for number in np.isin(self.types, kinds).nonzero()[0].tolist()}

    def vocabulary(self) -> Vocabulary:
        """What it is the table of."""
        pieces = [self.piece(number) for number in range(len(self))]
        return Vocabulary(pieces, self.scores.tolist(), self.types.tolist(), *self.named)

    def find(self, piece: str) -> int:
        """The id of a spelling, -1 where there is none."""
        spelled = piece.encode()
        starts, buckets = self._starts, self._buckets
        bucket = crc32(spelled) & len(starts) - 2
        for place in range(starts[bucket], starts[bucket + 1]):
            if self._spelled(number := buckets[place]) == spelled:
                return number
        return -1

    def merge(self, word: str) -> list[int]:
        """The ids of a text without user-defined symbols in it, its spaces spelled U+2581.

        Of all pairs side by side whose joint piece there is, the one whose joint piece is best is merged first; of
        several, that with the shortest left part, then the leftmost: the order of `Vocabulary.merges`. A character
        that is no piece is its bytes.
        """
        size = len(word)
        ids = [self.find(character) for character in word]  # of the symbol that begins there
        ends, before = list(range(1, size + 1)), list(range(-1, size - 1))  # where it ends, where that before begins
        normal = [number >= 0 and self._types[number] == NORMAL for number in ids]
        waiting: list[tuple[int, int, int, int, int]] = []

        def offer(left: int) -> None:
            """Put the pair whose left symbol begins there on the heap, if it may be merged."""
            middle = ends[left]
            if middle >= size or not (normal[left] and normal[middle]):
                return
            joint = self.find(word[left : ends[middle]])
            if joint >= 0 and self._types[joint] == NORMAL:
                heapq.heappush(waiting, (self._ranks[joint], middle - left, left, ends[middle], joint))

        for place in range(size):
            offer(place)
        while waiting:
            _, cut, left, end, joint = heapq.heappop(waiting)
            middle = left + cut
            if ends[left] != middle or ends[middle] != end:
                continue  # one of the two has become part of another
            ids[left], ends[left], ends[middle] = joint, end, 0
            if end < size:
                before[end] = left
                offer(left)
            if before[left] >= 0:
                offer(before[left])
        found: list[int] = []
        place = 0
        while place < size:
            found += [ids[place]] if ids[place] >= 0 else map(self._bytes.__getitem__, word[place].encode())
            place = ends[place]
        return found

    def decode(self, ids: Iterable[int], *, special: bool) -> str:
        """The text of `ids`, those beyond the last left out; special: spell out control tokens, or leave them away."""
        parts: list[str] = []
        bytes_ = bytearray()
        size, values = len(self), self._values
        for number in ids:
            if number in values:
                bytes_.append(values[number])
            elif 0 <= number < size and (special or self._types[number] not in (CONTROL, UNKNOWN)):
                if bytes_:
                    parts.append(_text(bytes_))
                    bytes_.clear()
                parts.append(self._spelled(number).replace(_SPACE, b" ").decode())
        return "".join(parts) + _text(bytes_)

    def _spelled(self, number: int) -> bytes:
        return self.text[self._offsets[number] : self._offsets[number + 1]]

    # Of a memoryview one number is had in half the time that an array takes, and is an int.
    @cached_property
    def _offsets(self) -> Sequence[int]:
        return _ints(self.offsets)

    @cached_property
    def _types(self) -> Sequence[int]:
        return _ints(self.types)

    @cached_property
    def _ranks(self) -> Sequence[int]:
        return _ints(self.ranks)

    @cached_property
    def _buckets(self) -> Sequence[int]:
        return _ints(self.buckets)

    @cached_property
    def _starts(self) -> Sequence[int]:
        return _ints(self.starts)

    @cached_property
    def _bytes(self) -> list[int]:
        return [self.find(piece) for piece in BYTES]

    @cached_property
    def _values(self) -> dict[int, int]:
        return {number: byte for byte, number in enumerate(self._bytes)}


_ARRAYS = ("offsets", "scores", "types", "ranks", "buckets", "starts")


def _ints(array: NDArray[Any]) -> Sequence[int]:
    return cast(Sequence[int], array.data)


def _text(data: bytearray) -> str:
    """A run of byte pieces as text; as the library has it, U+FFFD for each byte where they are none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "\ufffd" * len(data)
