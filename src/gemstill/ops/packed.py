"""A weight matrix in integers, in the order in which products read it.

What is in a block is what a GGUF's block has (ops/blocks.py), to the last bit; only the order differs. The order is
described in native/packed.h. Five- and six-bit integers are widened to bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.ops.blocks import BLOCKS, empty, quantize
from gemstill.ops.native import kernels
from gemstill.ops.panels import BLOCK, FORMATS, PANEL

FEW = 64  # vectors that are multiplied with the integers, tokens of a native step; more are with dequantized tiles
TILE = 1 << 20  # weights of such a tile
ROWS = 1 << 17  # weights that are repacked at once
MADE = {"int8": "Q8_0", "int4": "Q4_0"}  # the formats that `pack` makes


class Packed:
    """One matrix [N, K] of a quantized model: what stands where a parameter would, and is never trained.

    name: its block format, a key of ops.blocks.BLOCKS. data: [nbytes] uint8, all integers and scales.
    """

    def __init__(self, data: Tensor, name: str, shape: tuple[int, int]) -> None:
        self.data, self.name, self.shape = data, name, shape
        self.order = FORMATS[name].order

    @property
    def kind(self) -> str:
        """How the integers are kept, a name in panels.KINDS."""
        return self.order.kind

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def ndim(self) -> int:
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """What its rows come in unless another is asked for."""
        return torch.float32

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
        return self._unpacked(start, torch.empty(max(0, stop - start), self.shape[1], dtype=dtype))

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
                out[here] = self.order.weights(*self._rowwise(panel, panel + 1))[flat[here] % PANEL].to(dtype)
        return out.view(*ids.shape, self.shape[1])

    def linear(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x [..., K] times the transposed matrix -> [..., N], in x's dtype. Raises Error as `packed_linear` does."""
        return packed_linear(x, self, out=out)

    def unpack(self) -> tuple[Tensor, str]:
        """The blocks as a GGUF file has them, [N, bytes of a row] uint8, and their format: what was packed."""
        return torch.cat(list(self.parts())), self.name

    def parts(self) -> Iterator[Tensor]:
        """The same blocks, some rows at a time."""
        for start, stop in _cuts(self.shape):
            q, records = self._rowwise(start // PANEL, -(-stop // PANEL))
            yield FORMATS[self.name].join(q[: stop - start], records[: stop - start]).flatten(1)

    def _unpacked(self, start: int, out: Tensor) -> Tensor:
        """out [n, K] = the weights of n rows from `start` on."""
        if (native := kernels(out)) is not None:
            native.packed_rows(self.data, self.order.number, len(self), _NO_IDS, start, out)
            return out
        first, stop = start // PANEL, start + len(out)
        weights = self.order.weights(*self._rowwise(first, -(-stop // PANEL)))
        return out.copy_(weights[start - first * PANEL : stop - first * PANEL])

    def panels(self) -> tuple[Tensor, Tensor]:
        """Views of all panels: integers [panels, blocks, bytes] and scales [panels, groups, bytes]."""
        return self.order.views(self.data, *self.shape)

    def _rowwise(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The rows of panels [first, last), as integers and records; from N on they are zeros."""
        integers, scales = (part[first:last] for part in self.panels())
        return self.order.rowwise(integers, scales)


_NO_IDS = torch.empty(0, dtype=torch.int64)
Weight = Tensor | Packed


def pack(tensor: Tensor, kind: str) -> Packed:
    """A matrix [N, K] of any float dtype in blocks of 32 along K: "int8" has the numbers of Q8_0, "int4" of Q4_0.

    Raises:
        Error: another kind; no matrix; K is no multiple of 32; a weight that is not finite.
    """
    return pack_rows(tuple(tensor.shape), kind, lambda start, stop: tensor[start:stop].detach().cpu())


def pack_rows(shape: tuple[int, ...], kind: str, read: Callable[[int, int], Tensor]) -> Packed:
    """The same of a matrix that is never whole: read(start, stop) gives its rows, which are asked for in order."""
    if kind not in MADE:
        raise Error(f"no matrix is packed as '{kind}'", where="packed", fix=f"take one of {', '.join(MADE)}")
    if len(shape) != 2 or shape[1] % BLOCK:
        raise Error(f"weights of shape {list(shape)} are no rows of blocks of {BLOCK}", where="packed")
    name, (rows, columns) = MADE[kind], shape
    out = _empty(name, (rows, columns))
    for start, stop in _cuts((rows, columns)):
        _fill(out, quantize(read(start, stop), name), start)
    return out


def from_blocks(data: Tensor, name: str, done: Callable[[Tensor], object] | None = None) -> Packed:
    """A matrix from a GGUF's own blocks, [N, bytes of a row] uint8 in format `name`, not through floats.

    done: called with rows of `data` that are not needed any more.

    Raises:
        Error: a format that is not kept in blocks, or bytes that are no whole rows of it.
    """
    name = name.upper()
    if name not in FORMATS:
        raise Error(f"no matrix is packed in the format {name}", where="packed", fix=f"known: {', '.join(FORMATS)}")
    block = BLOCKS[name]
    if data.dtype != torch.uint8 or data.ndim != 2 or data.shape[1] % block.bytes:
        what = f"{name} takes uint8 of [N, n·{block.bytes}], not {data.dtype} of {list(data.shape)}"
        raise Error(what, where="packed")
    shape = (data.shape[0], data.shape[1] // block.bytes * block.size)
    out = _empty(name, shape)
    for start, stop in _cuts(shape):
        _fill(out, data[start:stop], start)
        if done is not None:
            done(data[start:stop])
    return out


def packed_linear(x: Tensor, *weights: Weight, out: Tensor | None = None) -> Tensor:
    """Several linear maps of the same x side by side, at least one of them packed: x [..., K] -> [..., ΣN], x's dtype.

    out: [M, ΣN] contiguous for x [M, K]: where the result is to be.
    Up to 64 vectors are multiplied with the integers, as 15-bit integers in blocks of 32; more with dequantized rows.

    Raises:
        Error: x needs a gradient, which stops at a quantized matrix.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise no_training()
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if out is None:
        out = torch.empty(len(flat), sum(map(len, weights)), dtype=x.dtype, device=x.device)
    if len(flat) <= FEW and (native := kernels(x)) is not None and all(isinstance(w, Packed) for w in weights):
        parts: Any = weights
        data, kinds = [part.data for part in parts], [part.order.number for part in parts]
        native.packed_linear(flat, data, kinds, [len(part) for part in parts], out)
    else:
        _by_tiles(flat, weights, out)
    return out.view(*x.shape[:-1], out.shape[1])


def _by_tiles(x: Tensor, weights: Sequence[Weight], out: Tensor) -> None:
    """As `packed_linear`, of dequantized rows that stay in a processor's cache."""
    step = max(PANEL, TILE // x.shape[1] // PANEL * PANEL)
    scratch = torch.empty(min(step, max(map(len, weights))), x.shape[1], dtype=x.dtype)
    columns = torch.split(out, [len(weight) for weight in weights], 1)
    for weight, to in zip(weights, columns, strict=True):
        for start in range(0, len(weight), step):
            tile = scratch[: min(step, len(weight) - start)]
            if isinstance(weight, Packed):
                weight._unpacked(start, tile)
            else:
                tile.copy_(weight[start : start + len(tile)])
            to[:, start : start + len(tile)] = F.linear(x, tile)


def no_training() -> Error:
    """The Error for a gradient that would have to pass a packed matrix."""
    fix = "train the unquantized model, and quantize it then"
    return Error("a quantized model cannot be trained", where="model", fix=fix)


def _cuts(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows [start, stop), whole panels of them, that are repacked at once."""
    step = max(PANEL, ROWS // shape[1] // PANEL * PANEL)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]


class _Slab:
    """Memory that small matrices share, side by side, as long as one of them is there.

    Only where some MiB are asked for at once does the system give pages of 2 MiB; from pages of 4 KiB a processor
    reads slower.
    """

    SIZE, LINE = 32 << 20, 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: Callable[[], np.ndarray[Any, Any] | None] = lambda: None
        self._used = 0

    def take(self, size: int) -> Tensor:
        """[size] uint8, size at most SIZE, at a multiple of LINE."""
        with self._lock:
            memory = self._known()
            if memory is None or self._used + size > len(memory):
                memory = np.empty(self.SIZE + self.LINE, np.uint8)
                self._known, self._used = weakref.ref(memory), -memory.ctypes.data % self.LINE
            part = memory[self._used : self._used + size]
            self._used += -(-size // self.LINE) * self.LINE
        return torch.from_numpy(part)


_slab = _Slab()


def _empty(name: str, shape: tuple[int, int]) -> Packed:
    size = FORMATS[name].order.nbytes(*shape)
    data = _slab.take(size) if size < _Slab.SIZE // 8 else empty(1, size, torch.uint8)[0]
    return Packed(data, name, shape)


def _fill(packed: Packed, data: Tensor, start: int) -> None:
    """Rows `start` and following from their blocks, [rows, bytes of a row]."""
    if missing := -len(data) % PANEL:
        data = F.pad(data, (0, 0, 0, missing))
    first, count = start // PANEL, len(data) // PANEL
    made = packed.order.arranged(*FORMATS[packed.name].split(torch.unflatten(data, 1, (-1, BLOCKS[packed.name].bytes))))
    for part, new in zip(packed.panels(), made, strict=True):
        part[first : first + count] = new
