"""Softmax attention with a soft cap, a sliding window and packed documents.

A mask is a function of (document, position) of the query and of the key, never of where they lie in
a tensor; so padding, packing, chunked prefill and ring caches need nothing of their own. Only when
the caller vouches that positions rise by one from token to token within a document (`ordered`) are
keys left out that no query of a tile can see.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemstill.ops.flex import Blocks, flex, make_blocks
from gemstill.ops.native import kernels
from gemstill.ops.visible import visible

TILE = 128  # fewest queries of a tile; a band is a multiple of it
ALIGNED = 32  # keys; products whose width is odd are slower than what is wasted
MOST_TILES = 4  # tiles are unrolled when compiled: more cost compilation and save little

Tiles = tuple[tuple[int, int, int, int], ...]  # queries [start, stop) against keys [first, last)


class Mask(NamedTuple):
    """Which keys each query sees, in tiles of queries [start, stop) against keys [first, last).

    seen: a bool tensor for each tile, [B, 1, stop - start, 1, last - first]; with `band` > 0 there is one
    tile for all bands of that many tokens, each seeing itself and the band before: [B, 1, n, band, 1, 2·band].
    """

    tiles: Tiles
    seen: tuple[Tensor, ...]
    band: int = 0


AnyMask = Mask | Blocks


def make_mask(
    q_positions: Tensor,
    k_positions: Tensor,
    q_documents: Tensor,
    k_documents: Tensor,
    window: int | None,
    *,
    ordered: bool = False,
    blocks: bool = False,
) -> AnyMask:
    """The mask of one kind of layer. Positions and documents: [B, Tq] and [B, Tk] int64.

    ordered: queries and keys are the same tokens, positions rise by one within each document. blocks: it is for
    FlexAttention (see ops.flex.suits).
    """
    if blocks:
        return make_blocks(q_positions, k_positions, q_documents, k_documents, window)
    T = q_positions.shape[1]
    band = 0 if window is None else -(-window // TILE) * TILE
    if ordered and band > 0 and 4 * band <= T:
        return _banded(q_positions, q_documents, window, band)
    count = min(MOST_TILES, T // TILE) if ordered else 1
    edges = [T * i // count for i in range(count + 1)] if count > 1 else [0, T]
    tiles, seen = [], []
    for start, stop in pairwise(edges):
        first, last = (max(0, start - (window or T) + 1), stop) if count > 1 else (0, k_positions.shape[1])
        first -= first % ALIGNED
        rows, columns = slice(start, stop), slice(first, last)
        part = visible(
            q_positions[:, rows], k_positions[:, columns], q_documents[:, rows], k_documents[:, columns], window
        )
        tiles.append((start, stop, first, last))
        seen.append(part[:, None, :, None])
    return Mask(tuple(tiles), tuple(seen))


def _banded(positions: Tensor, documents: Tensor, window: int | None, band: int) -> Mask:
    extra = -positions.shape[1] % band
    p = torch.unflatten(F.pad(positions, (0, extra)), 1, (-1, band))
    d = torch.unflatten(F.pad(documents, (0, extra), value=-1), 1, (-1, band))
    seen = visible(p, _with_previous(p, 1), d, _with_previous(d, 1, fill=-1), window)
    return Mask(((0, band, 0, 2 * band),), (seen[:, None, :, :, None],), band)


def _with_previous(x: Tensor, bands: int, fill: int = 0) -> Tensor:
    """Each band of x [..., n, C, ...], dimension `bands` being n, after the band before it: [..., n, 2C, ...]."""
    empty = torch.full_like(x.narrow(bands, 0, 1), fill)
    previous = torch.cat([empty, x.narrow(bands, 0, x.shape[bands] - 1)], bands)
    return torch.cat([previous, x], bands + 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: AnyMask, *, softcap: float | None) -> Tensor:
    """Attention of the report's section 2: softmax(mask(c·tanh(q·kᵀ/c)))·v.

    q: [B, G, Tq, R, D], scaled already: R queries share a key (grouped queries). k, v: [B, G, Tk, D]. Returns
    [B, Tq, G·R·D] in q's dtype; a query that sees nothing (padding) gets zeros, not NaN. Exponentials and sums
    are taken in float32, or float64 for float64.
    """
    if isinstance(mask, Blocks):
        return flex(q, k, v, mask, softcap=softcap)
    T, C = q.shape[2], mask.band
    if C:
        extra = -T % C
        q = F.pad(q, (0, 0, 0, 0, 0, extra)) if extra else q
        k, v = (F.pad(x, (0, 0, 0, extra)) if extra else x for x in (k, v))
        q = torch.unflatten(q, 2, (-1, C))  # [B, G, n, C, R, D]
        k, v = (_with_previous(torch.unflatten(x, 2, (-1, C)), 2) for x in (k, v))  # [B, G, n, 2C, D]
    kernels(q)  # built here, where gradients are still on
    out: Tensor = _Attention.apply(q, k, v, softcap, T, mask.tiles, *mask.seen)  # type: ignore[no-untyped-call]
    return out.flatten(2)


def _exponentials(scores: Tensor, seen: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """exp of the capped scores [*L, tq, R, tk], up to a factor for each row that the normalisation takes out.

    Returns the exponentials, 0 where not seen; the same times the slope of the cap, which backward wants; both
    in the dtype of the scores, which they may replace. And their sums [*L, tq, R, 1], wide.
    """
    if (native := kernels(scores)) is not None:
        sums = scores.new_empty(*scores.shape[:-1], 1, dtype=torch.float32)
        steep = scores if softcap is None else torch.empty_like(scores)
        flat = scores.flatten(0, -4), seen.contiguous(), sums, steep.flatten(0, -4)
        native.attention_exponentials(*flat, scores.shape[1], math.prod(scores.shape[2:-3]), softcap or 0.0)
        return scores, steep, sums
    wide = scores if scores.dtype == torch.float64 else scores.float()
    slope = None
    if softcap is not None:
        t = tanh(wide / softcap)
        wide, slope = softcap * t, 1 - t * t
    if softcap is None or softcap > 60:
        wide = torch.where(seen, wide, -1e30)
        wide = wide - wide.amax(-1, keepdim=True)
    # Otherwise no maximum is needed: scores lie within the cap, and e^±60 and their sums well inside float32.
    powers = torch.where(seen, wide.exp(), 0.0)
    # The smallest normal number keeps rows that see nothing at 0 instead of NaN.
    sums = powers.sum(-1, keepdim=True).clamp_min(1e-37)
    kept = powers.to(scores.dtype)
    return kept, kept if slope is None else (powers * slope).to(scores.dtype), sums


def tanh(x: Tensor) -> Tensor:
    """tanh as e/(e + 2), e = exp(2x) - 1: a third faster than torch's in eager mode, more when compiled.

    The form by exp alone, 1 - 2/(exp(2x) + 1), loses the digits of small x: at a cap of 50 it makes logits
    several times less exact.
    """
    e = torch.expm1((2 * x).clamp_max(80.0))  # e^80 is finite, and 1 long before
    return e / (e + 2)


class _Attention(torch.autograd.Function):
    """q [*L, Tq, R, D], already scaled; k, v [*L, Tk, D]; each seen broadcasts to [*L, tq, R, tk].

    L is [B, G], or [B, G, bands]. The result is [B, tokens, G, R, D]. Rows are normalised after the product with v,
    so that the one pass over the scores is elementwise. Kept for backward, in the compute dtype: the
    exponentials, and the same times the slope of the cap.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softcap: float | None,
        tokens: int,
        tiles: Tiles,
        *seen: Tensor,
    ) -> Tensor:
        B, G, R, D = q.shape[0], q.shape[1], q.shape[-2], q.shape[-1]
        out = q.new_empty(B, tokens, G, R, D)
        kept = []
        for (start, stop, first, last), mask in zip(tiles, seen, strict=True):
            rows = q[..., start:stop, :, :]
            scores = rows.flatten(-3, -2) @ k[..., first:last, :].transpose(-1, -2)
            powers, steep, sums = _exponentials(torch.unflatten(scores, -2, (stop - start, R)), mask, softcap)
            powers, steep = powers.flatten(-3, -2), steep.flatten(-3, -2)
            part = torch.unflatten(powers @ v[..., first:last, :], -2, (stop - start, R))
            _place(part, sums, out, start)
            kept += [powers, steep, sums]
        ctx.save_for_backward(q, k, v, out, *kept)
        ctx.tiles = tiles
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, (start, stop, first, last) in enumerate(ctx.tiles):
            powers, steep, sums = kept[3 * number : 3 * number + 3]
            queries, keys = slice(start, stop), slice(first, last)
            rows = q[..., queries, :, :]
            d_part, delta = _take(grad, out, sums, rows, start)
            d_scores = d_part @ v[..., keys, :].transpose(-1, -2)
            if (native := kernels(d_scores)) is not None:
                native.attention_gradient(d_scores, steep, delta)
            else:
                d_scores = (steep * (d_scores - delta)).to(q.dtype)
            dq[..., queries, :, :] = torch.unflatten(d_scores @ k[..., keys, :], -2, rows.shape[-3:-1])
            dk[..., keys, :] += d_scores.transpose(-1, -2) @ rows.flatten(-3, -2)
            dv[..., keys, :] += powers.transpose(-1, -2) @ d_part
        return (dq, dk, dv, None, None, None, *[None] * len(ctx.tiles))


def _place(part: Tensor, sums: Tensor, out: Tensor, start: int) -> None:
    """Write part / sums, [*L, tq, R, D], to its tokens of out [B, T, G, R, D]: those from `start`, or bands of tq."""
    bands, size = math.prod(part.shape[2:-3]), part.shape[-3]
    if (native := kernels(part)) is not None:
        native.attention_place(part.flatten(0, -4), sums, out, bands, size, start)
        return
    rows = (part / sums).to(out.dtype)
    rows = rows.flatten(2, 3) if part.ndim == 6 else rows
    T = min(rows.shape[2], out.shape[1] - start)
    out[:, start : start + T] = rows[:, :, :T].transpose(1, 2)


def _take(grad: Tensor, out: Tensor, sums: Tensor, like: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The way back: grad / sums [*L, tq·R, D], and its product with out, row by row, [*L, tq·R, 1] wide."""
    bands, size = math.prod(like.shape[2:-3]), like.shape[-3]
    if (native := kernels(out)) is not None:
        part, delta = torch.empty_like(like, memory_format=torch.contiguous_format), torch.empty_like(sums)
        native.attention_take(grad, out, sums, part.flatten(0, -4), delta, bands, size, start)
    else:
        g, o = (_rows(x[:, start:], like) for x in (grad, out))
        wide = g / sums
        part, delta = wide.to(out.dtype), (wide * o).sum(-1, keepdim=True)
    return part.flatten(-3, -2), delta.flatten(-3, -2)


def _rows(x: Tensor, like: Tensor) -> Tensor:
    """The first tokens of x [B, T, G, R, D] in the shape of `like` [*L, tq, R, D], zeros past the end."""
    count = math.prod(like.shape[2:-2])
    rows = x[:, :count].transpose(1, 2)
    return F.pad(rows, (0, 0, 0, 0, 0, count - rows.shape[2])).reshape(like.shape)
