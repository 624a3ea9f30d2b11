"""Bit-packing: what goes in comes out, wherever one starts reading, in the fewest bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gemstill.distill.packing import TAIL, bits_of, pack, packed_size, unpack


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_round_trip(data):
    widths = np.array(data.draw(st.lists(st.integers(0, 24), max_size=70)), dtype=np.int64)
    values = np.array([data.draw(st.integers(0, 2**width - 1)) for width in widths.tolist()], dtype=np.uint32)
    packed = pack(values, widths)
    assert packed.dtype == np.uint8
    assert len(packed) == packed_size(int(widths.sum())) == np.ceil(widths.sum() / 8) + TAIL
    starts = widths.cumsum() - widths
    some = np.array(data.draw(st.lists(st.integers(0, max(0, len(widths) - 1)))), dtype=np.int64)[: len(widths) * 9]
    assert unpack(packed, starts[some], widths[some]).tolist() == values[some].tolist()
    assert unpack(packed, starts, widths).tolist() == values.tolist()


def test_the_bytes_are_the_documented_ones():
    assert pack(np.array([5, 2, 7]), np.full(3, 3))[:2].tolist() == [0b11_010_101, 0b1]
    assert pack(np.array([0x12345, 0x3FFFF]), np.full(2, 18))[:5].tolist() == [0x45, 0x23, 0xFD, 0xFF, 0x0F]


def test_single_bits():
    data = np.array([0b1010_0110, 0b0000_0001], np.uint8)
    assert bits_of(data, 1, 9).tolist() == [1, 1, 0, 0, 1, 0, 1, 1]
    assert bits_of(data, 8, 8).tolist() == []
