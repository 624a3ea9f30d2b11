"""From a GGUF's blocks to panels of 16 rows and back, bit by bit: the order in which native/packed.h reads weights.

R rows, n blocks of a format in a row, B = n or 8·n blocks of 32 weights. A row's integers are q [R, B, 32] uint8, and
its scales a record for each group of blocks, [R, G, bytes] uint8: half-precision numbers, then single bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

PANEL, BLOCK = 16, 32  # rows, weights of a row
KINDS = ("float32", "bfloat16", "int8", "int4", "q4_k", "q5_k", "q6_k")  # as the native kernels number them
_BITS = torch.arange(8, dtype=torch.uint8)


class Order(NamedTuple):
    """How a kind of matrix is kept: blocks that share a record, whether two integers share a byte, the record."""

    kind: str
    group: int
    nibbles: bool
    halves: int
    singles: int
    offset: int  # of the integers

    @property
    def number(self) -> int:
        """As the native kernels have it."""
        return KINDS.index(self.kind)

    @property
    def integers(self) -> int:
        """Bytes of a panel and a block."""
        return PANEL * BLOCK // (2 if self.nibbles else 1)

    @property
    def scales(self) -> int:
        """Bytes of a panel and a group."""
        return PANEL * (2 * self.halves + self.singles)

    def sizes(self, rows: int, columns: int) -> tuple[int, int, int]:
        """Panels, blocks of a row, and where in the bytes of a whole matrix the scales begin."""
        panels, blocks = -(-rows // PANEL), columns // BLOCK
        return panels, blocks, -(-panels * blocks * self.integers // 64) * 64

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a whole matrix."""
        panels, blocks, start = self.sizes(rows, columns)
        return start + panels * (blocks // self.group) * self.scales

    def views(self, data: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """The integers [panels, blocks, bytes] and the scales [panels, groups, bytes] in the bytes of a matrix."""
        panels, blocks, start = self.sizes(rows, columns)
        integers = data[: panels * blocks * self.integers].view(panels, blocks, self.integers)
        return integers, data[start:].view(panels, blocks // self.group, self.scales)

    def arranged(self, q: Tensor, records: Tensor) -> tuple[Tensor, Tensor]:
        """What `views` gives of whole panels, from their rows' integers and records."""
        panels, blocks, groups = len(q) // PANEL, q.shape[1], records.shape[1]
        if self.nibbles:
            pairs = q.view(panels, PANEL, blocks, 4, 2, 4)
            lots = pairs[..., 0, :] | (pairs[..., 1, :] << 4)
        else:
            lots = q.view(panels, PANEL, blocks, 8, 4)
        items = records.view(panels, PANEL, groups, -1)
        halves = torch.unflatten(items[..., : 2 * self.halves], -1, (self.halves, 2)).permute(0, 2, 3, 1, 4)
        singles = items[..., 2 * self.halves :].permute(0, 2, 3, 1)
        scales = torch.cat([halves.flatten(2), singles.flatten(2)], -1)
        return lots.permute(0, 2, 3, 1, 4).reshape(panels, blocks, -1), scales

    def rowwise(self, integers: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The way back: integers [R, B, 32] and records of panels."""
        panels, blocks, groups = *integers.shape[:2], scales.shape[1]
        lots = integers.view(panels, blocks, -1, PANEL, 4).permute(0, 3, 1, 2, 4)
        q = torch.stack([lots & 15, lots >> 4], -2) if self.nibbles else lots
        halves = scales[..., : 32 * self.halves].view(panels, groups, self.halves, PANEL, 2).permute(0, 3, 1, 2, 4)
        singles = scales[..., 32 * self.halves :].view(panels, groups, self.singles, PANEL).permute(0, 3, 1, 2)
        records = torch.cat([halves.flatten(3), singles], -1)
        return q.reshape(panels * PANEL, blocks, BLOCK), records.reshape(panels * PANEL, groups, -1)

    def weights(self, q: Tensor, records: Tensor) -> Tensor:
        """Weights [R, B·32] float32 of integers and records."""
        wide = q.float() - self.offset
        d = _numbers(records, 0)
        if self.group == 1:
            return (wide * d).flatten(1)
        singles = records[..., 2 * self.halves :]
        if self.halves == 1:
            scales = singles.contiguous().view(torch.int8).float() * d
            return (wide.view(len(q), -1, 16) * scales.view(len(q), -1, 1)).flatten(1)
        scales, least = singles[..., 0::2].float() * d, singles[..., 1::2].float() * _numbers(records, 1)
        return (wide * scales.reshape(len(q), -1, 1) - least.reshape(len(q), -1, 1)).flatten(1)


def _numbers(records: Tensor, number: int) -> Tensor:
    """A half-precision number of each record, [R, G, 1] float32."""
    return records[..., 2 * number : 2 * number + 2].contiguous().view(torch.float16).float()


class Format(NamedTuple):
    """A format of ops.blocks.BLOCKS as it is kept: `split` its blocks [R, n, bytes], and `join` them again."""

    order: Order
    split: Callable[[Tensor], tuple[Tensor, Tensor]]
    join: Callable[[Tensor, Tensor], Tensor]


def _pairs(q: Tensor, size: int) -> Tensor:
    """Integers of 4 bits: the first `size` and the next in the halves of as many bytes, and so on."""
    low, high = torch.unflatten(q, -1, (-1, 2, size)).unbind(-2)
    return (low | (high << 4)).flatten(-2)


def _apart(data: Tensor, size: int) -> Tensor:
    """The way back."""
    some = torch.unflatten(data, -1, (-1, size))
    return torch.stack([some & 15, some >> 4], -2).flatten(-3)


def _split_q8_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return blocks[..., 2:] ^ 0x80, blocks[..., :2]


def _join_q8_0(q: Tensor, records: Tensor) -> Tensor:
    return torch.cat([records, q ^ 0x80], -1)


def _split_q4_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _apart(blocks[..., 2:], 16), blocks[..., :2]


def _join_q4_0(q: Tensor, records: Tensor) -> Tensor:
    return torch.cat([records, _pairs(q, 16)], -1)


def _split_q5_0(blocks: Tensor) -> tuple[Tensor, Tensor]:
    fifth = ((blocks[..., 2:6, None] >> _BITS) & 1).flatten(-2)
    return (_apart(blocks[..., 6:], 16) | (fifth << 4)) + (128 - 16), blocks[..., :2]


def _join_q5_0(q: Tensor, records: Tensor) -> Tensor:
    q = q - (128 - 16)
    fifth = (torch.unflatten((q >> 4), -1, (4, 8)) << _BITS).sum(-1, dtype=torch.uint8)
    return torch.cat([records, fifth, _pairs(q & 15, 16)], -1)


def _six_bits(blocks: Tensor) -> Tensor:
    """The record of a Q4_K or Q5_K block: d, m, and a scale and a minimum of each part, of 6 bits in 12 bytes."""
    low, high, both = torch.unflatten(blocks[..., 4:16], -1, (3, 4)).unbind(-2)
    scales = torch.cat([low & 63, (both & 15) | ((low >> 2) & 48)], -1)
    minima = torch.cat([high & 63, (both >> 4) | ((high >> 2) & 48)], -1)
    return torch.cat([blocks[..., :4], torch.stack([scales, minima], -1).flatten(-2)], -1)


def _twelve_bytes(records: Tensor) -> Tensor:
    """The way back, to 16 bytes."""
    scales, minima = records[..., 4::2], records[..., 5::2]
    low = scales[..., :4] | ((scales[..., 4:] & 48) << 2)
    high = minima[..., :4] | ((minima[..., 4:] & 48) << 2)
    both = (scales[..., 4:] & 15) | ((minima[..., 4:] & 15) << 4)
    return torch.cat([records[..., :4], low, high, both], -1)


def _split_q4_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    return _apart(blocks[..., 16:], 32).view(len(blocks), -1, BLOCK), _six_bits(blocks)


def _join_q4_k(q: Tensor, records: Tensor) -> Tensor:
    return torch.cat([_twelve_bytes(records), _pairs(q.view(*records.shape[:2], -1), 32)], -1)


def _split_q5_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    fifth = ((blocks[..., None, 16:48] >> _BITS[:, None]) & 1).flatten(-2)
    return (_apart(blocks[..., 48:], 32) | (fifth << 4)).view(len(blocks), -1, BLOCK), _six_bits(blocks)


def _join_q5_k(q: Tensor, records: Tensor) -> Tensor:
    q = q.view(*records.shape[:2], -1)
    fifth = (torch.unflatten((q >> 4), -1, (8, 32)) << _BITS[:, None]).sum(-2, dtype=torch.uint8)
    return torch.cat([_twelve_bytes(records), fifth, _pairs(q & 15, 32)], -1)


_TWICE = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]


def _split_q6_k(blocks: Tensor) -> tuple[Tensor, Tensor]:
    upper = ((torch.unflatten(blocks[..., 128:192], -1, (2, 1, 32)) >> _TWICE) & 3).flatten(-3)
    q = _apart(blocks[..., :128], 64) | (upper << 4)
    return q.view(len(blocks), -1, BLOCK), torch.cat([blocks[..., 208:], blocks[..., 192:208]], -1)


def _join_q6_k(q: Tensor, records: Tensor) -> Tensor:
    q = q.view(*records.shape[:2], -1)
    upper = (torch.unflatten((q >> 4), -1, (2, 4, 32)) << _TWICE).sum(-2, dtype=torch.uint8).flatten(-2)
    return torch.cat([_pairs(q & 15, 64), upper, records[..., 2:], records[..., :2]], -1)


_BYTES, _NIBBLES = Order("int8", 1, False, 1, 0, 128), Order("int4", 1, True, 1, 0, 8)
FORMATS = {
    "Q8_0": Format(_BYTES, _split_q8_0, _join_q8_0),
    "Q5_0": Format(_BYTES, _split_q5_0, _join_q5_0),
    "Q4_0": Format(_NIBBLES, _split_q4_0, _join_q4_0),
    "Q4_K": Format(Order("q4_k", 8, True, 2, 16, 0), _split_q4_k, _join_q4_k),
    "Q5_K": Format(Order("q5_k", 8, False, 2, 16, 0), _split_q5_k, _join_q5_k),
    "Q6_K": Format(Order("q6_k", 8, False, 1, 16, 32), _split_q6_k, _join_q6_k),
}
