"""The network by FlexAttention, uncompiled on the CPU: the same answers as by tiles."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex

from gemstill.model import slots as slots_room
from gemstill.model.slots import SlotCache
from gemstill.model.transformer import Block
from gemstill.ops import flex as room
from tests.model.reference import BASE, GEMMA3, name_of, network, ours, text

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
DEEP = replace(BASE, num_layers=4, sliding_window=9)


@pytest.fixture
def _flexible(monkeypatch):
    """FlexAttention for every pass of two tokens or more, in small blocks, and with a gradient on the CPU."""
    monkeypatch.setattr(room, "suits", lambda device, dtype, head_dim, queries: queries > 1)
    monkeypatch.setattr(room, "BLOCK", 16)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)


def packed(batch, time):
    documents = torch.zeros(batch, time, dtype=torch.int64)
    documents[:, time // 3 :], documents[-1, time - 6 :] = 1, -1
    return documents


@pytest.mark.usefixtures("_flexible")
@pytest.mark.parametrize("config", [DEEP, replace(GEMMA3, sliding_window=4)], ids=name_of)
def test_packed_documents_and_their_gradients(config, monkeypatch):
    tokens, documents, model = text(config, 2, 40), packed(2, 40), network(config)
    upstream = torch.randn(2, 40, config.vocab_size) * (documents >= 0)[..., None]

    def answers():
        model.zero_grad()
        out = model(tokens, documents=documents)
        (out * upstream).sum().backward()
        return [out * (documents >= 0)[..., None], *(p.grad for p in model.parameters())]

    made = []
    make = room.make_blocks
    monkeypatch.setattr("gemstill.ops.attention.make_blocks", lambda *where: made.append(where) or make(*where))
    ours = [x.clone() for x in answers()]
    assert len(made) == 2  # one for each kind of layer
    monkeypatch.setattr(room, "suits", lambda *which: False)
    for a, b in zip(ours, answers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.usefixtures("_flexible")
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("spare", [0, 3])
@torch.no_grad()
def test_chunks_of_a_prompt_against_the_keys_before(spare, dtype, monkeypatch):
    """Chunks shorter and longer than the ring, keys read in steps, what was never written being no number."""
    monkeypatch.setattr(slots_room, "SPARE", spare)
    monkeypatch.setattr(slots_room, "STEP", 8)
    made = []
    make = room.make_blocks
    monkeypatch.setattr("gemstill.ops.attention.make_blocks", lambda *where: made.append(where) or make(*where))
    model, tokens = ours(DEEP), text(DEEP, 1, 60)
    whole = model(tokens)
    made.clear()
    cache, start = SlotCache(DEEP, 2, 60, dtype, stepped=True), 0
    for chunk in (5, 1, 2, 17, 9, 20, 6):
        logits = model(tokens[:, start : start + chunk], cache=cache.view(1))
        error = (logits - whole[:, start : start + chunk]).abs().max()
        assert error < (1e-4 if dtype == torch.float32 else 0.1 * whole.abs().max())
        start += chunk
    assert len(made) == 2 * 6
    assert {len(where[1][0]) for where in made if where[4] is None} == {8, 32, 60}
    assert cache.rewind(1, 0)
    assert all(x.abs().max() == 0 for layer in cache.layers for x in layer.tensors)


@pytest.mark.usefixtures("_flexible")
@torch.no_grad()
def test_a_text_finds_no_numbers_of_the_one_before_it_in_its_slot():
    """Values that are not seen are multiplied by 0, which a NaN survives."""
    model, tokens = ours(DEEP), text(DEEP, 1, 40)
    cache = SlotCache(DEEP, 1, 64, stepped=True)
    model(tokens, cache=cache.view(0))
    for layer in cache.layers:
        for x in layer.tensors:
            x[:, :, min(20, x.shape[2] - 1) : 40] = float("nan")
    assert cache.rewind(0, 0)
    torch.testing.assert_close(model(tokens[:, :10], cache=cache.view(0)), model(tokens[:, :10]), **CLOSE)


@pytest.mark.slow
@pytest.mark.usefixtures("_flexible")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_are_two_graphs_whatever_the_documents(checkpointing, monkeypatch):
    """What training on a GPU compiles, up to the kernel: traced whole, and not anew for the masks of a new batch."""
    tokens, model = text(DEEP, 2, 40), network(DEEP).train()
    upstream = torch.randn(2, 40, DEEP.vocab_size)

    def gradients(documents):
        model.zero_grad()
        (model(tokens, documents=documents) * upstream * (documents >= 0)[..., None]).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    batches = [packed(2, 40), torch.zeros(2, 40, dtype=torch.int64)]
    expected = [gradients(documents) for documents in batches]
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    model._run_block = torch.compile(Block.forward, dynamic=False, fullgraph=True, backend=counter)
    model.checkpointing = checkpointing
    for documents, wanted in [*zip(batches, expected, strict=True)] * 2:
        for a, b in zip(gradients(documents), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
    assert counter.frame_count == 2
