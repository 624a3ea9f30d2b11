"""Rounding weights to blocks of Q4_0 with care: scales that lose least, errors made up for by what comes after.

A block is 32 weights of a row as d·q, d a float16 number of either sign and q an integer from -8 to 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemstill.core.errors import Error

SIZE, LOW, HIGH = 32, -8, 7
FACTORS = torch.linspace(0.72, 1.12, 11).tolist()  # of the scale that just reaches a block's largest weight
ROWS = 1 << 12  # blocks whose scales are searched at once: they stay in the cache
TALL = 1 << 14  # rows of a matrix that errors are moved in at once


class Rounded(NamedTuple):
    """A matrix [N, K] in blocks. codes: [N, K] int8, -8 to 7. scales: [N, K / 32] float32, each a float16 number."""

    codes: Tensor
    scales: Tensor

    def weights(self) -> Tensor:
        """[N, K] float32."""
        blocks = self.codes.view(*self.scales.shape, SIZE)
        return (blocks * self.scales[..., None]).view(self.codes.shape)

    def data(self) -> Tensor:
        """The bytes of Q4_0, [N, K / 32 · 18] uint8 (gemstill.ops.blocks)."""
        codes = (self.codes + 8).to(torch.uint8).view(*self.scales.shape, SIZE)
        out = torch.empty(*self.scales.shape, 18, dtype=torch.uint8)
        out[..., :2] = self.scales.half()[..., None].view(torch.uint8)
        torch.bitwise_or(codes[..., :16], codes[..., 16:] << 4, out=out[..., 2:])
        return out.view(len(self.codes), -1)


def search_scales(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """The scales [N, K / 32] float32, float16 numbers, with which rounding to the nearest loses least.

    Least is Σ importance·(w - d·q)² of a block, over scales that reach about as far as its largest weight, in both
    directions since q reaches further down than up; the best one's codes then choose d once more, by least squares.
    weight: [N, K] float32, K a multiple of 32. importance: [K], of the inputs; None weighs all alike.
    """
    if weight.shape[-1] % SIZE:
        raise Error(f"a row of {weight.shape[-1]} weights is not a multiple of {SIZE}", where="rounding")
    blocks = weight.reshape(-1, SIZE)
    each = None if importance is None else importance.reshape(1, -1, SIZE).expand(len(weight), -1, -1)
    each = None if each is None else each.reshape(-1, SIZE)
    out = torch.empty(len(blocks))
    for start in range(0, len(blocks), ROWS):
        rows = slice(start, start + ROWS)
        out[rows] = _search(blocks[rows], None if each is None else each[rows])
    return out.view(len(weight), -1)


def _search(x: Tensor, importance: Tensor | None) -> Tensor:
    """The scales [n] of blocks [n, 32]."""
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    weighted = x if importance is None else x * importance
    best, scale = x.new_full((len(x),), -1.0), x.new_zeros(len(x))
    for reach in (LOW, HIGH):
        for factor in FACTORS:
            d = largest * (factor / reach)
            q = (x / d).nan_to_num_(0).round_().clamp_(LOW, HIGH)
            # With the best scale for these codes the error falls by (Σ w·q·x)² / Σ w·q².
            along = (weighted * q).sum(1)
            size = (q.square() if importance is None else q.square() * importance).sum(1)
            gain = along.square() / size.clamp(min=1e-30)
            better = gain > best
            best = torch.where(better, gain, best)
            scale = torch.where(better, along / size.clamp(min=1e-30), scale)
    return scale.half().float()


def nearest(weight: Tensor, scales: Tensor) -> Rounded:
    """A matrix [N, K] rounded to the nearest with these scales [N, K / 32]."""
    blocks = weight.view(*scales.shape, SIZE)
    codes = (blocks / scales[..., None]).nan_to_num_(0).round_().clamp_(LOW, HIGH)
    return Rounded(codes.to(torch.int8).view(weight.shape), scales)


def gptq(weight: Tensor, hessian: Tensor, damping: float = 0.01) -> Rounded:
    """A matrix [N, K] rounded column by column, each column's error made up for by those to come (arXiv 2210.17323).

    What is made small is the error of the product with the inputs seen, tr(E·H·Eᵀ) with E the weights' error. A
    block's scales are searched when its turn comes, on what its weights have become. hessian: [K, K] float32,
    Σ x·xᵀ of the inputs x. damping: of the mean of its diagonal, added to it.

    Raises:
        Error: K is no multiple of 32.
    """
    columns = weight.shape[-1]
    if columns % SIZE:
        raise Error(f"a row of {columns} weights is not a multiple of {SIZE}", where="rounding")
    wide = hessian.double()
    wide = wide + torch.eye(columns, dtype=torch.float64) * (damping * wide.diagonal().mean() + 1e-12)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(wide))
    # Row i of the upper factor says how column i's error is best spread over those after it.
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    parts = [_gptq(part, upper) for part in torch.split(weight, TALL)]
    return Rounded(torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts]))


def _gptq(weight: Tensor, upper: Tensor) -> Rounded:
    left = weight.t().clone(memory_format=torch.contiguous_format)  # [K, N]: a column is a row
    codes = torch.empty(left.shape, dtype=torch.int8)
    scales = torch.empty(len(left) // SIZE, left.shape[1])
    importance = upper.diagonal().square().reciprocal()
    for start in range(0, len(left), SIZE):
        block, stop = left[start : start + SIZE], start + SIZE
        d = search_scales(block.t().contiguous(), importance[start:stop])[:, 0]
        errors = torch.empty_like(block)
        for i in range(SIZE):
            factors = upper[start + i, start:stop]
            q = (block[i] / d).nan_to_num_(0).round_().clamp_(LOW, HIGH)
            codes[start + i] = q.to(torch.int8)
            errors[i] = (block[i] - q * d) / factors[i]
            if i + 1 < SIZE:
                block[i + 1 :].addr_(factors[i + 1 :], errors[i], alpha=-1)
        scales[start // SIZE] = d
        if stop < len(left):
            left[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return Rounded(codes.t().contiguous(), scales.t().contiguous())


def unpack(data: Tensor) -> Rounded:
    """The inverse of `Rounded.data`: bytes of Q4_0 [N, K / 32 · 18] uint8."""
    blocks = data.reshape(len(data), -1, 18)
    nibbles = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0].float()
    return Rounded(nibbles.to(torch.int8).sub_(8).view(len(data), -1), scales)
