"""Drawing the next token from its logits.

The order and the definitions are those of `transformers`: repetition penalty, temperature, top-k, top-p,
min-p, each on what the one before left. (llama.cpp by default divides by the temperature last, so its top-p
and min-p look at the distribution before it; at temperature 1 both orders are the same.)

- repetition penalty r: the logit of every token of the text so far, prompt included, is divided by r where it
  is positive and multiplied by r where it is negative (arXiv 1909.05858);
- top-k: the k likeliest tokens; among equals any;
- top-p: a token stays when those likelier than it have less than p together (arXiv 1904.09751);
- min-p: a token stays when it is at least p times as likely as the likeliest (arXiv 2407.01082).

The likeliest token always stays. Nothing is sorted but the candidates, and few tokens are found by the maxima of
blocks: with 256,000 entries a draw costs a pass over the logits or a few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gemstill.infer.config import Sampling

__all__ = ["Sampler", "Sampling", "largest", "likeliest"]

LESS = 64  # top-p looks at tokens so many times less likely than the likeliest, and further where they do not suffice
BLOCK = 64  # entries whose maximum stands for them, or whose sum is drawn from first


class Sampler:
    """Draws tokens one after another from logits [vocab] float32 on the CPU, and remembers which were there."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen: set[int] = set()

    def see(self, ids: Iterable[int]) -> None:
        """Remember that tokens are part of the text, for the repetition penalty."""
        if self.sampling.repetition_penalty != 1:
            self._seen.update(ids)

    @property
    def plain(self) -> bool:
        """Whether it draws the likeliest token, as the logits are."""
        s = self.sampling
        return s.repetition_penalty == 1 and (s.temperature == 0 or s.top_k == 1)

    def draw(self, logits: Tensor) -> int:
        """The id of one token drawn from logits [vocab] float32, which it may overwrite; -inf: must not come."""
        s = self.sampling
        logits = self._penalised(logits)
        if s.temperature == 0 or s.top_k == 1:
            return likeliest(logits)
        if s.top_k == 0 and s.top_p == 1 and s.min_p == 0:
            return self._draw_from_all(logits)
        ids, probs = self._left(logits)
        return int(ids[self._pick(probs)])

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may be drawn and their probabilities, which sum to one: ids [n] int64, probs [n] float64."""
        logits = self._penalised(logits)
        if self.sampling.temperature == 0:
            return torch.tensor([likeliest(logits)]), torch.ones(1, dtype=torch.float64)
        return self._left(logits)

    def _left(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """`candidates` of logits that were penalised."""
        s = self.sampling
        if 0 < s.top_k < len(logits):
            values, ids = largest(logits, s.top_k)
            values = self._scaled(values)
            values, ids = _nucleus(values, ids, values.double().logsumexp(0), s.top_p)
        elif s.top_p < 1:
            values, ids = _nucleus_of_all(self._scaled(logits), s.top_p)
        else:
            values, ids = self._scaled(logits), torch.arange(len(logits))
        if s.min_p > 0:
            keep = values >= math.log(s.min_p)
            values, ids = values[keep], ids[keep]
        return ids, torch.softmax(values.double(), 0)

    def _scaled(self, logits: Tensor) -> Tensor:
        return (logits - logits.amax()).div_(self._divisor)

    @property
    def _divisor(self) -> float:
        # Differences to the largest stay finite under any temperature, however small or large.
        return min(max(self.sampling.temperature, 1e-30), 1e30)

    def _draw_from_all(self, logits: Tensor) -> int:
        """A draw without cuts: first a block of entries by their sums, then one of its entries."""
        # In place: a new megabyte costs more, page by page, than the work in it.
        weights = logits.sub_(logits.amax()).div_(self._divisor).exp_()
        size = BLOCK * BLOCK
        whole = len(weights) // size * size
        block = self._pick(torch.cat([weights[:whole].view(-1, size).sum(1), weights[whole:].sum()[None]]).double())
        return size * block + self._pick(weights[size * block : size * (block + 1)].double())

    def _pick(self, weights: Tensor) -> int:
        """An index of weights [n] float64, drawn in proportion to them."""
        if len(weights) == 1:
            return 0
        sums = weights.cumsum(0)
        total = float(sums[-1])
        place = torch.rand((), dtype=torch.float64, generator=self._generator) * total
        # A place rounded up to the total would lie behind the last candidate, wherever that is.
        place = place.clamp(max=math.nextafter(total, 0.0))
        return int(torch.searchsorted(sums, place, right=True))

    def _penalised(self, logits: Tensor) -> Tensor:
        penalty = self.sampling.repetition_penalty
        if penalty == 1:
            return logits
        ids = torch.tensor(sorted(self._seen), dtype=torch.int64)
        there = logits[ids]
        return logits.index_put((ids,), torch.where(there < 0, there * penalty, there / penalty))


def likeliest(logits: Tensor) -> int:
    """The index of the largest of logits [n], the first among equals, as torch.argmax, which reads them slowly.

    A NaN counts as larger than all numbers.
    """
    whole = len(logits) // BLOCK * BLOCK
    if whole == 0:
        return int(logits.argmax())
    grid = logits[:whole].view(-1, BLOCK)
    block = int(grid.amax(1).argmax())
    best = block * BLOCK + int(grid[block].argmax())
    if whole < len(logits):
        last = whole + int(logits[whole:].argmax())
        return best if logits[last] <= logits[best] or logits[best].isnan() else last
    return best


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of values [n] downwards, and their indices, as torch.topk: that reads all of them slowly.

    The k largest lie in the k blocks with the largest maxima.
    """
    whole = len(values) // BLOCK * BLOCK
    if 4 * count * BLOCK > whole:
        return values.topk(count)
    blocks = values[:whole].view(-1, BLOCK).amax(1).topk(count).indices
    ids = (blocks.sort().values[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    if whole < len(values):
        ids = torch.cat([ids, torch.arange(whole, len(values))])
    top = values[ids].topk(count)
    return top.values, ids[top.indices]


def _nucleus(values: Tensor, ids: Tensor, total: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Cut values [n], sorted downwards, where those before have `top_p` of exp(total); the first always stays."""
    if top_p >= 1:
        return values, ids
    probs = (values.double() - total).exp()
    keep = max(1, int(((probs.cumsum(0) - probs) < top_p).sum()))
    return values[:keep], ids[:keep]


def _nucleus_of_all(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """`_nucleus` of values [n] in any order: only those are sorted that are likely enough to be among them."""
    probs = torch.softmax(scaled, 0)
    bound = probs.amax()
    total = -bound.double().log()  # the largest value is 0
    while True:
        bound = bound / LESS
        ids = (probs >= bound).nonzero()[:, 0]
        if len(ids) == len(probs) or float(probs[ids].sum(dtype=torch.float64)) >= top_p:
            values, order = scaled[ids].sort(descending=True)
            return _nucleus(values, ids[order], total, top_p)
