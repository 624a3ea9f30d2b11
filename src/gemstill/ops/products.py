"""The loss's matrix products in blocks of tokens and tiles of the vocabulary, and their place in autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemstill.ops.columns import Columns, choose
from gemstill.ops.logits import CAST, Online, Sparse, cut, product, wide
from gemstill.ops.packed import Packed, Weight, no_training
from gemstill.ops.tied import given_away, is_tied

ROWS = 512  # tokens whose raw logits are held at once, in the products' dtype; a teacher's count, too
ELEMENTS = 1 << 22  # of raw logits held at once, where a small vocabulary lets them be of more tokens
PART = 1 << 21  # elements of the head's gradient that one product makes: they stay in a processor's cache
COLUMNS = 1 << 13  # of the vocabulary, summed at once: longer sums are no faster
FEW = 256  # tokens whose columns are drawn together: of fewer the products are slower, more want more new memory

Job = Sparse | Online


def walk(
    hidden: Tensor,
    head: Weight,
    job: Job,
    weight: Tensor,
    want_hidden: bool,
    want_head: bool,
    seed: int | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The losses [N], wide, and the gradients of their sum: to hidden [N, D] in its dtype, to head [V, D] in its own.

    seed: of the columns that are drawn; None takes all of them.
    """
    if isinstance(head, Packed) and (want_hidden or want_head):
        raise no_training()
    # A large one of another dtype is cast a part at a time: whole, it would lie in memory twice.
    cast = head.to(hidden.dtype) if isinstance(head, Tensor) and head.numel() <= CAST else head
    losses = hidden.new_zeros(len(hidden), dtype=wide(hidden.dtype))
    blocks = cut(len(hidden), _rows(hidden, head, job))
    backward = want_hidden or want_head
    d_hidden = torch.empty_like(hidden) if want_hidden else None
    d_head = _HeadGradient(head, hidden.dtype) if want_head and isinstance(head, Tensor) else None
    if blocks:
        raw = hidden.new_empty(max(rows.stop - rows.start for rows in blocks), len(head))
        spare = job.spare(raw)

    def logits_gradient(rows: slice, g: Tensor) -> None:
        """The losses of some rows, and in g [n, V] the gradient to their logits."""
        product(hidden[rows], cast, g)
        losses[rows] = job.consume(g, rows, weight[rows], backward, spare)

    def drawn(block: slice, seed: int) -> tuple[int, int]:
        """Do a block with drawn columns, few tokens at a time.

        Returns the token from which on all columns are needed, and for how many from there `raw` has the gradient.
        """
        start, few = block.start, max(FEW, ELEMENTS // len(head))
        while start < block.stop:
            rows = slice(start, min(start + few, block.stop))
            g = raw[: rows.stop - start]
            logits_gradient(rows, g)
            columns = choose(g, seed + start)
            if columns is None:
                return start, len(g)
            assert isinstance(cast, Tensor)
            _from_columns(g, hidden[rows], cast, columns, None if d_hidden is None else d_hidden[rows], d_head)
            start = rows.stop
        return start, 0

    for block in blocks:
        start, ready = (block.start, 0) if seed is None or not backward else drawn(block, seed)
        if start == block.stop:
            continue
        rows, g = slice(start, block.stop), raw[: block.stop - start]
        if ready < len(g):
            logits_gradient(slice(start + ready, block.stop), g[ready:])
        if d_hidden is not None:
            assert isinstance(cast, Tensor)
            _from_all(g, cast, d_hidden[rows])
        if d_head is not None:
            d_head.add(g, hidden[rows], alone=len(g) == len(hidden))
    return losses, d_hidden, d_head.finished() if d_head else None


def _rows(hidden: Tensor, head: Weight, job: Job) -> int:
    """How many tokens' logits are held at once."""
    held = max(ROWS, ELEMENTS // len(head))
    if head.dtype == hidden.dtype != wide(hidden.dtype) and len(hidden) * job.sides <= held + head.shape[1]:
        # One block needs no wide sum of a narrow gradient: that memory may as well hold logits.
        return len(hidden)
    return held // job.sides


def _from_all(g: Tensor, head: Tensor, out: Tensor) -> None:
    """out [n, D] = g·head, from all columns of g [n, V]."""
    if head.dtype == g.dtype and len(head) <= COLUMNS:
        torch.mm(g, head, out=out)
        return
    total = torch.zeros(out.shape, dtype=wide(g.dtype), device=g.device)
    for part in cut(len(head), COLUMNS):
        total += g[:, part] @ head[part].to(g.dtype)
    out.copy_(total)


def _from_columns(
    g: Tensor, x: Tensor, head: Tensor, columns: Columns, out: Tensor | None, d_head: _HeadGradient | None
) -> None:
    """out [n, D] = g·head, and gᵀ·x to the head's gradient, from the columns of g [n, V] that stand for all."""
    total = None if out is None else torch.zeros(out.shape, dtype=wide(g.dtype), device=g.device)
    for part in cut(len(columns.ids), COLUMNS):
        ids, factor = columns.ids[part], columns.factor[part]
        some = g[:, ids]  # by indexing, which takes half the time of index_select on a CPU
        some = (some * factor).to(g.dtype)
        if total is not None:
            total += some @ head.index_select(0, ids).to(g.dtype)
        if d_head is not None:
            d_head.add_rows(ids, some.T @ x)
    if out is not None and total is not None:
        out.copy_(total)


class _HeadGradient:
    """[V, D], summed over blocks in float32; what is made at once goes into its place at once."""

    def __init__(self, head: Tensor, products: torch.dtype) -> None:
        self.dtype, self.products = head.dtype, products
        self.shape, self.device = head.shape, head.device
        self.parts = cut(len(head), max(1, PART // max(1, head.shape[1])))
        self.sum: Tensor | None = None
        self.drawn: list[tuple[Tensor, Tensor]] = []

    def add(self, g: Tensor, x: Tensor, *, alone: bool) -> None:
        """Add gᵀ·x of a block: g [n, V], x [n, D]. alone: there is no other block, so its product is the sum."""
        empty = self.sum is None
        if self.sum is None:
            sums = self.products if alone and self.products == self.dtype else wide(self.products)
            self.sum = torch.empty(self.shape, dtype=sums, device=self.device)
        for part in self.parts:
            to, columns_of_it = self.sum[part], g[:, part].T
            if self.sum.dtype != g.dtype:
                made = columns_of_it @ x
                to.copy_(made) if empty else to.add_(made)
            elif empty:
                torch.mm(columns_of_it, x, out=to)
            else:
                to.addmm_(columns_of_it, x)

    def add_rows(self, ids: Tensor, made: Tensor) -> None:
        """Add `made` [k, D] to the rows `ids` [k], ascending and none of them twice."""
        self.drawn.append((ids, made))

    def finished(self) -> Tensor:
        """In the head's dtype; a narrower one is written into the front of the sum's own memory."""
        if self.sum is None:
            return self._of_drawn()
        for ids, made in self.drawn:
            self.sum.index_add_(0, ids, made.to(self.sum.dtype))
        if self.sum.dtype == self.dtype:
            return self.sum
        if self.dtype.itemsize > self.sum.dtype.itemsize:
            return self.sum.to(self.dtype)
        narrow = self.sum.view(-1).view(self.dtype)[: self.sum.numel()].view(self.sum.shape)
        for part in self.parts:
            narrow[part] = self.sum[part].to(self.dtype)
        return narrow

    def _of_drawn(self) -> Tensor:
        """Of drawn rows alone, which are summed before they are put into their places: the others stay zero."""
        out = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        if not self.drawn:
            return out
        ids, places = torch.unique(torch.cat([ids for ids, _ in self.drawn]), return_inverse=True)
        total = torch.zeros(len(ids), self.shape[1], dtype=wide(self.products), device=self.device)
        for part, (_, made) in zip(places.split([len(ids) for ids, _ in self.drawn]), self.drawn, strict=True):
            total.index_add_(0, part, made.to(total.dtype))
        out[ids] = total.to(out.dtype)
        return out


class Loss(torch.autograd.Function):
    """The sum of the losses of all rows, its gradients made with it; or each row's, which makes them anew."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Weight, job: Job, weight: Tensor, reduce: bool, seed: int | None
    ) -> Tensor:
        """hidden [N, D], head [V, D], weight [N] -> a scalar, or [N]."""
        want = ctx.needs_input_grad[:2] if reduce else (False, False)
        losses, *gradients = walk(hidden, head, job, weight, want[0], want[1], seed)
        ctx.gradients = gradients if reduce else None
        ctx.job, ctx.weight, ctx.seed = job, weight, seed
        ctx.tied = isinstance(head, Tensor) and is_tied(head)
        if isinstance(head, Tensor):  # a packed one has no way back
            ctx.save_for_backward(hidden, head)
        return losses.sum() if reduce else losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad: as the result -> gradients to hidden and head, in their dtypes."""
        if ctx.gradients is None:
            # Each row's own gradient, or the second backward through one graph: the gradients are made anew.
            hidden, head = ctx.saved_tensors
            weight = ctx.weight.to(grad.dtype) * grad
            want = ctx.needs_input_grad
            gradients = walk(hidden, head, ctx.job, weight, want[0], want[1], ctx.seed)[1:]
            return *gradients, None, None, None, None
        # Let go of here, so that they become the leaves' own gradients without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        if grad.device.type != "cpu" or float(grad) != 1:
            for part in gradients:
                if part is not None:
                    part.mul_(grad.to(part.dtype))
        d_hidden, d_head = gradients
        return d_hidden, given_away(d_head) if ctx.tied and d_head is not None else d_head, None, None, None, None
