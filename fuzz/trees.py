"""Mutations of JSON: values of other types and sizes, names twice, names away, nesting without end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from fuzz.raw import EDGES

Place = tuple[Any, Any]  # the list or dictionary, and the index or name in it
_LATER = "\x01later\x01"  # stands for text that `json.dumps` would not write; filled in afterwards

TEXTS = (
    "", " ", "a", "\0", "\n", "\ud800", "\U0010ffff", "../../outside", "/etc/passwd", "..", ".", "~", "a/b", "a\0b",
    "C:\\x", "%s%n", "x" * 300, "x" * 100_000, "<bos>", "<eos>", "▁", "<0x0A>", "null", "1e999", "-1",
)  # fmt: skip
LITERALS = (
    "NaN", "Infinity", "-Infinity", "1e999", "-0.0", "1e-320", "0.5", "1" * 400, "-" + "9" * 40, "1" * 5000,
    "[" * 500 + "]" * 500, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, '"\\ud800"', "nul",
)  # fmt: skip


def places(tree: Any) -> Iterator[Place]:
    """Every place in `tree`, outermost first."""
    items: Any = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, _ in items:
        yield tree, key
    for _, value in list(items):
        yield from places(value)


def choose(rng: Random, tree: Any) -> Place:
    """A place in `tree`: half of the time one of the few near the root, where the meaning is."""
    found = list(places(tree))
    if not found:
        raise ValueError("nothing in it")
    return rng.choice(found[:64] if rng.random() < 0.5 else found)


def odd(rng: Random, value: Any) -> Any:
    """Another value for `value`, of its type or of another."""
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.6:
        return rng.choice((-value, value * 2, value + 1, value - 1, value + 0.5, str(value), -1, rng.choice(EDGES)))
    return rng.choice(
        (
            None, True, False, -1, 0, 0.0, -1e308, 1e308, rng.choice(EDGES), -rng.choice(EDGES), rng.choice(TEXTS),
            [], {}, [[]], [value], {"a": value}, [value] * 1000, [0] * 10_000,
        )
    )  # fmt: skip


def _edit(change: Callable[[Random, Any], str | None], name: str) -> Callable[[Random, bytes], bytes]:
    """A mutator of JSON bytes from a change of the tree, which may leave a literal for `_LATER`."""

    def mutate(rng: Random, data: bytes) -> bytes:
        tree = json.loads(data)
        literal = change(rng, tree)
        text = json.dumps(tree)
        if literal is not None:
            text = text.replace(json.dumps(_LATER), literal, 1)
        return text.encode()

    mutate.__name__, mutate.__doc__ = name, change.__doc__
    return mutate


def _replace(rng: Random, tree: Any) -> None:
    """A value is another."""
    parent, key = choose(rng, tree)
    parent[key] = odd(rng, parent[key])


def _literal(rng: Random, tree: Any) -> str:
    """A value is something that readers of JSON disagree about, or are nested to death by."""
    parent, key = choose(rng, tree)
    parent[key] = _LATER
    return rng.choice(LITERALS)


def _remove(rng: Random, tree: Any) -> None:
    """A value is not there."""
    parent, key = choose(rng, tree)
    del parent[key]


def _move(rng: Random, tree: Any) -> None:
    """A value stands where another belongs."""
    parent, key = choose(rng, tree)
    other, at = choose(rng, tree)
    parent[key] = json.loads(json.dumps(other[at]))


def _rename(rng: Random, tree: Any) -> None:
    """A name is another."""
    objects = [(parent, key) for parent, key in places(tree) if isinstance(parent, dict)]
    parent, key = rng.choice(objects)
    parent[rng.choice((*TEXTS, str(key) + "x", str(key)[:-1]))] = parent.pop(key)


def _grow(rng: Random, tree: Any) -> None:
    """A list or a text is many times as long."""
    long = [(parent, key) for parent, key in places(tree) if isinstance(parent[key], list | str)]
    parent, key = rng.choice(long)
    parent[key] = parent[key] * rng.choice((2, 3, 100)) if len(parent[key]) < 1000 else parent[key] * 2


def twice(rng: Random, data: bytes) -> bytes:
    """A name stands twice, with two values."""
    tree = json.loads(data)
    objects = [parent for parent, _ in places(tree) if isinstance(parent, dict)]
    parent = rng.choice(objects[:64])
    key = rng.choice(list(parent))
    parent[_LATER] = odd(rng, parent[key])
    return json.dumps(tree).replace(json.dumps(_LATER), json.dumps(key), 1).encode()


MUTATORS = (
    _edit(_replace, "replace_value"), _edit(_replace, "replace_value"), _edit(_literal, "replace_by_literal"),
    _edit(_remove, "remove_value"), _edit(_move, "move_value"), _edit(_rename, "rename"), _edit(_grow, "grow"), twice,
)  # fmt: skip
