"""Weights in blocks, as GGUF files hold them: a few bytes of scale and small integers for 32 or 256 weights.

The layouts are those of ggml's `ggml-common.h`. Values are equal bit by bit to the reference in the
package `gguf` (gguf.quants), in both directions, for finite weights and scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemstill.core.errors import Error

Unpack = Callable[[Tensor, Tensor], None]  # blocks [n, bytes] uint8 -> weights [n, size] float32, written in place
FEW = 3  # threads that do not help
SLICE = 1 << 19  # weights unpacked at once: what they pass through stays in the cache


class Block(NamedTuple):
    """One format: `size` weights in `bytes` bytes; `type` is ggml's number of it."""

    name: str
    type: int
    size: int
    bytes: int


def _each(byte: int) -> np.uint64:
    """The word whose eight bytes are all `byte`."""
    return np.uint64(byte * 0x0101010101010101)


_DIAGONAL = np.uint64(0x8040201008040201)  # bit k of byte k
# Between the bytes and the floats numpy does the work: of short operations torch's are several times as dear.
Words = npt.NDArray[np.uint64]


def _float(blocks: Tensor, at: int) -> Tensor:
    """The half-precision number at byte `at` of each block, [n, 1] float32."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _items(blocks: Tensor, at: int, size: int) -> npt.NDArray[Any]:
    """Bytes at … at + size - 1 of each block, one block after the other, copied as items of that size."""
    n, width = blocks.shape
    return np.ndarray((n,), f"V{size}", blocks.numpy(), at, (width,)).copy()


def _words(blocks: Tensor, at: int, size: int) -> Words:
    """The same as words: eight bytes an operation."""
    return _items(blocks, at, size).view(np.uint64)


def _interleave(columns: Sequence[Words], size: int) -> Words:
    """`size` bytes from each of several columns in turn, as one column."""
    items = np.empty((columns[0].nbytes // size, len(columns)), f"V{size}")
    for number, column in enumerate(columns):
        items[:, number] = column.view(items.dtype)
    return items.view(np.uint64).reshape(-1)


def _moved(words: Words, right: int, kept: int) -> Words:
    """The words shifted to the right by so many bits (below 0: to the left); of each byte the bits `kept`."""
    moved = words >> np.uint64(right) if right > 0 else words << np.uint64(-right)
    moved &= _each(kept)
    return moved


def _nibbles(words: Words, size: int) -> Words:
    """The low halves of `size` bytes, then their high halves, and so on, as bytes."""
    return _interleave([words & _each(0x0F), _moved(words, 4, 0x0F)], size)


def _put(words: Words, out: Tensor, offset: int) -> None:
    """Bytes, less `offset`, as floats."""
    numbers = torch.from_numpy(words.view(np.int8))
    out.view(-1).copy_(numbers.sub_(offset) if offset else numbers)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    """float16 d; 32 int8 q: d·q."""
    out.copy_(blocks[:, 2:].view(torch.int8)).mul_(_float(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    """float16 d; 32 nibbles q, the low ones first: d·(q - 8)."""
    _put(_nibbles(_words(blocks, 2, 16), 16), out, 8)
    out.mul_(_float(blocks, 0))


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    """float16 d; the fifth bits of 32 q; their nibbles, the low ones first: d·(q - 16)."""
    fifth = _items(blocks, 2, 4).view(np.uint8) * _each(1)
    # Byte k of a word now holds the same eight bits; of these it keeps number k, moved to where a fifth bit belongs.
    fifth &= _DIAGONAL
    fifth += _each(0x7F)
    fifth >>= np.uint64(3)
    fifth &= _each(0x10)
    _put(_nibbles(_words(blocks, 6, 16), 16) | fifth, out, 16)
    out.mul_(_float(blocks, 0))


def _affine(blocks: Tensor, out: Tensor) -> None:
    """Times scale, less minimum, for each of the eight parts of a Q4_K or Q5_K block: 6 bits each in 12 bytes."""
    # Four parts in a word of 32 bits.
    _, low, high, both = np.ascontiguousarray(_items(blocks, 0, 16).view(np.uint32).reshape(-1, 4).T)
    six, four, two = (np.uint32(byte * 0x01010101) for byte in (0x3F, 0x0F, 0x30))
    scale = np.stack([low & six, (both & four) | ((low >> 2) & two)], 1).view(np.uint8)
    least = np.stack([high & six, ((both >> 4) & four) | ((high >> 2) & two)], 1).view(np.uint8)
    scales, minima = torch.from_numpy(scale) * _float(blocks, 0), torch.from_numpy(least) * _float(blocks, 2)
    out.view(-1, 8, 32).mul_(scales[..., None]).sub_(minima[..., None])


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    """float16 d, m; 6-bit s, t for 32 weights each; nibbles q, those of 64 weights in 32 bytes: d·s·q - m·t."""
    _put(_nibbles(_words(blocks, 16, 128), 32), out, 0)
    _affine(blocks, out)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    """As Q4_K, with the fifth bit of weight i of part p being bit p of byte i of 32 bytes before the nibbles."""
    bits = _words(blocks, 16, 32)
    fifth = _interleave([_moved(bits, part - 4, 0x10) for part in range(8)], 32)
    fifth |= _nibbles(_words(blocks, 48, 128), 32)
    _put(fifth, out, 0)
    _affine(blocks, out)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    """Nibbles and pairs of upper bits of 256 q; 16 int8 s; float16 d: d·s·(q - 32), s for 16 weights each."""
    pairs = _words(blocks, 128, 64)
    upper = _interleave([_moved(pairs, part - 4, 0x30) for part in range(0, 8, 2)], 32)
    upper |= _nibbles(_words(blocks, 0, 128), 64)
    _put(upper, out, 32)
    scale = blocks[:, 192:208].view(torch.int8) * _float(blocks, 208)
    out.view(-1, 16, 16).mul_(scale[..., None])


_FORMATS: dict[Block, Unpack] = {
    Block("Q4_0", 2, 32, 18): _q4_0,
    Block("Q5_0", 6, 32, 22): _q5_0,
    Block("Q8_0", 8, 32, 34): _q8_0,
    Block("Q4_K", 12, 256, 144): _q4_k,
    Block("Q5_K", 13, 256, 176): _q5_k,
    Block("Q6_K", 14, 256, 210): _q6_k,
}
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS: dict[str, Block] = {
    block.name: block for block in (Block("F32", 0, 1, 4), Block("F16", 1, 1, 2), Block("BF16", 30, 1, 2), *_FORMATS)
}  # by name


def dequantize(data: Tensor, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [..., w] in `dtype` of bytes [..., b] uint8, on the CPU, in format `name`; b is whole blocks.

    Formats without blocks that are `dtype` already come back as a view of `data`. Sums and products are
    float32, rounded once to `dtype`.

    Raises:
        Error: an unknown format, or a last dimension that is not a whole number of blocks.
    """
    block = _known(name)
    if data.dtype != torch.uint8 or data.ndim == 0 or data.shape[-1] % block.bytes:
        what = f"{block.name} takes uint8 of [..., n·{block.bytes}], not {data.dtype} of {list(data.shape)}"
        raise Error(what, where="blocks")
    shape = (*data.shape[:-1], data.shape[-1] // block.bytes * block.size)
    if block.name in _PLAIN:
        return _aligned(data).view(_PLAIN[block.name]).to(dtype)
    blocks = _aligned(data).view(-1, block.bytes)
    out = empty(len(blocks), block.size, dtype)
    unpack, step = _FORMATS[block], SLICE // block.size
    scratch = None if dtype == torch.float32 else torch.empty(min(step, len(blocks)), block.size)
    with _no_helpers():
        for start in range(0, len(blocks), step):
            part = out[start : start + step]
            if scratch is None:
                unpack(blocks[start : start + step], part)
            else:
                unpack(blocks[start : start + step], scratch[: len(part)])
                part.copy_(scratch[: len(part)])
    return out.view(shape)


@contextmanager
def _no_helpers() -> Iterator[None]:
    """Have torch work in this thread alone where it has few others: operations are so short that these are waited for.

    Two threads on two cores take twice as long as one, and far more where another program runs.
    """
    threads = torch.get_num_threads()
    if not 1 < threads <= FEW:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory the system may give in pages of 2 MiB, as numpy asks it to and torch does not.

    Most of the time that a matrix takes is otherwise spent on the first touch of each page of 4 KiB.
    """
    size, line = rows * columns * dtype.itemsize, 64
    memory = torch.from_numpy(np.empty(size + line, np.uint8))
    return memory[-memory.data_ptr() % line :][:size].view(dtype).view(rows, columns)


def _aligned(data: Tensor) -> Tensor:
    """`data` contiguous and at an address that words can be read from."""
    return data.contiguous() if data.data_ptr() % 8 == 0 else data.clone(memory_format=torch.contiguous_format)


def quantize(tensor: Tensor, name: str) -> Tensor:
    """Weights [..., w] of any float dtype as bytes [..., b] uint8: F32, F16, BF16, Q8_0 or Q4_0, in either case.

    Raises:
        Error: another format; w is not a whole number of blocks; a weight that is not finite, or is in `name`.
    """
    block = _known(name)
    if block.name in _PLAIN:
        plain = tensor.contiguous().to(_PLAIN[block.name])
        if not bool(plain.isfinite().all()):
            raise Error(f"weights are not finite, or are too large for {block.name}", where="blocks")
        return plain.view(torch.uint8) if plain.ndim else plain.view(1).view(torch.uint8)
    if block.name not in ("Q8_0", "Q4_0"):
        raise Error(f"{block.name} can be read, not written", where="blocks", fix="write Q8_0 or Q4_0")
    if tensor.ndim == 0 or tensor.shape[-1] % block.size:
        width = tensor.shape[-1] if tensor.ndim else 1
        raise Error(f"a row of {width} weights is not a multiple of {block.name}'s {block.size}", where="blocks")
    rows = tensor.contiguous().float().view(-1, block.size)
    out = torch.empty(len(rows), block.bytes, dtype=torch.uint8)
    pack, step = (_to_q8_0 if block.name == "Q8_0" else _to_q4_0), SLICE // block.size
    for start in range(0, len(rows), step):
        pack(rows[start : start + step], out[start : start + step])
    return out.view(*tensor.shape[:-1], tensor.shape[-1] // block.size * block.bytes)


def _known(name: str) -> Block:
    block = BLOCKS.get(name.upper())
    if block is None:
        raise Error(f"no block format is named '{name}'", where="blocks", fix=f"known: {', '.join(BLOCKS)}")
    return block


def _put_scale(scale: Tensor, out: Tensor) -> Tensor:
    """Store the scales [n, 1] in float16; returns their inverses in float32, 0 for 0."""
    half = scale.half()
    if not bool(half.isfinite().all()):
        raise Error("weights are not finite, or are too large for a float16 scale", where="blocks")
    out[:, :2] = half.view(torch.uint8)
    return torch.where(scale == 0, 0.0, 1 / scale)


def _to_q8_0(rows: Tensor, out: Tensor) -> None:
    size = rows.abs()
    inverse = _put_scale(size.amax(1, keepdim=True) / 127, out)
    size *= inverse
    whole = size.floor()
    whole += (2 * (size - whole)).floor()  # half a step rounds away from 0
    out[:, 2:] = torch.copysign(whole, rows).to(torch.int8).view(torch.uint8)


def _to_q4_0(rows: Tensor, out: Tensor) -> None:
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))  # with its sign: it becomes -8 exactly
    inverse = _put_scale(largest / -8, out)
    q = (rows * inverse + 8.5).trunc().to(torch.uint8).clamp_(max=15)
    torch.bitwise_or(q[:, :16], q[:, 16:] << 4, out=out[:, 2:])
