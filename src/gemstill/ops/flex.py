"""Attention on a GPU by PyTorch's FlexAttention (arXiv 2412.05496): one kernel, which skips blocks that nobody sees.

Beside the masks of ops/attention.py it is the same function of the same rule. It holds no scores, and its gradient
computes them again. Where a caller is to choose, `suits` decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.core.notices import note
from gemstill.ops.visible import sees

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# Queries and keys of a block. Both are padded to whole ones: kernels for ragged ends are other kernels, less used.
BLOCK = 128
FEWEST = BLOCK  # fewer queries are padded in vain, and their scores are small
SHAPES = 64  # kernels for so many shapes are kept; past PyTorch's own 8, all of them would run unfused
# PyTorch's own choice for the gradient with heads wider than 128 takes 112 KiB of a multiprocessor's memory, and cards
# for home use have 99: there, tiles that fit (pytorch/pytorch#198224).
ENOUGH = 112 << 10
SMALL = {"bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 32, "bwd_BLOCK_M2": 32, "bwd_BLOCK_N2": 32, "bwd_num_stages": 2}


class Blocks(NamedTuple):
    """Which keys each query sees, as blocks of BLOCK × BLOCK of which some see and some do not, or all do.

    mask: of Tq queries and Tk keys, each padded to whole blocks. real: [B, Tq] bool, which queries are no padding.
    tight: whether the card has little memory a multiprocessor.
    """

    mask: BlockMask
    real: Tensor
    tight: bool


def suits(device: torch.device, dtype: torch.dtype, head_dim: int, queries: int) -> bool:
    """Whether so many queries [.., queries, head_dim] of a dtype on a device are for FlexAttention: the one place.

    It is for CUDA, from FEWEST queries on. Where its kernel cannot be had (no Triton, a card or a width that it does
    not suit), one line says so, and False is the answer from then on.
    """
    if device.type != "cuda" or queries < FEWEST or dtype == torch.float64:  # the kernel's sums are float32
        return False
    return _works(device, dtype, head_dim, torch.is_grad_enabled())


@functools.cache
def _works(device: torch.device, dtype: torch.dtype, head_dim: int, grad: bool) -> bool:
    """Whether the kernel, and with `grad` that of its gradient, can be built and run, by doing it."""
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            q, k, v = (torch.ones(1, 1, BLOCK, head_dim, dtype=dtype, device=device, requires_grad=grad) for _ in "qkv")
            at, document = torch.arange(BLOCK, device=device)[None], torch.zeros(1, BLOCK, device=device).long()
            out = flex(q.unsqueeze(3), k, v, make_blocks(at, at, document, document, None), softcap=50.0)
            if grad:
                torch.autograd.grad(out.sum(), [q, k, v])
            return bool(out.isfinite().all())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or type(error).__name__
        note(f"there is no FlexAttention for heads of {head_dim} in {dtype}: {what[:200]}", where=device)
        return False


def make_blocks(
    q_positions: Tensor, k_positions: Tensor, q_documents: Tensor, k_documents: Tensor, window: int | None
) -> Blocks:
    """The mask of one kind of layer. Positions and documents: [B, Tq] and [B, Tk] int64.

    While it is made, a [B, Tq, Tk] of int32 and a few of bool are there.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    same = q_positions is k_positions and q_documents is k_documents
    qp, qd = _padded(q_positions.int(), 1), _padded(q_documents, 1, -1)
    kp, kd = (qp, qd) if same else (_padded(k_positions.int(), 1), _padded(k_documents, 1, -1))

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        found = sees(qp[b, q], kp[b, k], qd[b, q], kd[b, k], window)
        # Padding sees itself, so that no row of a training step is empty: PyTorch has had NaN gradients from such.
        return found | (q == k) if same else found

    mask = create_block_mask(seen, len(qp), None, qp.shape[1], kp.shape[1], device=qp.device, BLOCK_SIZE=BLOCK)
    card: Any = torch.cuda.get_device_properties(qp.device) if qp.is_cuda else None
    return Blocks(mask, q_documents >= 0, card is not None and card.shared_memory_per_block_optin < ENOUGH)


def flex(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, *, softcap: float | None) -> Tensor:
    """As ops.attention.attention: q [B, G, Tq, R, D], scaled already; k, v [B, G, Tk, D] -> [B, Tq, G·R·D]."""
    T, width = q.shape[2], q.shape[-1]
    rows = _padded(q.transpose(2, 3).flatten(1, 2), 2)  # [B, G·R, T, D]: heads that share a key lie together
    k, v = _padded(k, 2), _padded(v, 2)
    options: Any = SMALL if blocks.tight and width > 128 and q.dtype.itemsize == 2 else None
    how: dict[str, Any] = {"block_mask": blocks.mask, "scale": 1.0, "enable_gqa": True, "kernel_options": options}
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        out = flex_attention(rows, k, v, _cap(softcap), **how)
    else:
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            out = _kernel(q.device.type)(rows, k, v, _cap(softcap), **how)
    out = out[:, :, :T].transpose(1, 2).flatten(2)
    return torch.where(blocks.real[..., None], out, 0.0)


@functools.cache
def _kernel(device: str) -> Any:
    """FlexAttention for calls that are not compiled themselves. On the CPU, for tests, it is the formula written out.

    Each shape has a kernel of its own: those for any shape have given wrong numbers (pytorch/pytorch#186775).
    """
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=False)


def _cap(softcap: float | None) -> Callable[..., Tensor] | None:
    if softcap is None:
        return None

    def capped(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _padded(x: Tensor, dim: int, value: int = 0) -> Tensor:
    """x with dimension `dim` filled up to whole blocks."""
    extra = -x.shape[dim] % BLOCK
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, extra), value=value) if extra else x
