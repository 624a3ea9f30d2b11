"""The slot cache: whatever way texts come into its slots, every token sees what it sees in the whole text."""

import random
from dataclasses import replace

import pytest
import torch

from gemstill.core.errors import Error
from gemstill.model import slots as room
from gemstill.model.slots import SPARE, SlotCache
from tests.model.reference import BASE, GEMMA3, grid, name_of, ours, text

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("spare", [0, 3, 100])
@pytest.mark.parametrize("config", [*grid(3, seed=3), GEMMA3], ids=name_of)
@torch.no_grad()
def test_any_chunks_and_any_neighbours(config, spare, monkeypatch):
    """Three texts of different lengths, in chunks shorter and longer than the ring, then all a token at a time."""
    monkeypatch.setattr(room, "SPARE", spare)
    model, time = ours(config), 30
    tokens = text(config, 3, time)
    whole = model(tokens)
    cache = SlotCache(config, 5, time)
    for row, chunks in enumerate(([1, 2, 4, 3], [14, 5], [1] * 7)):
        slot, start = 4 - row, 0
        for chunk in chunks:
            logits = model(tokens[row : row + 1, start : start + chunk], cache=cache.view(slot))
            torch.testing.assert_close(logits[0], whole[row, start : start + chunk], **CLOSE)
            start += chunk
    assert cache.lengths == [0, 0, 7, 19, 10]
    for _ in range(time - 19):
        at = [cache.lengths[slot] for slot in (4, 3, 2)]
        new = torch.stack([tokens[row, p] for row, p in enumerate(at)])[:, None]
        logits = model(new, cache=cache.view(4, 3, 2))
        torch.testing.assert_close(logits[:, 0], torch.stack([whole[row, p] for row, p in enumerate(at)]), **CLOSE)


@pytest.mark.parametrize("config", [BASE, replace(GEMMA3, sliding_window=3)], ids=name_of)
@torch.no_grad()
def test_any_walk_over_texts_equals_a_fresh_start(config, monkeypatch):
    """Texts that grow, are taken back, branch into other slots: where the cache agrees, it is right."""
    monkeypatch.setattr(room, "SPARE", 5)
    model, draw, capacity = ours(config), random.Random(0), 40
    cache, texts, refused = SlotCache(config, 3, capacity), [[], [], []], 0
    for step in range(70):
        slot, kind = draw.randrange(3), draw.random()
        if kind < 0.3 and texts[slot]:
            length = draw.choice([0, draw.randrange(len(texts[slot])), max(0, len(texts[slot]) - draw.randrange(9))])
            done = cache.rewind(slot, length)
            texts[slot] = texts[slot][:length] if done else texts[slot]
            refused += not done
        elif kind < 0.5:
            target = (slot + 1) % 3
            length = draw.randrange(max(0, len(texts[slot]) - 8), len(texts[slot]) + 1)
            if cache.copy_prefix(slot, target, length):
                texts[target] = texts[slot][:length]
        new = text(config, 1, draw.randrange(1, 9), seed=step)[0].tolist()
        if len(texts[slot]) + len(new) > capacity:
            assert cache.rewind(slot, 0)
            texts[slot] = []
        texts[slot] += new
        logits = model(torch.tensor([new]), cache=cache.view(slot))
        torch.testing.assert_close(logits[0, -1], model(torch.tensor([texts[slot]]))[0, -1], **CLOSE)
        assert cache.lengths == [len(t) for t in texts]
    assert refused > 0


@pytest.mark.parametrize("stepped", [False, True], ids=["whole", "stepped"])
@pytest.mark.parametrize("config", [BASE, replace(GEMMA3, sliding_window=3)], ids=name_of)
@torch.no_grad()
def test_a_cache_of_another_size_holds_the_same_texts(config, stepped, monkeypatch):
    """Slots more and fewer, longer and shorter, in another order; a text goes on as before or says that it is lost."""
    monkeypatch.setattr(room, "SPARE", 2)
    model, draw = ours(config), random.Random(1)
    cache, texts = SlotCache(config, 1, 3, stepped=stepped), [[]]
    for step in range(120):
        if step % 3 == 0:
            keep = draw.sample(range(len(texts)), draw.randrange(len(texts) + 1))
            texts = [texts[slot] for slot in keep] + [[] for _ in range(draw.randrange(not keep, 3))]
            capacity = max(1, *(len(t) for t in texts)) + draw.choice([0, 0, 1, 5, 12])
            cache.resize(keep, len(texts), capacity)
            texts = [t[:length] for length, t in zip(cache.lengths, texts, strict=True)]
            assert (cache.slots, cache.capacity) == (len(texts), capacity)
            assert cache.bytes == len(texts) * SlotCache.bytes_of(config, capacity)
        slot = draw.randrange(len(texts))
        if step % 3 == 2 and cache.rewind(slot, length := max(0, len(texts[slot]) - 2)):
            texts[slot] = texts[slot][:length]
        elif room_left := cache.capacity - len(texts[slot]):
            new = text(config, 1, min(room_left, draw.randrange(1, 6)), seed=step)[0].tolist()
            texts[slot] += new
            logits = model(torch.tensor([new]), cache=cache.view(slot))
            torch.testing.assert_close(logits[0, -1], model(torch.tensor([texts[slot]]))[0, -1], **CLOSE)


@torch.no_grad()
def test_what_is_taken_back_of_a_slot_that_became_shorter_is_no_more_than_that(monkeypatch):
    """A text once reached further than its slot, read in steps, does now: its beginning stays."""
    monkeypatch.setattr(room, "SPARE", 2)
    model, ids = ours(BASE), text(BASE, 1, 10)
    cache = SlotCache(BASE, 1, 20, stepped=True)
    model(ids, cache=cache.view(0))
    assert cache.rewind(0, 8)
    cache.resize([0], 1, 9)
    assert cache.rewind(0, 7)
    logits = model(ids[:, 7:8], cache=cache.view(0))
    torch.testing.assert_close(logits[0, -1], model(ids[:, :8])[0, -1], **CLOSE)


def test_what_can_be_taken_back(monkeypatch):
    monkeypatch.setattr(room, "SPARE", 5)
    cache = SlotCache(BASE, 2, 40)
    cache.advance(0, 30)
    assert not cache.rewind(0, 23)
    assert not cache.copy_prefix(0, 1, 23)
    assert cache.lengths == [30, 0]
    assert cache.copy_prefix(0, 1, 24)
    assert cache.rewind(0, 24)
    cache.advance(0, 3)
    assert not cache.rewind(0, 23)  # what was lost does not come back
    assert cache.rewind(0, 0)
    assert cache.lengths == [0, 24]


def test_a_text_is_lost_where_the_ring_becomes_smaller_that_it_has_outgrown(monkeypatch):
    monkeypatch.setattr(room, "SPARE", 2)
    cache = SlotCache(BASE, 1, 20)  # rings of 6
    cache.advance(0, 8)
    assert cache.rewind(0, 5)
    cache.resize([0], 2, 9)
    assert cache.lengths == [5, 0]
    assert not cache.holds(0, 4)
    cache.resize([0], 1, 5)
    assert cache.lengths == [0]


def test_a_long_context_costs_half():
    config, window = replace(BASE, num_layers=4, sliding_window=512), 512
    cache = SlotCache(config, 2, 8192, torch.bfloat16)
    assert [layer.size for layer in cache.layers] == [window + SPARE, 8192] * 2
    token = 2 * 2 * config.num_kv_heads * config.head_dim
    assert (
        cache.bytes == 2 * SlotCache.bytes_of(config, 8192, torch.bfloat16) == 2 * token * 2 * (8192 + window + SPARE)
    )
    assert cache.bytes < 0.55 * 2 * token * 4 * 8192


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.05), (torch.int8, 0.1)])
@torch.no_grad()
def test_stored_in_fewer_bits_computed_in_float32(dtype, most):
    """In chunks, copied to another slot, taken back, beside another text: the same, nearly, as all in float32."""
    tokens, cache = text(BASE, 1, 30), SlotCache(BASE, 3, 30, dtype)
    exact = ours(BASE)(tokens)
    logits = torch.cat([ours(BASE)(part, cache=cache.view(0)) for part in tokens.split(7, 1)], 1)
    assert logits.dtype == torch.float32
    assert 0 < (logits - exact).abs().max() < most * exact.abs().max()
    assert cache.copy_prefix(0, 2, 28)
    cache.resize([2], 2, 30)
    cache.advance(1, 1)
    for layer in cache.layers:
        for x in layer.tensors:
            x[1] = 0
    again = ours(BASE)(tokens[:, 28:29].expand(2, 1), cache=cache.view(0, 1))
    assert (again[0, 0] - logits[0, 28]).abs().max() < 1e-4


def test_int8_is_rounded_to_the_nearest_of_its_block():
    config = replace(BASE, head_dim=40)  # a block of 32 and one of 8
    cache = SlotCache(config, 2, 8, torch.int8)
    shape = (1, BASE.num_kv_heads, 3, 40)
    keys, values = (torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(2))
    keys[:, :, 1, 35] *= 1000
    values[:, :, 2] = 0
    layer = cache.view(1).layers[1]
    found = layer.extend(keys, values, torch.arange(3)[None], 0, None)
    for one, other in zip(found, (keys, values), strict=False):
        for block in (slice(32), slice(32, 40)):
            bound = other[..., block].abs().amax(-1, keepdim=True) / 253
            assert ((one - other)[..., block].abs() <= bound).all()
    tokens = sum(layer.size for layer in cache.layers)
    assert cache.bytes == 2 * tokens * 2 * BASE.num_kv_heads * (40 + 8)
    assert cache.bytes == 2 * SlotCache.bytes_of(config, 8, torch.int8)


@torch.no_grad()
def test_refusals():
    cache = SlotCache(BASE, 2, 8)
    with pytest.raises(Error, match="padding does not fit a slot"):
        ours(BASE)(text(BASE, 1, 4), documents=torch.tensor([[-1, 0, 0, 0]]), cache=cache.view(0))
    with pytest.raises(Error, match="9 tokens do not fit a cache of 8"):
        ours(BASE)(text(BASE, 1, 9), cache=cache.view(0))
    assert cache.lengths == [0, 0]
