"""Softmax attention with a soft cap, a sliding window and packed documents.

A mask is a function of (document, position) of the query and of the key, never of where they lie in
a tensor; so padding, packing, chunked prefill and ring caches need nothing of their own. Only when
the caller vouches that positions rise by one from token to token within a document (`ordered`) are
keys left out that no query of a tile can see.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 128  # fewest queries of a tile; a band is a multiple of it
MOST_TILES = 4  # tiles are unrolled when compiled: more cost compilation and save little

Tiles = tuple[tuple[int, int, int, int], ...]  # queries [start, stop) against keys [first, last)


class Mask(NamedTuple):
    """Which keys each query sees, in tiles of queries [start, stop) against keys [first, last).

    seen: a bool tensor for each tile, [B, 1, 1, stop - start, last - first]; with `band` > 0 there is one
    tile for all bands of that many tokens, each seeing itself and the band before: [B, 1, n, 1, band, 2·band].
    """

    tiles: Tiles
    seen: tuple[Tensor, ...]
    band: int = 0


def visible(
    q_positions: Tensor, k_positions: Tensor, q_documents: Tensor, k_documents: Tensor, window: int | None
) -> Tensor:
    """Which keys each query sees: [..., Tq, Tk] bool from positions and documents [..., T*] int64.

    A query sees a key of its own document that does not come after it and, with a window, is among
    itself and the window - 1 tokens before it. Documents below 0 are padding and are seen by nobody.
    """
    distance = q_positions[..., :, None] - k_positions[..., None, :]
    same = (q_documents[..., :, None] == k_documents[..., None, :]) & (k_documents >= 0)[..., None, :]
    seen = (distance >= 0) & same
    return seen if window is None else seen & (distance < window)


def make_mask(
    q_positions: Tensor,
    k_positions: Tensor,
    q_documents: Tensor,
    k_documents: Tensor,
    window: int | None,
    *,
    ordered: bool = False,
) -> Mask:
    """The mask of one kind of layer. Positions and documents: [B, Tq] and [B, Tk] int64.

    ordered: queries and keys are the same tokens, positions rise by one within each document.
    """
    T = q_positions.shape[1]
    band = 0 if window is None else -(-window // TILE) * TILE
    if ordered and band > 0 and 4 * band <= T:
        return _banded(q_positions, q_documents, window, band)
    count = min(MOST_TILES, T // TILE) if ordered else 1
    edges = [T * i // count for i in range(count + 1)] if count > 1 else [0, T]
    tiles, seen = [], []
    for start, stop in pairwise(edges):
        first, last = (max(0, start - (window or T) + 1), stop) if count > 1 else (0, k_positions.shape[1])
        rows, columns = slice(start, stop), slice(first, last)
        part = visible(
            q_positions[:, rows], k_positions[:, columns], q_documents[:, rows], k_documents[:, columns], window
        )
        tiles.append((start, stop, first, last))
        seen.append(part[:, None, None])
    return Mask(tuple(tiles), tuple(seen))


def _banded(positions: Tensor, documents: Tensor, window: int | None, band: int) -> Mask:
    extra = -positions.shape[1] % band
    p = torch.unflatten(F.pad(positions, (0, extra)), 1, (-1, band))
    d = torch.unflatten(F.pad(documents, (0, extra), value=-1), 1, (-1, band))
    seen = visible(p, _with_previous(p, 1), d, _with_previous(d, 1, fill=-1), window)
    return Mask(((0, band, 0, 2 * band),), (seen[:, None, :, None],), band)


def _with_previous(x: Tensor, bands: int, fill: int = 0) -> Tensor:
    """Each band of x [..., n, C, ...], dimension `bands` being n, after the band before it: [..., n, 2C, ...]."""
    empty = torch.full_like(x.narrow(bands, 0, 1), fill)
    previous = torch.cat([empty, x.narrow(bands, 0, x.shape[bands] - 1)], bands)
    return torch.cat([previous, x], bands + 1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float, softcap: float | None) -> Tensor:
    """Attention of the report's section 2: softmax(mask(c·tanh(scale·q·kᵀ/c)))·v.

    q: [B, H, Tq, D]. k, v: [B, G, Tk, D] with H a multiple of G (grouped queries). Returns [B, H, Tq, D] in
    q's dtype; a query that sees nothing (padding) gets zeros, not NaN. Exponentials and sums are taken in
    float32, or float64 for float64.
    """
    B, H, T, D = q.shape
    G = k.shape[1]
    q = (q * scale).reshape(B, G, H // G, T, D)
    if not mask.band:
        out: Tensor = _Attention.apply(q, k, v, softcap, mask.tiles, *mask.seen)  # type: ignore[no-untyped-call]
        return out.reshape(B, H, T, D)
    extra, C = -T % mask.band, mask.band
    q, k, v = (F.pad(x, (0, 0, 0, extra)) if extra else x for x in (q, k, v))
    q = torch.unflatten(q, 3, (-1, C)).transpose(2, 3)  # [B, G, n, R, C, D]
    k, v = (_with_previous(torch.unflatten(x, 2, (-1, C)), 2) for x in (k, v))  # [B, G, n, 2C, D]
    out = _Attention.apply(q, k, v, softcap, mask.tiles, *mask.seen)  # type: ignore[no-untyped-call]
    return out.transpose(2, 3).reshape(B, H, T + extra, D)[:, :, :T]


def _exponentials(scores: Tensor, seen: Tensor, softcap: float | None) -> Tensor:
    """exp of the capped scores, up to a factor for each row that the normalisation takes out; 0 where not seen."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if softcap is not None:
        wide = softcap * tanh(wide / softcap)
    if softcap is None or softcap > 60:
        wide = torch.where(seen, wide, -1e30)
        wide = wide - wide.amax(-1, keepdim=True)
    # Otherwise no maximum is needed: scores lie within the cap, and e^±60 and their sums well inside float32.
    return torch.where(seen, wide.exp(), 0.0)


def tanh(x: Tensor) -> Tensor:
    """tanh as e/(e + 2), e = exp(2x) - 1: a third faster than torch's in eager mode, more when compiled.

    The form by exp alone, 1 - 2/(exp(2x) + 1), loses the digits of small x: at a cap of 50 it makes logits
    several times less exact.
    """
    e = torch.expm1((2 * x).clamp_max(80.0))  # e^80 is finite, and 1 long before
    return e / (e + 2)


def _slope(scores: Tensor, softcap: float) -> Tensor:
    """The derivative of c·tanh(x/c): 1 - tanh²."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return 1 - tanh(wide / softcap).square()


class _Attention(torch.autograd.Function):
    """q [*L, R, Tq, D], already scaled; k, v [*L, Tk, D]; each seen broadcasts to [*L, R, tq, tk].

    Rows are normalised after the product with v, so that the one pass over the scores is elementwise.
    Kept for backward, in the compute dtype: scores and their exponentials.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softcap: float | None,
        tiles: Tiles,
        *seen: Tensor,
    ) -> Tensor:
        outs, kept = [], []
        for (start, stop, first, last), mask in zip(tiles, seen, strict=True):
            rows = q[..., start:stop, :]
            flat = rows.flatten(-3, -2)
            scores = flat @ k[..., first:last, :].transpose(-1, -2)
            powers = _exponentials(torch.unflatten(scores, -2, rows.shape[-3:-1]), mask, softcap)
            # The smallest normal number keeps rows that see nothing at 0 instead of NaN.
            total = powers.sum(-1, keepdim=True).clamp_min(1e-37)
            powers = powers.to(v.dtype).flatten(-3, -2)
            out = torch.unflatten(powers @ v[..., first:last, :], -2, rows.shape[-3:-1])
            outs.append((out / total).to(q.dtype))
            kept += [scores, powers, total]
        joined = outs[0] if len(outs) == 1 else torch.cat(outs, -2)
        ctx.save_for_backward(q, k, v, joined, *kept)
        ctx.softcap, ctx.tiles = softcap, tiles
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *kept = ctx.saved_tensors
        dqs, dks, dvs = [], [], []
        for number, (start, stop, first, last) in enumerate(ctx.tiles):
            scores, powers, total = kept[3 * number : 3 * number + 3]
            rows, keys, values = q[..., start:stop, :], k[..., first:last, :], v[..., first:last, :]
            shape = rows.shape[-3:-1]
            d_out = grad[..., start:stop, :] / total
            delta = (d_out * out[..., start:stop, :]).sum(-1, keepdim=True).flatten(-3, -2)
            d_out = d_out.to(q.dtype).flatten(-3, -2)
            d_scores = powers * ((d_out @ values.transpose(-1, -2)) - delta)
            if ctx.softcap is not None:
                d_scores = d_scores * _slope(scores, ctx.softcap)
            d_scores = d_scores.to(q.dtype)
            dqs.append(torch.unflatten(d_scores @ keys, -2, shape))
            edges = (0, 0, first, k.shape[-2] - last)
            dks.append(F.pad(d_scores.transpose(-1, -2) @ rows.flatten(-3, -2), edges))
            dvs.append(F.pad(powers.transpose(-1, -2) @ d_out, edges))
        dq = dqs[0] if len(dqs) == 1 else torch.cat(dqs, -2)
        return (dq, sum(dks[1:], dks[0]), sum(dvs[1:], dvs[0]), None, None, *[None] * len(ctx.tiles))
