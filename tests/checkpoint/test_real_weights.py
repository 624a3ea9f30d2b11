"""The published Gemma 3 270M answers here as it does elsewhere: in `transformers` and llama.cpp, on real prose.

Perplexity is taken over ten windows of 1,024 tokens, twice what the local layers look back; the first two are
compared by whole distributions too. All compute in float32, keys and values included; only llama.cpp on the file
as published, or beside other formats than float32, rounds activations. Run with -s to see the figures.
"""

from __future__ import annotations

import functools
import importlib
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gemstill.checkpoint.gguf import load_gguf, save_gguf
from gemstill.checkpoint.huggingface import save_folder
from gemstill.core.errors import Error
from gemstill.infer.engine import Engine
from gemstill.infer.generate import Generation, Limits, stop_ids
from gemstill.infer.sampling import Sampling
from gemstill.model.readout import last_logits
from gemstill.model.slots import SlotCache
from gemstill.model.step import Step
from gemstill.ops.native import why_not
from tests.checkpoint.real import WINDOW, WINDOWS, Answers, distance, divergence, logprobs, prose, windows

pytestmark = [pytest.mark.real_weights, pytest.mark.filterwarnings("ignore:.*rounds activations")]
BARS = {"f16": 1e-4, "bf16": 1e-3, "q8_0": 5e-3}  # of the mean KL from our float32
WHOLE = 2  # windows compared by whole distributions
LENGTHS = [32] * 14 + [500] * 3 + [700] * 3  # tokens of the prompts: the middle ones outgrow the window as they go on
NEW, TIE = 64, 0.02


class Ours(NamedTuple):
    answers: Answers
    logits: list[Tensor]  # [WINDOW, V] of each of the first WHOLE windows


class Continuation(NamedTuple):
    prompt: list[int]
    tokens: list[int]  # the likeliest each time
    ended: bool  # whether the model then ended the text itself


@pytest.fixture(scope="module")
def rows(opened) -> list[list[int]]:
    return windows(opened[1])


@pytest.fixture(scope="module")
def ours(opened, rows) -> Ours:
    found, whole = [], []
    for row in rows:
        with torch.inference_mode():
            logits = opened[0](torch.tensor([row]))[0]
        found.append(logprobs(logits, row))
        whole += [logits] if len(whole) < WHOLE else []
    return Ours(Answers(torch.stack(found)), whole)


@pytest.fixture(scope="module")
def continuations(opened) -> list[Continuation]:
    """All written side by side by one engine."""
    model, tokenizer = opened
    ids, engine = prose(tokenizer), Engine(model)
    prompts = [[tokenizer.bos_id, *ids[number * 450 :][: length - 1]] for number, length in enumerate(LENGTHS)]
    texts = [Generation(engine, tokenizer, prompt, Sampling(temperature=0.0), Limits(NEW)) for prompt in prompts]
    for text in texts:
        text.start()
    found = [Continuation(text.prompt, list(text.ids()), text.ended == "end") for text in texts]
    assert sum(len(item.tokens) for item in found) > 0.9 * NEW * len(found)
    return found


@pytest.fixture(scope="module")
def theirs(opened, place: Path) -> Iterator[torch.nn.Module]:
    """The network in `transformers`, from the folder that we write."""
    transformers = pytest.importorskip("transformers")
    save_folder(*opened, place / "folder")
    yield transformers.AutoModelForCausalLM.from_pretrained(place / "folder", dtype=torch.float32).eval()
    shutil.rmtree(place / "folder")


def llama_of(path: Path) -> Callable[[list[int]], Tensor]:
    """The logits of a row in llama.cpp, with keys and values in float32."""
    pytest.importorskip("llama_cpp")
    test = importlib.import_module("tests.checkpoint.test_gguf_llama")
    part = dict.fromkeys(("n_batch", "n_ubatch"), WINDOW // 4)  # it holds the logits of so many tokens twice
    llama = test.open_llama(path, WINDOW, threads=torch.get_num_threads(), logits_all=True, **part)
    return functools.partial(test.scores, llama)


@pytest.fixture(scope="module")
def exported(opened, place: Path) -> Iterator[Callable[[list[int]], Tensor]]:
    """The network in llama.cpp, from the float32 file that we write."""
    path = place / "f32.gguf"
    save_gguf(*opened, path, dtype="f32")
    yield llama_of(path)
    path.unlink()


def test_transformers_on_our_folder(ours: Ours, theirs, rows) -> None:
    """The dequantized weights in a Hugging Face folder: perplexity within 0.01 %, logits within 1e-3."""
    found, apart = [], []
    for number, row in enumerate(rows):
        with torch.inference_mode():
            logits = theirs(torch.tensor([row]), use_cache=False).logits[0]
        found.append(logprobs(logits, row))
        apart += [distance(ours.logits[number], logits)] if number < WHOLE else []
    answers = Answers(torch.stack(found))
    said("transformers, float32", ours.answers, answers, f"logits within {max(apart):.1e}")
    assert abs(ours.answers.above(answers)) < 1e-4
    assert max(apart) < 1e-3


def test_llama_cpp_on_our_float32_export(ours: Ours, exported, rows) -> None:
    """Perplexity within 0.1 %, mean KL from our distributions at most 1e-5."""
    found, apart = [], []
    for number, row in enumerate(rows):
        logits = exported(row)
        found.append(logprobs(logits, row))
        apart += [divergence(ours.logits[number], logits)] if number < WHOLE else []
    answers, mean = Answers(torch.stack(found)), sum(apart) / WHOLE
    said("llama.cpp, our F32 export", ours.answers, answers, f"mean KL {mean:.1e} over {WHOLE * WINDOW} positions")
    assert abs(ours.answers.above(answers)) < 1e-3
    assert mean <= 1e-5


def test_llama_cpp_on_the_published_file(ours: Ours, published: Path, rows) -> None:
    """Perplexity within 1 %, for it rounds activations to eight bits; log-probabilities that go together."""
    logits = llama_of(published)
    answers = Answers(torch.stack([logprobs(logits(row), row) for row in rows]))
    correlation = ours.answers.correlation(answers)
    said("llama.cpp, the file as published", ours.answers, answers, f"correlation {correlation:.5f}")
    assert abs(ours.answers.above(answers)) < 0.01
    assert correlation > 0.999


@pytest.mark.parametrize("kind", BARS)
def test_other_exports_in_llama_cpp(kind: str, opened, ours: Ours, rows, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    save_gguf(*opened, path, dtype=kind)
    logits = llama_of(path)
    path.unlink()
    mean = sum(divergence(ours.logits[number], logits(rows[number])) for number in range(WHOLE)) / WHOLE
    print(f"\ngemma3-270m, our {kind} export in llama.cpp: mean KL {mean:.1e} over {WHOLE * WINDOW} positions")
    assert mean <= BARS[kind]


def test_rounding_to_bfloat16_changes_nothing_that_matters(published: Path, ours: Ours, rows) -> None:
    """The dtype that blocks get by default, against float32: perplexity of two windows within 0.1 %."""
    narrow, _ = load_gguf(published)
    narrow.compute_dtype = torch.float32
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    with torch.inference_mode():
        found = torch.stack([logprobs(narrow(torch.tensor([row]))[0], row) for row in rows[:WHOLE]])
    assert abs(Answers(found).above(Answers(ours.answers.logprobs[:WHOLE]))) < 1e-3


def test_greedy_continuations_are_transformers(continuations, opened, theirs) -> None:
    """Token by token from a cache, ours all together, theirs those of one length."""
    stops = stop_ids(opened[1])
    for length, group in groupby(continuations, lambda item: len(item.prompt)):
        items = list(group)
        prompts = torch.tensor([item.prompt for item in items])
        found = theirs.generate(prompts, do_sample=False, max_new_tokens=NEW)[:, length:].tolist()
        for item, tokens in zip(items, found, strict=True):
            assert tokens[: len(item.tokens)] == item.tokens
            assert len(item.tokens) == NEW or tokens[len(item.tokens)] in stops


@pytest.mark.skipif(bool(why_not()), reason=f"no native kernels: {why_not()}")
def test_the_native_step_says_the_same(continuations, opened) -> None:
    """The ends of prompts three tokens at once, then sixteen texts side by side: their tokens again."""
    model, items = opened[0], continuations[:14] + continuations[17:19]
    most = max(len(item.prompt) for item in items) + NEW
    cache = SlotCache(model.config, len(items), most)
    step = Step(model, cache)
    with torch.inference_mode():
        for slot, item in enumerate(items):
            model(torch.tensor([item.prompt[:-4]]), cache=cache.view(slot), readout=last_logits)
            assert step(item.prompt[-4:-1], [slot] * 3, wanted=[]) is not None
        for number in range(min(len(item.tokens) for item in items)):
            before = [item.tokens[number - 1] if number else item.prompt[-1] for item in items]
            logits = step(before, range(len(items)))
            assert logits is not None
            assert logits.argmax(1).tolist() == [item.tokens[number] for item in items]


def test_keys_and_values_in_int8(opened, ours: Ours, rows) -> None:
    """Prose read in chunks of 128, so that what is seen was stored: perplexity within 0.1 %, mean KL below 2e-3."""
    model, found, apart, same = opened[0], [], 0.0, 0
    for row, exact in zip(rows, ours.logits, strict=False):
        cache, parts = SlotCache(model.config, 1, WINDOW, torch.int8), []
        with torch.inference_mode():
            for part in torch.tensor([row]).split(128, 1):
                parts.append(model(part, cache=cache.view(0))[0])
        logits = torch.cat(parts)
        found.append(logprobs(logits, row))
        apart += divergence(exact, logits) / WHOLE
        same += int((exact.argmax(1) == logits.argmax(1)).sum())
    narrow, wide = Answers(torch.stack(found)), Answers(ours.answers.logprobs[:WHOLE])
    print(
        f"\ngemma3-270m, keys and values in int8, {WHOLE * WINDOW} tokens: perplexity "
        f"{100 * narrow.above(wide):+.4f} %, mean KL {apart:.1e}, likeliest token equal {same / (WHOLE * WINDOW):.2%}"
    )
    assert abs(narrow.above(wide)) < 1e-3
    assert apart < 2e-3


def test_greedy_continuations_are_llama_cpps_up_to_ties(continuations, opened, exported) -> None:
    """The likeliest token after the prompt and each part of our continuation is our next, or as likely as ours."""
    stops, ties = torch.tensor(sorted(stop_ids(opened[1]))), []
    for item in continuations:
        at = len(item.prompt) - 1
        logits = exported([*item.prompt, *item.tokens])[at:]
        best = logits.amax(1)
        chosen = logits[: len(item.tokens)].gather(1, torch.tensor(item.tokens)[:, None])[:, 0]
        behind = best[: len(item.tokens)] - chosen
        if item.ended:
            behind = torch.cat([behind, (best[-1] - logits[-1, stops].max())[None]])
        ties += [gap for gap in behind.tolist() if gap > 0]
    print(f"\n{sum(len(item.tokens) for item in continuations)} tokens in llama.cpp, ties: {ties}")
    assert max(ties, default=0.0) < TIE
    assert len(ties) < len(continuations)


def test_activations_overflow_float16_so_it_is_refused(published: Path, opened, rows, tmp_path: Path) -> None:
    largest, model = [], opened[0]

    def look(_layer, _inputs, output: Tensor) -> None:
        largest.append(round(float(output.abs().max())))

    handles = [layer.register_forward_hook(look) for layer in model.layers[:11]]
    with torch.inference_mode():
        model(torch.tensor([rows[0][:64]]))
    for handle in handles:
        handle.remove()
    print(f"\nlargest activation after each layer: {largest}")
    assert max(largest) > torch.finfo(torch.float16).max
    with pytest.raises(Error, match="overflow float16"):
        load_gguf(published, dtype=torch.float16)
    with pytest.raises(Error, match="overflow float16"):
        save_folder(*opened, tmp_path / "half", dtype=torch.float16)
    with pytest.warns(UserWarning, match="float16"):
        save_gguf(*opened, tmp_path / "half.gguf", dtype="f16")


def said(whom: str, ours: Answers, answers: Answers, more: str) -> None:
    count = ours.logprobs.numel()
    print(
        f"\ngemma3-270m, {count} tokens in {WINDOWS} windows: perplexity {ours.perplexity:.4f}; {whom}: "
        f"{answers.perplexity:.4f}, ours {100 * ours.above(answers):+.4f} %; {more}"
    )
