"""The native step against Transformer.forward in float32: any network, any texts side by side."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from gemstill.core.errors import Error
from gemstill.core.machine import processor_flags
from gemstill.model import step as room
from gemstill.model.slots import SPARE, SlotCache
from gemstill.model.step import Step
from gemstill.ops import native
from gemstill.ops.packed import pack
from tests.model.reference import BASE, GEMMA3, grid, name_of, network, ours, text

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=f"no native kernels: {native.why_not()}")

CLOSE = {"rtol": 1e-5, "atol": 2e-4}  # of logits of up to 30
WIDE = replace(BASE, hidden_size=96, intermediate_size=160, head_dim=64, num_heads=6, num_kv_heads=1, num_layers=2)
QK = replace(GEMMA3, num_layers=3, head_dim=40, num_heads=5, num_kv_heads=1, sliding_window=3, layer_pattern=2)


def walk(model, tokens, cache, slots, starts=None):
    """Every token of tokens [n, T] in steps, texts that begin later joining later; logits of each text [n, T, V]."""
    step, rows = Step(model, cache), [[] for _ in slots]
    starts, time = starts or [0] * len(slots), tokens.shape[1]
    for now in range(max(starts) + time):
        live = [n for n, start in enumerate(starts) if start <= now < start + time]
        logits = step([int(tokens[n, now - starts[n]]) for n in live], [slots[n] for n in live])
        for n, row in zip(live, logits, strict=True):
            rows[n].append(row)
    return torch.stack([torch.stack(row) for row in rows])


def pack_all(model, kind):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            packed = pack(module.weight, kind)
            del module.weight
            module.weight = packed


@pytest.mark.parametrize("config", [*grid(12, seed=5), GEMMA3, WIDE, QK], ids=name_of)
@torch.no_grad()
def test_any_network(config):
    """Three texts at different positions, all past the window but where it is 50."""
    tokens = text(config, 3, 24)
    logits = walk(ours(config), tokens, SlotCache(config, 5, 24), [4, 0, 2], [0, 9, 3])
    torch.testing.assert_close(logits, ours(config)(tokens), **CLOSE)


@pytest.mark.parametrize("config", [BASE, WIDE], ids=name_of)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 0.05), (torch.int8, 0.1)])
@torch.no_grad()
def test_long_texts_are_looked_at_in_parts(config, dtype, most):
    """Past a ring's end and with several parts of several lengths; what was prefilled in chunks comes before."""
    config = replace(config, sliding_window=70)
    model, time = ours(config), 70 + SPARE + 90
    tokens = text(config, 2, time)
    whole, cache = model(tokens), SlotCache(config, 2, time, dtype)
    step = Step(model, cache)
    for slot, length in enumerate((time - 12, time - 300)):
        for start in range(0, length, 100):
            model(tokens[slot : slot + 1, start : min(length, start + 100)], cache=cache.view(slot))
    for _ in range(12):
        at = list(cache.lengths)
        logits = step([int(tokens[slot, p]) for slot, p in enumerate(at)], [0, 1])
        exact = torch.stack([whole[slot, p] for slot, p in enumerate(at)])
        assert (logits - exact).abs().max() < most * exact.abs().max()


@pytest.mark.parametrize("count", range(1, 17))
@torch.no_grad()
def test_neighbours_and_their_order_change_nothing(count):
    model, tokens = ours(BASE), text(BASE, 16, 6)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(count))[:count].tolist()
    alone = torch.cat([walk(model, tokens[n : n + 1], SlotCache(BASE, 1, 6), [0]) for n in order])
    assert torch.equal(walk(model, tokens[order], SlotCache(BASE, 16, 6), order), alone)


@torch.no_grad()
def test_several_tokens_of_one_text():
    """A short prompt in one step, beside another text's next token; and only the logits that were asked for."""
    model, tokens = ours(BASE), text(BASE, 2, 20)
    whole, cache = model(tokens), SlotCache(BASE, 2, 20)
    step = Step(model, cache)
    first = step(tokens[0, :9].tolist(), [0] * 9)
    torch.testing.assert_close(first, whole[0, :9], **CLOSE)
    mixed = step([*tokens[0, 9:14].tolist(), int(tokens[1, 0]), int(tokens[0, 14])], [0] * 5 + [1, 0], wanted=[6, 5])
    torch.testing.assert_close(mixed, torch.stack([whole[0, 14], whole[1, 0]]), **CLOSE)
    assert step([1, 2], [1, 1], wanted=[]).shape == (0, BASE.vocab_size)
    assert cache.lengths == [15, 3]


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@torch.no_grad()
def test_whole_prompts_side_by_side(kind):
    """64 tokens at once, past the window; each text as it is alone, to the last bit."""
    config = replace(WIDE, vocab_size=70, sliding_window=9)
    model = network(config, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "int8":
        pack_all(model, kind)
    model.compute_dtype = torch.float32
    tokens, sizes = text(config, 4, 33), [33, 1, 19, 11]
    cache = SlotCache(config, 4, 34)
    rows = [(token, slot) for slot, size in enumerate(sizes) for token in tokens[slot, :size].tolist()]
    together = Step(model, cache)(*map(list, zip(*rows, strict=True)))
    assert cache.lengths == sizes
    for slot, part in enumerate(together.split(sizes)):
        alone = Step(model, SlotCache(config, 1, 34))(tokens[slot, : sizes[slot]].tolist(), [0] * sizes[slot])
        assert torch.equal(part, alone)
        true = model(tokens[slot : slot + 1, : sizes[slot]])[0]
        assert (part - true).abs().max() < (1e-3 if kind == "int8" else 1e-5) * true.abs().max()


@torch.no_grad()
def test_of_bfloat16_weights_it_is_the_float32_network():
    model = network(WIDE, torch.bfloat16)
    wide = network(WIDE)
    wide.load_state_dict(model.state_dict())
    tokens, cache = text(WIDE, 2, 12), SlotCache(WIDE, 2, 12)
    model.compute_dtype = torch.float32
    torch.testing.assert_close(walk(model, tokens, cache, [0, 1]), wide(tokens), **CLOSE)
    model.compute_dtype = None  # √96 in bfloat16 is another number
    assert not torch.allclose(walk(model, tokens, SlotCache(WIDE, 2, 12), [0, 1]), wide(tokens), **CLOSE)


def native_bfloat16():
    """Whether products of bfloat16 are among what the kernels are built for."""
    return os.environ.get("GEMSTILL_KERNELS", "native") == "native" and "avx512_bf16" in processor_flags()


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("config", [WIDE, QK], ids=name_of)
@torch.no_grad()
def test_a_prompt_in_bfloat16(config, dtype):
    """No further from float64 than Transformer.forward in bfloat16; the exact tokens beside it stay what they are."""
    config = replace(config, intermediate_size=168)  # no whole number of blocks
    model, wide = network(config, torch.bfloat16), network(config, torch.float64)
    wide.load_state_dict(model.state_dict())
    tokens = text(config, 3, 40)
    prompt = tokens[0, :33].tolist()
    plain = model(tokens[:1, :33])[0].double()
    model.compute_dtype = dtype

    def read(exact, beside=0):
        cache = SlotCache(config, 3, 40)
        others = [tokens[1 + slot, 0].item() for slot in range(beside)]
        slots = [*range(1, 1 + beside), *[0] * len(prompt)]
        return Step(model, cache)([*others, *prompt], slots, exact=exact).split([beside, len(prompt)])

    exact, rounded, true = read(33)[1], read(0)[1], wide(tokens[:1, :33])[0]
    assert torch.equal(exact, rounded) == (dtype is torch.float32 or not native_bfloat16())
    assert (rounded - true).norm() <= (plain - true).norm()
    for count in (1, 2):
        singles, again = read(count, count)
        assert torch.equal(again, rounded)
        assert torch.equal(singles, read(count + 33, count)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("config", [BASE, WIDE], ids=name_of)
@torch.no_grad()
def test_a_cache_in_fewer_bits_is_the_one_that_forward_writes(config, dtype):
    """Each reads what the other wrote."""
    model, tokens = ours(config), text(config, 1, 20)
    caches = [SlotCache(config, 1, 20, dtype) for _ in range(2)]
    steps = [Step(model, cache) for cache in caches]
    plain = torch.cat([model(part, cache=caches[0].view(0)) for part in tokens.split(1, 1)], 1)[0]
    mixed = [
        steps[1]([token], [0])[0]
        if number % 3
        else model(tokens[:, number : number + 1], cache=caches[1].view(0))[0, 0]
        for number, token in enumerate(tokens[0].tolist())
    ]
    assert (torch.stack(mixed) - plain).abs().max() < 0.02 * plain.abs().max()
    text_of = [0], torch.tensor([20]), 20, torch.float32
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        for x, y in zip(one.read(*text_of), other.read(*text_of), strict=True):
            torch.testing.assert_close(x, y, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@torch.no_grad()
def test_packed_weights(kind):
    """Products in integers of 15 bits, so somewhat less exact."""
    config = replace(WIDE, vocab_size=70)
    model, rounded = network(config), network(config)
    pack_all(model, kind)
    for module, other in zip(model.modules(), rounded.modules(), strict=True):
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            other.weight.copy_(module.weight.rows(0, len(module.weight)))
    tokens, cache = text(config, 2, 12), SlotCache(config, 2, 12)
    model.compute_dtype = torch.float32
    true = rounded(tokens)
    assert (walk(model, tokens, cache, [0, 1]) - true).abs().max() < 1e-3 * true.abs().max()


@torch.no_grad()
def test_weights_are_followed():
    """A live model: weights change in place, are given other memory, or are replaced."""
    model, tokens = network(BASE), text(BASE, 1, 5)
    cache = SlotCache(BASE, 1, 5)
    step = Step(model, cache)

    def check():
        cache.rewind(0, 0)
        torch.testing.assert_close(step(tokens[0].tolist(), [0] * 5), model(tokens)[0], **CLOSE)

    check()
    part = model.layers[1].mlp.up_proj
    part.weight.mul_(0.5)
    check()
    part.weight.data = part.weight.data * 3
    check()
    part.weight = Parameter(-part.weight)
    check()
    with torch.enable_grad():
        check()
    cache.resize([], 2, 30)
    check()


@torch.no_grad()
def test_where_it_cannot_be_it_says_so_and_does_nothing(monkeypatch):
    cache = SlotCache(BASE, 1, 30)

    def refused(model, cache=cache, tokens=1):
        return Step(model, cache)([1] * tokens, [0] * tokens) is None and cache.lengths == [0]

    assert refused(ours(BASE), tokens=65)
    assert refused(ours(BASE), tokens=0)
    assert refused(ours(BASE), SlotCache(BASE, 1, 30, torch.float64))
    assert refused(network(BASE, torch.float64))
    model = network(BASE)
    model.layers[0].mlp.up_proj.weight.data = model.layers[0].mlp.up_proj.weight.data.T.contiguous().T
    assert refused(model)
    with monkeypatch.context() as patch:
        patch.setattr(room, "kernels", lambda x: None)
        assert refused(ours(BASE))
    assert not refused(ours(BASE))


def test_bad_input_is_told():
    cache = SlotCache(BASE, 2, 4)
    step = Step(ours(BASE), cache)
    with pytest.raises(Error, match="5 tokens do not fit a cache of 4"):
        step([1] * 6, [0, 1, 0, 0, 0, 0])
    with pytest.raises(RuntimeError, match="outside the vocabulary"):
        step([BASE.vocab_size], [0])
    with pytest.raises(RuntimeError, match="no such slot"):
        step([1], [-1])
    assert cache.lengths == [0, 0]


@torch.no_grad()
def test_what_is_no_number_stays_with_its_text():
    model, cache = ours(BASE), SlotCache(BASE, 2, 8)
    step = Step(model, cache)
    step([3, 3], [0, 1])
    cache.layers[1].values[0, :, 0] = float("nan")
    logits = step([4, 4], [0, 1])
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()
    torch.testing.assert_close(logits[1], model(torch.tensor([[3, 4]]))[0, 1], **CLOSE)


def test_the_number_of_threads_changes_nothing():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(walk(ours(WIDE), text(WIDE, 3, 9), SlotCache(WIDE, 3, 9), [0, 1, 2]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.skipif("GEMSTILL_KERNELS" in os.environ, reason="one instruction set is asked for")
@pytest.mark.parametrize("choice", native.SETS)
def test_the_same_holds_for_every_instruction_set(choice):
    """This file again, in a process of its own, since a process has one library."""
    if not native.SETS[choice][1] <= processor_flags():
        pytest.skip("this processor does not have it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "GEMSTILL_KERNELS": choice}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
