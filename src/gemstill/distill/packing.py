"""Whole numbers of a few bits each, one after the other in a string of bytes, lowest bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 24  # a number and the up to 7 bits before it in its first byte fit four bytes
TAIL = 4  # bytes of zeros at the end, so that four bytes can be read from wherever a number starts


def packed_size(bits: int) -> int:
    """Bytes that `pack` needs for numbers of so many bits together."""
    return (bits + 7) // 8 + TAIL


def pack(values: NDArray[Any], widths: NDArray[Any]) -> NDArray[np.uint8]:
    """Pack values [n], whole numbers in [0, 2^width), at widths [n] ≤ 24 bits each: uint8 [packed_size(Σ widths)]."""
    ends = widths.cumsum(dtype=np.int64)
    starts = ends - widths
    out = np.zeros(packed_size(int(ends[-1]) if len(ends) else 0), np.uint8)
    shifted = values.astype(np.uint32) << (starts & 7).astype(np.uint32)
    for lane in range(4):
        piece = (shifted >> np.uint32(8 * lane)) & np.uint32(255)
        # Numbers share bytes but no bits: sums, exact in float64, are what `or` would give.
        sums = np.bincount((starts >> 3) + lane, weights=piece, minlength=len(out))
        out += sums[: len(out)].astype(np.uint8)
    return out


def unpack(data: NDArray[np.uint8], starts: NDArray[np.int64], widths: NDArray[Any]) -> NDArray[np.uint32]:
    """The numbers of widths [n] bits that start at the bits starts [n] of what `pack` gave: uint32 [n]."""
    place = starts >> 3
    words = np.zeros(len(place), np.uint32)
    for lane in range(4):
        words |= data[place + lane].astype(np.uint32) << np.uint32(8 * lane)
    ones = (np.uint32(1) << np.broadcast_to(widths, place.shape).astype(np.uint32)) - np.uint32(1)
    return (words >> (starts & 7).astype(np.uint32)) & ones


def bits_of(data: NDArray[np.uint8], start: int, stop: int) -> NDArray[np.uint8]:
    """Bits start..stop of a string of bytes, a 0 or 1 each: uint8 [stop − start]."""
    piece = np.unpackbits(data[start >> 3 : (stop + 7) >> 3], bitorder="little")
    return piece[start & 7 : (start & 7) + stop - start]
