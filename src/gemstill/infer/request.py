"""What is asked of an engine, and the answer as far as it has come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gemstill.core.errors import Error
from gemstill.infer.config import Sampling, check_length
from gemstill.infer.sampling import Sampler


class Token(NamedTuple):
    """A generated token.

    logprob: log-probability in the model's own distribution, before masks and sampling; None where it was not asked
    for. top: the likeliest tokens at this place with theirs, as many as were asked for, the likeliest first.
    """

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


GREEDY = Sampling()


@dataclass(frozen=True, eq=False)
class Request:
    """A text to go on from, and how.

    prompt: ids, one at least, <bos> among them where the model wants it. ends: ids that end the answer and are no
    part of it. banned: ids [n] int64 that are never drawn. logprobs: whether each token comes with its
    log-probability. top_logprobs: with those of how many likeliest tokens. prompt_logprobs: whether those of the
    prompt's tokens are wanted too. accept: called with each token by the thread that steps; True ends the answer.

    Raises:
        Error: an empty prompt, or a number below 0.
    """

    prompt: Sequence[int]
    sampling: Sampling = GREEDY
    max_new_tokens: int = 128
    ends: AbstractSet[int] = frozenset()
    banned: Tensor | None = None
    logprobs: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    accept: Callable[[int], bool] | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise Error("there are no tokens to go on from", where="prompt", fix="begin with <bos> at least")
        check_length(self.max_new_tokens)
        if self.top_logprobs < 0:
            raise Error(f"top_logprobs is {self.top_logprobs}", where="generate", fix="give a number from 0 up")


class Answer:
    """The answer to a request. Another thread may read it at any time.

    tokens: those generated so far, one that ended it excepted. ended: "" while it goes on, then why it ended: "end"
    (one of the request's `ends`), "stop" (`accept`), "length" (max_new_tokens), "context" (there is room for no
    more), "cancelled" or "error". error: what went wrong. prefilled: tokens of the prompt that had to be computed.
    prompt_logprobs: of each token of the prompt but the first, where asked for.
    """

    def __init__(self, request: Request, context: int, number: int = 0) -> None:
        self.request, self.number = request, number
        self.tokens: list[Token] = []
        self.ended = ""
        self.error: Exception | None = None
        self.prefilled = 0
        self.prompt_logprobs: list[float] = []
        self.cancelled = False
        # The engine's own: the text so far, and the most tokens that it may have.
        self.text = list(request.prompt)
        self.most = min(context, len(self.text) + request.max_new_tokens)
        # Its slot; whether it goes on there by itself, or still waits for a neighbour's beginning that it shares;
        # whether the weights have changed since.
        self.slot: int | None = None
        self.begun = self.stale = False
        self.sampler = Sampler(request.sampling)
        self.sampler.see(self.text)

    def cancel(self) -> None:
        """End it before the next token; also from another thread or a signal's handler."""
        self.cancelled = True

    @property
    def full(self) -> str:
        """Why there can be no further token: "length", "context", or "" where there can."""
        if len(self.text) < self.most:
            return ""
        return "length" if len(self.tokens) >= self.request.max_new_tokens else "context"
