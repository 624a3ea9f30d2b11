"""Drawing the next token from its logits.

The order and the definitions are those of `transformers`: repetition penalty, temperature, top-k, top-p,
min-p, each on what the one before left. (llama.cpp by default divides by the temperature last, so its top-p
and min-p look at the distribution before it; at temperature 1 both orders are the same.)

- repetition penalty r: the logit of every token of the text so far, prompt included, is divided by r where it
  is positive and multiplied by r where it is negative (arXiv 1909.05858);
- top-k: the k likeliest tokens; among equals those that `torch.topk` takes;
- top-p: a token stays when those likelier than it have less than p together (arXiv 1904.09751);
- min-p: a token stays when it is at least p times as likely as the likeliest (arXiv 2407.01082).

The likeliest token always stays. Nothing is sorted but the candidates: with 256,000 entries a draw costs a
few passes over the logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from gemstill.infer.config import Sampling

__all__ = ["Sampler", "Sampling"]

FIRST_LOOK = 1024  # candidates that top-p sorts first; eight times as many each time they do not suffice


class Sampler:
    """Draws tokens one after another from logits [vocab] float32 on the CPU, and remembers which were there."""

    def __init__(self, sampling: Sampling, vocab_size: int) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._seen = torch.zeros(vocab_size, dtype=torch.bool)

    def see(self, ids: Iterable[int]) -> None:
        """Remember that tokens are part of the text, for the repetition penalty."""
        if self.sampling.repetition_penalty != 1:
            self._seen[torch.tensor(list(ids), dtype=torch.int64)] = True

    def draw(self, logits: Tensor) -> int:
        """The id of one token drawn from logits [vocab] float32; -inf where a token must not come."""
        ids, probs = self.candidates(logits)
        if len(probs) == 1:
            return int(ids[0])
        sums = probs.cumsum(0)
        total = float(sums[-1])
        place = torch.rand((), dtype=torch.float64, generator=self._generator) * total
        # A place rounded up to the total would lie behind the last candidate, wherever that is.
        place = place.clamp(max=math.nextafter(total, 0.0))
        return int(ids[torch.searchsorted(sums, place, right=True)])

    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that may be drawn and their probabilities, which sum to one: ids [n] int64, probs [n] float64."""
        s = self.sampling
        logits = self._penalised(logits)
        if s.temperature == 0 or s.top_k == 1:
            return logits.argmax()[None], torch.ones(1, dtype=torch.float64)
        # Differences to the largest stay finite under any temperature, however small or large.
        scaled = (logits - logits.max()) / min(max(s.temperature, 1e-30), 1e30)
        if 0 < s.top_k < len(scaled):
            values, ids = scaled.topk(s.top_k)
            values, ids = _nucleus(values, ids, values.double().logsumexp(0), s.top_p)
        elif s.top_p < 1:
            values, ids = _nucleus_of_all(scaled, s.top_p)
        else:
            values, ids = scaled, torch.arange(len(scaled))
        if s.min_p > 0:
            keep = values >= math.log(s.min_p)
            values, ids = values[keep], ids[keep]
        return ids, torch.softmax(values.double(), 0)

    def _penalised(self, logits: Tensor) -> Tensor:
        penalty = self.sampling.repetition_penalty
        if penalty == 1:
            return logits
        ids = self._seen.nonzero()[:, 0]
        there = logits[ids]
        return logits.index_put((ids,), torch.where(there < 0, there * penalty, there / penalty))


def _nucleus(values: Tensor, ids: Tensor, total: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Cut values [n], sorted downwards, where those before have `top_p` of exp(total); the first always stays."""
    if top_p >= 1:
        return values, ids
    probs = (values.double() - total).exp()
    keep = max(1, int(((probs.cumsum(0) - probs) < top_p).sum()))
    return values[:keep], ids[:keep]


def _nucleus_of_all(scaled: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    total, count = scaled.double().logsumexp(0), FIRST_LOOK
    while True:
        values, ids = scaled.topk(min(count, len(scaled)))
        if count >= len(scaled) or float((values.double() - total).exp().sum()) >= top_p:
            return _nucleus(values, ids, total, top_p)
        count *= 8
