"""Mutations of bytes whose meaning does not matter, and the numbers that break readers."""

from __future__ import annotations

from random import Random

# Where counters wrap, signs flip and products overflow.
EDGES = (
    0, 1, 2, 3, 7, 31, 32, 33, 127, 128, 255, 256, 257, 4095, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1,
    2**32, 2**40, 2**53, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip


def edge(rng: Random, width: int) -> bytes:
    """A little-endian integer of `width` bytes: one of the edges, or one beside it."""
    value = rng.choice(EDGES) + rng.choice((0, 0, 0, -1, 1))
    return (value % 2 ** (8 * width)).to_bytes(width, "little")


def flip_bits(rng: Random, data: bytes) -> bytes:
    """One to eight bits are other bits."""
    out = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_early_bits(rng: Random, data: bytes) -> bytes:
    """One bit near the start, where headers are, is another."""
    out = bytearray(data or b"\0")
    out[rng.randrange(min(len(out), 256))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: Random, data: bytes) -> bytes:
    """The download broke off: anywhere, early, or one byte before its end."""
    return data[: rng.choice((rng.randint(0, len(data)), rng.randint(0, min(64, len(data))), max(len(data) - 1, 0), 0))]


def append(rng: Random, data: bytes) -> bytes:
    """Bytes follow the end."""
    return data + rng.choice((b"\0", rng.randbytes(rng.randint(1, 64)), data[: rng.randint(1, 4096)]))


def cut(rng: Random, data: bytes) -> bytes:
    """A piece in the middle is missing."""
    start = rng.randint(0, len(data))
    return data[:start] + data[start + rng.choice((1, 2, 4, 8, rng.randint(1, 1024))) :]


def repeat(rng: Random, data: bytes) -> bytes:
    """A piece in the middle stands there again, perhaps many times."""
    start = rng.randint(0, len(data))
    piece = data[start : start + rng.choice((1, 8, 64, 512))]
    return data[:start] + piece * rng.choice((1, 2, 64)) + data[start:]


def overwrite(rng: Random, data: bytes) -> bytes:
    """An aligned or unaligned integer somewhere is one of the edges."""
    width = rng.choice((1, 2, 4, 8))
    start = rng.randint(0, min(len(data), rng.choice((64, 1024, len(data)))))
    return data[:start] + edge(rng, width) + data[start + width :]


def empty(rng: Random, data: bytes) -> bytes:
    """Nothing, or something that is not this format at all."""
    return rng.choice(
        (b"", b"\0", b"\n", b"{}", b"[]", b"\xff" * 64, b"\x80\x02}q\0.", b"PK\3\4", b"GGUF", rng.randbytes(256))
    )


MUTATORS = (flip_bits, flip_early_bits, truncate, append, cut, repeat, overwrite, empty)
