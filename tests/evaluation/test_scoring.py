"""Scores of many texts at once against each text by itself."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from gemstill.evaluation.scoring import score
from gemstill.evaluation.trie import Text, grow
from gemstill.model.config import ModelConfig
from gemstill.model.quantized import quantize_model
from gemstill.model.readout import Scores, logits
from gemstill.model.transformer import Transformer
from tests.model.reference import BASE, GEMMA3, network, ours


def texts(count: int, seed: int = 0) -> list[Text]:
    """Texts over few ids, most of which begin as another does, some within another or twice."""
    draw = random.Random(seed)
    found: list[Text] = []
    for _ in range(count):
        start = [2, *(draw.randrange(4) for _ in range(draw.randrange(60)))]
        if found and draw.random() < 0.6:
            tokens = draw.choice(found).tokens
            start = list(tokens[: draw.randrange(1, len(tokens))])
        tokens = start + [draw.randrange(61) for _ in range(draw.randrange(1, 30))]
        found.append(Text(tokens, draw.randrange(1, len(tokens))))
    return found + found[:3]


@torch.no_grad()
def alone(model: Transformer, text: Text) -> tuple[float, bool]:
    logprobs = model(torch.tensor([text.tokens[:-1]]))[0].log_softmax(1)
    targets = torch.tensor(text.tokens[1:])
    likeliest = logprobs.argmax(1) == targets
    return float(logprobs.gather(1, targets[:, None])[-text.asked :].sum()), bool(likeliest[-text.asked :].all())


@pytest.mark.parametrize("config", [BASE, GEMMA3, replace(BASE, sliding_window=50)], ids=["gemma2", "gemma3", "wide"])
@pytest.mark.parametrize("batch_tokens", [8, 64, 0])
def test_each_text_has_the_score_that_it_has_alone(config: ModelConfig, batch_tokens: int) -> None:
    model, asked = ours(config), texts(15)
    found = list(score(model, asked, batch_tokens=batch_tokens))
    assert sorted(one.text for one in found) == list(range(len(asked)))
    for one in found:
        logprob, greedy = alone(model, asked[one.text])
        assert one.logprob == pytest.approx(logprob, abs=5e-4)
        assert one.greedy == greedy


def test_a_quantized_model() -> None:
    model = network(replace(BASE, hidden_size=64))
    quantize_model(model, "int8")
    asked = texts(6)
    for one in score(model, asked):
        assert one.logprob == pytest.approx(alone(model, asked[one.text])[0], abs=0.05 * len(asked[one.text].tokens))


def test_what_is_shared_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fed = ours(BASE), []
    run = Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda self, x, **how: fed.append(x.shape[1]) or run(self, x, **how))
    shots, questions = list(range(40, 60)) * 5, [[n, 3, 5] for n in range(10)]
    asked = [Text([2, *shots, *question, answer], 1) for question in questions for answer in (7, 8, 9)]
    list(score(model, asked, batch_tokens=50))
    assert sum(fed) == 1 + len(shots) + sum(map(len, questions))
    assert max(fed) <= 50


def test_a_trie_of_texts_within_one_another_is_no_deeper_than_memory() -> None:
    root = grow([Text(range(n), 1) for n in range(2, 3000)])
    assert root.size == 2998


@torch.no_grad()
def test_of_equal_logits_the_first_is_the_likeliest() -> None:
    head = torch.zeros(9, 4)
    head[[3, 5], 0] = 1.0
    hidden = torch.tensor([[[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]])
    ids = torch.tensor([5, 3, 0, 1])
    readout = Scores(torch.arange(2), torch.tensor([0, 0, 1, 1]), ids)
    logprobs, likeliest = readout(hidden, head, 30.0)
    expected = logits(hidden, head, 30.0)[0].log_softmax(1)
    assert likeliest.tolist() == [False, True, True, False]
    assert torch.allclose(logprobs, expected[[0, 0, 1, 1], ids])
