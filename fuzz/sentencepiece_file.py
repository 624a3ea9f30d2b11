"""Mutations of tokenizer.model: a protocol buffer of pieces with scores and types, and of settings."""

from __future__ import annotations

import struct
from collections.abc import Callable
from random import Random

from fuzz import raw, trees

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # field numbers of SentencePiece's ModelProto
VARINT, EIGHT, BYTES, FOUR = 0, 1, 2, 5  # wire types
Message = list[tuple[int, int, int | bytes]]  # field number, wire type, value


def varint(value: int) -> bytes:
    """A number in groups of seven bits."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift, at = shift + 7, at + 1
        if data[at - 1] < 128:
            return value, at


def unpack(data: bytes) -> Message:
    """The fields of a message. Raises ValueError or IndexError for bytes that are none."""
    at, out = 0, []
    while at < len(data):
        tag, at = _read(data, at)
        value: int | bytes
        if tag & 7 == VARINT:
            value, at = _read(data, at)
        elif tag & 7 in (EIGHT, BYTES, FOUR):
            length, at = _read(data, at) if tag & 7 == BYTES else ({EIGHT: 8, FOUR: 4}[tag & 7], at)
            value, at = data[at : at + length], at + length
        else:
            raise ValueError("a wire type that no field has")
        out.append((tag >> 3, tag & 7, value))
    return out


def pack(message: Message) -> bytes:
    """The bytes of a message."""
    out = b""
    for number, wire, value in message:
        out += varint(number << 3 | wire)
        if isinstance(value, int):
            out += varint(value % 2**64)
        else:
            out += (varint(len(value)) if wire == BYTES else b"") + value
    return out


def _fields(change: Callable[[Random, Message], None]) -> Callable[[Random, bytes], bytes]:
    def mutate(rng: Random, data: bytes) -> bytes:
        message = unpack(data)
        change(rng, message)
        return pack(message)

    mutate.__name__, mutate.__doc__ = change.__name__.strip("_"), change.__doc__
    return mutate


def _text(rng: Random) -> bytes:
    return rng.choice((b"\xff\xfe", b"\xe2\x96", *(text.encode(errors="surrogatepass") for text in trees.TEXTS)))


def _piece(rng: Random, message: Message) -> None:
    """A piece has another spelling, score or type."""
    pieces = [at for at, field in enumerate(message) if field[0] == PIECES]
    for _ in range(rng.choice((1, 1, 20))):
        at = rng.choice(pieces)
        score = struct.pack("<f", rng.choice((float("nan"), float("inf"), float("-inf"), 0.0, 1e38, -1e-45)))
        other = message[rng.choice(pieces)][2]
        assert isinstance(other, bytes)
        change: Message = [
            rng.choice(((1, BYTES, _text(rng)), (2, FOUR, score), (3, VARINT, rng.choice((*range(9), *raw.EDGES)))))
        ]
        old = message[at][2]
        assert isinstance(old, bytes)
        message[at] = PIECES, BYTES, rng.choice((other, b"", old + pack(change), old + pack(change)))


def _setting(rng: Random, message: Message) -> None:
    """A setting of the trainer or the normaliser is another: ids that are none, texts, maps of characters."""
    at = rng.choice([at for at, field in enumerate(message) if field[0] in (TRAINER, NORMALIZER)])
    number, wire, value = message[at]
    assert isinstance(value, bytes)
    inner = unpack(value)
    if number == NORMALIZER and rng.random() < 0.5:  # precompiled_charsmap: a trie that is walked without a look
        size = rng.choice((4, 64, 1024, 2**20))
        charsmap = rng.choice((struct.pack("<I", size) + rng.randbytes(size), rng.randbytes(size), raw.edge(rng, 4)))
        inner.append((2, BYTES, charsmap))
    elif inner and rng.random() < 0.7:
        place = rng.randrange(len(inner))
        field, kind, _ = inner[place]
        new = {VARINT: rng.choice(raw.EDGES), BYTES: _text(rng), FOUR: rng.randbytes(4), EIGHT: rng.randbytes(8)}[kind]
        inner[place] = field, kind, new
    else:
        inner.append((rng.choice((3, 4, 26, 35, 36, 40, 41, 42, 43, 44, 45, 50)), VARINT, rng.choice(raw.EDGES)))
    message[at] = number, wire, pack(inner)


def _away(rng: Random, message: Message) -> None:
    """Fields are missing, or all pieces are."""
    if rng.random() < 0.2:
        kept = [field for field in message if field[0] != rng.choice((PIECES, PIECES, TRAINER))]
        message[:] = kept
    else:
        del message[rng.randrange(len(message)) :][: rng.choice((1, 1, 100))]


def _again(rng: Random, message: Message) -> None:
    """Fields stand again, a few times or very often."""
    message.insert(rng.randint(0, len(message)), rng.choice(message))
    if rng.random() < 0.3:
        message += message[:50] * rng.choice((1, 20, 400))


def _wire(rng: Random, message: Message) -> None:
    """A field of a number or wire type that it does not have."""
    at = rng.randrange(len(message))
    number, _, value = message[at]
    wire = rng.choice((VARINT, EIGHT, BYTES, FOUR, 3, 4, 6, 7))
    message[at] = rng.choice((number, 4, 200, 2**29)), wire, value if wire == BYTES else rng.randbytes(8)


def length(rng: Random, data: bytes) -> bytes:
    """A length is wrong: in place of one field, a number of bytes that are not there."""
    message = unpack(data)
    at = rng.randrange(len(message))
    wrong = varint(PIECES << 3 | BYTES) + varint(rng.choice(raw.EDGES))
    return pack(message[:at]) + wrong + pack(message[at + 1 :])


def nested(rng: Random, data: bytes) -> bytes:
    """Groups in groups, or a number of endless length."""
    return data + rng.choice((b"\x0b" * 100_000, b"\x0a\x83" * 50_000, b"\x80" * 1000, b"\x08" + b"\xff" * 11))


MUTATORS = (
    _fields(_piece), _fields(_piece), _fields(_piece), _fields(_setting), _fields(_setting), _fields(_away),
    _fields(_again), _fields(_wire), length, nested,
)  # fmt: skip
