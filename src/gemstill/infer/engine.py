"""One engine under all that writes text: up to 16 answers at once, at each step one token more of every one.

Whoever wants a token calls `step`, or `wait`, which does: there is no thread of the engine's own. One thread steps at
a time; others that want to wait for it. A step frees the slots of answers that were cancelled, admits what waits, reads
a part of the prompts, and computes the next token of every answer whose prompt is read, all in one pass.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.infer.config import check_cache
from gemstill.infer.request import Answer, Request, Token
from gemstill.infer.sampling import largest, likeliest
from gemstill.infer.slots import Slots
from gemstill.model.readout import last_logits, logits
from gemstill.model.static import StaticStep
from gemstill.model.step import Step
from gemstill.model.transformer import Transformer
from gemstill.ops.logits import cut
from gemstill.ops.packed import FEW, Weight

MOST = 16  # answers at once
CHUNK = 512  # prompt tokens read in a step: bounds its memory
BESIDE = 128  # the same while other answers wait for their next token
ELEMENTS = 1 << 25  # logits of a prompt held at once where its log-probabilities are asked for


class Piece(NamedTuple):
    """Tokens [start, end) of a text, which a step computes behind the `start` that are computed."""

    answer: Answer
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    @property
    def last(self) -> bool:
        """Whether the text ends with it, so that its last token's logits are wanted."""
        return self.end == len(self.answer.text)

    @property
    def short(self) -> bool:
        """Whether a native step can compute it beside others."""
        scored = self.answer.request.prompt_logprobs and not (self.last and self.size == 1)
        return self.size <= FEW and not scored


class Engine:
    """Answers to requests, several at once, from one model.

    slots: answers at once, 16 at most. context: tokens that a text may have, 0 for as many as the model is made for.
    memory: bytes that all keys and values may take; what does not fit waits for others to end. cache: "int8" keeps them
    in eight bits, else they are kept in the dtype in which the model computes. fed: tokens computed.

    A text stays in its slot when it has ended, until the slot is needed, and what another has in common with its
    beginning is not computed again. The model is used as it stands: when its weights change, answers under way go on
    with the new ones, and nothing is shared with texts from before. (PyTorch must be able to see the change; after
    one through `.data`, call `forget`.)

    >>> engine = Engine(model)                                         # doctest: +SKIP
    >>> answers = engine.run([Request([2, 10, 11]), Request([2, 7])])  # doctest: +SKIP
    >>> [token.id for token in answers[0].tokens]                      # doctest: +SKIP

    Raises:
        Error: a number out of its range.
    """

    def __init__(
        self, model: Transformer, *, slots: int = MOST, context: int = 0, memory: int | None = None, cache: str = ""
    ) -> None:
        if not 1 <= slots <= MOST:
            raise Error(f"slots is {slots}", where="engine", fix=f"give a number from 1 to {MOST}")
        if context < 0 or (memory is not None and memory < 0):
            raise Error(f"context is {context} and memory {memory}", where="engine", fix="neither may be below 0")
        check_cache(cache)
        longest = model.config.max_position
        self.model = model
        self.context = min(context, longest) if context else longest
        self.fed = 0
        weight = model.embed_tokens.weight
        dtype = torch.int8 if cache == "int8" else model.compute_dtype or weight.dtype
        self._slots = Slots(model.config, slots, self.context, memory, dtype, weight.device)
        self._waiting: deque[Answer] = deque()
        self._turn = threading.Condition()  # guards what waits, and who steps
        self._stepper: int | None = None
        self._count = 0
        self._weights: object = None
        self._told = False
        self._native: Step | None = None
        self._static: StaticStep | None = None

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return 0 if self._slots.cache is None else self._slots.cache.bytes

    def needs(self, tokens: int) -> int:
        """Memory of the keys and values of a text of so many tokens."""
        return self._slots.needs(tokens)

    def submit(self, request: Request) -> Answer:
        """Have a request answered; any thread may. Nothing is computed before somebody calls `step` or `wait`.

        Raises:
            Error: a prompt longer than the context, an id that the model does not have, or a text that would not
                fit the memory even alone.
        """
        prompt, vocab = request.prompt, self.model.config.vocab_size
        if len(prompt) > self.context:
            what = f"{len(prompt)} tokens exceed the context of {self.context}"
            raise Error(what, where="prompt", fix="shorten it")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise Error(f"has an id outside the vocabulary of {vocab}", where="prompt")
        with self._turn:
            answer = Answer(request, self.context, self._count)
            self._count += 1
        needed, memory = self._slots.needs(answer.most), self._slots.memory
        if memory is not None and needed > memory:
            what = f"a text of {answer.most} tokens takes {needed} bytes, and the engine may have {memory}"
            raise Error(what, where="prompt", fix="shorten it or lower max_new_tokens")
        if answer.full and not request.prompt_logprobs:
            answer.ended = answer.full
            return answer
        with self._turn:
            self._waiting.append(answer)
        return answer

    def run(self, requests: Iterable[Request]) -> list[Answer]:
        """Answer all requests. One that failed has its `error` in the answer, and the others are whole.

        Raises:
            Error: where `submit` does; then none of them is answered.
        """
        answers: list[Answer] = []
        try:
            for request in requests:
                answers.append(self.submit(request))
            for answer in answers:
                while not answer.ended:
                    self.step()
        finally:
            for answer in answers:
                if not answer.ended:  # an error, or Ctrl-C
                    self.abandon(answer)
        return answers

    def wait(self, answer: Answer, count: int) -> bool:
        """Go on until an answer has more than `count` tokens, or has ended; whether it has more. Raises its error."""
        while len(answer.tokens) <= count and not answer.ended:
            self.step()
        if len(answer.tokens) <= count and answer.error is not None:
            raise answer.error
        return len(answer.tokens) > count

    def step(self) -> bool:
        """One step, or, where another thread is at one, its end. False where nothing was to be done."""
        with self._turn:
            if self._stepper == threading.get_ident():
                raise Error("step is called from within a step", where="engine", fix="let `accept` only look")
            if self._stepper is not None:
                self._turn.wait()
                return True
            self._stepper = threading.get_ident()
        try:
            return self._step()
        finally:
            with self._turn:
                self._stepper = None
                self._free_cancelled()
                self._turn.notify_all()

    def abandon(self, answer: Answer) -> None:
        """Cancel an answer that nobody waits for any more; its slot is free at once, or after the step under way."""
        answer.cancel()
        with self._turn:
            if self._stepper is None:
                self._free_cancelled()

    def forget(self) -> None:
        """Share nothing of what is computed by now with later texts."""
        with self._turn:
            while self._stepper is not None:
                self._turn.wait()
            self._slots.forget()

    @torch.inference_mode()
    def _step(self) -> bool:
        self._free_cancelled()
        admitting = True
        try:
            self._admit()
            admitting = False
            if not (busy := self._slots.busy):
                return False
            self._compute(self._plan(busy, self._share(busy)))
        except Exception as error:
            if not _short_of_memory(error):
                self._restart()
                raise
            self._admit_fewer(admitting)
        except BaseException:
            self._restart()
            raise
        return True

    def _held(self, answer: Answer) -> int:
        """How many tokens of an answer's text are in the cache."""
        return self._slots.held(self._slots.of(answer))

    def _free_cancelled(self) -> None:
        for answer in self._slots.busy:
            if answer.cancelled:
                self._end(answer, "cancelled")
        with self._turn:
            gone = [answer for answer in self._waiting if answer.cancelled]
            for answer in gone:
                self._waiting.remove(answer)
                self._end(answer, "cancelled")

    def _admit(self) -> None:
        """Give slots to what waits, in its order, as far as there are slots and memory."""
        if self._waiting and (weights := _fingerprint(self.model)) != self._weights:
            self._weights = weights
            self._slots.forget()
        while self._waiting:
            with self._turn:
                answer, waiting = self._waiting[0], len(self._waiting)
            if not self._slots.admit(answer, waiting):
                return
            with self._turn:
                self._waiting.popleft()

    def _share(self, busy: Sequence[Answer]) -> dict[int | None, int]:
        """Have texts begin with what others hold of them: slot -> after how many tokens it is still waited for."""
        stops: dict[int | None, int] = {}
        for answer in busy:
            if not answer.begun and not (match := self._slots.begin(answer)).ready:
                stops[match.slot] = min(match.shared, stops.get(match.slot, match.shared))
        return stops

    def _plan(self, busy: Sequence[Answer], stops: dict[int | None, int]) -> list[Piece]:
        """What this step computes: the token that a text lacks, then parts of prompts, those asked for first before."""
        lacking = [Piece(answer, self._held(answer), len(answer.text)) for answer in busy if answer.begun]
        pieces = [piece for piece in lacking if piece.size == 1]
        tokens = BESIDE if pieces else CHUNK
        for answer, start, end in (piece for piece in lacking if piece.size > 1):
            waited_for = stops.get(answer.slot, 0)
            stop = min(end, start + tokens, waited_for if start < waited_for else end)
            if start < stop:
                pieces.append(Piece(answer, start, stop))
                tokens -= stop - start
        return pieces

    def _compute(self, pieces: Sequence[Piece]) -> None:
        """Short pieces together, as many as a native step takes; then the others one by one."""
        few: list[Piece] = []
        large = [piece for piece in pieces if not piece.short]
        for piece in (piece for piece in pieces if piece.short):
            if sum(one.size for one in few) + piece.size > FEW:
                self._feed_few(few)
                few = []
            few.append(piece)
        if few:
            self._feed_few(few)
        for piece in large:
            self._feed(piece)

    def _feed_few(self, pieces: Sequence[Piece]) -> None:
        """Compute short pieces, FEW tokens in all, in one pass over the weights as far as that can be."""
        self._slots.make_room(max(piece.end for piece in pieces))
        cache = self._slots.cache
        assert cache is not None
        if self._native is None or self._native.cache is not cache:
            self._native = Step(self.model, cache)
        # Next tokens before parts of prompts: only these may be computed less exactly.
        pieces = sorted(pieces, key=lambda piece: piece.size > 1)
        exact = sum(piece.size == 1 for piece in pieces)
        tokens = [token for piece in pieces for token in piece.answer.text[piece.start : piece.end]]
        slots = [self._slots.of(piece.answer) for piece in pieces for _ in range(piece.size)]
        ends = zip(pieces, itertools.accumulate(piece.size for piece in pieces), strict=True)
        found = self._native(tokens, slots, [end - 1 for piece, end in ends if piece.last], exact)
        if found is None:
            self._feed_plain(pieces)
            return
        rows = iter(found)
        for piece in pieces:
            self._fed(piece, next(rows) if piece.last else None)

    def _feed_plain(self, pieces: Sequence[Piece]) -> None:
        """The same in PyTorch: the next tokens of texts together, parts of prompts one by one."""
        single = [piece for piece in pieces if piece.last and piece.size == 1]
        others = [piece for piece in pieces if piece not in single]
        if single:
            found = self._next([piece.answer.text[-1] for piece in single], [self._slots.of(p.answer) for p in single])
            for piece, row in zip(single, found, strict=True):
                self._fed(piece, row)
        for piece in others:
            self._feed(piece)

    def _next(self, tokens: Sequence[int], slots: Sequence[int]) -> Iterable[Tensor]:
        """The logits [V] float32 on the CPU after one token more of each of several texts."""
        cache = self._slots.cache
        assert cache is not None
        if cache.stepped:
            if self._static is None or self._static.cache is not cache:
                self._static = StaticStep(self.model, cache)
            if (found := self._static(tokens, slots)) is not None:
                return found
        last = torch.tensor(tokens, device=self._slots.device)[:, None]
        logits: Tensor = self.model(last, cache=cache.view(*slots), readout=last_logits)
        return logits.float().cpu()

    def _feed(self, piece: Piece) -> None:
        """Compute a part of a prompt in PyTorch."""
        answer, start, end = piece
        self._slots.make_room(end)
        targets: list[int] = []
        if answer.request.prompt_logprobs:
            answer.prompt_logprobs = answer.prompt_logprobs[:start]
            targets = answer.text[start + 1 : min(end + 1, len(answer.request.prompt))]
        tokens = torch.tensor([answer.text[start:end]], device=self._slots.device)
        assert self._slots.cache is not None
        view = self._slots.cache.view(self._slots.of(answer))
        logprobs, found = self.model(tokens, cache=view, readout=_OfPrompt(targets, piece.last))
        answer.prompt_logprobs += logprobs
        self._fed(piece, None if found is None else found[0].float().cpu())

    def _fed(self, piece: Piece, row: Tensor | None) -> None:
        """Go on after a piece; row: the logits [V] float32 of the last one of a text."""
        answer, start, end = piece
        self.fed += piece.size
        answer.prefilled += max(0, min(end, len(answer.request.prompt)) - start)
        if row is not None and answer.full:
            self._end(answer, answer.full)  # the log-probabilities of the prompt alone were asked for
        elif row is not None:
            self._take(answer, row)

    def _take(self, answer: Answer, row: Tensor) -> None:
        """Draw an answer's next token from its logits [V] float32, which are overwritten."""
        request, logprobs = answer.request, None
        drawn = likeliest(row)
        if not bool(row[drawn].isfinite()):
            fix = "compute in float32 or bfloat16: float16 overflows in some models"
            self._end(answer, "error", Error("the model's logits are no numbers", where="generate", fix=fix))
            return
        if request.logprobs or request.top_logprobs:
            logprobs = row.log_softmax(0)
        if request.banned is not None:
            row[request.banned] = -torch.inf
        if request.banned is not None or not answer.sampler.plain:  # else a pass over the logits is saved
            drawn = answer.sampler.draw(row)
        if drawn in request.ends:
            self._end(answer, "end")
            return
        answer.text.append(drawn)
        answer.sampler.see([drawn])
        top: tuple[tuple[int, float], ...] = ()
        if logprobs is not None and request.top_logprobs:
            values, ids = largest(logprobs, min(request.top_logprobs, len(logprobs)))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        try:
            stop = request.accept is not None and request.accept(drawn)
        except Exception as error:  # of whoever asked, who hears of it; the neighbours go on
            self._end(answer, "error", error)
            return
        # Only now: who waits for the token finds what `accept` made of it.
        answer.tokens.append(Token(drawn, None if logprobs is None else float(logprobs[drawn]), top))
        if stop or answer.full:
            self._end(answer, "stop" if stop else answer.full)

    def _end(self, answer: Answer, why: str, error: Exception | None = None) -> None:
        if answer.slot is not None:
            self._slots.release(answer, keep=error is None)
        answer.error = error
        answer.ended = why

    def _restart(self) -> None:
        """A step was left half done: some layers have stored its tokens and others have not. All is read again."""
        for answer in self._slots.busy:
            self._slots.empty(answer)

    def _admit_fewer(self, admitting: bool) -> None:
        """Memory was short: give all of it back and go on with fewer answers, or end the one that is too much alone."""
        lost = self._slots.drop()
        self._native = self._static = None  # they hold the cache, and what was recorded memory of its own
        tried = max(len(lost) + 1, self._slots.tried) if admitting else len(lost)
        if tried <= 1:
            with self._turn:
                answer = lost[0] if lost else self._waiting.popleft()
            what = f"memory does not suffice for a text of {answer.most} tokens"
            fix = "shorten it, lower max_new_tokens, or give the engine a smaller context"
            self._end(answer, "error", Error(what, where="engine", fix=fix))
            return
        with self._turn:
            self._waiting.extendleft(reversed(lost))
        self._slots.most = tried - 1
        if not self._told:
            self._told = True
            note(f"memory is short: fewer than {tried} texts are written at once from now on", where="engine")


@dataclass(frozen=True)
class _OfPrompt:
    """Of a part of a prompt: the log-probabilities of the tokens after its first ones, and the last one's logits."""

    targets: list[int]
    last: bool

    def __call__(self, hidden: Tensor, head: Weight, softcap: float | None) -> tuple[list[float], Tensor | None]:
        found: list[float] = []
        ids = torch.tensor(self.targets, dtype=torch.int64, device=hidden.device)
        for some in cut(len(ids), ELEMENTS // head.shape[0]):
            raw = logits(hidden[:, some], head, softcap)[0]
            found += (raw.gather(1, ids[some, None])[:, 0] - raw.logsumexp(1)).tolist()
        return found, last_logits(hidden, head, softcap) if self.last else None


def _fingerprint(model: Transformer) -> object:
    """Something that changes when weights do: where they are, and how often PyTorch has seen them written."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]


def _short_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ("allocate memory", "out of memory"))
