"""A model of ours as lm-eval calls one: its tasks and metrics, our arithmetic.

Requests mean what they mean to lm-eval's own `hf` backend (HFLM, version 0.4.13), whose answers these are:

- A text begins with one BOS, which is put there unless the text spells it. Control tokens that a prompt spells out
  are control tokens. In rolling log-likelihoods BOS stands in front twice and is predicted once, as there.
- White space at the end of a context belongs to the continuation. An empty context is BOS alone.
- What exceeds the context is cut off on the left; here it is counted too.
- A generation ends with a text of `until`, with <eos> or <end_of_turn>, or after max_gen_toks tokens, and is what comes
  before the first of these texts. Each answer is what it would be alone; that backend's may depend on its batch.

Of chats two things differ. A control token that a message spells stays text there, so that no benchmark's item can end
its own turn. A system message that the model's template has no place for opens the user's first turn; `hf` drops it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from gemstill.core.errors import Error
from gemstill.evaluation.scoring import Score, score
from gemstill.evaluation.trie import Text
from gemstill.infer.config import Sampling
from gemstill.infer.engine import Engine
from gemstill.infer.generate import stop_ids
from gemstill.infer.pieces import Until, WholeText
from gemstill.infer.request import Answer, Request
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.turns import encode_rendered, render_turns

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise Error("needs lm-eval", where="eval", fix="pip install 'gemstill[eval]'") from error

MAX_GEN_TOKS = 256  # where a task does not say, as the `hf` backend has it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")

Pair = tuple[str, str]  # a context and a continuation


class Scored(ABC):
    """Continuations scored as lm-eval wants them, for a class of its interface: what stands before it in the bases.

    It has max_length, and `truncated`, which counts the texts that were longer.
    """

    max_length: int
    truncated: int
    cache_hook: Any

    def reading(self: Any) -> list[Any]:
        """What answers depend on beside weights and vocabulary, for `run.fingerprint`.

        A short text as the ids that the model is given, and bare; the ids that begin and end a text; the tokens that
        one may have.
        """
        texts = [self.tok_encode("a"), self.tok_encode("a", add_special_tokens=False)]
        return [*texts, self.prefix_token_id, self.eot_token_id, self.max_length]

    @abstractmethod
    def _score(self, texts: Sequence[Text]) -> Iterator[Score]:
        """The score of each text, as it comes."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation and whether it is the greedy one.

        Raises:
            Error: a continuation that is empty, or longer than the context.
        """
        for request in requests:
            if not request.args[1]:
                raise _nothing(request)
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)  # type: ignore[misc]
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Pair | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        texts = [self._text(key, context, continuation) for key, context, continuation in requests]
        answers = [(0.0, False)] * len(texts)
        for number, logprob, greedy in self._score(texts):
            answers[number] = (logprob, greedy)
            if (key := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[number])
        return answers

    def _text(self, key: Pair | None, context: list[int], continuation: list[int]) -> Text:
        """A context and what is asked for after it, cut off on the left where it is too long."""
        if not continuation:
            raise Error("the continuation adds no token to its context", where=f"the request {key!r:.200}")
        if len(continuation) > self.max_length:
            what = f"a continuation of {len(continuation)} tokens exceeds the context of {self.max_length}"
            raise Error(what, where=f"the request {key!r:.200}", fix="give a larger context, or leave the task out")
        whole = context + continuation
        # The last token is asked for, and not read.
        if len(whole) > self.max_length + 1:
            self.truncated += 1
            whole = whole[-(self.max_length + 1) :]
        return Text(whole, len(continuation))


class Adapter(Scored, TemplateLM):  # type: ignore[misc]
    """What lm-eval calls a model.

    context: tokens that a text may have, 0 for as many as the model is made for. batch_tokens: computed at once when
    texts are scored, 0 for a good number. truncated: texts so far that were longer than the context.

    >>> adapter = Adapter(*gemstill.load("google/gemma-2-2b"))             # doctest: +SKIP
    >>> lm_eval.simple_evaluate(adapter, tasks=["arc_easy"], limit=100)    # doctest: +SKIP
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, context: int = 0, batch_tokens: int = 0) -> None:
        super().__init__()
        longest = model.config.max_position
        if not 0 <= context <= longest or batch_tokens < 0:
            what = f"context is {context} and batch_tokens {batch_tokens}"
            raise Error(what, where="eval", fix=f"give numbers from 0 up, a context of at most {longest}")
        self.model, self.tokenizer, self.batch_tokens = model.eval(), tokenizer, batch_tokens
        self.max_length = context or longest
        self.truncated = 0
        self._device = model.embed_tokens.weight.device
        self._bos = tokenizer.decode([tokenizer.bos_id])
        self._last: tuple[str, list[int]] = ("", [])

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    @property
    def max_gen_toks(self) -> int:
        return MAX_GEN_TOKS

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template, None where it has none or none is asked for: then the report's turns are used."""
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as a prompt. Raises Error for a model without turns, or a conversation that is none."""
        return render_turns(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text. add_special_tokens: put BOS in front; None: unless the text begins with it."""
        # The context of a few requests in a row is often the same, and long.
        if self._last[0] != string:
            self._last = string, encode_rendered(self.tokenizer, string)
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._bos)
        return [self.tokenizer.bos_id, *self._last[1]] if add_special_tokens else list(self._last[1])

    def _score(self, texts: Sequence[Text]) -> Iterator[Score]:
        return score(self.model, texts, batch_tokens=self.batch_tokens)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in windows of the context that share no predicted token."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [number] * (len(windows) - len(owners))
        answers = [0.0] * len(requests)
        left = Counter(owners)
        texts = [self._text(*window) for window in windows]
        for window, logprob, _ in self._score(texts):
            number = owners[window]
            answers[number] += logprob
            left[number] -= 1
            if not left[number]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[number].args, answers[number])
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context. Draws of the same request differ, and are the same in each run.

        Raises:
            Error: an option of generation that there is not, or max_gen_toks that leave the context no room.
        """
        engine = Engine(self.model, context=self.max_length)
        copies: Counter[str] = Counter()
        tasks = []
        for request in requests:
            context, options = request.args
            seed = copies[repr(request.args)]
            copies[repr(request.args)] += 1
            tasks.append(_Task(self, context, options, seed))
        # Neighbours in this order have most in common, which the engine computes once.
        order = sorted(range(len(tasks)), key=lambda number: tasks[number].prompt)
        answers = [engine.submit(tasks[number].request()) for number in order]
        texts = [""] * len(tasks)
        under_way = dict(zip(order, answers, strict=True))
        while under_way:
            engine.step()
            for number in [number for number, answer in under_way.items() if answer.ended]:
                texts[number] = tasks[number].text(under_way.pop(number))
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts


class _Task:
    """A prompt and how it is gone on from, as lm-eval names it."""

    def __init__(self, adapter: Adapter, context: str, options: dict[str, Any], seed: int) -> None:
        known = dict(normalize_gen_kwargs(options, MAX_GEN_TOKS))
        tokenizer = adapter.tokenizer
        self.until = handle_stop_sequences(known.pop("until"), eos=tokenizer.decode([tokenizer.eos_id]))
        self.new = known.pop("max_gen_toks")
        sample = known.pop("do_sample")
        drawn = {name: known.pop(name) for name in _SAMPLING if known.get(name) is not None}
        if unknown := {name for name, value in known.items() if value is not None}:
            what = f"there is no option {', '.join(sorted(unknown))}"
            raise Error(what, where="generation", fix=f"do_sample, until, max_gen_toks and {', '.join(_SAMPLING)} are")
        if sample and not drawn.get("temperature"):
            raise Error("do_sample at a temperature of 0", where="generation", fix="give a temperature above 0")
        room = room_for(adapter.max_length, self.new)
        self.sampling = (
            Sampling(**drawn, seed=seed)
            if sample
            else Sampling(repetition_penalty=drawn.get("repetition_penalty", 1.0))
        )
        ids = adapter.tok_encode(context)
        adapter.truncated += len(ids) > room
        self.prompt = ids[-room:]
        self.tokenizer = tokenizer

    def request(self) -> Request:
        whole, until = WholeText(self.tokenizer), Until([text for text in self.until if text])

        def accept(token: int) -> bool:
            until.push(whole.push(token))
            return until.found

        return Request(self.prompt, self.sampling, self.new, ends=stop_ids(self.tokenizer), accept=accept)

    def text(self, answer: Answer) -> str:
        if answer.error is not None:
            raise answer.error
        written = self.tokenizer.decode([token.id for token in answer.tokens], special=False)
        text: str = postprocess_generated_text(written, self.until, None)
        return text


def room_for(context: int, new: int) -> int:
    """How many tokens a prompt may have of which `new` are to be written. Raises Error where there are none."""
    if new >= context:
        what = f"max_gen_toks of {new} leaves a context of {context} tokens no room for a prompt"
        raise Error(what, where="generation", fix="give a larger context or fewer max_gen_toks")
    return context - new


def _nothing(request: Any) -> Error:
    where = " ".join(str(part) for part in (request.task_name, f"item {request.doc_id}") if part is not None)
    return Error("its continuation is empty, so there is nothing to score", where=where, fix="mend the task's data")
