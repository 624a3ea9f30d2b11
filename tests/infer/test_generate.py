"""Generation: the same text as `transformers` writes, and nothing that must not be drawn."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from gemstill.core.errors import Error
from gemstill.infer import engine as room
from gemstill.infer.engine import Engine
from gemstill.infer.generate import Generation, Limits, generate, prompt_ids, stop_ids, stream
from gemstill.infer.pieces import Until, WholeText
from gemstill.infer.sampling import Sampling
from gemstill.model import step as step_room
from gemstill.text.turns import encode_turns
from tests.infer.networks import SMALL, SMALL3, TIED, VOCAB, lean, network
from tests.model.reference import copy_of, name_of
from tests.model.tokenizers import TEXT, small_tokenizer


def whole_text(tokenizer, ids):
    """The pieces that WholeText makes of ids."""
    text = WholeText(tokenizer)
    pieces = [*map(text.push, ids), text.rest()]
    return [piece for piece in pieces if piece]


def until(pieces, stop):
    """The pieces that Until makes of pieces, and whether it found a stop string."""
    text = Until(stop)
    shown = [*map(text.push, pieces), text.rest()]
    return [piece for piece in shown if piece], text.found


PROMPTS = ["", "def area", TEXT[3][:40], "# 東京 🙂 straße"]
greedy = {"max_new_tokens": 24, "temperature": 0.0}


def generate_ids(model, tokenizer, ids, *, max_new_tokens=128, **options):
    """The ids alone that are generated after `ids`."""
    return Generation(Engine(model), tokenizer, ids, Sampling(**options), Limits(max_new_tokens)).ids()


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


def test_bos_exactly_once(monkeypatch):
    """Twice, when a template and the tokenizer both give it (llama-cpp-python#1561); never, when both leave it away."""
    monkeypatch.setattr(step_room, "kernels", lambda _: None)  # so that all tokens go through the embedding's module
    model, tokenizer = network(), small_tokenizer()
    for prompt in (*PROMPTS, "<bos>def", "<bos><bos>"):
        seen = []
        hook = model.embed_tokens.register_forward_pre_hook(lambda _, args, seen=seen: seen.extend(args[0][0].tolist()))
        generate(model, tokenizer, prompt, max_new_tokens=1)
        hook.remove()
        assert seen[0] == tokenizer.bos_id
        assert seen.count(tokenizer.bos_id) == 1


def test_several_prompts_are_written_as_each_alone():
    model, tokenizer = network(), small_tokenizer()
    turns = [{"role": "user", "content": "def"}]
    options = {"max_new_tokens": 12, "temperature": 2.0, "seed": 3}
    for prompts in (PROMPTS, [turns, PROMPTS[1], turns], PROMPTS * 5):
        alone = [generate(model, tokenizer, prompt, **options) for prompt in prompts]
        assert generate(model, tokenizer, prompts, **options) == alone
    stop = alone[1][3:6]
    cut = [text.partition(stop)[0] for text in alone]
    assert generate(model, tokenizer, PROMPTS * 5, stop=[stop], **options) == cut
    with pytest.raises(Error, match="more than the model's context"):
        generate(model, tokenizer, ["a", "abc " * 600])


def test_a_generation_that_is_left_frees_its_slot():
    model, tokenizer = network(), small_tokenizer()
    engine = Engine(model, slots=1)
    pieces = iter(Generation(engine, tokenizer, [2, 40], Sampling(), Limits(100)))
    next(pieces)
    pieces.close()
    assert not engine.step()
    later = Generation(engine, tokenizer, [2, 40], Sampling(), Limits(12))
    assert "".join(later) == "".join(Generation(Engine(model), tokenizer, [2, 40], Sampling(), Limits(12)))
    unwanted = Generation(engine, tokenizer, [2, 40], Sampling(), Limits(12))
    unwanted.cancel()
    assert (list(unwanted), unwanted.ended, unwanted.tokens) == ([], "cancelled", [])


def test_seeds_and_temperature():
    model, tokenizer = network(), small_tokenizer()
    options = {"max_new_tokens": 30, "temperature": 3.0}
    first = generate(model, tokenizer, "def", seed=1, **options)
    assert generate(model, tokenizer, "def", seed=1, **options) == first
    assert generate(model, tokenizer, "def", seed=2, **options) != first
    cold = generate(model, tokenizer, "def", seed=1, max_new_tokens=30, temperature=1e-4)
    assert cold == generate(model, tokenizer, "def", max_new_tokens=30)


def test_generation_ends_where_the_context_does():
    tokenizer = small_tokenizer()
    model = network(replace(SMALL, max_position=10))
    ids = prompt_ids(tokenizer, "ab")
    assert 0 < len(list(generate_ids(model, tokenizer, ids, max_new_tokens=99))) <= 10 - len(ids)
    assert generate(model, tokenizer, "ab", max_new_tokens=0) == ""
    with pytest.raises(Error, match="context of 10"):
        generate(model, tokenizer, "abcdefghijklmnop" * 2)


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": -1}, {"temperature": -0.5}, {"top_p": 2}, {"stop": [""]}, {"stop": "text"}, {"stop": [3]}],
)
def test_bad_options_are_refused_before_anything_runs(options):
    with pytest.raises(Error):
        stream(network(), small_tokenizer(), "a", **options)


def test_it_says_why_it_ended():
    model, tokenizer = network(), small_tokenizer()

    def ended(model=model, prompt="ab", **options):
        pieces = stream(model, tokenizer, prompt, **options)
        assert pieces.ended == ""
        text = "".join(pieces)
        return pieces.ended, text

    assert ended(max_new_tokens=4)[0] == "length"
    assert ended(network(replace(SMALL, max_position=10)), max_new_tokens=99)[0] == "context"
    text = ended(**greedy)[1]
    assert ended(stop=[text[4:7]], **greedy) == ("stop", text[: text.find(text[4:7])])
    eos = [lean(network(), [tokenizer.eos_id], by=sign) for sign in (5.0, -5.0)]
    assert ("end", "") in [ended(model) for model in eos]
    pieces = stream(model, tokenizer, "ab", max_new_tokens=50)
    for number, _ in enumerate(pieces):
        if number == 3:
            pieces.cancel()
    assert pieces.ended == "cancelled"
    assert len(pieces.tokens) < 50


def test_log_probabilities_are_the_models_own():
    """Of the whole distribution, whatever sampling makes of it; equal to one pass over the text without a cache."""
    model, tokenizer = network(), small_tokenizer()
    pieces = stream(model, tokenizer, "def", max_new_tokens=20, temperature=2.0, top_k=7, seed=3)
    list(pieces)
    ids = [token.id for token in pieces.tokens]
    with torch.no_grad():
        logits = model(torch.tensor([[*pieces.prompt, *ids]]))[0, len(pieces.prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([token.logprob for token in pieces.tokens]), expected, atol=1e-4, rtol=1e-4)


def test_logits_that_are_no_numbers_are_said():
    model = network()
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(Error, match="no numbers"):
        generate(model, small_tokenizer(), "def")


def test_messages_are_answered():
    model, tokenizer = network(), small_tokenizer()
    messages = [{"role": "user", "content": "def <end_of_turn>"}]
    ids = encode_turns(tokenizer, messages)
    assert ids.count(tokenizer.token_id("<end_of_turn>")) == 1
    pieces = stream(model, tokenizer, messages, **greedy)
    assert pieces.prompt == ids
    assert "".join(pieces) == generate(model, tokenizer, messages, **greedy)
    assert [token.id for token in pieces.tokens] == list(generate_ids(model, tokenizer, ids, **greedy))


def test_images_are_refused():
    message = {"role": "user", "content": [{"type": "image", "url": "x.png"}]}
    with pytest.raises(Error, match="this is a text model"):
        generate(network(), small_tokenizer(), [message])


def test_bfloat16_generates():
    model = network()
    model.compute_dtype = torch.bfloat16
    assert len(list(generate_ids(model, small_tokenizer(), [2, 40], **greedy))) > 3


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=20))
def test_streamed_pieces_are_whole_characters(text):
    tokenizer = small_tokenizer()
    ids = tokenizer.encode(text)
    pieces = whole_text(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in tokenizer.decode(ids):
        assert not any("\ufffd" in piece for piece in pieces)
    assert all(pieces)


def test_broken_bytes_are_shown_and_end():
    """A model may write bytes that are no UTF-8: they come out as U+FFFD, and what follows still comes."""
    tokenizer = small_tokenizer()
    bad = [tokenizer.token_id("<0xFF>")] * 6
    pieces = whole_text(tokenizer, [*bad, *tokenizer.encode("def")])
    assert "".join(pieces) == "\ufffd" * 6 + "def"
    half = tokenizer.encode("界")[:2]
    assert tokenizer.decode(half) == "".join(whole_text(tokenizer, half)) == "\ufffd\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_nothing_of_a_stop_string_is_shown_however_the_text_is_cut(data):
    text = data.draw(st.text("ab<>", max_size=30))
    stops = data.draw(st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    shown, found = until(pieces, stops)
    ends = sorted((text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text)
    assert "".join(shown) == (text[: ends[0][1]] if ends else text)
    assert found == bool(ends)
    assert all(shown)
    # What was out before the last piece holds no beginning of a stop string at its end but the text's own.
    for count in range(len(shown)):
        before = "".join(shown[:count])
        if ends:
            assert len(before) <= ends[0][1]


def test_clear_text_is_not_held_back():
    assert Until(["<end>"]).push("abc<") == "abc"
    assert until(["abc<", "en", "x"], ["<end>"]) == (["abc", "<enx"], False)
    assert until(["abc<", "en"], ["<end>"]) == (["abc", "<en"], False)


def test_stop_strings_over_several_tokens():
    model, tokenizer = network(), small_tokenizer()
    text = generate(model, tokenizer, "def", **greedy)
    for start in range(1, len(text) - 4):
        stop = text[start : start + 4]
        pieces = stream(model, tokenizer, "def", stop=["never", stop], **greedy)
        shown = ""
        for piece in pieces:
            shown += piece
            assert text[: text.find(stop)].startswith(shown)
        assert shown == text[: text.find(stop)]
