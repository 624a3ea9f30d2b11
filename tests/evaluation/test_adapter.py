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


quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(asked=pairs())
def test_log_likelihoods_and_greedy_flags(both, asked):
    ours, theirs = (scored(backend, asked) for backend in both)
    if isinstance(theirs, str):
        assert (ours, theirs) == ("Error", "AssertionError")
        return
    for (logprob, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert logprob == pytest.approx(expected, abs=2e-4, rel=1e-5)
        assert greedy == expected_greedy


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
