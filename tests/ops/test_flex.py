"""FlexAttention, uncompiled on the CPU, against the attention in tiles: the same rule, numbers and gradients."""

import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as torch_flex

from gemstill.core.notices import Notice
from gemstill.ops import flex as room
from gemstill.ops.attention import attention, make_mask
from gemstill.ops.visible import visible
from tests.ops.test_attention import layout

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")


@pytest.fixture(autouse=True)
def _plainly(monkeypatch):
    """The formula written out, with a gradient: PyTorch refuses one on the CPU, where its kernel has none."""
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def tensors(batch, groups, queries, rows, width, keys, dtype=torch.float64):
    g = torch.Generator().manual_seed(queries)
    shapes = (batch, groups, queries, rows, width), (batch, groups, keys, width), (batch, groups, keys, width)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def both(qkv, where, window, softcap, **how):
    """The results of FlexAttention and of tiles, and the leaves that they come from."""
    leaves = [[x.clone().requires_grad_() for x in qkv] for _ in range(2)]
    masks = make_mask(*where, window, blocks=True), make_mask(*where, window, **how)
    return [attention(*x, mask, softcap=softcap) for x, mask in zip(leaves, masks, strict=True)], leaves


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
@pytest.mark.parametrize(
    ("window", "softcap", "groups", "rows"),
    [(None, 5.0, 2, 2), (None, None, 1, 1), (1, 50.0, 1, 3), (5, None, 2, 1), (6, 5.0, 1, 4), (1000, 5.0, 2, 2)],
)
def test_numbers_and_gradients_are_those_of_tiles(window, softcap, groups, rows, kind, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", 16)  # several blocks, the last one padded
    positions, documents = layout(2, 39, kind)
    same = positions, positions, documents, documents
    (ours, theirs), leaves = both(tensors(2, groups, 39, rows, 16, 39), same, window, softcap, ordered=True)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
    for out in (ours, theirs):
        (out * upstream).sum().backward()
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **CLOSE)


@pytest.mark.parametrize("window", [None, 1, 7, 8])
def test_keys_of_a_cache_in_any_order(window, monkeypatch):
    """New queries against a ring's keys, some of which are nothing, and whose positions go round."""
    monkeypatch.setattr(room, "BLOCK", 16)
    keys = (torch.arange(40) * 7 % 40)[None] - 5
    queries = torch.arange(20, 35)[None]
    where = queries, keys, queries.clamp(max=0), keys.clamp(max=0)
    (ours, theirs), _ = both(tensors(1, 2, 15, 2, 16, 40), where, window, 5.0)
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("window", [None, 20])
def test_blocks_hold_all_that_is_seen_and_leave_out_the_rest(window):
    positions, documents = layout(2, 500, "packed")
    same = positions, positions, documents, documents
    mask = room.make_blocks(*same, window).mask
    seen = visible(*same, window)
    padded = torch.nn.functional.pad(seen, (0, 12, 0, 12)).view(2, 4, 128, 4, 128)
    real = padded.any(4).any(2)
    # The last queries are padding, which sees itself: those blocks hold real tokens too.
    assert torch.equal(mask.to_dense()[:, 0].bool(), real)
    assert real.sum() < 2 * 10


def test_rows_that_see_nothing_are_zeros_and_have_no_gradient():
    q, k, v = (x.requires_grad_() for x in tensors(1, 2, 4, 1, 16, 4, torch.float32))
    positions, documents = torch.zeros(1, 4, dtype=torch.int64), torch.full((1, 4), -1)
    mask = make_mask(positions, positions, documents, documents, None, blocks=True)
    out = attention(q, k, v, mask, softcap=50.0)
    out.sum().backward()
    assert out.abs().max() == 0
    assert all(x.grad.abs().max() == 0 for x in (q, k, v))


@torch.no_grad()
def test_one_kernel_for_each_shape_whatever_the_mask(monkeypatch):
    """Masks and caps are new functions in each pass; that must not be a new kernel."""
    counter = CompileCounter()
    run = torch.compile(torch_flex.flex_attention, dynamic=False, backend=counter)
    monkeypatch.setattr(room, "_kernel", lambda device: run)
    for time, kind in ((150, "packed"), (200, "padded"), (256, "whole"), (300, "whole"), (300, "packed")):
        positions, documents = layout(1, time, kind)
        where = positions, positions, documents, documents
        qkv = tensors(1, 2, time, 2, 16, time)
        ours = attention(*qkv, make_mask(*where, 9, blocks=True), softcap=5.0)
        torch.testing.assert_close(ours, attention(*qkv, make_mask(*where, 9), softcap=5.0), **CLOSE)
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler")
def test_compiled_for_the_cpu_it_skips_blocks_and_is_the_same(monkeypatch):
    """PyTorch's own kernel for the CPU, which is not used here, reads the lists of blocks that the GPU's reads."""
    monkeypatch.undo()
    positions, documents = layout(2, 300, "packed")
    where = positions, positions, documents, documents
    qkv = tensors(2, 2, 300, 2, 64, 300, torch.float32)
    run = torch.compile(room.flex, dynamic=False)
    with torch.no_grad():
        for window in (None, 50):
            ours = run(*qkv, make_mask(*where, window, blocks=True), softcap=5.0)
            theirs = attention(*qkv, make_mask(*where, window), softcap=5.0)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_who_decides(monkeypatch):
    """Nothing but CUDA, from whole blocks on, and only what its kernel can; told once where it cannot."""
    cuda = torch.device("cuda")
    assert not room.suits(torch.device("cpu"), torch.float32, 64, 4096)
    monkeypatch.setattr(room, "_works", lambda *which: True)
    assert room.suits(cuda, torch.bfloat16, 64, room.FEWEST)
    assert not room.suits(cuda, torch.bfloat16, 64, room.FEWEST - 1)
    assert not room.suits(cuda, torch.float64, 64, 4096)
    monkeypatch.undo()
    monkeypatch.setattr(room, "make_blocks", lambda *where: 1 / 0)
    with pytest.warns(Notice, match="there is no FlexAttention for heads of 24 in torch.float32: division by zero"):
        assert not room._works(torch.device("cpu"), torch.float32, 24, True)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("width", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "softcap", "kind"), [(None, 50.0, "packed"), (100, 50.0, "padded"), (33, None, "whole")]
)
def test_the_kernel_and_its_gradient_are_those_of_tiles(window, softcap, kind, dtype, width):
    """Errors against float64, at most one and a half times those of the tiles."""
    assert room.suits(torch.device("cuda"), dtype, width, 700)
    where = [x.cuda() for x in layout(2, 700, kind)]
    same = where[0], where[0], where[1], where[1]
    exact = [x.cuda() for x in tensors(2, 2, 700, 2, width, 700)]
    exact[0] *= width**-0.5
    upstream = torch.randn(2, 700, 4 * width, dtype=torch.float64, device="cuda")
    results = []
    for cast, blocks in ((torch.float64, False), (dtype, True), (dtype, False)):
        leaves = [x.to(dtype).to(cast).requires_grad_() for x in exact]
        out = attention(*leaves, make_mask(*same, window, ordered=True, blocks=blocks), softcap=softcap)
        grads = torch.autograd.grad((out * upstream.to(cast)).sum(), leaves)
        results.append([x.double() for x in (out, *grads)])
    for true, ours, tiles in zip(*results, strict=True):
        error, bar = ((x - true).square().mean().sqrt() for x in (ours, tiles))
        assert error <= 1.5 * bar + 1e-6 * true.square().mean().sqrt(), f"{error:.1e} against {bar:.1e}"
