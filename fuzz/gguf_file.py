"""Mutations of GGUF: counted fields, counted tensors, then the tensors' bytes at stated offsets."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from fuzz import raw, templates, trees

STRING, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of the plain types
ALIGNMENT = 32


@dataclass
class Span:
    """Where an integer of the container lies: a count, a length, a type, a dimension, an offset."""

    kind: str
    start: int
    width: int


@dataclass
class Container:
    """A file taken apart: fields and tensor descriptions as bytes of their own."""

    version: int
    fields: list[tuple[bytes, int, bytes]]  # name, type, the value's bytes
    tensors: list[tuple[bytes, list[int], int, int]]  # name, dimensions, type, offset
    body: bytes
    spans: list[Span] = field(default_factory=list)

    def pack(self) -> bytes:
        """The file again, its counts, lengths and alignment true."""
        out = struct.pack("<4sIQQ", b"GGUF", self.version, len(self.tensors), len(self.fields))
        for name, kind, value in self.fields:
            out += struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value
        for name, dims, kind, offset in self.tensors:
            out += struct.pack("<Q", len(name)) + name + struct.pack("<I", len(dims))
            out += struct.pack(f"<{len(dims)}QIQ", *(size % 2**64 for size in dims), kind % 2**32, offset % 2**64)
        return out + b"\0" * (-len(out) % ALIGNMENT) + self.body


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.spans: list[Span] = []

    def number(self, kind: str, width: int) -> int:
        self.spans.append(Span(kind, self.at, width))
        self.at += width
        if self.at > len(self.data):
            raise ValueError("the file ends early")
        return int.from_bytes(self.data[self.at - width : self.at], "little")

    def bytes(self, length: int) -> bytes:
        self.at += length
        if self.at > len(self.data):
            raise ValueError("the file ends early")
        return self.data[self.at - length : self.at]

    def value(self, kind: int) -> bytes:
        start = self.at
        if kind == STRING:
            self.bytes(self.number("length", 8))
        elif kind == ARRAY:
            inner = self.number("type", 4)
            for _ in range(self.number("length", 8)):
                self.value(inner)
        else:
            self.number("value", WIDTHS[kind])
        return self.data[start : self.at]


def unpack(data: bytes) -> Container:
    """Take a good file apart. Raises ValueError or KeyError for one that is none."""
    reader = _Reader(data)
    reader.number("magic", 4)
    version, tensors, fields = reader.number("version", 4), reader.number("count", 8), reader.number("count", 8)
    out = Container(version, [], [], b"", reader.spans)
    for _ in range(fields):
        name = reader.bytes(reader.number("length", 8))
        kind = reader.number("type", 4)
        out.fields.append((name, kind, reader.value(kind)))
    for _ in range(tensors):
        name = reader.bytes(reader.number("length", 8))
        dims = [reader.number("dimension", 8) for _ in range(reader.number("rank", 4))]
        out.tensors.append((name, dims, reader.number("tensor type", 4), reader.number("offset", 8)))
    out.body = data[-(-reader.at // ALIGNMENT) * ALIGNMENT :]
    return out


def integer(rng: Random, data: bytes) -> bytes:
    """One integer of the container, of any kind equally often, is one of the edges."""
    spans = unpack(data).spans
    kind = rng.choice(sorted({span.kind for span in spans}))
    span = rng.choice([span for span in spans if span.kind == kind])
    return data[: span.start] + raw.edge(rng, span.width) + data[span.start + span.width :]


def _parts(change: Callable[[Random, Container], None]) -> Callable[[Random, bytes], bytes]:
    def mutate(rng: Random, data: bytes) -> bytes:
        parts = unpack(data)
        change(rng, parts)
        return parts.pack()

    mutate.__name__, mutate.__doc__ = change.__name__.strip("_"), change.__doc__
    return mutate


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _value(rng: Random) -> tuple[int, bytes]:
    """A value of any type, likely none that is asked for."""
    kind = rng.choice((*WIDTHS, STRING, STRING, ARRAY, ARRAY))
    if kind == STRING:
        return kind, _string(rng.choice(trees.TEXTS).encode(errors="surrogatepass"))
    if kind == ARRAY:
        inner, count = rng.choice((0, 4, 5, 6)), rng.choice((0, 1, 7, 1000))
        nested = struct.pack("<IQ", ARRAY, 1) * rng.choice((2, 50, 30_000)) + struct.pack("<IQ", 0, 0)
        return kind, rng.choice((struct.pack("<IQ", inner, count) + rng.randbytes(count * WIDTHS[inner]), nested))
    floats = (struct.pack("<f", x) for x in (float("nan"), float("inf"), -1.0, 0.0, 1e-38))
    return kind, rng.choice(list(floats)) if kind == 6 else raw.edge(rng, WIDTHS[kind])


def _field(rng: Random, parts: Container) -> None:
    """A field has another value, of the same or another type."""
    at = rng.randrange(len(parts.fields))
    name, kind, _ = parts.fields[at]
    if kind in WIDTHS and rng.random() < 0.5:
        parts.fields[at] = name, kind, raw.edge(rng, WIDTHS[kind])
    else:
        parts.fields[at] = (name, *_value(rng))


def _array(rng: Random, parts: Container) -> None:
    """A list of the vocabulary is shorter, longer, shuffled, or all one."""
    arrays = [at for at, (_, kind, _) in enumerate(parts.fields) if kind == ARRAY]
    at = rng.choice(arrays)
    name, kind, value = parts.fields[at]
    reader = _Reader(value)
    inner, items = reader.number("type", 4), []
    for _ in range(reader.number("length", 8)):
        items.append(reader.value(inner))
    change = rng.randrange(7)
    if change == 0:
        items = items[: rng.randint(0, len(items))]
    elif change == 1:
        items = items * rng.choice((2, 100))
    elif change == 2:
        rng.shuffle(items)
    elif change == 3:
        items = [rng.choice(items)] * len(items)
    elif change == 4:
        items[rng.randrange(len(items))] = items[rng.randrange(len(items))]
    else:
        texts = [_string(text.encode(errors="surrogatepass")) for text in trees.TEXTS]
        odd = (
            [*texts, _string(b"\xff\xfe"), _string(b"\xe2\x96")] if inner == STRING else [raw.edge(rng, WIDTHS[inner])]
        )
        for _ in range(rng.choice((1, 10))):
            items[rng.randrange(len(items))] = rng.choice(odd)
    parts.fields[at] = name, kind, struct.pack("<IQ", inner, len(items)) + b"".join(items)


def _field_twice(rng: Random, parts: Container) -> None:
    """A field stands twice, with another value the second time."""
    name, _, _ = rng.choice(parts.fields)
    parts.fields.insert(rng.randint(0, len(parts.fields)), (name, *_value(rng)))


def _field_away(rng: Random, parts: Container) -> None:
    """A field is not there, or has another name."""
    at = rng.randrange(len(parts.fields))
    name, kind, value = parts.fields.pop(at)
    if rng.random() < 0.3:
        other = rng.choice((name + b"x", b"", b"\xff", b"x" * 100_000, name.replace(b"gemma", b"llama")))
        parts.fields.insert(at, (other, kind, value))


def _alignment(rng: Random, parts: Container) -> None:
    """The file states an alignment."""
    parts.fields.append((b"general.alignment", 4, rng.choice((struct.pack("<I", 1), raw.edge(rng, 4)))))


def _template(rng: Random, parts: Container) -> None:
    """The chat template is hostile."""
    name = b"tokenizer.chat_template"
    parts.fields = [item for item in parts.fields if item[0] != name]
    parts.fields.append((name, STRING, _string(templates.hostile(rng).encode(errors="surrogatepass"))))


def _tensor(rng: Random, parts: Container) -> None:
    """A tensor is described otherwise: its name, shape, type or place."""
    at, other = rng.randrange(len(parts.tensors)), rng.choice(parts.tensors)
    name, dims, kind, offset = parts.tensors[at]
    edge = rng.choice(raw.EDGES)
    change = rng.randrange(4)
    if change == 0:
        name = rng.choice((other[0], b"", b"\xff", name + b"\0", name[:-1], b"../../outside", b"x" * 100_000))
    elif change == 1:
        wrong = ([], [0], [edge], [edge, edge], [2**32, 2**32], [2**63, 2], dims[::-1], [*dims, 1], [1] * 9, [0, edge])
        dims = rng.choice((*wrong, other[1], [dims[0], edge], [2**64 - 32]))
    elif change == 2:
        kind = rng.choice((*range(45), edge))
    else:
        offset = rng.choice((edge, other[3], offset + 1, offset + 32, len(parts.body), max(offset - 32, 0), 2**64 - 32))
    parts.tensors[at] = name, dims, kind, offset


def _tensor_twice(rng: Random, parts: Container) -> None:
    """A tensor stands twice, in one place or in two."""
    name, dims, kind, offset = rng.choice(parts.tensors)
    parts.tensors.append((name, dims, kind, rng.choice((offset, rng.choice(parts.tensors)[3], len(parts.body)))))


def _tensor_away(rng: Random, parts: Container) -> None:
    """A tensor is not there, or there are twenty thousand more."""
    if rng.random() < 0.5:
        parts.tensors.pop(rng.randrange(len(parts.tensors)))
    else:
        parts.tensors += [(b"blk.%d.x" % n, [0], 0, len(parts.body)) for n in range(20_000)]


template = _parts(_template)
MUTATORS = (
    integer, integer, integer, _parts(_field), _parts(_field), _parts(_array), _parts(_field_twice),
    _parts(_field_away), _parts(_alignment), _parts(_tensor), _parts(_tensor), _parts(_tensor_twice),
    _parts(_tensor_away),
)  # fmt: skip
