"""A tile of raw logits becomes the losses of its rows and, in its own place, their gradient."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gemstill.ops.attention import tanh
from gemstill.ops.native import kernels
from gemstill.ops.packed import Packed, Weight
from gemstill.ops.target import OnlineTarget

TILE = 1 << 22  # elements that plain operations make temporaries of at once
CAST = 1 << 24  # elements of a head that are cast at once

Kind = Literal["cross_entropy", "reverse_kl", "jensen_shannon"]
KINDS = get_args(Kind)  # as the native kernels number them


class Cap(NamedTuple):
    """From a raw logit x to z = c·tanh(x/c) / T."""

    softcap: float | None = None
    temperature: float = 1.0

    @property
    def bounded(self) -> bool:
        """Whether e^z and sums of it lie well inside float32, so that no maximum need be taken out."""
        return self.softcap is not None and self.softcap / self.temperature <= 60

    @property
    def numbers(self) -> tuple[float, float]:
        """As the native kernels take them: no cap is 0."""
        return self.softcap or 0.0, self.temperature

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z and dz/dx, float32 (float64 for float64)."""
        x = x.to(wide(x.dtype))
        if self.softcap is None:
            z, slope = x, torch.ones_like(x)
        else:
            t = tanh(x / self.softcap)
            z, slope = self.softcap * t, 1 - t * t
        return (z, slope) if self.temperature == 1 else (z / self.temperature, slope / self.temperature)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cut(count: int, size: int) -> list[slice]:
    """[0, count) in even parts of at most `size`."""
    parts = -(-count // max(1, size))
    return [slice(a, b) for a, b in pairwise(count * i // parts for i in range(parts + 1))] if parts else []


def _log_sum_exp(raw: Tensor, cap: Cap) -> Tensor:
    """[n, 1] from raw logits [n, V]."""
    z = cap(raw)[0]
    return z.exp().sum(1, keepdim=True).log() if cap.bounded else z.logsumexp(1, keepdim=True)


def _softmax_gradient(raw: Tensor, lse: Tensor, total: Tensor, cap: Cap) -> Tensor:
    """total·softmax(z)·dz/draw [n, V]: the dense part of the gradient, wide, as the target is yet to be taken off."""
    z, slope = cap(raw)
    return (z - lse).exp() * total * slope


_eager = _log_sum_exp, _softmax_gradient


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """Made when asked for: torch.compile loads 2 s of torch, for which a first token would wait too."""
    return torch.compile(_log_sum_exp, dynamic=False), torch.compile(_softmax_gradient, dynamic=False)


@dataclass(frozen=True)
class Sparse:
    """Cross-entropy to few entries a row: Σp·lse(z) − Σ p·z, and what they leave as one bucket.

    ids: [N, K] int64. probs: [N, K] float32. rest: [N] float32, the mass of the bucket of all entries but the
    first `inside` slots' (those of probability above 0); None: there is no bucket.
    """

    ids: Tensor
    probs: Tensor
    rest: Tensor | None
    inside: int
    cap: Cap
    compiled: bool

    sides = 1  # of which raw logits are held

    def spare(self, raw: Tensor) -> Tensor | None:
        """Further memory that `consume` needs beside `raw` [n, V]: none."""

    def consume(self, raw: Tensor, rows: slice, weight: Tensor, gradient: bool, spare: Tensor | None) -> Tensor:
        """Losses [n] of raw logits [n, V], wide, times `weight` [n]; `raw` becomes their gradient where wanted."""
        ids, probs = self.ids[rows], self.probs[rows]
        rest = None if self.rest is None else self.rest[rows]
        if (native := kernels(raw)) is not None:
            losses = torch.empty(len(raw), dtype=torch.float32)
            whole = (x.float().contiguous() for x in (probs, weight.new_empty(0) if rest is None else rest, weight))
            native.cross_entropy(raw, ids.contiguous(), *whole, losses, self.inside, *self.cap.numbers, gradient)
            return losses
        parts = []
        for some in cut(len(raw), TILE // raw.shape[1]):
            bucket = None if rest is None else rest[some]
            parts.append(self._tile(raw[some], ids[some], probs[some], bucket, weight[some], gradient))
        return torch.cat(parts)

    def _tile(
        self, raw: Tensor, ids: Tensor, probs: Tensor, rest: Tensor | None, weight: Tensor, gradient: bool
    ) -> Tensor:
        log_sum_exp, softmax_gradient = _compiled() if self.compiled else _eager
        lse = log_sum_exp(raw, self.cap)
        picked, slope = self.cap(raw.gather(1, ids))
        weight = weight[:, None].to(lse.dtype)
        p = probs.to(lse.dtype) * weight
        total = p.sum(1, keepdim=True)
        losses = total * lse - (p * picked).sum(1, keepdim=True)
        if rest is None:
            if gradient:
                # (Σp)·softmax − p, times the slope of the cap.
                raw.copy_(softmax_gradient(raw, lse, total, self.cap).scatter_add_(1, ids, -p * slope))
            return losses[:, 0]
        there = rest[:, None] > 0
        left = rest[:, None].to(lse.dtype) * weight
        z, steep = self.cap(raw)
        taken = torch.where(probs[:, : self.inside] > 0, -torch.inf, 0.0).to(z.dtype)
        outside = z.scatter_add(1, ids[:, : self.inside], taken)
        log_outside = outside.logsumexp(1, keepdim=True)
        losses = losses + torch.where(there, left * (lse - log_outside), 0.0)
        if gradient:
            # The bucket's log-probability is lse(outside) − lse: its gradient is the difference of the softmaxes.
            g = (z - lse).exp() * (total + left)
            g -= torch.where(there, left * (outside - log_outside).exp(), 0.0)
            raw.copy_((g * steep).scatter_add_(1, ids, -p * slope))
        return losses[:, 0]


@dataclass(frozen=True)
class Online:
    """A divergence from a teacher at hand, (1 − fraction) of it, and `fraction` of the cross-entropy to labels [N]."""

    teacher: OnlineTarget
    kind: Kind
    beta: float
    labels: Tensor | None
    fraction: float
    cap: Cap

    sides = 2

    def spare(self, raw: Tensor) -> Tensor | None:
        """Room for the teacher's raw logits [n, V]."""
        return torch.empty(raw.shape, dtype=self.teacher.hidden.dtype, device=raw.device)

    def consume(self, raw: Tensor, rows: slice, weight: Tensor, gradient: bool, spare: Tensor | None) -> Tensor:
        """As Sparse.consume does."""
        assert spare is not None
        theirs = product(self.teacher.hidden[rows], self.teacher.head, spare[: len(raw)])
        labels = None if self.labels is None else self.labels[rows, None]
        theirs_cap = Cap(self.teacher.softcap, self.teacher.temperature)
        if kernels(theirs) is not None and (native := kernels(raw)) is not None:
            losses = torch.empty(len(raw), dtype=torch.float32)
            given = torch.empty(0, dtype=torch.int64) if labels is None else labels.contiguous()
            options = KINDS.index(self.kind), self.beta, self.fraction, *self.cap.numbers, *theirs_cap.numbers, gradient
            native.divergence(raw, theirs, given, weight.float().contiguous(), losses, *options)
            return losses
        parts = []
        for tile in cut(len(raw), TILE // raw.shape[1]):
            label = None if labels is None else labels[tile]
            parts.append(self._tile(raw[tile], theirs[tile], label, weight[tile], gradient))
        return torch.cat(parts)

    def _tile(self, raw: Tensor, theirs: Tensor, label: Tensor | None, weight: Tensor, gradient: bool) -> Tensor:
        z, slope = self.cap(raw)
        lse = z.logsumexp(1, keepdim=True)
        log_q = z - lse
        log_p = Cap(self.teacher.softcap, self.teacher.temperature)(theirs)[0].to(z.dtype).log_softmax(1)
        losses, g = self._divergence(log_p, log_q)
        weight = weight[:, None].to(z.dtype)
        if label is not None:
            losses = (1 - self.fraction) * losses - self.fraction * log_q.gather(1, label)
            rest = torch.full_like(label, -self.fraction, dtype=z.dtype)
            g = ((1 - self.fraction) * g + self.fraction * log_q.exp()).scatter_add(1, label, rest)
        if gradient:
            raw.copy_(g * slope * weight)
        return (losses * weight)[:, 0]

    def _divergence(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """The loss [n, 1] and its gradient to the student's capped logits [n, V], from log-probabilities."""
        p, q = log_p.exp(), log_q.exp()
        if self.kind == "cross_entropy":
            return -(p * log_q).sum(1, keepdim=True), q - p
        if self.kind == "reverse_kl":
            ratio = log_q - log_p
            loss = (q * ratio).sum(1, keepdim=True)
            return loss, q * (ratio - loss)
        # JSD_β = β·KL(p‖m) + (1−β)·KL(q‖m), m = β·p + (1−β)·q (arXiv 2306.13649, equation 1).
        log_m = torch.logaddexp(log_p + math.log(self.beta), log_q + math.log(1 - self.beta))
        ratio = log_q - log_m
        reverse = (q * ratio).sum(1, keepdim=True)
        forward = (p * (log_p - log_m)).sum(1, keepdim=True)
        return self.beta * forward + (1 - self.beta) * reverse, (1 - self.beta) * q * (ratio - reverse)


def product(x: Tensor, head: Weight, out: Tensor) -> Tensor:
    """out [n, V] = x·headᵀ in the dtype of x [n, D]; a head of another dtype is cast a part at a time."""
    if isinstance(head, Packed):
        head.linear(x, out)
        return out
    if head.dtype == x.dtype:
        return torch.mm(x, head.T, out=out)
    for part in cut(len(head), CAST // head.shape[1]):
        torch.mm(x, head[part].to(x.dtype).T, out=out[:, part])
    return out
