"""Generation: the same text as `transformers` writes, and nothing that must not be drawn."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from gemstill.checkpoint.huggingface import save
from gemstill.core.errors import Error
from gemstill.infer import generate as room
from gemstill.infer.generate import (
    GenerateConfig,
    generate,
    generate_ids,
    plan,
    prompt_ids,
    run,
    stop_ids,
    stream,
    whole_text,
)
from gemstill.model.transformer import Transformer
from tests.model.reference import BASE, GEMMA3, copy_of, name_of, roughen
from tests.model.tokenizers import TEXT, small_tokenizer

VOCAB = 320
SMALL = replace(BASE, vocab_size=VOCAB + 64, tie_embeddings=False)  # 64 rows of padding
TIED, SMALL3 = replace(SMALL, tie_embeddings=True), replace(GEMMA3, vocab_size=VOCAB)
PROMPTS = ["", "def area", TEXT[3][:40], "# 東京 🙂 straße"]
greedy = {"max_new_tokens": 24, "temperature": 0.0}


def network(config=SMALL, seed=0):
    """A rough network that does not want to end: the ends' rows of the head are zero."""
    model = Transformer(config)
    roughen(model, seed)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    with torch.no_grad():
        head.weight[sorted(stop_ids(small_tokenizer()))] = 0.0
    return model.eval()


@torch.no_grad()
def lean(model, ids, by=1.0):
    """Make `ids` the likeliest by far, wherever the model stands: their rows of the head alone get every vote."""
    model.lm_head.weight.zero_()
    model.norm.weight.fill_(-1.0)  # a gain of 0 ...
    model.norm.weight[0] = 9.0  # ... but for one entry, whose sign then decides
    model.lm_head.weight[ids, 0] = by
    return model


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("config", [SMALL, TIED, SMALL3], ids=name_of)
def test_greedy_equals_transformers(config, prompt):
    """24 tokens behind prompts on both sides of the window of 4."""
    model, tokenizer = network(config), small_tokenizer()
    ids = prompt_ids(tokenizer, prompt)
    banned = [*sorted(tokenizer.control_ids - stop_ids(tokenizer)), *range(tokenizer.vocab_size, config.vocab_size)]
    ends = {"eos_token_id": sorted(stop_ids(tokenizer)), "pad_token_id": tokenizer.pad_id}
    settings = GenerationConfig(max_new_tokens=24, do_sample=False, suppress_tokens=banned, **ends)
    expected = copy_of(model, config).generate(torch.tensor([ids]), generation_config=settings)[0, len(ids) :].tolist()
    assert len(expected) == 24
    assert list(generate_ids(model, tokenizer, ids, **greedy)) == expected
    assert generate(model, tokenizer, prompt, **greedy) == "".join(stream(model, tokenizer, prompt, **greedy)) != ""


def test_a_prompt_longer_than_a_chunk(monkeypatch):
    model, tokenizer = network(), small_tokenizer()
    ids = prompt_ids(tokenizer, TEXT[0])
    expected = list(generate_ids(model, tokenizer, ids, **greedy))
    monkeypatch.setattr(room, "CHUNK", 7)
    assert list(generate_ids(model, tokenizer, ids, **greedy)) == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_padded_vocabulary_never_drawn(temperature):
    """256,000 of 256,128: rows without a token would decode to nothing, or crash (trl#2215)."""
    model, tokenizer = network(), small_tokenizer()
    lean(model, list(range(VOCAB, SMALL.vocab_size)), by=5.0)
    with torch.no_grad():
        model.lm_head.weight[10:VOCAB, 0] = 4.0
        model.norm.weight[0] = 9.0
    ids = list(generate_ids(model, tokenizer, [2, 30], max_new_tokens=200, temperature=temperature))
    assert ids
    assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("temperature", [0.0, 1.0, 50.0])
def test_control_tokens_never_drawn(temperature):
    model, tokenizer = network(), small_tokenizer()
    control = tokenizer.control_ids - stop_ids(tokenizer)
    assert {tokenizer.bos_id, tokenizer.pad_id, tokenizer.unk_id} <= control
    for sign in (5.0, -5.0):  # whichever sign the one open entry has
        lean(model, sorted(control), by=sign)
        ids = list(generate_ids(model, tokenizer, [2, 30], max_new_tokens=100, temperature=temperature))
        assert not control & set(ids)


@pytest.mark.parametrize("name", ["<eos>", "<end_of_turn>"])
def test_generation_stops_at_the_end(name):
    model, tokenizer = network(), small_tokenizer()
    end = tokenizer.token_id(name)
    assert end in stop_ids(tokenizer)
    outcomes = [generate(lean(model, [end], by=sign), tokenizer, "def", max_new_tokens=5) for sign in (5.0, -5.0)]
    assert "" in outcomes


def test_bos_exactly_once():
    """Twice, when a template and the tokenizer both give it (llama-cpp-python#1561); never, when both leave it away."""
    model, tokenizer = network(), small_tokenizer()
    for prompt in (*PROMPTS, "<bos>def", "<bos><bos>"):
        seen = []
        hook = model.embed_tokens.register_forward_pre_hook(lambda _, args, seen=seen: seen.extend(args[0][0].tolist()))
        generate(model, tokenizer, prompt, max_new_tokens=1)
        hook.remove()
        assert seen[0] == tokenizer.bos_id
        assert seen.count(tokenizer.bos_id) == 1


def test_seeds_and_temperature():
    model, tokenizer = network(), small_tokenizer()
    options = {"max_new_tokens": 30, "temperature": 3.0}
    first = generate(model, tokenizer, "def", seed=1, **options)
    assert generate(model, tokenizer, "def", seed=1, **options) == first
    assert generate(model, tokenizer, "def", seed=2, **options) != first
    cold = generate(model, tokenizer, "def", seed=1, max_new_tokens=30, temperature=1e-4)
    assert cold == generate(model, tokenizer, "def", max_new_tokens=30)


def test_draws_follow_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, 1.0, 0.0, -torch.inf, -3.0])
    expected = torch.softmax(logits / 2.0, 0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([room._draw(logits, 2.0, generator) for _ in range(4000)])
    share = torch.bincount(draws, minlength=5) / len(draws)
    assert share[3] == 0
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / len(draws)).sqrt()).all()


def test_generation_ends_where_the_context_does():
    tokenizer = small_tokenizer()
    model = network(replace(SMALL, max_position=10))
    ids = prompt_ids(tokenizer, "ab")
    assert 0 < len(list(generate_ids(model, tokenizer, ids, max_new_tokens=99))) <= 10 - len(ids)
    assert generate(model, tokenizer, "ab", max_new_tokens=0) == ""
    with pytest.raises(Error, match="context of 10"):
        generate(model, tokenizer, "abcdefghijklmnop" * 2)


@pytest.mark.parametrize("options", [{"max_new_tokens": -1}, {"temperature": -0.5}, {"temperature": float("nan")}])
def test_bad_options_are_refused_before_anything_runs(options):
    with pytest.raises(Error):
        stream(network(), small_tokenizer(), "a", **options)
    with pytest.raises(Error):
        GenerateConfig(model="folder", **options)


def test_bfloat16_generates():
    model = network()
    model.compute_dtype = torch.bfloat16
    assert len(list(generate_ids(model, small_tokenizer(), [2, 40], **greedy))) > 3


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_streamed_pieces_are_whole_characters(text):
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    pieces = list(whole_text(tokenizer, iter(ids)))
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in piece for piece in pieces)
    assert all(pieces)


def test_broken_bytes_are_shown_and_end():
    """A model may write bytes that are no UTF-8: they come out as U+FFFD, and what follows still comes."""
    tokenizer = small_tokenizer()
    bad = [tokenizer.token_id("<0xFF>")] * 6
    pieces = list(whole_text(tokenizer, iter([*bad, *tokenizer.encode("def")])))
    assert "".join(pieces) == "\ufffd" * 6 + "def"
    half = tokenizer.encode("界")[:2]
    assert tokenizer.decode(half) == "".join(whole_text(tokenizer, iter(half))) == "\ufffd\ufffd"


def test_the_command(tmp_path, capsys):
    save(network(), small_tokenizer(), tmp_path / "model")
    config = GenerateConfig(model=tmp_path / "model", prompt="def", max_new_tokens=8)
    run(config)
    assert capsys.readouterr().out == generate(network(), small_tokenizer(), "def", max_new_tokens=8) + "\n"
    figures = plan(config)
    assert figures["prompt_tokens"] == len(prompt_ids(small_tokenizer(), "def"))
    assert figures["cache_bytes"] > 0
    with pytest.raises(Error, match="no such folder"):
        run(GenerateConfig(model=tmp_path / "nothing"))
