"""Packed matrices: their blocks bit by bit, their rows, and their products against float64 of the same weights."""

import os
import subprocess
import sys

import pytest
import torch

from gemstill.core.errors import Error
from gemstill.core.machine import processor_flags
from gemstill.ops import native
from gemstill.ops import packed as room
from gemstill.ops.blocks import BLOCKS, dequantize, quantize
from gemstill.ops.packed import MADE, Packed, from_blocks, pack, packed_linear
from gemstill.ops.panels import FORMATS, KINDS

SHAPES = [(16, 256), (37, 96), (7, 32), (250, 1056)]  # rows: no multiple of 16; columns: an odd number of blocks
VECTORS = (1, 2, 3, 5, 8, 9, 16, 64, 65)


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(name, rows, columns):
    """Blocks of random weights; of a format that cannot be written, random bytes with scales of a sound size."""
    if name in MADE.values():
        return quantize(draw(rows, columns, scale=0.05), name)
    block = BLOCKS[name]
    data = torch.randint(0, 256, (rows, columns // block.size, block.bytes), generator=torch.Generator().manual_seed(1))
    data = data.to(torch.uint8)
    places = {"Q5_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]
    for at in places:
        data[..., at : at + 2] = (0.01 + draw(*data.shape[:2], 1, seed=at).abs() * 0.01).half().view(torch.uint8)
    return data.view(rows, -1)


def cases():
    size = {name: BLOCKS[name].size for name in FORMATS}
    return [(name, rows, -(-columns // size[name]) * size[name]) for name in FORMATS for rows, columns in SHAPES]


@pytest.mark.parametrize(("name", "rows", "columns"), cases())
def test_what_was_packed_comes_back(name, rows, columns):
    data = blocks_of(name, rows, columns)
    packed = from_blocks(data, name)
    assert packed.shape == (rows, columns)
    again, told = packed.unpack()
    assert told == name
    assert torch.equal(again, data)
    true = dequantize(data, name)
    # A product and a difference may be rounded together.
    torch.testing.assert_close(packed.rows(0, rows), true, rtol=0 if BLOCKS[name].size == 32 else 1e-6, atol=1e-6)
    some = packed.rows(3, rows - 1, torch.bfloat16)
    torch.testing.assert_close(some, true[3 : rows - 1].bfloat16(), rtol=0 if BLOCKS[name].size == 32 else 8e-3, atol=0)
    ids = torch.randint(0, rows, (2, 3), generator=torch.Generator().manual_seed(2))
    assert torch.equal(packed.gather(ids), packed.rows(0, rows)[ids])


def test_small_matrices_share_memory_and_give_it_back():
    slab = room._Slab()
    parts = [slab.take(size) for size in (1, 64, 100, slab.SIZE - 320)]
    for number, part in enumerate(parts):
        part.fill_(number)
    assert [part.data_ptr() - parts[0].data_ptr() for part in parts] == [0, 64, 128, 256]
    assert parts[0].data_ptr() % slab.LINE == 0
    assert all(bool((part == number).all()) for number, part in enumerate(parts))
    assert [part.untyped_storage().nbytes() for part in parts[:3]] == [1, 64, 100]
    other = slab.take(512)  # there is no room for it beside them
    assert slab._known() is not None
    del other, part
    assert slab._known() is None
    assert bool((parts[2] == 2).all())


@pytest.mark.parametrize(("name", "rows", "columns"), cases())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_the_dequantized_weights(name, rows, columns, dtype):
    packed = from_blocks(blocks_of(name, rows, columns), name)
    true = packed.rows(0, rows).double()
    for count in VECTORS:
        x = draw(count, columns, seed=count).to(dtype)
        out, exact = packed.linear(x), x.double() @ true.T
        assert out.dtype == dtype
        assert out.shape == (count, rows)
        bound = 1e-4 if dtype == torch.float32 else 1e-2
        assert (out.double() - exact).norm() <= bound * exact.norm()


def test_matrices_side_by_side_are_one_product():
    kinds = [pack(draw(rows, 64, seed=rows), kind) for rows, kind in ((40, "int8"), (24, "int4"), (7, "int8"))]
    for count in (2, 70):
        x = draw(3, count, 64)
        joint = packed_linear(x, *kinds)
        assert torch.equal(joint, torch.cat([one.linear(x) for one in kinds], -1))
    plain = draw(5, 64)
    torch.testing.assert_close(packed_linear(x, kinds[0], plain)[..., 40:], x @ plain.T)


def test_a_vector_does_not_depend_on_its_neighbours():
    packed, x = pack(draw(50, 320), "int4"), draw(16, 320, seed=3)
    together = packed.linear(x)
    for count in (1, 3, 8):
        assert torch.equal(packed.linear(x[:count]), together[:count]) or native.why_not()


@pytest.mark.skipif(bool(native.why_not()), reason="no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_plain_tensors(dtype):
    """More than one lot of them, no whole number of tiles; a vector is the same in any company."""
    weights, x = draw(205, 1000).to(dtype), draw(64, 1000, seed=1)

    def products(x):
        out = torch.empty(len(x), 205)
        torch.ops.gemstill.packed_linear(x, [weights], [KINDS.index(str(dtype)[6:])], [205], out)
        return out

    together, true = products(x), x.double() @ weights.double().T
    assert (together - true).norm() <= 5e-7 * true.norm()
    for count in range(1, 64):
        assert torch.equal(products(x[:count]), together[:count])


def test_what_is_not_finite_stays_so_and_alone():
    packed, x = pack(draw(20, 64), "int8"), draw(3, 64)
    x[1, 5], x[2, :] = float("inf"), 0
    out = packed.linear(x)
    assert out[0].isfinite().all()
    assert not out[1].isfinite().any()
    assert (out[2] == 0).all()


def test_a_copy_may_lie_at_any_address():
    """A copy of a model is one of its storages, whose addresses are the allocator's affair."""
    packed, x = pack(draw(40, 96), "int4"), draw(2, 96)
    for shift in (1, 2, 16, 33):
        moved = torch.empty(packed.nbytes + shift, dtype=torch.uint8)[shift:].copy_(packed.data)
        assert torch.equal(Packed(moved, packed.name, packed.shape).linear(x), packed.linear(x))


def test_the_numbers_are_those_of_the_block_formats():
    weights = draw(33, 64).bfloat16()
    for kind, name in MADE.items():
        assert torch.equal(pack(weights, kind).unpack()[0], quantize(weights, name))


def test_bad_input_is_told():
    for kind, weights, words in (
        ("int3", draw(4, 32), "packed as 'int3'"),
        ("int8", draw(4, 33), "no rows of blocks"),
        ("int8", draw(32), "no rows of blocks"),
        ("int4", draw(4, 32) / 0, "not finite"),
    ):
        with pytest.raises(Error, match=words):
            pack(weights, kind)
    with pytest.raises(Error, match="in the format Q2_K"):
        from_blocks(torch.zeros(2, 84, dtype=torch.uint8), "Q2_K")
    with pytest.raises(Error, match=r"takes uint8 of \[N, n·34\]"):
        from_blocks(torch.zeros(2, 33, dtype=torch.uint8), "Q8_0")
    packed = pack(draw(4, 32), "int8")
    with pytest.raises(IndexError):
        packed.gather(torch.tensor([0, 4]))
    with pytest.raises(Error, match="cannot be trained"):
        packed.linear(draw(1, 32).requires_grad_())


def test_it_says_what_it_is():
    packed = pack(draw(33, 64), "int4")
    assert isinstance(packed, Packed)
    assert repr(packed) == "Packed(Q4_0, [33, 64])"
    assert packed.kind == "int4"
    assert packed.nbytes == 48 * 64 * 18 // 32
    assert packed.numel() == 33 * 64
    assert len(packed) == 33


@pytest.mark.skipif("GEMSTILL_KERNELS" in os.environ, reason="one instruction set is asked for")
@pytest.mark.parametrize("choice", ["torch", *native.SETS])
def test_the_same_holds_for_every_instruction_set(choice):
    """This file again, in a process of its own, since a process has one library."""
    if choice in native.SETS and not native.SETS[choice][1] <= processor_flags():
        pytest.skip("this processor does not have it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "GEMSTILL_KERNELS": choice}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
