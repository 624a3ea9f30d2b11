"""The network against `transformers`' Gemma2ForCausalLM and Gemma3ForCausalLM, over a grid of configurations."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from gemstill.model.config import ModelConfig
from gemstill.model.readout import LogProbs, Loss, last_logits
from gemstill.model.slots import SlotCache
from gemstill.model.transformer import Transformer
from gemstill.ops.target import Target
from tests.model.reference import (
    AXES,
    BASE,
    GEMMA3,
    TIME,
    copy_of,
    grid,
    name_of,
    ours,
    roughen,
    text,
    their_logits,
    theirs,
)

OTHER_GEMMA3 = replace(GEMMA3, num_layers=6, tie_embeddings=False, num_kv_heads=1, final_logit_softcap=30.0)
GRID = [*grid(24), GEMMA3, OTHER_GEMMA3]
each = pytest.mark.parametrize("config", GRID, ids=name_of)


def test_grid_covers_every_value_of_every_axis():
    for name, values in AXES.items():
        if name == "heads":
            assert {(c.num_heads, c.num_kv_heads) for c in GRID} >= set(values)
        else:
            assert {getattr(c, name) for c in GRID} >= set(values)
    assert any(c.head_dim * c.num_heads != c.hidden_size for c in GRID)


def test_grid_weights_make_the_caps_bite():
    tokens = text(BASE)
    with torch.no_grad():
        plain = ours(BASE)(tokens)
        for name in ("attn_logit_softcap", "final_logit_softcap"):
            uncapped = Transformer(replace(BASE, **{name: None}))
            uncapped.load_state_dict(ours(BASE).state_dict())
            assert (uncapped(tokens) - plain).abs().max() > 0.1


@each
def test_logits(config):
    tokens = text(config)
    torch.testing.assert_close(run(config, tokens), their_logits(theirs(config), tokens), atol=1e-4, rtol=0)


@each
def test_loss_and_gradients(config):
    """The loss is a readout: cap, tied head and weights go through it, and its gradient through all parameters."""
    model, reference = Transformer(config), copy_of(ours(config), config)
    model.load_state_dict(ours(config).state_dict())
    tokens, labels = text(config), text(config, seed=2)
    weight = torch.rand(labels.numel(), generator=torch.Generator().manual_seed(3)).round(decimals=1)
    loss = model(tokens, readout=Loss(Target.hard(labels.flatten(), weight)))
    loss.backward()
    logits = reference(input_ids=tokens, use_cache=False).logits.flatten(0, 1)
    expected = (F.cross_entropy(logits, labels.flatten(), reduction="none") * weight).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-5)
    wanted = {name.removeprefix("model."): parameter.grad for name, parameter in reference.named_parameters()}
    whole = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - wanted[name]).norm() / wanted[name].norm()
        difference = (parameter.grad - wanted[name]).norm()
        # Where a window of 1 leaves nothing to attend to, the gradients of queries and keys are rounding about zero.
        assert difference <= 1e-4 * wanted[name].norm() + 1e-6 * whole, f"{name}: {difference:.1e}"


@each
def test_left_padding_gives_the_same_answer(config):
    """Rows of different lengths, padded on the left, as batched generation needs them (transformers#32390)."""
    lengths, longest = [TIME, 5, 1], TIME
    texts = [text(config, 1, length, seed=length) for length in lengths]
    tokens = torch.cat([F.pad(t, (longest - t.shape[1], 0)) for t in texts])
    documents = torch.tensor([[-1] * (longest - length) + [0] * length for length in lengths])
    answer = run(config, tokens, documents=documents)
    assert answer.isfinite().all()
    for row, own in enumerate(texts):
        alone = their_logits(theirs(config), own)[0]
        torch.testing.assert_close(answer[row, -len(alone) :], alone, atol=1e-4, rtol=0)


@each
def test_packed_documents_do_not_leak(config):
    """Several texts in one row: each is answered as if alone, its positions counted from 0."""
    texts = [text(config, 1, length, seed=length) for length in (6, 1, 9, 4)]
    tokens = torch.cat(texts, 1)
    # The ids of neighbours differ; that of the first comes again later, as ids that count modulo something would.
    documents = torch.cat([torch.full_like(t, number) for t, number in zip(texts, (0, 1, 7, 0), strict=True)], 1)
    documents[0, -4:] = 5
    answer = run(config, tokens, documents=documents)
    expected = torch.cat([their_logits(theirs(config), t) for t in texts], 1)
    torch.testing.assert_close(answer, expected, atol=1e-4, rtol=0)


@each
@pytest.mark.parametrize("sizes", [(5, 5, 3), (1,) * TIME, (2, 7, 4)], ids=["chunks", "decoding", "uneven"])
def test_chunked_prefill_into_ring_keeps_what_early_queries_see(config, sizes):
    """A chunk longer than what the ring has free pushes out keys that its own first queries still look at."""
    tokens = text(config)
    cache = SlotCache(config, len(tokens), TIME).view(*range(len(tokens)))
    answer = torch.cat([run(config, part, cache=cache) for part in tokens.split(sizes, 1)], 1)
    torch.testing.assert_close(answer, their_logits(theirs(config), tokens), atol=1e-4, rtol=0)


@each
def test_decoding_past_the_window_of_texts_of_different_lengths(config):
    lengths = [6, 2]
    texts = [text(config, 1, length + TIME, seed=length) for length in lengths]
    cache = SlotCache(config, 2, max(lengths) + TIME)
    prompts = [t[:, :length] for t, length in zip(texts, lengths, strict=True)]
    answers = [torch.cat([run(config, own, cache=cache.view(n))[:, -1:] for n, own in enumerate(prompts)])]
    for step in range(TIME):
        fed = torch.cat([t[:, length + step, None] for t, length in zip(texts, lengths, strict=True)])
        answers.append(run(config, fed, cache=cache.view(0, 1)))
    answer = torch.cat(answers, 1)
    for row, (own, length) in enumerate(zip(texts, lengths, strict=True)):
        expected = their_logits(theirs(config), own)[0, length - 1 :]
        torch.testing.assert_close(answer[row], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("config", [*grid(4, seed=5), GEMMA3], ids=name_of)
def test_bfloat16_is_no_further_from_float64_than_theirs(config):
    """Storage float32, compute bfloat16, and storage bfloat16: both against float64 on the same (rounded) weights."""
    model = Transformer(config)
    roughen(model, 4)
    model.bfloat16()
    wide = Transformer(config).double()
    wide.load_state_dict(model.state_dict())
    mixed = Transformer(config, compute_dtype=torch.bfloat16)
    mixed.load_state_dict(model.state_dict())
    tokens = text(config, 4, 48)
    with torch.no_grad():
        exact = wide(tokens)
        their_error = (their_logits(copy_of(model, config), tokens) - exact).square().mean().sqrt()
        for candidate in (model, mixed):
            assert (candidate(tokens) - exact).square().mean().sqrt() <= 1.5 * their_error


def test_float64_agrees_with_float32():
    wide = Transformer(BASE).double()
    wide.load_state_dict(ours(BASE).state_dict())
    with torch.no_grad():
        exact = wide(text(BASE))
    assert exact.dtype == torch.float64
    torch.testing.assert_close(run(BASE, text(BASE)).double(), exact, atol=1e-4, rtol=0)


WINDOWS = ((1, 4), (5, 2), (128, 2), (129, 1), (300, 2))
LONG = [replace(BASE, sliding_window=window, num_kv_heads=kv_heads) for window, kv_heads in WINDOWS]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("time", [129, 257, 520])
@pytest.mark.parametrize("config", LONG, ids=name_of)
def test_long_texts_in_tiles_and_bands(config, time, packed):
    """Long texts skip keys out of sight; positions given by hand switch that off and must change nothing."""
    tokens = text(config, 1, time)
    documents = torch.zeros_like(tokens)
    edges = [0, 3, 130, 131, time] if packed and time > 131 else [0, time]
    for number, (first, last) in enumerate(pairwise(edges)):
        documents[:, first:last] = number
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(edges)])[None]
    answer = run(config, tokens, documents=documents)
    torch.testing.assert_close(answer, run(config, tokens, documents=documents, positions=positions), atol=1e-4, rtol=0)
    if time == 257:
        alone = [their_logits(theirs(config), tokens[:, a:b]) for a, b in pairwise(edges)]
        torch.testing.assert_close(answer, torch.cat(alone, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("time", [257, 520])
@pytest.mark.parametrize("config", LONG, ids=name_of)
def test_gradients_of_long_texts(config, time):
    tokens, labels = text(config, 2, time), text(config, 2, time, seed=2)
    loss = Loss(Target.hard(labels.flatten()))
    positions = torch.arange(time).expand(2, -1)
    plain, tiled = gradients(config, tokens, loss, positions=positions), gradients(config, tokens, loss)
    whole = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    for name, gradient in tiled.items():
        assert (gradient - plain[name]).norm() <= 1e-4 * plain[name].norm() + 1e-6 * whole, name


@pytest.mark.parametrize("config", [BASE, GEMMA3], ids=["gemma2", "gemma3"])
def test_activation_checkpointing_changes_nothing(config):
    tokens, labels = text(config), text(config, seed=2)
    loss = Loss(Target.hard(labels.flatten()))
    plain, saved = gradients(config, tokens, loss), gradients(config, tokens, loss, checkpointing=True)
    for name, gradient in saved.items():
        torch.testing.assert_close(gradient, plain[name], atol=0, rtol=0)


def test_readouts_agree_with_the_logits():
    tokens, ids = text(BASE), text(BASE, seed=2)
    full = run(BASE, tokens)
    torch.testing.assert_close(run(BASE, tokens, readout=last_logits), full[:, -1])
    expected = full.log_softmax(-1).gather(2, ids[..., None])[..., 0]
    torch.testing.assert_close(run(BASE, tokens, readout=LogProbs(ids)), expected, atol=1e-5, rtol=1e-5)


def run(config: ModelConfig, tokens, **options):
    with torch.no_grad():
        return ours(config)(tokens, **options)


def gradients(config, tokens, loss, checkpointing=False, **options):
    model = Transformer(config)
    model.load_state_dict(ours(config).state_dict())
    model.checkpointing = checkpointing
    model(tokens, readout=loss, **options).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}
