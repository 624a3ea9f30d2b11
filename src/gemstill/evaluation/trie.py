"""The beginnings that texts have in common, as a tree of runs of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Text(NamedTuple):
    """A text of ids, of whose last `asked` tokens the log-probabilities are asked for; one more at least is there."""

    tokens: Sequence[int]
    asked: int


class Ask(NamedTuple):
    """The log-probability that `token` follows token number `place` of a node, as part of what `text` asks for."""

    place: int
    token: int
    text: int


@dataclass(eq=False)
class Node:
    """A run of tokens [n] int64 from position `start` on, what is asked of them, and what goes on from the last one.

    size: tokens of the node and of all below it.
    """

    tokens: NDArray[np.int64]
    start: int
    children: list[Node] = field(default_factory=list)
    asks: list[Ask] = field(default_factory=list)
    size: int = 0

    def walk(self) -> Iterator[Node]:
        """The node and all below it, each before those that go on from it."""
        agenda = [self]
        while agenda:
            node = agenda.pop()
            yield node
            agenda += reversed(node.children)

    def divided(self, tokens: int) -> list[Node]:
        """Nodes that say the same, each this one's run with some of its children: `tokens` together, or one child."""
        found: list[Node] = []
        for child in self.children:
            if not found or found[-1].size + child.size > tokens:
                # What is asked of the run is asked once.
                found.append(Node(self.tokens, self.start, [], [] if found else self.asks, len(self.tokens)))
            found[-1].children.append(child)
            found[-1].size += child.size
        return [_merged(node) if len(node.children) == 1 else node for node in found]

    def pieces(self, tokens: int) -> Iterator[Node]:
        """The node's own run in pieces of at most so many tokens."""
        for start in range(0, len(self.tokens), tokens):
            run = self.tokens[start : start + tokens]
            asks = [ask for ask in self.asks if start <= ask.place < start + len(run)]
            yield Node(run, self.start + start, [], _moved(asks, -start), len(run))


def grow(texts: Sequence[Text]) -> Node:
    """The trie of all texts without their last tokens; its root has no tokens of its own."""
    # As bytes, the higher ones first, texts sort as their ids do, and quickly.
    keys = [np.asarray(text.tokens, ">u4")[:-1].tobytes() for text in texts]
    root = Node(np.empty(0, np.int64), 0)
    path, parents, last = [root], {root: root}, {}
    previous = b""
    for key in sorted(set(keys)):
        common = _common(previous, key)
        while path[-1].start >= common and path[-1] is not root:
            path.pop()
        if path[-1].start + len(path[-1].tokens) > common:
            path[-1] = _split(path[-1], common, parents)
        node = Node(np.frombuffer(key, ">u4")[common:].astype(np.int64), common)
        parents[node] = path[-1]
        path[-1].children.append(node)
        path.append(node)
        last[key], previous = node, key
    for number, (text, key) in enumerate(zip(texts, keys, strict=True)):
        node, length = last[key], len(text.tokens)
        for place in range(length - 2, length - 2 - text.asked, -1):
            while place < node.start:
                node = parents[node]
            node.asks.append(Ask(place - node.start, text.tokens[place + 1], number))
    for node in reversed(list(root.walk())):
        node.size = len(node.tokens) + sum(child.size for child in node.children)
    return root


def _split(node: Node, at: int, parents: dict[Node, Node]) -> Node:
    """Give the tokens of a node before position `at` to a new one, which it goes on from."""
    count, parent = at - node.start, parents[node]
    upper = Node(node.tokens[:count], node.start, [node])
    node.tokens, node.start = node.tokens[count:], at
    parent.children[-1] = upper  # texts are sorted: it was the last
    parents[node], parents[upper] = upper, parent
    return upper


def _common(a: bytes, b: bytes) -> int:
    """How many ids two keys have in common at their beginnings."""
    short = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, "<u4", short) != np.frombuffer(b, "<u4", short)
    return int(differ.argmax()) if differ.any() else short


def _merged(node: Node) -> Node:
    """A node and its only child as one."""
    child = node.children[0]
    asks = node.asks + _moved(child.asks, len(node.tokens))
    return Node(np.concatenate([node.tokens, child.tokens]), node.start, child.children, asks, node.size)


def _moved(asks: Sequence[Ask], by: int) -> list[Ask]:
    return [ask._replace(place=ask.place + by) for ask in asks]
