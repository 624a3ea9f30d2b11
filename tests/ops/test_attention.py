"""Attention in tiles and bands against softmax written out over the whole mask."""

import pytest
import torch

from gemstill.ops import attention as room
from gemstill.ops.attention import attention, make_mask, visible


def attend(q, k, v, mask, softcap):
    """Our attention in the plain formula's layout: q and the result [B, H, T, D]."""
    out = attention(torch.unflatten(q, 1, (k.shape[1], -1)).transpose(2, 3), k, v, mask, softcap=softcap)
    return torch.unflatten(out, -1, (q.shape[1], -1)).transpose(1, 2)


def plain(q, k, v, seen, scale, softcap):
    """softmax(mask(cap(scale·q·kᵀ)))·v with repeated keys; rows that see nothing are 0."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = scale * q @ k.transpose(-1, -2)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    return torch.nan_to_num(scores.softmax(-1), 0.0) @ v


def tensors(batch, heads, groups, time, width, dtype=torch.float64, size=1.0):
    g = torch.Generator().manual_seed(time)
    shapes = (batch, heads, time, width), (batch, groups, time, width), (batch, groups, time, width)
    return [(torch.randn(shape, generator=g, dtype=torch.float64) * size).to(dtype) for shape in shapes]


def layout(batch, time, kind):
    """Positions and documents [B, T]: one document, several, or padded on the left."""
    documents = torch.zeros(batch, time, dtype=torch.int64)
    starts = torch.zeros_like(documents)
    if kind == "packed":
        for edge in (1, time // 3, time // 3 + 1, 3 * time // 4):
            documents[:, edge:] += 1
            starts[:, edge:] = edge
    if kind == "padded":
        for row in range(batch):
            documents[row, : (row * time) // (batch + 1)] = -1
            starts[row] = (row * time) // (batch + 1)
    positions = (torch.arange(time) - starts).clamp(min=0)
    return positions, documents


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize("softcap", [None, 5.0, 50.0])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 100])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_against_the_plain_formula(window, groups, softcap, kind):
    check(tensors(2, 4, groups, 11, 6), layout(2, 11, kind), window, softcap)


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("time", [3, 4, 7, 8, 17, 32, 33, 50])
@pytest.mark.parametrize("window", [None, 1, 3, 4, 5, 9, 40])
def test_tiles_and_bands(window, time, softcap, kind, monkeypatch):
    """Tiles of 4 queries, so that short texts have many: what is left out is what nobody sees."""
    monkeypatch.setattr(room, "TILE", 4)
    check(tensors(2, 2, 1, time, 4), layout(2, time, kind), window, softcap)


def test_tiles_and_bands_are_really_used(monkeypatch):
    monkeypatch.setattr(room, "TILE", 4)
    positions, documents = layout(1, 40, "whole")
    same = (positions, positions, documents, documents)
    assert make_mask(*same, 3, ordered=True).band == 4
    assert len(make_mask(*same, None, ordered=True).tiles) > 1
    assert len(make_mask(*same, 3).tiles) == 1
    tiles = make_mask(*same, 12, ordered=True).tiles
    assert sum((stop - start) * (last - first) for start, stop, first, last in tiles) < 40 * 40


def check(qkv, where, window, softcap):
    """Values and gradients in float64."""
    positions, documents = where
    same = (positions, positions, documents, documents)
    seen = visible(*same, window)
    mask = make_mask(*same, window, ordered=True)
    ours, theirs = ([x.clone().requires_grad_() for x in qkv] for _ in range(2))
    out = attend(0.7 * ours[0], *ours[1:], mask, softcap=softcap)
    expected = plain(*theirs, seen, 0.7, softcap)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-10)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * upstream).sum().backward()
    (expected * upstream).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, torch.nan_to_num(b.grad, 0.0), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    positions, documents = layout(1, 5, "packed")
    mask = make_mask(positions, positions, documents, documents, 3)
    leaves = [x.requires_grad_() for x in tensors(1, 4, 2, 5, 3)]
    assert torch.autograd.gradcheck(lambda q, k, v: attend(0.5 * q, k, v, mask, softcap=softcap), leaves)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("softcap", [None, 0.5, 50.0, 70.0, 100.0, 1000.0])
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0, 1e4])
def test_float32_whatever_the_cap_and_the_scores(size, softcap, sign):
    """Rows whose scores all lie at the lower end of the cap are softmaxes too: nothing may underflow."""
    q, k, v = tensors(1, 2, 1, 9, 4)
    q = q.abs() * sign * size
    k = k.abs()
    positions, documents = layout(1, 9, "whole")
    same = (positions, positions, documents, documents)
    seen = visible(*same, None)
    exact = plain(q.float().double(), k.float().double(), v.float().double(), seen, 1.0, softcap)
    out = attend(q.float(), k.float(), v.float(), make_mask(*same, None), softcap=softcap)
    formula = plain(q.float(), k.float(), v.float(), seen, 1.0, softcap)
    error, bar = ((x.double() - exact).abs().max() for x in (out, formula))
    largest = min(softcap or 1e9, (q @ k.transpose(-1, -2)).abs().max().item())
    slack = 1e-6 if softcap is None else 1e-6 + 3e-7 * largest  # a few roundings of the largest score
    assert error <= 2 * bar + slack, f"{error:.1e} against {bar:.1e}"


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_bfloat16_is_no_further_from_float64_than_the_plain_formula(softcap):
    q, k, v = tensors(2, 4, 2, 64, 16, dtype=torch.bfloat16, size=2.0)
    positions, documents = layout(2, 64, "packed")
    same = (positions, positions, documents, documents)
    exact = plain(q.double(), k.double(), v.double(), visible(*same, 20), 0.25, softcap)
    formula = plain(q, k, v, visible(*same, 20), 0.25, softcap)
    out = attend(q * 0.25, k, v, make_mask(*same, 20), softcap=softcap)
    assert out.dtype == torch.bfloat16
    error, bar = ((x.double() - exact).square().mean().sqrt() for x in (out, formula))
    assert error <= 1.5 * bar


def test_a_query_that_sees_nothing_gets_zeros():
    q, k, v = tensors(1, 2, 2, 4, 4, dtype=torch.float32)
    positions, documents = torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -1)
    for softcap in (None, 50.0):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        mask = make_mask(positions, positions, documents, documents, None)
        out = attend(*leaves, mask, softcap=softcap)
        out.sum().backward()
        assert out.abs().max() == 0
        assert all(x.grad.isfinite().all() for x in leaves)
