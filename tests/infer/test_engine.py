"""The engine: each answer is what it would be alone, whoever is beside it, and every slot comes back."""

from __future__ import annotations

import math
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from gemstill.core.errors import Error
from gemstill.infer import engine as room
from gemstill.infer import slots as slots_room
from gemstill.infer.engine import Engine
from gemstill.infer.request import Answer, Request
from gemstill.infer.sampling import Sampling
from gemstill.model import slots as cache_room
from gemstill.model import step as step_room
from gemstill.model.config import ModelConfig
from gemstill.model.slots import SlotCache
from gemstill.model.static import Shape, StaticStep
from gemstill.model.transformer import Transformer
from gemstill.ops.native import why_not
from tests.infer.networks import SMALL, SMALL3, TIED, network
from tests.infer.test_sampling import by_transformers
from tests.model.reference import copy_of, name_of

NEW, TIE = 12, 1e-4
WINDOW = SMALL.sliding_window


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [2, *(draw.randrange(8, 300) for _ in range(count - 1))]


def ids(answer: Answer) -> list[int]:
    assert answer.error is None
    return [token.id for token in answer.tokens]


def alone(model: Transformer, prompt: Sequence[int], new: int = NEW, **options: Any) -> list[int]:
    """What a request gets from an engine of its own."""
    return ids(Engine(model).run([Request(prompt, max_new_tokens=new, **options)])[0])


def all_free(engine: Engine) -> bool:
    return not engine._waiting and not any(engine._slots.users) and not engine.step()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step in PyTorch's operations."""
    monkeypatch.setattr(step_room, "kernels", lambda _: None)


@pytest.fixture
def static(monkeypatch: pytest.MonkeyPatch, plain: None) -> Iterator[None]:
    """Slots read in steps and steps in shapes that stay the same, as on a GPU but for the recording."""
    steps: list[int] = []

    class Stepped(SlotCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, stepped=True)

    class Counting(StaticStep):
        def _play(self, shape: Shape, rows: torch.Tensor) -> torch.Tensor:
            steps.append(shape.slots)
            return super()._play(shape, rows)

    monkeypatch.setattr(slots_room, "SlotCache", Stepped)
    monkeypatch.setattr(room, "StaticStep", Counting)
    monkeypatch.setattr(cache_room, "STEP", 16)
    yield
    assert steps


@pytest.fixture(params=["native", "plain", "static"])
def either(request: pytest.FixtureRequest) -> None:
    """The step in native code, where it can be built, and without; and as on a GPU."""
    if request.param != "native":
        request.getfixturevalue(request.param)
    elif why_not() is not None:
        pytest.skip(f"no kernels: {why_not()}")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("config", [SMALL, TIED, SMALL3], ids=name_of)
def test_a_greedy_batch_equals_transformers(config: ModelConfig) -> None:
    """Prompts of 1 to 40 tokens side by side, more of them than slots; theirs one at a time."""
    model, theirs = network(config), copy_of(network(config), config)
    prompts = [tokens(1 + 2 * n, seed=n) for n in range(20)]
    for prompt, answer in zip(prompts, Engine(model).run(Request(p, max_new_tokens=NEW) for p in prompts), strict=True):
        options = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected = theirs.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :]
        assert ids(answer) == expected.tolist()
        assert answer.ended == "length"


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("config", [SMALL, SMALL3], ids=name_of)
def test_the_answer_does_not_depend_on_its_neighbours(config: ModelConfig) -> None:
    """Alone, with 1 and with 15 neighbours: equal up to ties of less than 1e-4 in log-probability."""
    model = network(config)
    wanted = Request(tokens(30), max_new_tokens=60, top_logprobs=2)
    lone = Engine(model).run([wanted])[0]
    for count in (1, 15):
        others = [Request(tokens(3 + 5 * n, seed=n + 1), max_new_tokens=20 + 4 * n) for n in range(count)]
        answer = Engine(model).run([*others, wanted])[-1]
        for ours, theirs in zip(lone.tokens, answer.tokens, strict=True):
            if ours.id != theirs.id:
                assert ours.top[0][1] - ours.top[1][1] < TIE
                break
            assert ours.logprob == pytest.approx(theirs.logprob, abs=TIE)


@pytest.mark.usefixtures("either")
def test_what_was_computed_is_forgotten_and_given_up_between_steps() -> None:
    """With one answer ended and one under way: the next is computed anew, and right."""
    model, prompt = network(), tokens(30)
    engine, due = Engine(model), alone(model, prompt)
    engine.run([Request(tokens(20, seed=1), max_new_tokens=3)])
    answer = engine.submit(Request(prompt, max_new_tokens=NEW))
    for _ in range(3):
        engine.step()
    engine.forget()
    engine.abandon(answer)
    assert answer.ended == "cancelled"
    assert all_free(engine)
    fed = engine.fed
    assert ids(engine.run([Request(prompt, max_new_tokens=NEW)])[0]) == due
    assert engine.fed >= fed + len(prompt)


def test_a_seed_gives_its_text_whenever_it_comes_and_whoever_is_beside_it() -> None:
    model = network()
    requests = [
        Request(tokens(5 + n, seed=n), Sampling(3.0, top_k=(0, 40)[n % 2], top_p=(1, 0.9)[n % 3 == 0], seed=n), NEW)
        for n in range(10)
    ]
    lone = [ids(Engine(model).run([request])[0]) for request in requests]
    engine = Engine(model, slots=3)
    assert [ids(answer) for answer in engine.run(requests)] == lone
    assert [ids(answer) for answer in engine.run(reversed(requests))] == lone[::-1]
    late = engine.submit(requests[0])
    for _ in range(3):
        engine.step()
    assert [ids(answer) for answer in engine.run(requests[4:])] == lone[4:]
    assert ids(late) == lone[0]
    assert len({tuple(text) for text in lone}) == 10


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(4.0), Sampling(9.0), Sampling(6.0, top_k=12), Sampling(5.0, top_p=0.8), Sampling(6.0, min_p=0.05),
        Sampling(4.0, repetition_penalty=1.6), Sampling(5.0, 20, 0.9, 0.02, 1.3),
    ],
)  # fmt: skip
def test_draws_follow_the_distribution_of_transformers(sampling: Sampling) -> None:
    """Chi-square of 1,000 first tokens against their processors on their logits; a vocabulary of 61."""
    config = replace(SMALL, vocab_size=61)
    model, prompt = network_of(config), [2, 7, 30, 7, 12, 55]
    with torch.no_grad():
        logits = copy_of(model, config)(torch.tensor([prompt])).logits[0, -1].float()
    expected = 1000 * by_transformers(sampling, logits, prompt)
    requests = (Request(prompt, replace(sampling, seed=seed), 1) for seed in range(1000))
    found = torch.bincount(torch.tensor([ids(a)[0] for a in Engine(model).run(requests)]), minlength=61)
    assert (found[expected == 0] == 0).all()
    often = expected >= 5
    pairs = [*zip(found[often].tolist(), expected[often].tolist(), strict=True)]
    if (rare := float(expected[~often].sum())) >= 1:
        pairs.append((int(found[~often].sum()), rare))
    freedom = len(pairs) - 1
    assert freedom >= 3
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    # The quantile of 1 - 1e-4 (Wilson and Hilferty 1931).
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def network_of(config: ModelConfig, seed: int = 0) -> Transformer:
    from tests.model.reference import roughen

    model = Transformer(config)
    roughen(model, seed)
    return model.eval()


@cache
def steady() -> Transformer:
    return network()


@cache
def lone(prompt: tuple[int, ...], new: int, temperature: float, seed: int) -> list[int]:
    return alone(steady(), prompt, new, sampling=Sampling(temperature, seed=seed))


PROMPTS = [tuple(tokens(40)[:n]) for n in (1, 2, 9, 25, 40)] + [
    (*tokens(40)[:n], *tokens(9, seed=n)[1:]) for n in (5, 20, 30)
]
CALLS = st.one_of(
    st.tuples(
        st.just("submit"), st.sampled_from(PROMPTS), st.integers(0, 9), st.sampled_from([0.0, 3.0]), st.integers(0, 2)
    ),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.sampled_from(["cancel", "abandon"]), st.integers(0, 30)),
    st.tuples(st.just("forget")),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(CALLS, max_size=24), st.integers(1, 4), st.sampled_from([None, 1.0, 2.5]), st.sampled_from([2, 9]))
def test_any_arrivals_and_cancellations(calls: list[Any], slots: int, budget: float | None, chunk: int) -> None:
    """Every slot is freed, memory stays within what was given, each text is the one it has alone, or its beginning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "CHUNK", chunk + 3)
        patch.setattr(room, "BESIDE", chunk)
        patch.setattr(slots_room, "FIRST_CAPACITY", 3)
        patch.setattr(cache_room, "SPARE", 15)
        engine = Engine(steady(), slots=slots)
        if budget is not None:
            engine = Engine(steady(), slots=slots, memory=int(budget * engine.needs(49)))
        asked: list[tuple[Answer, tuple[Any, ...]]] = []
        for kind, *values in calls:
            if kind == "submit":
                prompt, new, temperature, seed = values
                asked.append((engine.submit(Request(prompt, Sampling(temperature, seed=seed), new)), tuple(values)))
            elif kind == "step":
                for _ in range(values[0]):
                    engine.step()
                    assert engine._slots.memory is None or engine.bytes <= engine._slots.memory
            elif kind == "forget":
                engine.forget()
            elif asked:
                answer = asked[values[0] % len(asked)][0]
                answer.cancel() if kind == "cancel" else engine.abandon(answer)
        while engine.step():
            pass
        assert all_free(engine)
        for answer, values in asked:
            whole = lone(*values)
            assert ids(answer) == (whole[: len(answer.tokens)] if answer.ended == "cancelled" else whole)
            assert answer.ended in ("length", "cancelled")
            assert answer.cancelled or answer.ended == "length"


@pytest.mark.parametrize("spare", [15, 256])
@pytest.mark.parametrize("chunk", [16, 512])
def test_a_common_beginning_is_computed_once(spare: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late in it the others come, and though the rings of whom they follow keep little more than a window."""
    monkeypatch.setattr(cache_room, "SPARE", spare)
    monkeypatch.setattr(room, "CHUNK", chunk)
    monkeypatch.setattr(room, "FEW", min(room.FEW, spare))  # a ring takes no more rows at once than it has to spare
    model, beginning = network(), tokens(60)
    prompts = [[*beginning, 10 + n, *tokens(5, seed=n)] for n in range(12)]
    engine = Engine(model)
    first = [engine.submit(Request(prompt, max_new_tokens=1)) for prompt in prompts[:6]]
    engine.step()
    answers = [*first, *(engine.submit(Request(prompt, max_new_tokens=1)) for prompt in prompts[6:])]
    while engine.step():
        pass
    assert [ids(answer) for answer in answers] == [alone(model, prompt, 1) for prompt in prompts]
    late = spare == 15 and chunk == 512  # the whole beginning and more was read in that one step
    assert engine.fed <= 60 + 12 * 6 + 60 * late
    assert sum(answer.prefilled for answer in answers) == engine.fed


@pytest.mark.skipif(bool(why_not()), reason="no kernels")
def test_short_prompts_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """And beside the next tokens of other texts; none of them is split, for nothing would be gained."""
    sizes: list[int] = []

    class Counting(step_room.Step):
        def __call__(self, tokens: Sequence[int], *more: Any) -> Any:
            sizes.append(len(tokens))
            return super().__call__(tokens, *more)

    monkeypatch.setattr(room, "Step", Counting)
    model, prompts = network(), [tokens(20, seed) for seed in range(1, 8)]
    engine = Engine(model)
    first = engine.submit(Request(prompts[0], max_new_tokens=3))
    engine.step()
    others = engine.run(Request(prompt, max_new_tokens=2) for prompt in prompts[1:])
    assert sizes == [20, 1 + 3 * 20, 3 * 20, 7]
    assert [ids(answer) for answer in (first, *others)] == [
        alone(model, prompt, 2 + (prompt is prompts[0])) for prompt in prompts
    ]


def test_a_text_that_goes_on_is_not_read_again() -> None:
    engine, text = Engine(network()), tokens(20)

    def fed(prompt: list[int]) -> int:
        return engine.run([Request(prompt, max_new_tokens=1)])[0].prefilled

    assert fed(text) == 20
    assert fed([*text, 40, 41, 42]) == 3
    assert fed([*text, 40, 41, 42]) == 1  # the same again: the last token, for its logits
    assert fed([*text, 40, 41, 50]) == 1
    assert fed([*text[:10], 50]) == 1  # the beginning of another text leaves that where it is
    assert fed([*text, 40, 41, 50, 60]) == 1


@pytest.mark.parametrize("config", [SMALL, SMALL3], ids=name_of)
def test_any_walk_over_texts_equals_a_fresh_start(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer, shorter, branching, equal texts on both sides of the window in one slot; chunks and growth on the way."""
    monkeypatch.setattr(room, "CHUNK", 5)
    monkeypatch.setattr(slots_room, "FIRST_CAPACITY", 3)
    monkeypatch.setattr(cache_room, "SPARE", 15)
    model, draw = network(config), random.Random(1)
    engine, text = Engine(model, slots=1), tokens(2)
    for step in range(40):
        keep = draw.choice((len(text), len(text) - 1, draw.randrange(1, len(text) + 1)))
        text = text[: max(1, keep)] + tokens(draw.randrange(4), seed=step)[1:]
        ours, fresh = (e.run([Request(text, top_logprobs=9, max_new_tokens=1)])[0] for e in (engine, Engine(model)))
        assert [number for number, _ in ours.tokens[0].top] == [number for number, _ in fresh.tokens[0].top]
        values = [value for _, value in fresh.tokens[0].top]
        assert [value for _, value in ours.tokens[0].top] == pytest.approx(values, abs=1e-4)
    assert engine.fed < 40 * 6


@pytest.mark.usefixtures("static")
def test_the_same_in_steps_of_static_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that are read a little at a time while neighbours write, each with its own sampling: as alone."""
    test_any_walk_over_texts_equals_a_fresh_start(SMALL3, monkeypatch)
    test_no_numbers_end_their_own_answer()
    monkeypatch.setattr(room, "BESIDE", 6)
    model, prompts = network(), [tokens(3 + 7 * n, seed=n) for n in range(6)]
    requests = [Request(p, Sampling(0.8, seed=n), 3 + 4 * n, logprobs=True) for n, p in enumerate(prompts)]
    together = Engine(model).run(requests)
    monkeypatch.undo()
    for answer, request in zip(together, requests, strict=True):
        (other,) = Engine(model).run([request])
        assert ids(answer) == ids(other)
        values = [token.logprob for token in other.tokens]
        assert [token.logprob for token in answer.tokens] == pytest.approx(values, abs=TIE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")
@pytest.mark.parametrize("config", [SMALL, SMALL3], ids=name_of)
def test_on_a_gpu_the_answers_are_those_of_the_cpu(config: ModelConfig) -> None:
    """Greedy texts in float32, more than one recording, on both sides of the window; then a cache that has grown."""
    requests = [Request(tokens(3 + 9 * n, seed=n), max_new_tokens=NEW + 20 * n, logprobs=True) for n in range(6)]
    config = replace(config, max_position=2048)
    here, there = Engine(network(config)), Engine(network(config).cuda())
    for _ in range(2):
        for ours, theirs in zip(there.run(requests), here.run(requests), strict=True):
            for a, b in zip(ours.tokens, theirs.tokens, strict=True):
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
                if a.id != b.id:  # a tie, after which the texts are others
                    break
        requests = [Request(tokens(600 + n, seed=n), max_new_tokens=NEW, logprobs=True) for n in range(3)]
    assert there._static is not None
    assert there._static._recorded


def test_memory_grows_with_the_text_and_the_rings_do_not() -> None:
    engine = Engine(network(replace(SMALL, max_position=8192)))
    engine.run([Request(tokens(3), max_new_tokens=2)])
    assert engine.bytes == engine.needs(5)
    engine.run([Request(tokens(3000), max_new_tokens=2)])
    assert [layer.size for layer in engine._slots.cache.layers] == [WINDOW + cache_room.SPARE, 3002] * 1 + [
        WINDOW + cache_room.SPARE
    ]


def test_log_probabilities_of_prompt_and_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole distribution, before what is banned; in chunks, and parts of chunks; nothing shared is left out."""
    monkeypatch.setattr(room, "CHUNK", 7)
    monkeypatch.setattr(room, "ELEMENTS", 3 * SMALL.vocab_size)
    model, prompt, banned = network(), tokens(30), torch.arange(100)
    engine = Engine(model)
    engine.run([Request(prompt, max_new_tokens=3)])
    wanted = {"prompt_logprobs": True, "logprobs": True, "top_logprobs": 4, "banned": banned}
    answer, without = engine.run(
        [Request(prompt, Sampling(2.0), 8, **wanted), Request(prompt, Sampling(2.0), 8, banned=banned)]
    )
    assert answer.prefilled == 30
    assert [token.id for token in without.tokens] == ids(answer)
    assert all((token.logprob, token.top) == (None, ()) for token in without.tokens)
    text = [*prompt, *ids(answer)]
    with torch.no_grad():
        whole = model(torch.tensor([text]))[0].log_softmax(1)
    own = whole[:-1].gather(1, torch.tensor(text)[1:, None])[:, 0].tolist()
    assert answer.prompt_logprobs == pytest.approx(own[:29], abs=1e-4)
    assert [token.logprob for token in answer.tokens] == pytest.approx(own[29:], abs=1e-4)
    assert min(ids(answer)) >= 100
    for token, row in zip(answer.tokens, whole[29:], strict=False):
        assert [number for number, _ in token.top] == row.topk(4).indices.tolist()
    scored = engine.run([Request(text, max_new_tokens=0, prompt_logprobs=True)])[0]
    assert scored.prompt_logprobs == pytest.approx(own, abs=1e-4)
    assert (scored.tokens, scored.ended) == ([], "length")


def test_edges() -> None:
    engine = Engine(network(replace(SMALL, max_position=16)))
    for request, message in (
        (lambda: Request([]), "no tokens to go on from"),
        (lambda: Request([2], max_new_tokens=-1), "max_new_tokens is -1"),
        (lambda: Request([2], top_logprobs=-1), "top_logprobs is -1"),
        (lambda: Request(tokens(17)), "17 tokens exceed the context of 16"),
        (lambda: Request([2, SMALL.vocab_size]), "an id outside the vocabulary"),
        (lambda: Request([-1]), "an id outside the vocabulary"),
    ):
        with pytest.raises(Error, match=message):
            engine.submit(request())
    with pytest.raises(Error, match="17 tokens exceed"):
        engine.run([Request([2]), Request(tokens(17))])
    assert all_free(engine)
    for options in ({"slots": 0}, {"slots": 17}, {"context": -1}, {"memory": -1}):
        with pytest.raises(Error, match="engine"):
            Engine(engine.model, **options)
    assert Engine(engine.model, context=99).context == 16
    nothing, one, full, short = engine.run(
        [Request([2], max_new_tokens=0), Request([2], max_new_tokens=3), Request(tokens(16)), Request(tokens(14))]
    )
    assert (nothing.tokens, nothing.ended, full.tokens, full.ended) == ([], "length", [], "context")
    assert (len(one.tokens), one.ended, len(short.tokens), short.ended) == (3, "length", 2, "context")
    assert all_free(engine)


@pytest.mark.usefixtures("either")
def test_keys_and_values_in_eight_bits() -> None:
    """Of prompts read alone and together: nearly the same log-probabilities, of up to 27 nats, in a third of it all."""
    model = network()
    requests = [Request(tokens(size, seed=size), max_new_tokens=0, prompt_logprobs=True) for size in (30, 90)]
    requests += [Request(tokens(size, seed=size), max_new_tokens=1, top_logprobs=5) for size in (20, 40, 90)]
    plain, eight = Engine(model), Engine(model, cache="int8")
    found = [engine.run(requests) for engine in (plain, eight)]
    for true, rounded in zip(*found, strict=True):
        pairs = list(zip(true.prompt_logprobs, rounded.prompt_logprobs, strict=True))
        pairs += [(a.top[0][1], b.top[0][1]) for a, b in zip(true.tokens, rounded.tokens, strict=True)]
        assert sum(abs(a - b) for a, b in pairs) / len(pairs) < 0.15
        assert any(a != b for a, b in pairs)
    assert eight.bytes < plain.bytes / 3
    with pytest.raises(Error, match="not kept in 'int4'"):
        Engine(model, cache="int4")


def test_what_does_not_fit_the_memory_waits() -> None:
    """A budget for two texts of 40 tokens: four short ones go beside each other, then a long one has it alone."""
    model = network()
    memory = 2 * Engine(model).needs(40)
    engine = Engine(model, memory=memory)
    with pytest.raises(Error, match=r"a text of 1\d\d tokens takes \d+ bytes, and the engine may have"):
        engine.submit(Request(tokens(50), max_new_tokens=100))
    prompts = [(tokens(10, seed=n), 10) for n in range(6)] + [(tokens(60), 15), (tokens(30, seed=9), 9)]
    answers = [engine.submit(Request(prompt, max_new_tokens=new)) for prompt, new in prompts]
    most, beside = 0, 0
    while engine.step():
        most, beside = max(most, engine.bytes), max(beside, len(engine._slots.busy))
        assert engine.bytes <= memory
    assert (most > memory // 2, beside) == (True, 4)
    for (prompt, new), answer in zip(prompts, answers, strict=True):
        assert ids(answer) == alone(model, prompt, new)
    assert all_free(engine)


SHORT_OF_MEMORY = """
import resource, warnings
from gemstill.infer import slots
from gemstill.infer.engine import Engine
from gemstill.infer.request import Request
from tests.infer.networks import SMALL, network
from tests.infer.test_engine import alone, ids, tokens
from dataclasses import replace

def six():
    count = iter(range(5))
    return lambda _: next(count, None) is None

model, prompts = network(replace(SMALL, max_position=1 << 30)), [tokens(9, seed=n) for n in range(8)]
expected = [alone(model, prompt, 6) for prompt in prompts]
slots.FIRST_CAPACITY = 1 << 20  # of addresses a slot takes 256 MiB now, of memory no more than before
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (900 << 20),) * 2)
engine = Engine(model)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    answers = engine.run(Request(prompt, max_new_tokens=1 << 20, accept=six()) for prompt in prompts)
assert [ids(answer) for answer in answers] == expected
print(len(told), told[0].message, engine._slots.most)
"""


def test_short_memory_admits_fewer_and_says_so_once() -> None:
    """A process that may have few addresses more; eight texts that want to have room for a million tokens each."""
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 engine: memory is short: fewer than 8 texts are written at once from now on")
    assert 1 <= int(done.stdout.split()[-1]) <= 3


def test_a_text_too_large_for_the_machine_is_an_error_and_the_next_is_answered(monkeypatch) -> None:
    """No machine has a petabyte: the allocation itself fails."""
    engine = Engine(network(replace(SMALL, max_position=1 << 31)), slots=2)
    slots = engine._slots
    monkeypatch.setattr(slots, "make_room", lambda _: slots._resize([0], 1, 1 << 40))
    answer = engine.run([Request([2, 3], max_new_tokens=1)])[0]
    assert answer.ended == "error"
    assert "memory does not suffice for a text of 3 tokens" in str(answer.error)
    monkeypatch.undo()
    assert len(ids(engine.run([Request([2, 3], max_new_tokens=1)])[0])) == 1


def test_no_numbers_end_their_own_answer() -> None:
    """Where a token's embedding is broken; before the prompt's end, and in the midst of the neighbours' texts."""
    model, prompts = network(), [tokens(5 + n, seed=n) for n in range(6)]
    expected = [alone(model, prompt) for prompt in prompts]
    broken = next(n for n in range(10, 300) if not any(n in text for text in [*prompts, *expected]))
    with torch.no_grad():
        model.embed_tokens.weight[broken] = float("nan")
    requests = [Request(prompt, max_new_tokens=NEW) for prompt in prompts]
    engine = Engine(model, slots=7)
    bad = Request([*tokens(8), broken, 9], max_new_tokens=NEW)
    answers = engine.run([*requests[:3], bad, *requests[3:]])
    assert "no numbers" in str(answers[3].error)
    assert (answers[3].ended, answers[3].tokens) == ("error", [])
    with pytest.raises(Error, match="no numbers"):
        engine.wait(answers[3], 0)
    again = engine.run([*requests, bad, *requests])  # through the slot that held it, too
    assert [ids(a) for a in answers if a is not answers[3]] == expected
    assert [ids(a) for a in [*again[:6], *again[7:]]] == expected * 2


def test_accept_ends_and_fails_for_its_own_request() -> None:
    model, engine = network(), None

    def stubborn(_: int) -> bool:
        engine.step()
        return False

    seen: list[int] = []

    def third(token: int) -> bool:
        seen.append(token)
        return len(seen) == 3

    engine = Engine(model)
    prompt = tokens(9)
    plain, stopped, failed = engine.run(
        [Request(prompt, max_new_tokens=NEW), Request(prompt, accept=third), Request(prompt, accept=stubborn)]
    )
    assert ids(plain) == alone(model, prompt)
    assert (ids(stopped), stopped.ended) == (seen, "stop")
    assert seen == ids(plain)[:3]
    assert "from within a step" in str(failed.error)


def test_what_is_cancelled_during_a_step_is_gone_after_it() -> None:
    """A waiting one and one with a slot: else the last step of all would leave them there."""
    engine = Engine(network(), slots=2)

    def accept(_: int) -> bool:
        for answer in others:
            engine.abandon(answer)
        return True

    first = engine.submit(Request(tokens(4), accept=accept))
    others = [engine.submit(Request(tokens(5, seed))) for seed in (1, 2)]
    while not first.ended:
        engine.step()
    assert [answer.ended for answer in others] == ["cancelled"] * 2
    assert not engine._waiting
    assert not any(engine._slots.users)


def test_threads() -> None:
    """Four threads ask one engine, each waits for its own; another one interrupts and cancels."""
    model = network()
    engine, found = Engine(model, slots=3), {}

    def ask(number: int) -> None:
        for turn in range(3):
            answer = engine.submit(Request(tokens(4 + number, seed=turn), Sampling(2.0, seed=number), NEW))
            count = 0
            while engine.wait(answer, count):
                count += 1
            found[number, turn] = ids(answer)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for number in range(20):
        engine.abandon(engine.submit(Request(tokens(5, seed=number))))
        engine.step()
    for thread in threads:
        thread.join(60)
    assert all_free(engine)
    for number in range(4):
        for turn in range(3):
            expected = alone(model, tokens(4 + number, seed=turn), sampling=Sampling(2.0, seed=number))
            assert found[number, turn] == expected


@pytest.mark.usefixtures("plain")
def test_an_error_on_the_way_leaves_nothing_half_stored() -> None:
    model = network()
    engine, prompts = Engine(model), [tokens(10), tokens(7, seed=1)]
    expected = [alone(model, prompt) for prompt in prompts]
    answers = [engine.submit(Request(prompt, max_new_tokens=NEW)) for prompt in prompts]
    for error in (KeyboardInterrupt, ValueError):
        engine.step()

        def fail(*_: Any, error: type[BaseException] = error) -> None:
            raise error

        hook = model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error):
            engine.step()
        hook.remove()
    while engine.step():
        pass
    assert [ids(answer) for answer in answers] == expected


def test_a_live_model_is_run_as_it_stands() -> None:
    """Weights that change between answers, as in training, and in the midst of one."""
    model, prompt = network(), tokens(20)
    engine = Engine(model)
    before = ids(engine.run([Request(prompt, max_new_tokens=NEW)])[0])
    running = engine.submit(Request(prompt, max_new_tokens=NEW))
    for _ in range(3):
        engine.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    after = ids(engine.run([Request(prompt, max_new_tokens=NEW)])[0])
    assert after == alone(model, prompt) != before
    assert running.ended == "length"
    assert ids(engine.run([Request(prompt, max_new_tokens=NEW)])[0]) == after
    with torch.no_grad():
        model.norm.weight.data[0] = float("nan")  # a change that nobody is told of; yet no weight is held twice
    assert engine.run([Request(prompt, max_new_tokens=NEW)])[0].error is not None


@pytest.mark.slow
def test_a_thousand_short_requests_leave_memory_as_it_is() -> None:
    engine, process, sizes = Engine(network()), psutil.Process(), []
    for part in range(10):
        engine.run(
            Request(tokens(2 + n % 9, seed=n), Sampling(1.0, seed=n), 3) for n in range(100 * part, 100 * part + 100)
        )
        sizes.append(process.memory_info().rss)
    assert all_free(engine)
    assert sizes[-1] - sizes[2] < 4 << 20, sizes


def test_likeliest_and_largest_are_torchs() -> None:
    from gemstill.infer.sampling import largest, likeliest

    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 64, 65, 1000, 4096, 50_001):
        values = torch.randn(size, generator=generator).bfloat16().float()  # many equals
        assert likeliest(values) == int(values.argmax())
        for count in (1, 3, min(64, size)):
            if count <= size:
                top, where = largest(values, count)
                assert torch.equal(top, values.topk(count).values)
                assert torch.equal(values[where], top)
        for where in {0, size // 2, size - 1}:
            values[where] = torch.nan
            assert likeliest(values) == int(values.argmax())
            values[where] = 0
