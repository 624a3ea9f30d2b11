"""Gemma 3 270M in float32, item for item against lm-eval's own `hf` backend over `transformers`.

Made-up items have the shapes of the benchmarks. The benchmarks' own items come from the folder that the environment
variable GEMSTILL_EVALS names, laid out as docs/evaluation.md says.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

import gemstill
from gemstill.evaluation.adapter import Adapter
from gemstill.evaluation.run import Setting, measure
from gemstill.evaluation.tasks import Asked
from tests.checkpoint.conftest import opened, place, published
from tests.evaluation.requests import hf, instances

__all__ = ["opened", "place", "published"]  # fixtures
pytestmark = [pytest.mark.slow, pytest.mark.real_weights, pytest.mark.filterwarnings("ignore::UserWarning")]

CONTEXT, WINDOW = 2048, 1024  # tokens; in rolling log-likelihoods: `hf` holds the logits of all of them twice
CLOSE = 1e-3  # of a log-likelihood
SHORT = 35  # the seed that draws two short articles of WikiText-2, the longer of 1156 tokens
# HumanEval's own limit, 1024 tokens, would take eight times as long: a base model seldom ends a program.
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
PROGRAM = {"generation_kwargs": {"until": STOPS, "max_gen_toks": 128, "do_sample": False}}
SUBJECTS = ("astronomy", "college_biology", "global_facts", "marketing", "world_religions")
# Items of each task that take some minutes together: of a group's, or a long prompt's, fewer.
TASKS = [
    (Asked("arc_easy"), 16), (Asked("arc_challenge", 25), 3), *((Asked(f"mmlu_{name}", 5), 4) for name in SUBJECTS),
    (Asked("winogrande"), 24), (Asked("piqa"), 16), (Asked("social_iqa"), 16), (Asked("boolq"), 16),
    (Asked("gsm8k", 5), 8), (Asked("humaneval", variant="short", overrides=PROGRAM), 8),
    (Asked("truthfulqa_mc2"), 8), (Asked("wikitext"), 2),
]  # fmt: skip
WORDS = " ".join(topics[name] for name in ("objects", "execmodel", "exceptions", "import", "function")).split()


@pytest.fixture(scope="module")
def backends(opened, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Any]:
    model, tokenizer = opened
    folder = tmp_path_factory.mktemp("exported")
    gemstill.save(model, tokenizer, folder)
    # A log-softmax over 262,144 entries in float32 is off by 2.5e-5, always upwards: in 40 tokens by all of CLOSE.
    theirs = hf(folder, max_length=CONTEXT, batch_size=1, softmax_dtype="float64")
    return Adapter(model, tokenizer, context=CONTEXT), theirs


def answers(response: Any) -> list[Any]:
    """What a backend says to a request, told apart: log-probability and flag, log-probability, or text."""
    return list(response) if isinstance(response, tuple | list) else [response]


def compare(ours: list[Any], theirs: list[Any]) -> float:
    """The largest difference of two log-likelihoods; all else is equal."""
    assert len(ours) == len(theirs) > 0
    largest = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        for one, another in zip(answers(mine), answers(other), strict=True):
            if isinstance(one, float):
                largest = max(largest, abs(one - another))
            else:
                assert one == another
    assert largest < CLOSE
    return largest


@pytest.mark.parametrize(("asked", "items"), TASKS, ids=[asked.name for asked, _ in TASKS])
def test_items_of_the_benchmarks(backends, monkeypatch, asked: Asked, items: int) -> None:
    root = os.environ.get("GEMSTILL_EVALS")
    if not root:
        pytest.skip("needs the benchmarks' items: GEMSTILL_EVALS names their folder")
    if asked.shots:  # a long context and few tokens asked for: the memory matters, the softmax does not
        monkeypatch.setattr(backends[1], "softmax_dtype", None)
    if asked.name in ("gsm8k", "humaneval"):  # one text at a time would take a quarter of an hour
        monkeypatch.setattr(backends[1], "batch_size_per_gpu", items)
    if asked.name == "wikitext":
        _windows(monkeypatch, *backends)
    setting = Setting(limit=items, data_root=Path(root), seed=SHORT if asked.name == "wikitext" else 0)
    ours, theirs = (
        measure(lm, name, [asked], setting, None, None, name) for lm, name in zip(backends, "ab", strict=True)
    )
    assert asked.label() in ours["results"]
    largest, seen = 0.0, set()  # of the samples each filter of a task has its own
    for task, samples in ours["samples"].items():
        for mine, other in zip(samples, theirs["samples"][task], strict=True):
            largest = max(largest, compare(*([r[0] for r in x["resps"]] for x in (mine, other))))
            seen.add((task, mine["doc_id"]))
    assert len(seen) == items
    print(f"{asked.name}: {items} items, largest difference {largest:.1e}")
    scores = [{k: v for k, v in x["results"][asked.label()].items() if isinstance(v, float)} for x in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)


def _windows(monkeypatch, ours: Adapter, theirs: Any) -> None:
    monkeypatch.setattr(ours, "max_length", WINDOW)
    monkeypatch.setattr(theirs, "_max_length", WINDOW)


def _words(draw: random.Random, count: int) -> str:
    start = draw.randrange(len(WORDS) - count)
    return " ".join(WORDS[start : start + count])


def _choices(draw: random.Random) -> list[tuple[str, str]]:
    """A few questions with one beginning, four letters each; and contexts gone on with in four ways."""

    def question() -> str:
        return _words(draw, 20) + "?\n" + "".join(f"{letter}. {_words(draw, 5)}\n" for letter in "ABCD") + "Answer:"

    shots = "".join(f"{question()} {draw.choice('ABCD')}\n\n" for _ in range(5))
    asked = [(shots + text, f" {letter}") for text in (question() for _ in range(3)) for letter in "ABCD"]
    for _ in range(3):
        context = _words(draw, 40)
        asked += [(context, f" {_words(draw, draw.randrange(1, 20))}") for _ in range(4)]
    return [
        *asked,
        ("", _words(draw, 8)),
        ("    def f(x):\n", "        return x  \n\n"),
        ("Straße ", "東京 🙂<eos> <unk>"),
    ]


def test_made_up_choices(backends) -> None:
    asked = instances("loglikelihood", _choices(random.Random(0)))
    print(f"largest difference {compare(*(lm.loglikelihood(asked) for lm in backends)):.1e}")


def test_made_up_documents(backends, monkeypatch) -> None:
    _windows(monkeypatch, *backends)
    # The first one in three windows.
    texts = [(topics["execmodel"],), ("A short one.",), ("= Title = \n \n A <unk> text @-@ of Wikipedia . \n",)]
    asked = instances("loglikelihood_rolling", texts)
    print(f"largest difference {compare(*(lm.loglikelihood_rolling(asked) for lm in backends)):.1e}")


def test_made_up_generations(backends) -> None:
    draw = random.Random(1)
    how = {"until": ["\n\n", "Question:"], "max_gen_toks": 40, "do_sample": False}
    asked = [(f"Question: {_words(draw, 12)}\nAnswer: {_words(draw, 12)}\n\nQuestion:", dict(how)) for _ in range(3)]
    compare(*(lm.generate_until(instances("generate_until", asked)) for lm in backends))


def test_the_precision_of_the_comparison(backends) -> None:
    ours, theirs = backends
    assert ours.model.compute_dtype == torch.float32
    assert theirs.model.dtype == torch.float32
