"""The loss over a vocabulary, without ever holding the [tokens, vocabulary] logits."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemstill.core.errors import Error
from gemstill.ops.attention import tanh
from gemstill.ops.native import kernels
from gemstill.ops.target import Target

TILE = 1 << 22  # logits held at once, elements


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Target,
    *,
    softcap: float | None = None,
    hard: tuple[Tensor, float] | None = None,
    compiled: bool = False,
) -> Tensor:
    """Weighted sum over rows of the cross-entropy from a (sparse) target to softmax(cap(hidden·headᵀ)).

    A row's loss is (Σp)·lse(z) − Σ p·z with z = c·tanh(hidden·headᵀ/c): forward cross-entropy (Gemma 2
    report, section 3), unbiased for an unbiased target since it is linear in p. Σp is kept as it is.

    hidden: [N, D] float32, bfloat16 or float64; products are taken in its dtype. head: [V, D], any float
    dtype. target: N rows. hard: (labels [N] int64, fraction f) learns from (1 − f)·target + f·label.
    compiled: where no native kernel does the elementwise work, fuse it by torch.compile: seconds at the first call.
    Returns a scalar in float32 (float64 for float64). Gradients flow to hidden and head; the head's is
    summed in float32. They are computed with the loss, tile by tile, so that no logits are kept.

    Raises:
        Error: shapes that do not fit, or a fraction outside [0, 1].
        RuntimeError: an id of the target outside [0, V).
    """
    ids, probs, weight = target
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise Error(
            f"hidden {list(hidden.shape)} and head {list(head.shape)} should be [N, D] and [V, D]", where="loss"
        )
    if ids.shape != probs.shape or len(ids) != len(hidden) or len(weight) != len(hidden):
        shapes = f"ids {list(ids.shape)}, probs {list(probs.shape)}, weight {list(weight.shape)}"
        raise Error(f"a target of {shapes} does not fit {len(hidden)} rows", where="loss")
    if hard is not None:
        labels, fraction = hard
        if not 0 <= fraction <= 1:
            raise Error(f"the fraction of hard labels is {fraction}", where="loss", fix="it lies between 0 and 1")
        ids = torch.cat([ids, labels.reshape(-1, 1)], 1)
        probs = torch.cat([probs * (1 - fraction), probs.new_full((len(ids), 1), fraction)], 1)
    kernels(hidden)  # built here, where gradients are still on
    loss: Tensor = _LinearCrossEntropy.apply(hidden, head, ids, probs, weight, softcap, compiled)  # type: ignore[no-untyped-call]
    return loss


def log_probs(hidden: Tensor, head: Tensor, ids: Tensor, *, softcap: float | None = None) -> Tensor:
    """log softmax(cap(hidden·headᵀ)) at one id a row: hidden [N, D], head [V, D], ids [N] -> [N]. No gradient."""
    with torch.no_grad():
        cast = head.to(hidden.dtype)
        parts = []
        for rows in _tiles(len(hidden), len(head)):
            z = _capped(F.linear(hidden[rows], cast), softcap)[0]
            parts.append(z.gather(1, ids[rows, None])[:, 0] - z.logsumexp(1))
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _tiles(rows: int, vocab: int) -> list[slice]:
    count = -(-rows // max(1, TILE // vocab))
    edges = [rows * i // count for i in range(count + 1)] if count else []
    return [slice(a, b) for a, b in pairwise(edges)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _capped(x: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """c·tanh(x/c) and its slope 1 - tanh²."""
    wide = x.to(_wide(x.dtype))
    if softcap is None:
        return wide, torch.ones_like(wide)
    t = tanh(wide / softcap)
    return softcap * t, 1 - t * t


def _log_sum_exp(raw: Tensor, softcap: float | None) -> Tensor:
    """[n, 1] from uncapped logits [n, V]."""
    z = _capped(raw, softcap)[0]
    if softcap is None or softcap > 60:
        return z.logsumexp(1, keepdim=True)
    # Capped logits need no maximum taken out: e^±60 and their sums lie well inside float32.
    return z.exp().sum(1, keepdim=True).log()


def _gradient(raw: Tensor, lse: Tensor, total: Tensor, softcap: float | None) -> Tensor:
    """total·softmax(z)·dz/draw [n, V]: the dense part of the gradient, wide, as the target is yet to be taken off."""
    z, slope = _capped(raw, softcap)
    return (z - lse).exp() * total * slope


_eager = _log_sum_exp, _gradient


@functools.cache
def _compiled() -> tuple[Any, Any]:
    """Made when asked for: torch.compile loads 2 s of torch, for which a first token would wait too."""
    return torch.compile(_log_sum_exp, dynamic=False), torch.compile(_gradient, dynamic=False)


def _tile(
    raw: Tensor, target: Target, softcap: float | None, wanted: bool, compiled: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of rows with uncapped logits [n, V], and, if wanted, its gradient to them, perhaps in their place."""
    ids, probs, weight = target
    if (native := kernels(raw)) is not None:
        losses = torch.empty(len(raw), dtype=torch.float32)
        whole = ids.contiguous(), probs.float().contiguous(), weight.float().contiguous()
        native.cross_entropy(raw, *whole, losses, softcap or 0.0, wanted)
        return losses.sum(), raw if wanted else None
    log_sum_exp, gradient = _compiled() if compiled else _eager
    lse = log_sum_exp(raw, softcap)
    picked, slope = _capped(raw.gather(1, ids), softcap)
    p = probs.to(lse.dtype) * weight[:, None].to(lse.dtype)
    total = p.sum(1, keepdim=True)
    loss = (total * lse).sum() - (p * picked).sum()
    # d loss / d logits: (Σp)·softmax − p, times the slope of the cap.
    g = gradient(raw, lse, total, softcap).scatter_add_(1, ids, -p * slope).to(raw.dtype) if wanted else None
    return loss, g


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        ids: Tensor,
        probs: Tensor,
        weight: Tensor,
        softcap: float | None,
        compiled: bool,
    ) -> Tensor:
        wide = _wide(hidden.dtype)
        cast = head.to(hidden.dtype)
        loss = hidden.new_zeros((), dtype=wide)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if ctx.needs_input_grad[1] else None
        wanted = d_hidden is not None or d_head is not None
        for rows in _tiles(len(hidden), len(head)):
            x = hidden[rows]
            part, g = _tile(F.linear(x, cast), Target(ids[rows], probs[rows], weight[rows]), softcap, wanted, compiled)
            loss += part
            if g is None:
                continue
            if d_hidden is not None:
                torch.mm(g, cast, out=d_hidden[rows])
            if d_head is not None:
                d_head += g.T @ x
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_head = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden.mul(grad.to(d_hidden.dtype))
        d_head = None if d_head is None else d_head.mul(grad).to(ctx.head_dtype)
        return d_hidden, d_head, None, None, None, None, None
