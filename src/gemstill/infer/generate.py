"""Generation of text, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gemstill.checkpoint.sidecars import END_OF_TURN
from gemstill.core.errors import Error
from gemstill.infer.config import check_length, check_stop
from gemstill.infer.engine import Engine
from gemstill.infer.pieces import Until, WholeText
from gemstill.infer.request import Answer, Request, Token
from gemstill.infer.sampling import Sampling
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.turns import encode_turns

Prompt = str | Sequence[Mapping[str, str]]  # text to go on from, or the turns of a conversation


@dataclass(frozen=True)
class Limits:
    """Where a text ends, other than at the model's own <eos> or <end_of_turn>."""

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # texts before which it ends

    def __post_init__(self) -> None:
        check_length(self.max_new_tokens)
        check_stop(self.stop)


class Generation:
    """A text being written: iterate once, for its pieces as they come, each of whole characters.

    tokens: what was generated so far, a token that ended it excepted, those of a stop string included. ended:
    "" while it goes on, then why it ended: "end" (the model's own), "stop" (a stop string), "length"
    (max_new_tokens), "context" (the model can look back no further), "cancelled". prefilled: tokens of the
    prompt that were not in the engine's cache already. logprobs: whether the tokens come with theirs.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        sampling: Sampling,
        limits: Limits,
        *,
        logprobs: bool = True,
    ) -> None:
        self.prompt = list(prompt)
        self._engine, self._tokenizer, self._limits = engine, tokenizer, limits
        self._sampling, self._logprobs = sampling, logprobs
        self._answer: Answer | None = None
        self._whole, self._until = WholeText(tokenizer), Until(limits.stop)
        self._pieces: list[str] = []  # of each token, what became clear with it
        self._cancelled = False

    @property
    def tokens(self) -> list[Token]:
        return [] if self._answer is None else self._answer.tokens

    @property
    def ended(self) -> str:
        return "" if self._answer is None else self._answer.ended

    @property
    def prefilled(self) -> int:
        return 0 if self._answer is None else self._answer.prefilled

    def start(self) -> None:
        """Have the engine write it beside others; iterating does this by itself. Raises Error as Engine.submit."""
        self._submit(self._accept)

    def __iter__(self) -> Iterator[str]:
        self.start()
        for number, _ in enumerate(self._come()):
            if self._pieces[number]:
                yield self._pieces[number]
        if not self._until.found and (rest := self._until.push(self._whole.rest()) + self._until.rest()):
            yield rest

    def cancel(self) -> None:
        """End it before the next token; also from another thread or a signal's handler."""
        self._cancelled = True
        if self._answer is not None:
            self._answer.cancel()

    def ids(self) -> Iterator[int]:
        """The ids alone, without regard to stop strings. Iterate over this or over the pieces, once."""
        self._submit(None)
        for token in self._come():
            yield token.id

    def _submit(self, accept: Callable[[int], bool] | None) -> None:
        if self._answer is not None:
            return
        ends, banned = _vocabulary(self._tokenizer, self._engine.model.config.vocab_size)
        request = Request(
            self.prompt,
            self._sampling,
            self._limits.max_new_tokens,
            ends=ends,
            banned=banned,
            logprobs=self._logprobs,
            accept=accept,
        )
        self._answer = self._engine.submit(request)
        if self._cancelled:
            self._answer.cancel()

    def _accept(self, token: int) -> bool:
        self._pieces.append(self._until.push(self._whole.push(token)))
        return self._until.found

    def _come(self) -> Iterator[Token]:
        """The tokens as they come; who leaves before the last one cancels the rest."""
        assert self._answer is not None
        count = 0
        try:
            while self._engine.wait(self._answer, count):
                yield self._answer.tokens[count]
                count += 1
        finally:
            if not self._answer.ended:
                self._engine.abandon(self._answer)


@overload
def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: Prompt,
    *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., min_p: float = ...,
    repetition_penalty: float = ..., seed: int = ..., stop: Sequence[str] = ...,
) -> str: ...  # fmt: skip


@overload
def generate(
    model: Transformer, tokenizer: Tokenizer, prompt: list[Prompt],
    *, max_new_tokens: int = ..., temperature: float = ..., top_k: int = ..., top_p: float = ..., min_p: float = ...,
    repetition_penalty: float = ..., seed: int = ..., stop: Sequence[str] = ...,
) -> list[str]: ...  # fmt: skip


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Prompt | list[Prompt],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> str | list[str]:
    """The text that the model writes after `prompt`: all pieces of `stream` (see there) as one string.

    Of a list of prompts, texts or conversations, a list of strings: they are written 16 at a time, each as it would
    be alone, with the same seed.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    limits = Limits(max_new_tokens, check_stop(stop))
    many = not isinstance(prompt, str) and any(not isinstance(item, Mapping) for item in prompt)
    prompts: list[Any] = list(prompt) if many else [prompt]
    engine = Engine(model)
    texts = [
        Generation(engine, tokenizer, fitting(tokenizer, one, engine.context), sampling, limits, logprobs=False)
        for one in prompts
    ]
    for text in texts:
        text.start()
    written = ["".join(text) for text in texts]
    return written if many else written[0]


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
) -> Generation:
    """What the model writes after `prompt`; iterate for the text, piece by piece, each of whole characters.

    prompt: text to go on from, or a conversation, [{"role": "user", "content": "…"}, …], to be answered.
    temperature: 0 takes the likeliest token each time, above it they are drawn with `seed` from what top_k,
    top_p and min_p leave (see gemstill.infer.sampling). stop: texts before which generation ends. It also
    ends with <eos> or <end_of_turn>, after max_new_tokens, or when the model's longest context is full.
    Padding rows of the vocabulary and control tokens are never drawn. The result also has the tokens with
    their log-probabilities, and why it ended.

    Raises:
        Error: an option out of its range; a prompt longer than the model's context; a conversation whose
            roles do not alternate, or that holds anything but text.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    limits = Limits(max_new_tokens, check_stop(stop))
    engine = Engine(model, slots=1)
    return Generation(engine, tokenizer, fitting(tokenizer, prompt, engine.context), sampling, limits)


def fitting(tokenizer: Tokenizer, prompt: Prompt, context: int, name: str = "the prompt") -> list[int]:
    """The ids of `prompt_ids`. Raises Error where it does, and where they are more than `context`."""
    ids = prompt_ids(tokenizer, prompt)
    if len(ids) > context:
        what = f"{name} has {len(ids)} tokens, more than the model's context of {context}"
        raise Error(what, where="generate", fix="shorten it")
    return ids


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The prompt's ids behind one <bos>; a control token spelled out in the prompt is text, so no other can come in.

    Raises:
        Error: a conversation whose roles do not alternate, or that holds anything but text.
    """
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return encode_turns(tokenizer, prompt)


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that end a text: <eos>, and <end_of_turn> where there is one."""
    turn = tokenizer.token_id(END_OF_TURN)
    return {tokenizer.eos_id} if turn is None else {tokenizer.eos_id, turn}


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> tuple[frozenset[int], Tensor]:
    """The ids that end a text, and those never drawn, [n] int64: padding rows, and all other control tokens."""
    known = _VOCABULARIES.setdefault(tokenizer, {})
    if vocab_size not in known:
        ends = stop_ids(tokenizer)
        control = {number for number in tokenizer.control_ids if number < vocab_size}
        never = {*control, *range(tokenizer.vocab_size, vocab_size)} - ends
        known[vocab_size] = frozenset(ends), torch.tensor(sorted(never), dtype=torch.int64)
    return known[vocab_size]


_VOCABULARIES: WeakKeyDictionary[Tokenizer, dict[int, tuple[frozenset[int], Tensor]]] = WeakKeyDictionary()
