"""Whole numbers of a few bits each, one after the other in a string of bytes, lowest bit first."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 24  # a number and the up to 7 bits before it in its first byte fit four bytes
TAIL = 4  # bytes of zeros at the end, so that four bytes can be read from wherever a number starts


def packed_size(count: int, bits: int) -> int:
    """Bytes that `pack` needs for `count` numbers."""
    return (count * bits + 7) // 8 + TAIL if count else 0


def pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Pack values [n], whole numbers in [0, 2^bits), at `bits` ≤ 24 bits each: uint8 [packed_size(n, bits)].

    Eight numbers fill `bits` bytes: number i of each eight starts at bit i·bits of its bytes.
    """
    count = len(values)
    eights = np.zeros((-(-count // 8), 8), dtype=np.uint32)
    eights.reshape(-1)[:count] = values
    out = np.zeros(len(eights) * bits + TAIL, dtype=np.uint8)
    table = out[: len(eights) * bits].reshape(len(eights), bits)
    for lane in range(8):
        first, shift = divmod(lane * bits, 8)
        number = eights[:, lane] << np.uint32(shift)
        for byte in range((shift + bits + 7) // 8):
            table[:, first + byte] |= (number >> np.uint32(8 * byte)).astype(np.uint8)
    return out[: packed_size(count, bits)]


def unpack(data: NDArray[np.uint8], bits: int, start: int, stop: int) -> NDArray[np.uint32]:
    """Numbers start..stop of those that `pack` put into `data`: uint32 [stop − start]. Reads those bytes alone."""
    first = start // 8
    count = -(-stop // 8) - first
    if stop <= start:
        return np.zeros(0, dtype=np.uint32)
    piece = np.array(data[first * bits : (first + count) * bits + TAIL])
    piece = np.pad(piece, (0, count * bits + TAIL - len(piece)))
    out = np.empty((count, 8), dtype=np.uint32)
    mask = np.uint32((1 << bits) - 1)
    for lane in range(8):
        offset, shift = divmod(lane * bits, 8)
        words = np.ndarray((count,), dtype="<u4", buffer=piece, offset=offset, strides=(bits,))
        out[:, lane] = (words >> np.uint32(shift)) & mask
    return out.reshape(-1)[start - first * 8 : stop - first * 8]
