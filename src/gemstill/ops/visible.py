"""The rule of which token sees which, in one place for every way to compute attention."""

from __future__ import annotations

from torch import Tensor


def sees(q_position: Tensor, k_position: Tensor, q_document: Tensor, k_document: Tensor, window: int | None) -> Tensor:
    """Whether a query sees a key, elementwise: bool in the common shape of four integer tensors.

    A query sees a key of its own document that does not come after it and, with a window, is among
    itself and the window - 1 tokens before it. Documents below 0 are padding and are seen by nobody.
    """
    # Written so that where queries are a column and keys a row, all that is as large as both is of bools.
    seen = (q_position >= k_position) & (q_document == k_document) & (k_document >= 0)
    return seen if window is None else seen & (q_position - window < k_position)


def visible(
    q_positions: Tensor, k_positions: Tensor, q_documents: Tensor, k_documents: Tensor, window: int | None
) -> Tensor:
    """Which keys each query sees: [..., Tq, Tk] bool from positions and documents [..., T*] int64, by `sees`."""
    queries = (x[..., :, None] for x in (q_positions, q_documents))
    keys = (x[..., None, :] for x in (k_positions, k_documents))
    (qp, qd), (kp, kd) = queries, keys
    return sees(qp, kp, qd, kd, window)
