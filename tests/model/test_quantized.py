"""A network whose matrices are packed does what the same network does with the numbers that are packed."""

import copy
from dataclasses import replace

import pytest
import torch

from gemstill.core.errors import Error
from gemstill.distill.teachers import ModelTeacher
from gemstill.model.quantized import count_weights, is_quantized, named_weights, quantize_model, weight_bytes
from gemstill.model.readout import LogProbs, Loss, last_logits
from gemstill.model.slots import SlotCache
from gemstill.ops.packed import Packed
from gemstill.ops.target import OnlineTarget, Target
from tests.model.reference import BASE, network, text

SMALL = replace(BASE, hidden_size=64, intermediate_size=96)
UNTIED = replace(SMALL, tie_embeddings=False)


def pair(config, kind):
    """A quantized network, and the same one with what its integers stand for as floats."""
    model = network(config)
    quantize_model(model, kind)
    plain = network(config)
    plain.load_state_dict(
        {name: w.rows(0, len(w)) if isinstance(w, Packed) else w.clone() for name, w in named_weights(model)},
        assign=True,
    )
    return model, plain.eval()


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("config", [SMALL, UNTIED])
def test_the_same_answers_as_with_the_numbers_as_floats(config, kind):
    model, plain = pair(config, kind)
    tokens = text(config)
    for some in (tokens.repeat(4, 1), tokens[:1, :5]):  # many vectors at once, and few
        logits = plain(some)
        bound = 1e-3 * logits.abs().max()
        assert (model(some) - logits).abs().max() < bound
        assert (model(some, readout=last_logits) - logits[:, -1]).abs().max() < bound
        ids = some.roll(-1, 1)
        picked = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        assert (model(some, readout=LogProbs(ids)) - picked).abs().max() < bound
        with torch.no_grad():
            loss = model(some, readout=Loss(Target.hard(ids)))
        torch.testing.assert_close(loss, -picked.sum(), rtol=1e-3, atol=0)


def test_with_a_cache_as_without():
    model, _ = pair(SMALL, "int8")
    tokens = text(SMALL)[:1]
    cache, parts = SlotCache(SMALL, 1, tokens.shape[1]).view(0), []
    for start in range(0, tokens.shape[1], 3):
        parts.append(model(tokens[:, start : start + 3], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-3, atol=2e-3)


def test_its_distance_from_a_teacher_can_be_measured():
    """The divergence that judges a quantized model: from the unquantized one, at every position."""
    model, _ = pair(SMALL, "int4")
    teacher, tokens = network(SMALL), text(SMALL)
    with torch.no_grad():
        target = ModelTeacher(teacher).distribution(tokens, torch.zeros_like(tokens))
        found = model(tokens, readout=Loss(target, divergence="reverse"))
        log_q, log_p = model(tokens).log_softmax(-1), teacher(tokens).log_softmax(-1)
    assert isinstance(target, OnlineTarget)
    torch.testing.assert_close(found, (log_q.exp() * (log_q - log_p)).sum(), rtol=1e-3, atol=0)


def test_what_it_is_made_of():
    whole = network(UNTIED)
    names, count = [name for name, _ in named_weights(whole)], count_weights(whole)
    assert names == [name for name, _ in whole.named_parameters()]
    assert not is_quantized(whole)
    before = weight_bytes(whole)
    quantize_model(whole, "int4")
    assert [name for name, _ in named_weights(whole)] == names
    assert count_weights(whole) == count
    assert 0.14 * before < weight_bytes(whole) < 0.28 * before
    kinds = {name: w.kind for name, w in named_weights(whole) if isinstance(w, Packed)}
    assert {kinds.pop(name) for name in ("embed_tokens.weight", "lm_head.weight")} == {"int8"}
    assert set(kinds.values()) == {"int4"}
    assert torch.equal(copy.deepcopy(whole)(text(UNTIED)), whole(text(UNTIED)))


def test_what_a_quantized_model_cannot_do_is_told():
    model, _ = pair(SMALL, "int8")
    with pytest.raises(Error, match="cannot be trained"):
        model.train()
    hidden = torch.randn(3, 64, requires_grad=True)
    head = model.embed_tokens.weight
    with pytest.raises(Error, match="cannot be trained"):
        Loss(Target.hard(torch.tensor([1, 2, 3])))(hidden[None], head, None)
    with pytest.raises(Error, match="cannot be quantized again"):
        quantize_model(model, "int4")
    with pytest.raises(Error, match="cannot be a teacher"):
        ModelTeacher(model)
    with pytest.raises(Error, match="packed as 'int2'"):
        quantize_model(network(SMALL), "int2")
    assert model.eval() is model
