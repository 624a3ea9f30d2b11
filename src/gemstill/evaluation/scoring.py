"""Log-probabilities of the ends of many texts, each beginning that they share computed once.

The texts form a trie. A beginning too large with all that follows it for one pass is kept as a trunk, and what goes
on from it is cut into passes of so many tokens: several branches in one row (gemstill.model.branches), none padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

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
    sums, greedy, left = [0.0] * len(texts), [True] * len(texts), [text.asked for text in texts]
    for one in _passes(root, budget):
        trunk.cut(one.trunk)
        asks, logprobs, likeliest = _compute(model, trunk, one)
        for ask, logprob, is_likeliest in zip(asks, logprobs, likeliest, strict=True):
            sums[ask.text] += logprob
            greedy[ask.text] &= is_likeliest
            left[ask.text] -= 1
            if not left[ask.text]:
                yield Score(ask.text, sums[ask.text], greedy[ask.text])


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
        yield from (_Pass(held, branches) for branches in _filled(light, budget))
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


def _filled(nodes: Sequence[Node], budget: int) -> Iterator[list[Node]]:
    """Nodes in groups of at most `budget` tokens."""
    group: list[Node] = []
    for node in nodes:
        if group and sum(other.size for other in group) + node.size > budget:
            yield group
            group = []
        group.append(node)
    if group:
        yield group


@torch.inference_mode()
def _compute(model: Transformer, trunk: Trunk, one: _Pass) -> tuple[list[Ask], list[float], list[bool]]:
    tokens: list[NDArray[np.int64]] = []
    positions: list[NDArray[np.int64]] = []
    ends: list[NDArray[np.int64]] = []
    asks: list[Ask] = []
    places: list[int] = []
    edges, at = [0], 0
    for branch in one.branches:
        if at + branch.size - edges[-1] > TILE and at > edges[-1]:
            edges.append(at)
        for node in branch.walk():
            length = len(node.tokens)
            tokens.append(node.tokens)
            positions.append(np.arange(node.start, node.start + length))
            ends.append(np.full(length, at + node.size))
            asks += node.asks
            places += [at + ask.place for ask in node.asks]
            at += length
    edges.append(at)
    device = trunk.device
    row, where, until = (torch.from_numpy(np.concatenate(x)).to(device) for x in (tokens, positions, ends))
    distinct, rows = np.unique(np.array(places, np.int64), return_inverse=True)
    ids = torch.tensor([ask.token for ask in asks], dtype=torch.int64)
    readout = Scores(*(x.to(device) for x in (torch.from_numpy(distinct), torch.from_numpy(rows), ids)))
    branches = Branches(trunk, where, until, edges, keep=one.keep)
    logprobs, likeliest = model(row[None], positions=where[None], cache=branches, readout=readout)
    return asks, logprobs.tolist(), likeliest.tolist()
