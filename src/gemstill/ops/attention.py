"""Softmax attention with a soft cap, a sliding window and packed documents.

The mask is a function of (document, position) of the query and of the key, never of where they lie
in a tensor; so padding, packing, chunked prefill and ring caches need nothing of their own. Only
when the caller vouches that positions rise by one from token to token within a document (`ordered`)
may tiles that no query of theirs can see be left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 128  # queries handled at once when tiles may be left out


def visible(q_positions: Tensor, k_positions: Tensor, q_documents: Tensor, k_documents: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: [B, Tq, Tk] bool from positions and documents [B, T*] int64.

    A query sees a key of its own document that does not come after it and, with a window, is among
    itself and the window - 1 tokens before it. Documents below 0 are padding and are seen by nobody.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (distance >= 0) & (q_documents[:, :, None] == k_documents[:, None, :]) & (k_documents >= 0)[:, None, :]
    return seen if window is None else seen & (distance < window)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    q_documents: Tensor,
    k_documents: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    ordered: bool = False,
) -> Tensor:
    """Attention of the report's section 2: softmax(mask(c·tanh(scale·q·kᵀ/c)))·v.

    q: [B, H, Tq, D]. k, v: [B, G, Tk, D] with H a multiple of G (grouped queries). Positions and
    documents: [B, Tq] and [B, Tk] int64. Returns [B, H, Tq, D] in q's dtype; a query that sees
    nothing (padding) gets zeros, not NaN. The softmax is taken in float32, or float64 for float64.
    """
    B, H, Tq, D = q.shape
    G = k.shape[1]
    grouped = (q * scale).reshape(B, G, H // G, Tq, D)
    tiles = range(0, Tq, TILE) if ordered and Tq > TILE else range(1)
    size = TILE if len(tiles) > 1 else Tq
    outputs = []
    for start in tiles:
        stop = min(start + size, Tq)
        first, last = 0, k.shape[2]
        if len(tiles) > 1:
            first, last = (0 if window is None else max(0, start - window + 1)), stop
        mask = visible(
            q_positions[:, start:stop], k_positions[:, first:last], q_documents[:, start:stop], k_documents[:, first:last], window
        )
        outputs.append(_tile(grouped[:, :, :, start:stop], k[:, :, first:last], v[:, :, first:last], mask, softcap))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, 3)).reshape(B, H, Tq, D)


def _tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None) -> Tensor:
    B, G, R, Tq, D = q.shape
    scores = (q.reshape(B, G, R * Tq, D) @ k.transpose(-1, -2)).reshape(B, G, R, Tq, k.shape[2])
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if softcap is not None:
        wide = softcap * torch.tanh(wide / softcap)
    # A finite floor keeps rows that see nothing free of NaN; their weights are then wiped.
    wide = wide.masked_fill(~mask[:, None, None], -1e30)
    weights = torch.softmax(wide, -1).masked_fill(~mask.any(-1)[:, None, None, :, None], 0.0).to(v.dtype)
    return (weights.reshape(B, G, R * Tq, -1) @ v).reshape(B, G, R, Tq, D)
