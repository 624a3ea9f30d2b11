"""The loss over a vocabulary, without ever holding the [tokens, vocabulary] logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemstill.core.errors import Error
from gemstill.ops.logits import Cap, Online, Sparse, cut, product, wide
from gemstill.ops.native import kernels
from gemstill.ops.target import IGNORED, OnlineTarget, Target

ROWS = 512  # tokens whose raw logits are held at once, in the products' dtype
ELEMENTS = 1 << 22  # of them, where the vocabulary is small enough for more rows

Rest = Literal["drop", "renormalise", "bucket"]
Reduction = Literal["sum", "mean", "none", "sum_and_weight"]


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    target: Target | OnlineTarget,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    hard: tuple[Tensor, float] | None = None,
    rest: Rest = "drop",
    reduction: Reduction = "sum",
    compiled: bool = False,
) -> Any:
    """Cross-entropy from a target to softmax(cap(hidden·headᵀ) / temperature), over rows.

    A row's loss is (Σp)·lse(z) − Σ p·z with z = c·tanh(hidden·headᵀ/c) / temperature: forward cross-entropy (Gemma 2
    report, section 3), unbiased for an unbiased target since it is linear in p. It is the forward KL divergence
    plus the target's entropy, which no gradient knows of: the gradients of both are the same.

    hidden: [N, D] float32, bfloat16 or float64; products are taken in its dtype. head: [V, D], any float
    dtype. target: N rows, sparse or online. weight: [N], multiplies the target's. hard: (labels [N] int64,
    fraction f) learns from (1 − f)·target + f·label; a label of -100 takes its row out. rest: what becomes of the
    mass 1 − Σp that a sparse target lacks: dropped (Σp is kept as it is), shared by its entries in proportion, or
    one bucket of all other entries. reduction: the weighted sum, that divided by the sum of weights, each row's
    weighted loss [N], or (the sum, the sum of weights). compiled: where no native kernel does the elementwise work,
    fuse it by torch.compile: seconds at the first call.
    Returns float32 (float64 for float64). Gradients flow to hidden and head; the head's is summed in float32. They
    are computed with the loss, block by block, so that no logits are kept; each row's loss makes its own anew.

    Raises:
        Error: shapes that do not fit, or an option that is none.
        RuntimeError: an id of the target outside [0, V).
    """
    weight = _weight(hidden, head, target, weight, hard)
    cap = _cap(softcap, temperature)
    if hard is not None:
        weight = weight * (hard[0].reshape(-1) != IGNORED)
        hard = hard[0].reshape(-1).masked_fill(hard[0].reshape(-1) == IGNORED, 0), hard[1]
    if isinstance(target, OnlineTarget):
        job: Sparse | Online = _online(target, "cross_entropy", 0.5, hard, cap)
    else:
        job = _sparse(target, hard, rest, cap, compiled)
    return _reduced(hidden, head, job, weight, reduction)


def log_probs(hidden: Tensor, head: Tensor, ids: Tensor, *, softcap: float | None = None) -> Tensor:
    """log softmax(cap(hidden·headᵀ)) at one id a row: hidden [N, D], head [V, D], ids [N] -> [N]. No gradient."""
    with torch.no_grad():
        one = Sparse(ids[:, None], hidden.new_ones(len(ids), 1, dtype=torch.float32), None, 1, Cap(softcap), False)
        return -_walk(hidden, head, one, hidden.new_ones(len(ids), dtype=torch.float32), False, False)[0]


def _weight(
    hidden: Tensor,
    head: Tensor,
    target: Target | OnlineTarget,
    weight: Tensor | None,
    hard: tuple[Tensor, float] | None,
) -> Tensor:
    """The weight of each row [N], once all shapes are seen to fit."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise Error(
            f"hidden {list(hidden.shape)} and head {list(head.shape)} should be [N, D] and [V, D]", where="loss"
        )
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in target._asdict().items() if isinstance(x, Tensor))
    if isinstance(target, OnlineTarget):
        fits = target.hidden.ndim == 2 and target.head.ndim == 2 and target.hidden.shape[1] == target.head.shape[1]
        if fits and len(target.head) != len(head):
            what = f"the teacher's vocabulary has {len(target.head)} entries, the student's {len(head)}"
            raise Error(what, where="loss", fix="distil from a teacher of the same tokenizer; cut padding off its head")
        fits = fits and len(target.hidden) == len(hidden)
    else:
        fits = target.ids.shape == target.probs.shape and len(target.ids) == len(hidden)
    if not fits or len(target.weight) != len(hidden):
        raise Error(f"a target of {shapes} does not fit {len(hidden)} rows", where="loss")
    if hard is not None:
        if not 0 <= hard[1] <= 1:
            raise Error(f"the fraction of hard labels is {hard[1]}", where="loss", fix="it lies between 0 and 1")
        if hard[0].numel() != len(hidden):
            raise Error(f"{hard[0].numel()} hard labels do not fit {len(hidden)} rows", where="loss")
    if weight is None:
        return target.weight
    if weight.numel() != len(hidden):
        raise Error(f"{weight.numel()} weights do not fit {len(hidden)} rows", where="loss")
    return target.weight * weight.reshape(-1)


def _cap(softcap: float | None, temperature: float) -> Cap:
    if not temperature > 0 or (softcap is not None and not softcap > 0):
        raise Error(f"softcap is {softcap} and temperature {temperature}", where="loss", fix="both are above 0")
    return Cap(softcap, temperature)


def _sparse(target: Target, hard: tuple[Tensor, float] | None, rest: Rest, cap: Cap, compiled: bool) -> Sparse:
    ids, probs, _ = target
    inside, left = ids.shape[1], None
    if rest == "renormalise":
        probs = probs / probs.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    elif rest == "bucket":
        left = (1 - probs.sum(1)).clamp_min(0)
    elif rest != "drop":
        raise Error(f"rest is '{rest}'", where="loss", fix="it is drop, renormalise or bucket")
    if hard is not None:
        labels, fraction = hard
        ids = torch.cat([ids, labels[:, None]], 1)
        probs = torch.cat([probs * (1 - fraction), probs.new_full((len(ids), 1), fraction)], 1)
        left = None if left is None else left * (1 - fraction)
    return Sparse(ids, probs, left, inside, cap, compiled)


def _online(target: OnlineTarget, kind: Any, beta: float, hard: tuple[Tensor, float] | None, cap: Cap) -> Online:
    labels, fraction = hard or (None, 0.0)
    _cap(target.softcap, target.temperature)
    return Online(target, kind, beta, labels, fraction, cap)


def _reduced(hidden: Tensor, head: Tensor, job: Sparse | Online, weight: Tensor, reduction: str) -> Any:
    kernels(hidden)  # built here, where gradients are still on
    total = weight.sum()
    if reduction == "mean":
        weight = weight / total.clamp_min(torch.finfo(total.dtype).tiny)
    elif reduction not in ("sum", "none", "sum_and_weight"):
        what = f"reduction is '{reduction}'"
        raise Error(what, where="loss", fix="it is sum, mean, none or sum_and_weight")
    loss: Tensor = _Loss.apply(hidden, head, job, weight, reduction != "none")  # type: ignore[no-untyped-call]
    return (loss, total) if reduction == "sum_and_weight" else loss


def _walk(
    hidden: Tensor, head: Tensor, job: Sparse | Online, weight: Tensor, want_hidden: bool, want_head: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses [N] and the gradients of their sum to hidden [N, D], in its dtype, and head [V, D], wide."""
    sums = wide(hidden.dtype)
    cast = head.to(hidden.dtype)
    losses = hidden.new_empty(len(hidden), dtype=sums)
    d_hidden = torch.empty_like(hidden) if want_hidden else None
    d_head = torch.zeros(head.shape, dtype=sums, device=head.device) if want_head else None
    for rows in cut(len(hidden), max(ROWS, ELEMENTS // len(head)) // job.blocks):
        x = hidden[rows]
        g = product(x, cast)
        losses[rows] = job.consume(g, rows, weight[rows], want_hidden or want_head)
        if d_hidden is not None:
            torch.mm(g, cast, out=d_hidden[rows])
        if d_head is not None:
            d_head += g.T @ x
    return losses, d_hidden, d_head


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, job: Sparse | Online, weight: Tensor, reduce: bool) -> Tensor:
        want = ctx.needs_input_grad[:2] if reduce else (False, False)
        losses, *gradients = _walk(hidden, head, job, weight, *want)
        ctx.gradients = gradients if reduce else None
        ctx.job, ctx.weight, ctx.head_dtype = job, weight, head.dtype
        ctx.save_for_backward(hidden, head)
        return losses.sum() if reduce else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            # Each row's own gradient, or the second backward through one graph: the gradients are made anew.
            hidden, head = ctx.saved_tensors
            d_hidden, d_head = _walk(
                hidden, head, ctx.job, ctx.weight.to(grad.dtype) * grad, *ctx.needs_input_grad[:2]
            )[1:]
        else:
            # Let go of here, so that they become the leaves' own gradients without a copy.
            (d_hidden, d_head), ctx.gradients = ctx.gradients, None
            for part in (d_hidden, d_head):
                if part is not None:
                    part.mul_(grad.to(part.dtype))
        return d_hidden, None if d_head is None else d_head.to(ctx.head_dtype), None, None, None
