"""An embedding that is the head, too: one gradient for both, in one piece of memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_OURS = "gemstill_adds_here"  # on a gradient that nobody else has


def tied(ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of an embedding that is the head, too, and the head: ids [...] int64, weight [V, D] -> [..., D], [V, D].

    Apart they would have a gradient each. That of the rows is nearly all zeros: of a large vocabulary, to make and to
    add it takes a twentieth of a small student's step, and as much memory as the weights. Here the rows' gradients are
    added to the head's.
    """
    both: tuple[Tensor, Tensor] = _Tied.apply(ids, weight)  # type: ignore[no-untyped-call]
    return both


def is_tied(head: Tensor) -> bool:
    """Whether this is the head that `tied` gave, so that a gradient to it goes there and nowhere else."""
    return isinstance(head.grad_fn, _Tied._backward_cls)


def given_away(gradient: Tensor) -> Tensor:
    """A gradient to such a head, which is now its own: what it adds may be added in place."""
    setattr(gradient, _OURS, True)
    return gradient


class _Tied(torch.autograd.Function):
    """An embedding's rows and its matrix."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """ids [...], weight [V, D] -> [..., D], [V, D]."""
        ctx.save_for_backward(ids)
        ctx.set_materialize_grads(False)
        ctx.shape = weight.shape
        return F.embedding(ids, weight), weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor | None, d_head: Tensor | None) -> tuple[None, Tensor | None]:
        """d_rows [..., D], d_head [V, D] -> [V, D]."""
        if d_rows is None:
            return None, d_head
        if d_head is None:
            total = d_rows.new_zeros(ctx.shape)
        else:
            total = d_head if getattr(d_head, _OURS, False) else d_head.clone()
        (ids,) = ctx.saved_tensors
        return None, total.index_add_(0, ids.flatten(), d_rows.flatten(0, -2).to(total.dtype))
