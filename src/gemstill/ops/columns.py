"""A few columns in place of all: what the backward products of a trained model's loss can do with, unbiased.

Of the gradient to the logits [n, V] hardly any column is large once a model knows something. Columns of at least a
threshold's size are kept; of the others, some are drawn in proportion to their size and weighted by 1 over their
probability, so that the expectation of every product with them is the exact one. It is the threshold estimator
(arXiv 2402.14925) of a teacher's probabilities, turned on the columns of the gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemstill.ops.logits import TILE, cut, wide
from gemstill.ops.native import kernels

NOISE = 1e-3  # of the gradient, relative, were all columns of equal direction; two to three times that by measurement
SORTED = 1 << 14  # sizes that set the threshold, which may be any as far as the expectation goes
WORTH = 0.6  # of all columns: beyond this share, gathering them costs more than it saves


class Columns(NamedTuple):
    """Columns that stand for all. ids: [k] int64, ascending. factor: [k] wide, 1 over a column's probability."""

    ids: Tensor
    factor: Tensor


def choose(g: Tensor, seed: int) -> Columns | None:
    """Columns of g [n, V] for products along V: a function of g and `seed`; None where too many would be needed."""
    size = _squares(g).sqrt_()
    threshold = _threshold(size)
    small = size < threshold
    if threshold <= 0 or float((~small).sum() + size[small].sum(dtype=torch.float64) / threshold) > WORTH * len(size):
        return None
    u = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    chance = torch.where(small, size.double() / threshold, 0.0)
    # A column is drawn where a whole number lies in its stretch of the sum of chances, shifted by u.
    reached = (chance.cumsum(0) + u.to(chance.device)).floor_()
    drawn = reached.diff(prepend=reached.new_zeros(1)) > 0
    ids = (~small | drawn).nonzero()[:, 0]
    return Columns(ids, torch.where(small[ids], 1 / chance[ids], 1.0).to(size.dtype))


def _threshold(size: Tensor) -> float:
    """The largest of the sizes [V] (of some of them, spread evenly) whose draws stay below NOISE."""
    stride = max(1, len(size) // SORTED)
    ordered = size[::stride].sort().values.double()
    # With the threshold t at the k-th size, systematic draws have variance Σ s·(t − s) over the sizes below it.
    variance = (ordered * ordered.cumsum(0) - ordered.square().cumsum(0)) * stride
    most = NOISE**2 * size.square().sum(dtype=torch.float64)
    k = int(torch.searchsorted(variance, most, right=True)) - 1
    return float(ordered[max(k, 0)])


def _squares(g: Tensor) -> Tensor:
    """The sum of squares [V], wide, of each column of g [n, V]."""
    out = torch.zeros(g.shape[1], dtype=wide(g.dtype), device=g.device)
    if (native := kernels(g)) is not None:
        native.column_squares(g, out)
        return out
    for rows in cut(len(g), TILE // g.shape[1]):
        out += g[rows].to(out.dtype).square().sum(0)
    return out
