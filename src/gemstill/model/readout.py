"""What the head does with the last hidden states: the argument `readout` of Transformer.forward.

A readout is any callable of (hidden [B, T, D], head [V, D], softcap or None). It is called inside
`forward`, so that a head that is sharded or tied is touched only while it is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.ops.logits import Cap, Sparse, cut, product, wide
from gemstill.ops.loss import (
    Backward,
    linear_cross_entropy,
    linear_jensen_shannon,
    linear_reverse_kl,
    log_probs,
)
from gemstill.ops.packed import Packed, Weight
from gemstill.ops.target import OnlineTarget, Target

Readout = Callable[[Tensor, Weight, float | None], Any]
Divergence = Literal["forward", "reverse", "jensen-shannon"]
ROWS = 1 << 13  # of a head that is cast, at once
BYTES = 1 << 27  # of logits that Scores holds at once: fewer rows are multiplied slower


def logits(hidden: Tensor, head: Weight, softcap: float | None) -> Tensor:
    """The logits [B, T, V] of every position, capped; float32, or float64 for float64."""
    out = _projected(hidden, head)
    out = out if out.dtype == torch.float64 else out.float()
    return out if softcap is None else softcap * torch.tanh(out / softcap)


def _projected(hidden: Tensor, head: Weight) -> Tensor:
    if isinstance(head, Packed):
        return head.linear(hidden)
    if head.dtype == hidden.dtype or torch.is_grad_enabled():
        return F.linear(hidden, head.to(hidden.dtype))
    # The head is the largest matrix; cast as a whole it would lie in memory twice.
    return torch.cat([F.linear(hidden, rows.to(hidden.dtype)) for rows in torch.split(head, ROWS)], -1)


def last_logits(hidden: Tensor, head: Weight, softcap: float | None) -> Tensor:
    """The logits [B, V] of the last position of each row."""
    return logits(hidden[:, -1], head, softcap)


@dataclass(frozen=True)
class Loss:
    """The weighted sum of what B·T rows lack of their targets: a float32 scalar (see gemstill.ops.loss).

    divergence: the cross-entropy to the target (forward KL), or, to an online one alone, the reverse KL or the
    generalised Jensen-Shannon divergence with its beta.

    hard: labels and their fraction f. temperature t: of the student's logits. Above or below 1 the target's part is
    multiplied by t², so that its gradient keeps its size, and the labels' part stays at 1 (arXiv 1503.02531,
    section 2): t²·(1 − f)·D_t(target) + f·CE_1(labels).
    """

    target: Target | OnlineTarget
    hard: tuple[Tensor, float] | None = None
    temperature: float = 1.0
    backward: Backward = "exact"
    seed: int = 0
    divergence: Divergence = "forward"
    beta: float = 0.5
    compiled: bool = False

    def __call__(self, hidden: Tensor, head: Weight, softcap: float | None) -> Tensor:
        flat, t = hidden.flatten(0, 1), self.temperature
        if isinstance(self.target, OnlineTarget) and len(self.target.head) < len(head):
            if isinstance(head, Packed):
                raise Error("a quantized head has rows of padding that its teacher has not", where="model")
            head = head[: len(self.target.head)]  # the rest is padding
        how: dict[str, Any] = {"softcap": softcap, "backward": self.backward, "seed": self.seed}
        if t == 1 or self.hard is None:
            loss = self._to_target(flat, head, how | {"hard": self.hard})
            return loss * t**2 if t != 1 else loss
        labels, fraction = self.hard
        loss = self._to_target(flat, head, how) * (t**2 * (1 - fraction))
        hard = Target.hard(labels, self.target.weight)
        known: Tensor = linear_cross_entropy(flat, head, hard, compiled=self.compiled, **how)
        return loss + fraction * known

    def _to_target(self, hidden: Tensor, head: Weight, how: dict[str, Any]) -> Tensor:
        target: Any = self.target
        how = how | {"temperature": self.temperature}
        loss: Tensor
        if self.divergence == "forward":
            loss = linear_cross_entropy(hidden, head, target, compiled=self.compiled, **how)
        elif self.divergence == "reverse":
            loss = linear_reverse_kl(hidden, head, target, **how)
        else:
            loss = linear_jensen_shannon(hidden, head, target, beta=self.beta, **how)
        return loss


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities [B, T] float32 of one chosen token at each position. ids: [B, T] int64. No gradient."""

    ids: Tensor

    def __call__(self, hidden: Tensor, head: Weight, softcap: float | None) -> Tensor:
        return log_probs(hidden.flatten(0, 1), head, self.ids.flatten(), softcap=softcap).view(self.ids.shape)


@dataclass(frozen=True)
class Scores:
    """Log-probabilities [K] float32 of tokens at some positions of one row, and whether they are the likeliest there.

    places: [P] int64, the positions that reach the head, each once. rows: [K] int64, which of them is asked for, and
    ids: [K] int64, for which token. Returns both [K] on the CPU, float32 and bool. No gradient.
    """

    places: Tensor
    rows: Tensor
    ids: Tensor

    @torch.no_grad()
    def __call__(self, hidden: Tensor, head: Weight, softcap: float | None) -> tuple[Tensor, Tensor]:
        x, cap = hidden[0, self.places], Cap(softcap)
        logprobs = torch.empty(len(self.ids), dtype=wide(x.dtype))
        likeliest = torch.empty(len(self.ids), dtype=torch.bool)
        blocks = cut(len(x), BYTES // (head.shape[0] * x.element_size()))
        spare = x.new_empty(max((part.stop - part.start for part in blocks), default=0), head.shape[0])
        for part in blocks:
            raw = product(x[part], head, spare[: part.stop - part.start])
            asked = ((self.rows >= part.start) & (self.rows < part.stop)).nonzero()[:, 0]
            rows, ids = self.rows[asked] - part.start, self.ids[asked]
            z, greatest = cap(raw[rows, ids])[0], raw.amax(1)
            some = torch.zeros_like(greatest, dtype=torch.int64)[:, None]
            one = Sparse(some, torch.ones_like(some, dtype=wide(x.dtype)), None, 1, cap, False)
            # What any one token lacks of the log of the sum of all exponentials is its loss.
            lse = one.consume(raw, slice(0, len(raw)), one.probs[:, 0], False, None) + cap(raw[:, 0])[0]
            logprobs[asked] = (z - lse[rows]).cpu()
            great = (raw[rows, ids] == greatest[rows]).nonzero()[:, 0]
            likeliest[asked] = False
            for number, row, id in zip(great.tolist(), rows[great].tolist(), ids[great].tolist(), strict=True):
                # Of several that are equal the first; argmax over all takes longer than the logits themselves.
                likeliest[asked[number]] = not bool((raw[row, :id] == greatest[row]).any())
        return logprobs, likeliest
