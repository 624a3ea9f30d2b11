"""Block formats give the values that the package `gguf` gives, bit by bit, in both directions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemstill.core.errors import Error
from gemstill.ops import blocks
from gemstill.ops.blocks import BLOCKS, SLICE, dequantize, quantize

gguf = pytest.importorskip("gguf")
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q5_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}  # bytes of scales


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Every bit at random but for the half-precision scales, which are finite."""
    rng = np.random.default_rng(seed)
    block = BLOCKS[name]
    data = rng.integers(0, 256, (count, block.bytes), dtype=np.uint8)
    for at in HALVES.get(name, []):
        scales = rng.standard_normal((count, 1)).astype(np.float16)
        data[:, at : at + 2] = scales.view(np.uint8)
    return data


def kind(name: str) -> gguf.GGMLQuantizationType:
    return getattr(gguf.GGMLQuantizationType, name)


def test_numbers_and_sizes_are_those_of_ggml() -> None:
    for block in BLOCKS.values():
        assert kind(block.name) == block.type
        assert gguf.GGML_QUANT_SIZES[kind(block.name)] == (block.size, block.bytes)


@pytest.mark.parametrize("count", [1, 2, 77, SLICE // 256 + 3])
@pytest.mark.parametrize("name", HALVES)
def test_unpacked_as_by_gguf(name: str, count: int) -> None:
    data = random_blocks(name, count)
    theirs = gguf.quants.dequantize(data, kind(name))
    kept = data.copy()
    assert np.array_equal(dequantize(torch.from_numpy(data), name).numpy(), theirs)
    assert np.array_equal(data, kept), "what is read stays as it is"


@pytest.mark.parametrize("name", HALVES)
def test_other_dtypes_round_once_and_rows_keep_their_shape(name: str) -> None:
    block = BLOCKS[name]
    data = torch.from_numpy(random_blocks(name, 12)).view(2, 3, 2 * block.bytes)
    exact = dequantize(data, name)
    assert exact.shape == (2, 3, 2 * block.size)
    assert torch.equal(dequantize(data, name, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_plain_formats(name: str) -> None:
    weights = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    theirs = gguf.quants.quantize(weights, kind(name)).view(np.uint8)
    ours = quantize(torch.from_numpy(weights), name.lower())
    assert np.array_equal(ours.numpy(), theirs)
    assert np.array_equal(dequantize(ours, name).numpy(), gguf.quants.dequantize(theirs, kind(name)))


def test_a_plain_format_in_its_own_dtype_is_not_copied() -> None:
    data = quantize(torch.arange(6.0), "bf16")
    assert dequantize(data, "BF16", torch.bfloat16).data_ptr() == data.data_ptr()


def test_bytes_at_an_odd_address() -> None:
    data = torch.from_numpy(random_blocks("Q4_K", 3))
    shifted = torch.empty(data.numel() + 1, dtype=torch.uint8)[1:].view(3, -1).copy_(data)
    assert torch.equal(dequantize(shifted, "Q4_K"), dequantize(data, "Q4_K"))


# Halves of a step, zeros, ties of the largest size with both signs, and sizes from 2^-20 to 2^18.
grid = st.integers(-254, 254).map(lambda number: number / 2)
rows = st.lists(grid | st.floats(-(2.0**18), 2.0**18, width=32).filter(lambda x: x == 0 or abs(x) > 2**-20),
                min_size=32, max_size=32)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(row=rows, name=st.sampled_from(["Q8_0", "Q4_0"]))
def test_packed_as_by_gguf(row: list[float], name: str) -> None:
    weights = np.array([row, row[::-1]], dtype=np.float32)
    assert np.array_equal(quantize(torch.from_numpy(weights), name).numpy(), gguf.quants.quantize(weights, kind(name)))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0"])
def test_many_blocks_packed_as_by_gguf(name: str) -> None:
    weights = np.random.default_rng(2).standard_normal((67, 4096)).astype(np.float32)
    weights[3] = 0
    assert np.array_equal(quantize(torch.from_numpy(weights), name).numpy(), gguf.quants.quantize(weights, kind(name)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dequantize(torch.zeros(33, dtype=torch.uint8), "Q8_0"), "Q8_0 takes uint8"),
        (lambda: dequantize(torch.zeros(34), "Q8_0"), "Q8_0 takes uint8"),
        (lambda: dequantize(torch.zeros(34, dtype=torch.uint8), "Q9_9"), "no block format is named 'Q9_9'"),
        (lambda: quantize(torch.zeros(256), "q4_k"), "can be read, not written"),
        (lambda: quantize(torch.zeros(2, 48), "q8_0"), "48 weights is not a multiple of Q8_0's 32"),
        (lambda: quantize(torch.full((32,), float("nan")), "q8_0"), "not finite"),
        (lambda: quantize(torch.full((32,), 1e30), "q4_0"), "too large"),
        (lambda: quantize(torch.full((32,), 1e5), "f16"), "too large for F16"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(Error, match=message):
        call()


def test_the_number_of_threads_is_left_as_it_was(monkeypatch):
    """Few threads are not used, and are there again afterwards, also when something fails on the way."""
    seen = []
    block, unpack = BLOCKS["Q8_0"], blocks._FORMATS[BLOCKS["Q8_0"]]

    def watched(data, out):
        seen.append(torch.get_num_threads())
        unpack(data, out)
        if len(seen) > 2:
            raise RuntimeError("on the way")

    monkeypatch.setitem(blocks._FORMATS, block, watched)
    before = torch.get_num_threads()
    try:
        for threads in (2, blocks.FEW + 1):
            torch.set_num_threads(threads)
            dequantize(torch.zeros(4, block.bytes, dtype=torch.uint8), "Q8_0")
            assert torch.get_num_threads() == threads
        torch.set_num_threads(2)
        with pytest.raises(RuntimeError, match="on the way"):
            dequantize(torch.zeros(4, block.bytes, dtype=torch.uint8), "Q8_0")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, blocks.FEW + 1, 1]
