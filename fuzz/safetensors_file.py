"""Mutations of safetensors: a length, a JSON header of shapes and offsets, the tensors' bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

from fuzz import raw, trees

DTYPES = ("BOOL", "U8", "I8", "I64", "F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2", "C64", "F4", "f32", "", None)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the bytes behind it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: bytes | dict[str, Any], body: bytes) -> bytes:
    """A file of this header, whose length is true."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def header_json(rng: Random, data: bytes) -> bytes:
    """The header is other JSON."""
    header, body = split(data)
    return join(rng.choice(trees.MUTATORS)(rng, json.dumps(header).encode()), body)


def header_length(rng: Random, data: bytes) -> bytes:
    """The header is longer or shorter than it is."""
    return raw.edge(rng, 8) + data[8:]


def _entry(change: Callable[[Random, dict[str, Any], dict[str, Any]], None]) -> Callable[[Random, bytes], bytes]:
    def mutate(rng: Random, data: bytes) -> bytes:
        header, body = split(data)
        names = [name for name in header if name != "__metadata__"]
        first, second = rng.choice(names), rng.choice(names)
        change(rng, header[first], header[second])
        return join(header, body)

    mutate.__name__, mutate.__doc__ = change.__name__.strip("_"), change.__doc__
    return mutate


def _offsets(rng: Random, one: dict[str, Any], other: dict[str, Any]) -> None:
    """A tensor lies elsewhere: beyond the end, before the start, backwards."""
    one["data_offsets"][rng.randrange(2)] = rng.choice((rng.choice(raw.EDGES), -1, other["data_offsets"][0]))


def _overlap(rng: Random, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two tensors are the same bytes."""
    one["data_offsets"] = list(other["data_offsets"])
    if rng.random() < 0.5:
        one["shape"], one["dtype"] = list(other["shape"]), other["dtype"]


def _shape(rng: Random, one: dict[str, Any], other: dict[str, Any]) -> None:
    """A shape whose product wraps, is nothing, or is another's."""
    edge = rng.choice(raw.EDGES)
    size = one["shape"][0]
    one["shape"] = rng.choice((
        [edge], [edge, edge], [edge, 2**64 - edge], [2**32, 2**32], [2**63, 2], [0, edge], [], [1] * 100, [size, 1],
        [-1, size], [size * 2, 0], other["shape"], one["shape"][::-1], [*one["shape"], 1],
    ))  # fmt: skip


def _dtype(rng: Random, one: dict[str, Any], other: dict[str, Any]) -> None:
    """A tensor is of another type, of the same width or not."""
    one["dtype"] = rng.choice(DTYPES)


def retyped(rng: Random, data: bytes) -> bytes:
    """All is well but the type: a shape that fits the bytes in a type that is no number of ours."""
    header, body = split(data)
    name = rng.choice([name for name in header if name != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    dtype, width = rng.choice((("I64", 8), ("F64", 8), ("C64", 8), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("I32", 4)))
    header[name] |= {"dtype": dtype, "shape": [(end - begin) // width]}
    return join(header, body)


def extra_tensors(rng: Random, data: bytes) -> bytes:
    """Tensors that nobody asked for: of no size, a great many, of names like ours."""
    header, body = split(data)
    end = len(body)
    nothing = {"dtype": "F32", "shape": [0, rng.choice(raw.EDGES[:20])], "data_offsets": [end, end]}
    names = rng.choice((["lm_head.weight"], ["x"], [""], [f"model.layers.{n}.x" for n in range(20_000)], ["x" * 10**6]))
    return join(header | dict.fromkeys(names, nothing), body)


MUTATORS = (
    header_json, header_json, header_length, _entry(_offsets), _entry(_overlap), _entry(_shape), _entry(_dtype),
    retyped, extra_tensors,
)  # fmt: skip
