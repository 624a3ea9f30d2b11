"""Sampling: the same distributions as the logits processors of `transformers` leave, and draws that follow them."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gemstill.core.errors import Error
from gemstill.infer.sampling import Sampler, Sampling

VOCAB = 3000
SEEN = [5, 17, 17, 900, 2999]
GRID = list(
    itertools.product((0.3, 1.0, 4.0), (0, 1, 40, 5000), (0.0, 0.3, 0.9, 1.0), (0.0, 0.02, 1.0), (1.0, 1.7, 0.6))
)


def logits(seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * spread


def dense(sampler: Sampler, scores: Tensor) -> Tensor:
    ids, probs = sampler.candidates(scores)
    assert len(set(ids.tolist())) == len(ids)
    return torch.zeros(len(scores), dtype=torch.float64).index_put((ids,), probs)


def by_transformers(s: Sampling, scores: Tensor, seen: list[int]) -> Tensor:
    steps: list[Any] = []
    if s.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(s.repetition_penalty))
    steps.append(TemperatureLogitsWarper(s.temperature))
    if s.top_k:
        steps.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        steps.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        steps.append(MinPLogitsWarper(s.min_p))
    out = LogitsProcessorList(steps)(torch.tensor([seen]), scores[None].clone())
    return torch.softmax(out[0].double(), 0)


@pytest.mark.parametrize("part", range(6))
def test_distributions_equal_those_of_transformers(part: int) -> None:
    for number, values in list(enumerate(GRID))[part::6]:
        s = Sampling(*values)
        sampler = Sampler(s)
        sampler.see(SEEN)
        scores = logits(number)
        ours, theirs = dense(sampler, scores), by_transformers(s, scores, SEEN)
        # In float32 the sum at which top-p cuts may fall on either side of it: one token more or less there.
        odd = (ours > 0) != (theirs > 0)
        assert odd.sum() <= (1 if 0 < s.top_p < 1 else 0), s
        if not odd.any():
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-12)


def test_the_cut_of_top_p_by_hand() -> None:
    """0.5, 0.3, 0.2: a token stays when those before it have less than p together."""
    scores = torch.tensor([0.2, 0.5, 0.3]).log()
    for top_p, left in ((0.0, {1}), (0.4, {1}), (0.6, {1, 2}), (0.79, {1, 2}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2})):
        ids, probs = Sampler(Sampling(1.0, top_p=top_p)).candidates(scores)
        assert set(ids.tolist()) == left
        assert float(probs.sum()) == pytest.approx(1)


def test_a_nucleus_far_below_the_likeliest() -> None:
    """One token has nearly half of it, thousands share the rest: what is looked at first does not suffice."""
    scores = logits(1, 0.3)
    scores[77] = 8.0
    for top_p in (0.95, 1 - 1e-6):
        s = Sampling(1.0, top_p=top_p)
        ours, theirs = dense(Sampler(s), scores) > 0, by_transformers(s, scores, []) > 0
        assert ours.sum() > 0.8 * VOCAB
        assert (ours == theirs).float().mean() > 0.999


@pytest.mark.parametrize("s", [Sampling(2.0), Sampling(2.0, top_k=4, top_p=0.9), Sampling(1.5, min_p=0.1)])
def test_draws_follow_the_probabilities(s: Sampling) -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -torch.inf, -3.0, 1.5])
    expected = dense(Sampler(s), scores)
    sampler = Sampler(s)
    draws = torch.tensor([sampler.draw(scores.clone()) for _ in range(4000)])
    share = torch.bincount(draws, minlength=6) / len(draws)
    assert (share[expected == 0] == 0).all()
    assert ((share - expected).abs() <= 4 * (expected * (1 - expected) / len(draws)).sqrt()).all()


def test_seeds() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed))
        return [sampler.draw(logits(n)) for n in range(20)]

    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize("temperature", [1e-300, 1e-20, 1e20, 1e300])
def test_extreme_temperatures_keep_what_is_banned_out(temperature: float) -> None:
    scores = logits(0)
    scores[100:] = -torch.inf
    sampler = Sampler(Sampling(temperature, top_p=0.99))
    draws = {sampler.draw(scores.clone()) for _ in range(50)}
    assert max(draws) < 100
    assert draws == {int(scores.argmax())} if temperature < 1 else len(draws) > 10


def test_greedy_with_a_penalty() -> None:
    scores = torch.tensor([3.0, 2.5, -1.0])
    sampler = Sampler(Sampling(0.0, repetition_penalty=2.0))
    assert sampler.draw(scores) == 0
    sampler.see([0])
    assert sampler.draw(scores) == 1
    assert scores.tolist() == [3.0, 2.5, -1.0]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_k": -1},
        {"top_p": 1.1}, {"top_p": float("nan")}, {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"seed": -1},
        {"seed": 1 << 63},
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(Error, match=next(iter(values))):
        Sampling(**values)


def test_a_draw_from_a_large_vocabulary_is_cheap() -> None:
    """Against one sort of all entries, which a plain top-p would do: the median draw takes less."""
    scores = torch.randn(256_000, generator=torch.Generator().manual_seed(0)) * 3
    sampler = Sampler(Sampling(0.8, top_k=64, top_p=0.95, min_p=0.01))
    times: dict[str, list[float]] = {"draw": [], "sort": []}
    for _ in range(9):
        for name, work in (("draw", lambda: sampler.draw(scores)), ("sort", lambda: scores.sort())):
            start = time.thread_time()
            work()
            times[name].append(time.thread_time() - start)
    assert sorted(times["draw"])[4] < sorted(times["sort"])[4]
