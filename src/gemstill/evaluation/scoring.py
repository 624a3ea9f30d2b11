"""Log-probabilities of the ends of many texts, each beginning that they share computed once.

The texts form a trie. A beginning too large with all that follows it for one pass is kept as a trunk, and what goes
on from it is cut into passes of so many tokens: several branches in one row (gemstill.model.branches), none padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemstill.evaluation.trie import Ask, Node, Text, grow
from gemstill.model.branches import Branches, Trunk
from gemstill.model.readout import Scores
from gemstill.model.transformer import Transformer

SHORT = 8  # tokens of a beginning that is rather computed again with each tile than kept
TILE = 256  # tokens of neighbouring branches between which attention makes no difference but by its mask


class Score(NamedTuple):
    """Of text number `text`: the sum of its last tokens' log-probabilities, and whether each was the likeliest."""

    text: int
    logprob: float
    greedy: bool


def score(model: Transformer, texts: Sequence[Text], *, batch_tokens: int = 0) -> Iterator[Score]:
    """The score of each text, in the order in which they come to be known. batch_tokens: of a pass; 0: a good number.

    Of no more than `batch_tokens` tokens the activations are held at once, of fewer the logits.
    """
    weight = model.embed_tokens.weight
    budget = batch_tokens or (1024 if weight.device.type == "cpu" else 8192)
    root = grow(texts)
    dtype = model.compute_dtype or weight.dtype
    longest = max((len(text.tokens) - 1 for text in texts), default=0)
    trunk = Trunk(model.config, longest, dtype, weight.device)

    def read() -> Iterator[tuple[Row, Tensor, Tensor]]:
        for one in _passes(root, budget):
            trunk.cut(one.trunk)
            yield _compute(model, trunk, one)

    yield from gather(texts, read())


@dataclass(frozen=True)
class _Pass:
    """Branches to compute on the first `trunk` tokens of the trunk. keep: they are one, and become part of it."""

    trunk: int
    branches: list[Node]
    keep: bool = False


def _passes(root: Node, budget: int) -> Iterator[_Pass]:
    """All tokens of a trie in passes of at most `budget` tokens, each behind the beginnings it goes on from."""
    agenda = [(0, root)]  # nodes that are worth keeping, and the trunk that they go on from
    while agenda:
        held, node = agenda.pop()
        for piece in node.pieces(budget):
            yield _Pass(held, [piece], keep=True)
            held += piece.size
        light, heavy = _parted(node.children, budget)
        yield from (_Pass(held, branches) for branches in filled(light, budget))
        agenda += [(held, other) for other in reversed(heavy)]


def _parted(nodes: Sequence[Node], budget: int) -> tuple[list[Node], list[Node]]:
    """Nodes that fit a pass with all that follows them, and those that do not and are worth keeping."""
    light: list[Node] = []
    heavy: list[Node] = []
    agenda = list(reversed(nodes))
    while agenda:
        node = agenda.pop()
        if node.size <= budget:
            light.append(node)
        elif len(node.tokens) < SHORT and node.children:
            agenda.extend(reversed(node.divided(min(TILE, budget))))
        else:
            heavy.append(node)
    return light, heavy


def filled(nodes: Sequence[Node], budget: int) -> Iterator[list[Node]]:
    """Nodes in groups of at most `budget` tokens."""
    group: list[Node] = []
    for node in nodes:
        if group and sum(other.size for other in group) + node.size > budget:
            yield group
            group = []
        group.append(node)
    if group:
        yield group


@dataclass(frozen=True)
class Row:
    """Branches one behind the other, N tokens, and K log-probabilities that are asked for.

    tokens, positions, ends: [N] int64; what goes on from a token lies before its end. parts: where each branch begins.
    asks: [K]; places: [P] int64, the places in the row that they read, each once; which: [K] int64, the one of each.
    """

    tokens: NDArray[np.int64]
    positions: NDArray[np.int64]
    ends: NDArray[np.int64]
    parts: list[int]
    asks: list[Ask]
    places: NDArray[np.int64]
    which: NDArray[np.int64]

    @staticmethod
    def of(branches: Sequence[Node]) -> Row:
        """The row of some branches."""
        tokens: list[NDArray[np.int64]] = []
        positions: list[NDArray[np.int64]] = []
        ends: list[NDArray[np.int64]] = []
        parts: list[int] = []
        asks: list[Ask] = []
        places: list[int] = []
        at = 0
        for branch in branches:
            parts.append(at)
            for node in branch.walk():
                length = len(node.tokens)
                tokens.append(node.tokens)
                positions.append(np.arange(node.start, node.start + length))
                ends.append(np.full(length, at + node.size))
                asks += node.asks
                places += [at + ask.place for ask in node.asks]
                at += length
        distinct, which = np.unique(np.array(places, np.int64), return_inverse=True)
        flat = [np.concatenate(each) for each in (tokens, positions, ends)]
        return Row(flat[0], flat[1], flat[2], parts, asks, distinct, which)

    def readout(self, device: torch.device) -> Scores:
        """What reads the row's log-probabilities."""
        ids = np.array([ask.token for ask in self.asks], np.int64)
        return Scores(*(torch.from_numpy(x).to(device) for x in (self.places, self.which, ids)))


def gather(texts: Sequence[Text], read: Iterable[tuple[Row, Tensor, Tensor]]) -> Iterator[Score]:
    """The score of each text as its last part comes. read: rows with what their readout gave, [K] each."""
    sums, greedy, left = [0.0] * len(texts), [True] * len(texts), [text.asked for text in texts]
    for row, logprobs, likeliest in read:
        for ask, logprob, is_likeliest in zip(row.asks, logprobs.tolist(), likeliest.tolist(), strict=True):
            sums[ask.text] += logprob
            greedy[ask.text] &= is_likeliest
            left[ask.text] -= 1
            if not left[ask.text]:
                yield Score(ask.text, sums[ask.text], greedy[ask.text])


@torch.inference_mode()
def _compute(model: Transformer, trunk: Trunk, one: _Pass) -> tuple[Row, Tensor, Tensor]:
    row, device = Row.of(one.branches), trunk.device
    edges = [0]
    for start, branch in zip(row.parts, one.branches, strict=True):
        if start + branch.size - edges[-1] > TILE and start > edges[-1]:
            edges.append(start)
    edges.append(len(row.tokens))
    tokens, where, until = (torch.from_numpy(x).to(device) for x in (row.tokens, row.positions, row.ends))
    branches = Branches(trunk, where, until, edges, keep=one.keep)
    return row, *model(tokens[None], positions=where[None], cache=branches, readout=row.readout(device))
