"""Generation of text, token by token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gemstill.checkpoint.sidecars import END_OF_TURN
from gemstill.core.errors import Error
from gemstill.infer.config import check_length, check_stop
from gemstill.infer.pieces import until, whole_text
from gemstill.infer.sampling import Sampler, Sampling
from gemstill.infer.session import Session
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.turns import encode_turns

Prompt = str | Sequence[Mapping[str, str]]  # text to go on from, or the turns of a conversation


class Token(NamedTuple):
    """A generated token. logprob: log-probability in the model's own distribution, before masks and sampling."""

    id: int
    logprob: float


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
    prompt that were not in the session's cache already.
    """

    def __init__(
        self, session: Session, tokenizer: Tokenizer, prompt: Sequence[int], sampling: Sampling, limits: Limits
    ) -> None:
        self.prompt = list(prompt)
        self.tokens: list[Token] = []
        self.ended = ""
        self.prefilled = 0
        self._session, self._tokenizer, self._limits = session, tokenizer, limits
        self._sampler = Sampler(sampling, session.model.config.vocab_size)
        self._cancelled = False

    def __iter__(self) -> Iterator[str]:
        return until(whole_text(self._tokenizer, self.ids()), self._limits.stop, self._stopped)

    def cancel(self) -> None:
        """End it before the next token; also from another thread or a signal's handler."""
        self._cancelled = True

    def ids(self) -> Iterator[int]:
        """The ids alone, without regard to stop strings. Iterate over this or over the pieces, once."""
        config = self._session.model.config
        stops, banned = stop_ids(self._tokenizer), ~_allowed(config.vocab_size, self._tokenizer)
        text = list(self.prompt)
        self._sampler.see(text)
        room = self._session.context - len(text)
        for _ in range(min(room, self._limits.max_new_tokens)):
            logits = None if self._cancelled else self._session.feed(text, lambda: self._cancelled)
            if logits is None:
                self.ended = "cancelled"
                return
            self.prefilled = self.prefilled or self._session.fed
            token = self._next(logits, banned)
            if token.id in stops:
                self.ended = "end"
                return
            self.tokens.append(token)
            text.append(token.id)
            self._sampler.see([token.id])
            yield token.id
        self.ended = "length" if self._limits.max_new_tokens <= room else "context"

    def _next(self, logits: Tensor, banned: Tensor) -> Token:
        total = float(logits.logsumexp(0))
        if total != total:
            fix = "compute in float32 or bfloat16: float16 overflows in some models"
            raise Error("the model's logits are no numbers", where="generate", fix=fix)
        drawn = self._sampler.draw(logits.masked_fill(banned, -torch.inf))
        return Token(drawn, float(logits[drawn]) - total)

    def _stopped(self) -> None:
        self.ended = "stop"


def generate(
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
) -> str:
    """The text that the model writes after `prompt`: all pieces of `stream` (see there) as one string."""
    pieces = stream(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    return "".join(pieces)


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
    if isinstance(stop, str):
        raise Error(f"stop is {stop!r}", where="generate", fix="give a list of texts")
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    limits = Limits(max_new_tokens, tuple(stop))
    ids = prompt_ids(tokenizer, prompt)
    if len(ids) > model.config.max_position:
        what = f"{len(ids)} tokens exceed the model's context of {model.config.max_position}"
        raise Error(what, where="prompt", fix="shorten it")
    return Generation(Session(model), tokenizer, ids, sampling, limits)


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


def _allowed(vocab_size: int, tokenizer: Tokenizer) -> Tensor:
    """Which entries may be drawn: [vocab_size] bool; no padding row, no control token but those that end the text."""
    allowed = torch.zeros(vocab_size, dtype=torch.bool)
    allowed[: tokenizer.vocab_size] = True
    allowed[[number for number in tokenizer.control_ids if number < vocab_size]] = False
    allowed[sorted(stop_ids(tokenizer))] = True
    return allowed
