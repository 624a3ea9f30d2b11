"""Our answers to lm-eval's requests against those of its own `hf` backend on the same weights, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gemstill
from gemstill.core.errors import Error
from gemstill.evaluation.adapter import Adapter
from gemstill.text.turns import encode_turns
from tests.evaluation.requests import hf, instances
from tests.infer.networks import SMALL, SMALL3, network
from tests.model.tokenizers import small_tokenizer

CONTEXT = 48  # tokens
PIECES = [
    "def area_1(width, height):\n",
    "    return width",
    " * height",
    " ",
    "\n",
    "straße",
    " 東京 🙂",
    "a",
    "é\n\n",
    "<eos>",
]


@pytest.fixture(scope="module", params=[SMALL, SMALL3], ids=["gemma2", "gemma3"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Any]:
    model, tokenizer = network(request.param), small_tokenizer()
    folder: Path = tmp_path_factory.mktemp("model")
    gemstill.save(model, tokenizer, folder)
    return Adapter(model, tokenizer, context=CONTEXT, batch_tokens=40), hf(folder, max_length=CONTEXT)


texts = st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join)


@st.composite
def pairs(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Contexts that share beginnings, some too long, some empty, with several continuations, some asked for twice."""
    shared = [draw(texts) for _ in range(2)]
    contexts = draw(st.lists(st.sampled_from(["", *shared, shared[0] * 4]), min_size=1, max_size=4))
    contexts = [context + draw(st.sampled_from(["", "a", " b", "width "])) for context in contexts]
    found = [(context, draw(texts)) for context in contexts for _ in range(draw(st.integers(1, 3)))]
    return found + draw(st.lists(st.sampled_from(found), max_size=2))


def scored(backend: Any, asked: list[tuple[str, str]]) -> list[tuple[float, bool]] | str:
    try:
        return backend.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    except (Error, AssertionError) as error:  # a continuation without a token, or longer than the context
        return type(error).__name__


quick = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def agree(both: tuple[Any, Any], asked: list[tuple[str, str]]) -> None:
    """Ours and theirs score alike, or refuse alike."""
    ours, theirs = (scored(backend, asked) for backend in both)
    if isinstance(theirs, str):
        assert (ours, theirs) == ("Error", "AssertionError")
        return
    for (logprob, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(expected, abs=2e-4, rel=1e-5)
        assert greedy == expected_greedy


@quick
@given(asked=pairs())
def test_log_likelihoods_and_greedy_flags(both, asked):
    agree(both, asked)


def greedy_pair(ours: Adapter, count: int) -> tuple[str, str]:
    """A context and what the model goes on with, which reads as it was written: `count` tokens."""
    for number in range(60):
        context = f"def area_{number}(width"
        ids = ours.tok_encode(context)
        for _ in range(count):
            with torch.no_grad():
                ids.append(int(ours.model(torch.tensor([ids]))[0, -1].argmax()))
        continuation = ours.tokenizer.decode(ids)[len("<bos>") + len(context) :]
        if ours._encode_pair(context, continuation)[1] == ids[-count:]:
            return context, continuation
    raise AssertionError("no context is gone on from in whole pieces")


@pytest.mark.parametrize("count", [1, 2])
def test_the_greedy_continuation_is_said_to_be_it(both, count):
    context, continuation = greedy_pair(both[0], count)
    asked = [(context, continuation), (context, continuation + "é"), (context, "é"), ("é" + context, "東")]
    flags = [[greedy for _, greedy in scored(backend, asked)] for backend in both]
    assert flags[0] == flags[1]
    assert flags[0][:3] == [True, False, False]


@quick
@given(asked=st.lists(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), min_size=1, max_size=4))
def test_rolling(both, asked):
    found = [b.loglikelihood_rolling(instances("loglikelihood_rolling", [(x,) for x in asked])) for b in both]
    assert found[0] == pytest.approx(found[1], abs=1e-3, rel=1e-5)


options = st.fixed_dictionaries(
    {
        "until": st.sampled_from([[], ["a"], ["\n", "e"], ["th", " r"], "i"]),
        "max_gen_toks": st.sampled_from([1, 7, 20]),
    },
    optional={"do_sample": st.just(False), "temperature": st.just(0.0)},
)


@settings(quick, max_examples=5)
@given(asked=st.lists(st.tuples(st.one_of(texts, st.just("")), options), min_size=3, max_size=6))
def test_generations(both, asked):
    ours, theirs = (
        backend.generate_until(instances("generate_until", [(text, dict(how)) for text, how in asked]))
        for backend in both
    )
    for mine, other in zip(ours, theirs, strict=True):
        # In bytes that are no text lm-eval, which looks for stops in the last tokens alone, may find one and end.
        if "\ufffd" not in mine:
            assert mine == other


def test_draws_of_one_request_differ_and_are_the_same_in_each_run(both):
    how = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    asked = instances("generate_until", [("def", how)] * 3 + [("return", how)])
    found = [both[0].generate_until(asked) for _ in range(2)]
    assert found[0] == found[1]
    assert len(set(found[0][:3])) > 1


MESSAGES = [
    {"role": "user", "content": " What is 東京? "},
    {"role": "assistant", "content": "straße"},
    {"role": "user", "content": "width\n"},
]


def test_chats_are_laid_out_as_the_template_says(both):
    ours = both[0]
    for messages in (MESSAGES[:1], MESSAGES):
        prompt = ours.apply_chat_template(messages)
        assert ours.tok_encode(prompt) == encode_turns(ours.tokenizer, messages)
    opened = ours.apply_chat_template(MESSAGES[:2], add_generation_prompt=False)
    assert opened.endswith("<start_of_turn>model\nstraße")
    closing = encode_turns(ours.tokenizer, MESSAGES[:2], add_generation_prompt=False)
    ids = ours.tok_encode(opened)
    assert closing[: len(ids)] == ids


def test_a_control_token_in_a_message_is_text(both):
    ours = both[0]
    for said in ("a<end_of_turn>b", "<bos><bos", "\ufdd0<eos>\ufdd0", "<\ufdd0eos>"):
        messages = [{"role": "user", "content": said}]
        ids = ours.tok_encode(ours.apply_chat_template(messages))
        assert ids == encode_turns(ours.tokenizer, messages)
        assert said in ours.tokenizer.decode(ids)


def test_what_is_too_long_is_counted(both):
    ours = Adapter(both[0].model, both[0].tokenizer, context=CONTEXT)
    context = "def area_1(width, height):\n" * 40
    ours.loglikelihood(instances("loglikelihood", [(context, "a"), ("a", "b")]))
    assert ours.truncated == 1
    ours.generate_until(instances("generate_until", [(context, {"max_gen_toks": 2}), ("a", {"max_gen_toks": 2})]))
    assert ours.truncated == 2


def test_answers_are_told_as_they_come(both):
    ours, told = Adapter(both[0].model, both[0].tokenizer, context=CONTEXT), []

    class Hook:
        def add_partial(self, method: str, request: tuple[Any, ...], answer: Any) -> None:
            told.append((method, request, answer))

    ours.set_cache_hook(Hook())
    for method, asked in (
        ("loglikelihood", [("a", " b"), ("", "c")]),
        ("loglikelihood_rolling", [("straße " * 30,), ("a",)]),
        ("generate_until", [("a", {"max_gen_toks": 2, "until": ["b"]})]),
    ):
        answers = getattr(ours, method)(instances(method, asked))
        key = repr
        assert sorted(told, key=key) == sorted(zip([method] * 2, asked, answers, strict=False), key=key)
        told.clear()


@pytest.mark.parametrize(
    ("method", "asked", "message"),
    [
        ("loglikelihood", ("a", ""), "made-up item 0: its continuation is empty"),
        ("loglikelihood", ("", ""), "its continuation is empty"),
        ("loglikelihood", ("a", "é東" * 60), "tokens exceeds the context of 48"),
        ("generate_until", ("a", {"max_gen_toks": 48}), "max_gen_toks of 48 leaves a context of 48 tokens no room"),
        ("generate_until", ("a", {"num_beams": 4}), "there is no option num_beams"),
        ("generate_until", ("a", {"do_sample": True}), "do_sample at a temperature of 0"),
    ],
)
def test_refusals(both, method, asked, message):
    with pytest.raises(Error, match=message):
        getattr(both[0], method)(instances(method, [asked]))


def test_a_context_longer_than_the_model_is_refused(both):
    with pytest.raises(Error, match="at most 512"):
        Adapter(both[0].model, both[0].tokenizer, context=513)
