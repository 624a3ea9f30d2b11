"""The loss over a vocabulary, without ever holding the [tokens, vocabulary] logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.ops.logits import Cap, Kind, Online, Sparse, wide
from gemstill.ops.native import kernels
from gemstill.ops.packed import Weight
from gemstill.ops.products import Job, Loss, walk
from gemstill.ops.target import IGNORED, OnlineTarget, Target

Rest = Literal["drop", "renormalise", "bucket"]
Reduction = Literal["sum", "mean", "none", "sum_and_weight"]
Backward = Literal["exact", "sampled"]
ROUNDING = 1e-6  # what float32 probabilities may lack of 1 without a rest


def linear_cross_entropy(
    hidden: Tensor,
    head: Weight,
    target: Target | OnlineTarget,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    hard: tuple[Tensor, float] | None = None,
    rest: Rest = "drop",
    reduction: Reduction = "sum",
    backward: Backward = "exact",
    seed: int = 0,
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
    weighted loss [N], or (the sum, the sum of weights). backward: `exact`, or `sampled`: from a few columns of the
    logits' gradient, drawn by `seed`, in expectation the exact gradients, cheaper once the model knows something
    (ops/columns.py). compiled: where no native kernel does the elementwise work, fuse it by torch.compile: seconds
    at the first call.
    Returns float32 (float64 for float64). Gradients flow to hidden and head; the head's is summed in float32. They
    are computed with the loss, block by block, so that no logits are kept; each row's loss makes its own anew.

    Raises:
        Error: shapes that do not fit, or an option that is none.
        RuntimeError: an id of the target outside [0, V).
    """
    weight, hard = _rows(hidden, head, target, weight, hard)
    cap = _cap(softcap, temperature)
    if isinstance(target, OnlineTarget):
        job: Job = _online(target, "cross_entropy", 0.5, hard, cap)
    else:
        probs = target.probs.to(wide(hidden.dtype))
        job = _sparse(target.ids, probs, hard, rest, cap, compiled)
    return _reduced(hidden, head, job, weight, reduction, _seed(backward, seed))


def linear_reverse_kl(
    hidden: Tensor,
    head: Weight,
    target: OnlineTarget,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    hard: tuple[Tensor, float] | None = None,
    reduction: Reduction = "sum",
    backward: Backward = "exact",
    seed: int = 0,
) -> Any:
    """KL(q ‖ p) from q = softmax(cap(hidden·headᵀ) / temperature) to an online teacher's p, over rows.

    A row's loss is Σ q·(ln q − ln p) (MiniLLM, arXiv 2306.08543): the student keeps to what the teacher finds likely.
    It is not linear in p, so that a sampled target would bias it. Arguments, result and gradients are those of
    `linear_cross_entropy`; hard: f of the cross-entropy to the label, 1 − f of the divergence.

    Raises:
        Error: the target is sparse, or as `linear_cross_entropy` does.
        RuntimeError: a label outside [0, V).
    """
    weight, hard = _rows(hidden, head, _dense(target), weight, hard)
    job = _online(target, "reverse_kl", 0.5, hard, _cap(softcap, temperature))
    return _reduced(hidden, head, job, weight, reduction, _seed(backward, seed))


def linear_jensen_shannon(
    hidden: Tensor,
    head: Weight,
    target: OnlineTarget,
    *,
    beta: float = 0.5,
    softcap: float | None = None,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    hard: tuple[Tensor, float] | None = None,
    reduction: Reduction = "sum",
    backward: Backward = "exact",
    seed: int = 0,
) -> Any:
    """The generalised Jensen-Shannon divergence β·KL(p ‖ m) + (1 − β)·KL(q ‖ m), m = β·p + (1 − β)·q, over rows.

    p is the online teacher's distribution, q the student's (GKD, arXiv 2306.13649, equation 1). Divided by β it tends
    to the forward KL divergence as β → 0, divided by 1 − β to the reverse one as β → 1; both have functions of
    their own, so that 0 < β < 1 here. Otherwise as `linear_reverse_kl`.

    Raises:
        Error: β is not between 0 and 1, or as `linear_reverse_kl` does.
        RuntimeError: a label outside [0, V).
    """
    if not 0 < beta < 1:
        fix = "it lies between 0 and 1; at the ends are linear_cross_entropy and linear_reverse_kl"
        raise Error(f"beta is {beta}", where="loss", fix=fix)
    weight, hard = _rows(hidden, head, _dense(target), weight, hard)
    job = _online(target, "jensen_shannon", beta, hard, _cap(softcap, temperature))
    return _reduced(hidden, head, job, weight, reduction, _seed(backward, seed))


def log_probs(hidden: Tensor, head: Weight, ids: Tensor, *, softcap: float | None = None) -> Tensor:
    """log softmax(cap(hidden·headᵀ)) at one id a row: hidden [N, D], head [V, D], ids [N] -> [N]. No gradient."""
    with torch.no_grad():
        one = Sparse(ids[:, None], hidden.new_ones(len(ids), 1, dtype=torch.float32), None, 1, Cap(softcap), False)
        return -walk(hidden, head, one, one.probs[:, 0], False, False)[0]


def _dense(target: Target | OnlineTarget) -> OnlineTarget:
    if not isinstance(target, OnlineTarget):
        what = "a sparse target biases a divergence that is not linear in it"
        raise Error(what, where="loss", fix="give the teacher itself (OnlineTarget), or take linear_cross_entropy")
    return target


def _rows(
    hidden: Tensor,
    head: Weight,
    target: Target | OnlineTarget,
    weight: Tensor | None,
    hard: tuple[Tensor, float] | None,
) -> tuple[Tensor, tuple[Tensor, float] | None]:
    """The weight [N] and the hard label [N] of each row, once all shapes are seen to fit."""
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise Error(
            f"hidden {list(hidden.shape)} and head {list(head.shape)} should be [N, D] and [V, D]", where="loss"
        )
    _check_target(len(hidden), len(head), target)
    each = target.weight
    if weight is not None:
        if weight.numel() != len(hidden):
            raise Error(f"{weight.numel()} weights do not fit {len(hidden)} rows", where="loss")
        each = each * weight.reshape(-1)
    if hard is None:
        return each, None
    labels, fraction = hard[0].reshape(-1), hard[1]
    if not 0 <= fraction <= 1:
        raise Error(f"the fraction of hard labels is {fraction}", where="loss", fix="it lies between 0 and 1")
    if len(labels) != len(hidden):
        raise Error(f"{len(labels)} hard labels do not fit {len(hidden)} rows", where="loss")
    ignored = labels == IGNORED
    return each * ~ignored, (labels.masked_fill(ignored, 0), fraction)


def _check_target(rows: int, vocab: int, target: Target | OnlineTarget) -> None:
    if isinstance(target, OnlineTarget):
        theirs = target.hidden, target.head
        fits = all(x.ndim == 2 for x in theirs) and theirs[0].shape[1] == theirs[1].shape[1] and len(theirs[0]) == rows
        if fits and len(target.head) != vocab:
            what = f"the teacher's vocabulary has {len(target.head)} entries, the student's {vocab}"
            raise Error(what, where="loss", fix="both need one tokenizer; cut what pads the larger head off")
    else:
        fits = target.ids.shape == target.probs.shape and len(target.ids) == rows
    if not fits or len(target.weight) != rows:
        tensors = {name: x for name, x in target._asdict().items() if isinstance(x, Tensor)}
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise Error(f"a target of {shapes} does not fit {rows} rows", where="loss")


def _cap(softcap: float | None, temperature: float) -> Cap:
    if not temperature > 0 or (softcap is not None and not softcap > 0):
        raise Error(f"softcap is {softcap} and temperature {temperature}", where="loss", fix="both are above 0")
    return Cap(softcap, temperature)


def _sparse(
    ids: Tensor, probs: Tensor, hard: tuple[Tensor, float] | None, rest: Rest, cap: Cap, compiled: bool
) -> Sparse:
    inside, left = ids.shape[1], None
    if rest == "renormalise":
        probs = probs / probs.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    elif rest == "bucket":
        left = 1 - probs.sum(1)
        left = left.where(left > ROUNDING, 0.0)
    elif rest != "drop":
        raise Error(f"rest is '{rest}'", where="loss", fix="it is drop, renormalise or bucket")
    if hard is not None:
        labels, fraction = hard
        ids = torch.cat([ids, labels[:, None]], 1)
        probs = torch.cat([probs * (1 - fraction), probs.new_full((len(ids), 1), fraction)], 1)
        left = None if left is None else left * (1 - fraction)
    return Sparse(ids, probs, left, inside, cap, compiled)


def _online(target: OnlineTarget, kind: Kind, beta: float, hard: tuple[Tensor, float] | None, cap: Cap) -> Online:
    labels, fraction = hard or (None, 0.0)
    _cap(target.softcap, target.temperature)
    return Online(target, kind, beta, labels, fraction, cap)


def _seed(backward: str, seed: int) -> int | None:
    if backward not in ("exact", "sampled"):
        raise Error(f"backward is '{backward}'", where="loss", fix="it is exact or sampled")
    return seed if backward == "sampled" else None


def _reduced(hidden: Tensor, head: Weight, job: Job, weight: Tensor, reduction: str, seed: int | None) -> Any:
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype == torch.float32:
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    kernels(hidden)  # built here, where gradients are still on
    total = weight.sum()
    if reduction == "mean":
        weight = weight / total.clamp_min(torch.finfo(total.dtype).tiny)
    elif reduction not in ("sum", "none", "sum_and_weight"):
        what = f"reduction is '{reduction}'"
        raise Error(what, where="loss", fix="it is sum, mean, none or sum_and_weight")
    with torch.autocast(kind, enabled=False):
        loss: Tensor = Loss.apply(hidden, head, job, weight, reduction != "none", seed)  # type: ignore[no-untyped-call]
    return (loss, total) if reduction == "sum_and_weight" else loss
