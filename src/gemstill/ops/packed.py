"""A weight matrix in integers, in the order in which products read it.

What is in a block is what a GGUF's block has (ops/blocks.py), to the last bit; only the order differs. The order is
described in native/packed.h. Five- and six-bit integers are widened to bytes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.ops.blocks import BLOCKS, empty, quantize
from gemstill.ops.native import kernels

PANEL, BLOCK = 16, 32  # rows, weights of a row
FEW = 16  # vectors that are multiplied with the integers; more are with dequantized tiles of rows
TILE = 1 << 21  # weights of such a tile
ROWS = 1 << 21  # weights that are repacked at once
KINDS = ("float32", "bfloat16", "int8", "int4", "q4_k", "q5_k", "q6_k")  # as the native kernels number them
FORMATS = {"int8": "Q8_0", "int4": "Q4_0"}  # what `pack` makes


class _Order(NamedTuple):
    """How the blocks of a format are kept: the kind of matrix, how many blocks of 32 share a group of scales."""

    kind: str
    group: int
    nibbles: bool
    scales: int  # bytes of a panel's group

    @property
    def number(self) -> int:
        return KINDS.index(self.kind)

    @property
    def integers(self) -> int:
        """Bytes of a panel and a block."""
        return PANEL * BLOCK // (2 if self.nibbles else 1)


_ORDERS = {
    "Q8_0": _Order("int8", 1, False, 32),
    "Q5_0": _Order("int8", 1, False, 32),
    "Q4_0": _Order("int4", 1, True, 32),
}


class Packed:
    """One matrix [N, K] of a quantized model: what stands where a parameter would, and is never trained.

    name: its block format, a key of ops.blocks.BLOCKS. data: [nbytes] uint8, all integers and scales.
    """

    def __init__(self, data: Tensor, name: str, shape: tuple[int, int]) -> None:
        self.data, self.name, self.shape = data, name, shape
        self.order = _ORDERS[name]

    @property
    def kind(self) -> str:
        """How the integers are kept, a name in KINDS."""
        return self.order.kind

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def ndim(self) -> int:
        return 2

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def is_meta(self) -> bool:
        return self.data.is_meta

    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"Packed({self.name}, {list(self.shape)})"

    def rows(self, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights [stop - start, K] of some rows, in `dtype`: rounded to it once, from float32."""
        start, stop = max(0, start), min(stop, len(self))
        out = torch.empty(max(0, stop - start), self.shape[1], dtype=dtype)
        if (native := kernels(out)) is not None:
            native.packed_rows(self.data, self.order.number, len(self), _NO_IDS, start, out)
            return out
        first = start // PANEL
        panels = self._panels(first, -(-stop // PANEL))
        return out.copy_(panels[start - first * PANEL : stop - first * PANEL])

    def gather(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [..., K] in `dtype` of ids [...] int64: an embedding.

        Raises:
            IndexError: an id outside [0, N).
        """
        flat = ids.reshape(-1)
        if len(flat) and not bool(((flat >= 0) & (flat < len(self))).all()):
            raise IndexError(f"a row outside [0, {len(self)})")
        out = torch.empty(len(flat), self.shape[1], dtype=dtype)
        if len(flat) and (native := kernels(out)) is not None:
            native.packed_rows(self.data, self.order.number, len(self), flat.contiguous(), 0, out)
        else:
            for panel in sorted(set((flat // PANEL).tolist())):
                here = flat // PANEL == panel
                out[here] = self._panels(panel, panel + 1)[flat[here] % PANEL].to(dtype)
        return out.view(*ids.shape, self.shape[1])

    def linear(self, x: Tensor) -> Tensor:
        """x [..., K] times the transposed matrix -> [..., N], in x's dtype. Raises Error as `packed_linear` does."""
        return packed_linear(x, self)

    def unpack(self) -> tuple[Tensor, str]:
        """The blocks as a GGUF file has them, [N, bytes of a row] uint8, and their format: what was packed."""
        block = BLOCKS[self.name]
        out = torch.empty(len(self), self.shape[1] // block.size * block.bytes, dtype=torch.uint8)
        for start, stop in _cuts(self.shape):
            out[start:stop] = self._blocks(start // PANEL, -(-stop // PANEL))[: stop - start]
        return out, self.name

    def _parts(self) -> tuple[Tensor, Tensor]:
        """The integers [panels, blocks, bytes] and the scales [panels, groups, bytes] of all panels."""
        return _views(self.data, self.order, self.shape)

    def _panels(self, first: int, last: int) -> Tensor:
        """Weights [16·(last - first), K] float32 of panels, in plain operations; rows from N on are any."""
        integers, scales = (part[first:last] for part in self._parts())
        q = _from_order(integers, self.order).view(-1, self.shape[1] // BLOCK, BLOCK)
        d = _rowwise(scales.view(torch.float16))
        return ((q.float() - _offset(self.order)) * d.float()).view(len(q), -1)

    def _blocks(self, first: int, last: int) -> Tensor:
        """The blocks of panels as a file has them, [16·(last - first), bytes of a row]."""
        integers, scales = (part[first:last] for part in self._parts())
        q = _from_order(integers, self.order).view(-1, self.shape[1] // BLOCK, BLOCK)
        d = _rowwise(scales.view(torch.float16)).reshape(-1).view(torch.uint8).view(*q.shape[:2], 2)
        if self.name == "Q4_0":
            body = q[..., :16] | (q[..., 16:] << 4)
        elif self.name == "Q8_0":
            body = q ^ 0x80
        else:
            q = q - (128 - 16)
            bits = (q >> 4).view(*q.shape[:2], 4, 8) << torch.arange(8, dtype=torch.uint8)
            low = q & 15
            body = torch.cat([bits.sum(-1, dtype=torch.uint8), low[..., :16] | (low[..., 16:] << 4)], -1)
        return torch.cat([d, body], -1).view(len(q), -1)


_NO_IDS = torch.empty(0, dtype=torch.int64)
Weight = Tensor | Packed


def pack(tensor: Tensor, kind: str) -> Packed:
    """A matrix [N, K] of any float dtype in blocks of 32 along K: "int8" has the numbers of Q8_0, "int4" of Q4_0.

    Raises:
        Error: another kind; no matrix; K is no multiple of 32; a weight that is not finite.
    """
    if kind not in FORMATS:
        raise Error(f"no matrix is packed as '{kind}'", where="packed", fix=f"take one of {', '.join(FORMATS)}")
    if tensor.ndim != 2 or tensor.shape[1] % BLOCK:
        raise Error(f"weights of shape {list(tensor.shape)} are no rows of blocks of {BLOCK}", where="packed")
    name, shape = FORMATS[kind], (tensor.shape[0], tensor.shape[1])
    out = _empty(name, shape)
    for start, stop in _cuts(shape):
        _fill(out, quantize(tensor[start:stop].detach().cpu(), name), start)
    return out


def from_blocks(data: Tensor, name: str) -> Packed:
    """A matrix from a GGUF's own blocks, [N, bytes of a row] uint8 in format `name`, not through floats.

    Raises:
        Error: a format that is not kept in blocks, or bytes that are no whole rows of it.
    """
    name = name.upper()
    if name not in _ORDERS:
        raise Error(f"no matrix is packed in the format {name}", where="packed", fix=f"known: {', '.join(_ORDERS)}")
    block = BLOCKS[name]
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] % block.bytes:
        what = f"{name} takes uint8 of [N, n·{block.bytes}], not {data.dtype} of {list(data.shape)}"
        raise Error(what, where="packed")
    shape = (data.shape[0], data.shape[1] // block.bytes * block.size)
    out = _empty(name, shape)
    for start, stop in _cuts(shape):
        _fill(out, data[start:stop], start)
    return out


def packed_linear(x: Tensor, *weights: Weight) -> Tensor:
    """Several linear maps of the same x side by side, at least one of them packed: x [..., K] -> [..., ΣN], x's dtype.

    Up to 16 vectors are multiplied with the integers, as 15-bit integers in blocks of 32; more with dequantized rows.

    Raises:
        Error: x needs a gradient, which stops at a quantized matrix.
    """
    if x.requires_grad and torch.is_grad_enabled():
        fix = "train the unquantized model, and quantize it then"
        raise Error("a quantized model cannot be trained", where="packed", fix=fix)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty(len(flat), sum(map(len, weights)), dtype=x.dtype, device=x.device)
    if len(flat) <= FEW and (native := kernels(x)) is not None and all(isinstance(w, Packed) for w in weights):
        parts: Any = weights
        data, kinds = [part.data for part in parts], [part.order.number for part in parts]
        native.packed_linear(flat, data, kinds, [len(part) for part in parts], out)
    else:
        column = 0
        for weight in weights:
            step = max(PANEL, TILE // x.shape[-1] // PANEL * PANEL)
            for start in range(0, len(weight), step):
                stop = min(start + step, len(weight))
                tile = (
                    weight.rows(start, stop, x.dtype) if isinstance(weight, Packed) else weight[start:stop].to(x.dtype)
                )
                out[:, column + start : column + stop] = F.linear(flat, tile)
            column += len(weight)
    return out.view(*x.shape[:-1], -1)


def _rows(weight: Weight, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    return weight.rows(start, stop, dtype) if isinstance(weight, Packed) else weight[start:stop].to(dtype)


def _cuts(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows [start, stop), whole panels of them, that are repacked at once."""
    step = max(PANEL, ROWS // shape[1] // PANEL * PANEL)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


def _views(data: Tensor, order: _Order, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    panels, blocks = -(-shape[0] // PANEL), shape[1] // BLOCK
    size = panels * blocks * order.integers
    integers = data[:size].view(panels, blocks, order.integers)
    return integers, data[-(-size // 64) * 64 :].view(panels, blocks // order.group, order.scales)


def _empty(name: str, shape: tuple[int, int]) -> Packed:
    order, panels, blocks = _ORDERS[name], -(-shape[0] // PANEL), shape[1] // BLOCK
    size = -(-panels * blocks * order.integers // 64) * 64 + panels * blocks // order.group * order.scales
    return Packed(empty(1, size, torch.uint8)[0], name, shape)


def _offset(order: _Order) -> int:
    return 8 if order.nibbles else 128


def _fill(packed: Packed, data: Tensor, start: int) -> None:
    """Rows `start` and following from their blocks, [rows, bytes of a row]."""
    missing = -len(data) % PANEL
    data = F.pad(data, (0, 0, 0, missing)) if missing else data
    first = start // PANEL
    integers, scales = (part[first : first + len(data) // PANEL] for part in packed._parts())
    blocks = data.reshape(len(data), -1, BLOCKS[packed.name].bytes)
    body = blocks[..., 2:]
    if packed.name == "Q8_0":
        q = body ^ 0x80
    else:
        low = body[..., -16:]
        q = torch.cat([low & 15, low >> 4], -1)
        if packed.name == "Q5_0":
            bits = (body[..., :4, None] >> torch.arange(8, dtype=torch.uint8)) & 1
            q += (bits.flatten(-2) << 4) + (128 - 16)
    integers.copy_(_to_order(q, packed.order))
    d = blocks[..., :2].contiguous().view(torch.float16)
    scales.view(torch.float16).copy_(d.view(len(data) // PANEL, PANEL, -1).transpose(1, 2))


def _to_order(q: Tensor, order: _Order) -> Tensor:
    """Integers [rows, blocks, 32] uint8 in the order of panels, [panels, blocks, bytes]."""
    panels, blocks = len(q) // PANEL, q.shape[1]
    if not order.nibbles:
        return q.view(panels, PANEL, blocks, 8, 4).permute(0, 2, 3, 1, 4).reshape(panels, blocks, -1)
    halves = q.view(panels, PANEL, blocks, 4, 2, 4)
    both = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return both.permute(0, 2, 3, 1, 4).reshape(panels, blocks, -1)


def _from_order(integers: Tensor, order: _Order) -> Tensor:
    """The way back: [panels, blocks, bytes] -> [rows, blocks·32]."""
    panels, blocks = integers.shape[:2]
    if not order.nibbles:
        return integers.view(panels, blocks, 8, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(panels * PANEL, -1)
    both = integers.view(panels, blocks, 4, PANEL, 4).permute(0, 3, 1, 2, 4)
    return torch.stack([both & 15, both >> 4], -2).reshape(panels * PANEL, -1)


def _rowwise(scales: Tensor) -> Tensor:
    """[panels, groups, 16] -> [rows, groups, 1]."""
    return scales.transpose(1, 2).reshape(-1, scales.shape[1], 1)
