"""Bit-packing: what goes in comes out, wherever one starts reading, in the fewest bytes."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gemstill.distill.packing import TAIL, pack, packed_size, unpack


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_round_trip(data):
    bits = data.draw(st.integers(1, 24))
    values = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), dtype=np.uint32)
    packed = pack(values, bits)
    assert packed.dtype == np.uint8
    assert len(packed) == packed_size(len(values), bits)
    assert len(packed) <= np.ceil(len(values) * bits / 8) + TAIL
    start = data.draw(st.integers(0, len(values)))
    stop = data.draw(st.integers(start, len(values)))
    assert unpack(packed, bits, start, stop).tolist() == values[start:stop].tolist()


def test_the_bytes_are_the_documented_ones():
    assert pack(np.array([5, 2, 7]), 3)[:2].tolist() == [0b11_010_101, 0b1]
    assert pack(np.array([0x12345, 0x3FFFF]), 18)[:5].tolist() == [0x45, 0x23, 0xFD, 0xFF, 0x0F]
