"""What the head does with the last hidden states: the argument `readout` of Transformer.forward.

A readout is any callable of (hidden [B, T, D], head [V, D], softcap or None). It is called inside
`forward`, so that a head that is sharded or tied is touched only while it is whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.ops.loss import linear_cross_entropy, log_probs
from gemstill.ops.target import OnlineTarget, Target

Readout = Callable[[Tensor, Tensor, float | None], Any]
ROWS = 1 << 13  # of a head that is cast, at once


def logits(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """The logits [B, T, V] of every position, capped; float32, or float64 for float64."""
    out = _projected(hidden, head)
    out = out if out.dtype == torch.float64 else out.float()
    return out if softcap is None else softcap * torch.tanh(out / softcap)


def _projected(hidden: Tensor, head: Tensor) -> Tensor:
    if head.dtype == hidden.dtype or torch.is_grad_enabled():
        return F.linear(hidden, head.to(hidden.dtype))
    # The head is the largest matrix; cast as a whole it would lie in memory twice.
    return torch.cat([F.linear(hidden, rows.to(hidden.dtype)) for rows in torch.split(head, ROWS)], -1)


def last_logits(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """The logits [B, V] of the last position of each row."""
    return logits(hidden[:, -1], head, softcap)


@dataclass(frozen=True)
class Loss:
    """The weighted sum of cross-entropies to a target of B·T rows: a float32 scalar (see linear_cross_entropy)."""

    target: Target | OnlineTarget
    hard: tuple[Tensor, float] | None = None
    compiled: bool = False

    def __call__(self, hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
        loss: Tensor = linear_cross_entropy(
            hidden.flatten(0, 1), head, self.target, softcap=softcap, hard=self.hard, compiled=self.compiled
        )
        return loss


@dataclass(frozen=True)
class LogProbs:
    """Log-probabilities [B, T] float32 of one chosen token at each position. ids: [B, T] int64. No gradient."""

    ids: Tensor

    def __call__(self, hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
        return log_probs(hidden.flatten(0, 1), head, self.ids.flatten(), softcap=softcap).view(self.ids.shape)
