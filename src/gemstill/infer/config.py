"""Settings of the commands that write text. Nothing here loads torch, so help and wrong values are answered at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gemstill.core.errors import Error


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; gemstill.infer.sampling says in which order.

    Raises:
        Error: a value out of its range.
    """

    temperature: float = 0.0  # logits are divided by it; 0 takes the likeliest token each time
    top_k: int = 0  # draw from this many of the likeliest tokens; 0: from any number
    top_p: float = 1.0  # draw from the fewest likeliest tokens that together have this probability
    min_p: float = 0.0  # draw from the tokens that are at least this many times as likely as the likeliest
    repetition_penalty: float = 1.0  # tokens that are there already become less likely above 1
    seed: int = 0  # of the draws at a temperature above 0

    def __post_init__(self) -> None:
        self._check("temperature", 0 <= self.temperature < math.inf, "a number from 0 up")
        self._check("top_k", self.top_k >= 0, "a whole number from 0 up")
        self._check("top_p", 0 <= self.top_p <= 1, "a number from 0 to 1")
        self._check("min_p", 0 <= self.min_p <= 1, "a number from 0 to 1")
        self._check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a number above 0")
        self._check("seed", 0 <= self.seed < 1 << 63, "a whole number from 0 up, below 2^63")

    def _check(self, name: str, right: bool, wanted: str) -> None:
        if not right:
            raise Error(f"{name} is {getattr(self, name)}", where="sampling", fix=f"it must be {wanted}")


def check_length(max_new_tokens: int) -> None:
    """Raise Error for a number of new tokens below 0."""
    if max_new_tokens < 0:
        raise Error(f"max_new_tokens is {max_new_tokens}, it must not be below 0", where="generate")


def check_stop(stop: object) -> tuple[str, ...]:
    """The stop strings as a tuple. Raises Error for what is no list of texts, or an empty one, which stops nothing."""
    texts = tuple(stop) if isinstance(stop, list | tuple) else ()
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise Error(f"stop is {stop!r}", where="generate", fix="give a list of texts, none of them empty")
    return texts


QUANTIZED = ("int8", "int4", "file")


def check_quantize(quantize: str) -> None:
    """Raise Error for what no model is quantized to."""
    if quantize and quantize not in QUANTIZED:
        fix = f"take one of {', '.join(QUANTIZED)}, or leave it out"
        raise Error(f"no model is quantized to '{quantize}'", where="quantize", fix=fix)


def check_cache(cache: str) -> None:
    """Raise Error for what keys and values are not kept in."""
    if cache not in ("", "int8"):
        raise Error(f"keys and values are not kept in '{cache}'", where="cache", fix="take int8, or leave it out")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(Sampling):
    """What `gemstill generate` needs to know."""

    source: str  # the model: a folder, a GGUF file, a hub name
    quantize: str = ""  # compute on weights in int8 or int4, or in the blocks of a GGUF "file"; empty: as stored
    cache: str = ""  # keep keys and values in int8, in about half of the memory; empty: as the model computes
    prompt: str = "-"  # text to go on from; - reads standard input
    prompts: str = ""  # a file of prompts instead: one a line, or .jsonl with "prompt" or "messages" in each line
    chat: bool = False  # give the prompt as a user's turn, as a tuned model expects
    max_new_tokens: int = 128  # after each prompt
    stop: tuple[str, ...] = ()  # end before this text comes; may be given several times
    json: bool = False  # print tokens and log-probabilities, one JSON object a prompt

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.max_new_tokens)
        check_stop(self.stop)
        check_quantize(self.quantize)
        check_cache(self.cache)
        if self.prompts and self.prompt != "-":
            raise Error("has both a prompt and a file of prompts", where="generate", fix="give one of them")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Sampling):
    """What `gemstill chat` needs to know. The defaults of sampling are those published with Gemma 3."""

    source: str  # the model: a folder, a GGUF file, a hub name
    quantize: str = ""  # compute on weights in int8 or int4, or in the blocks of a GGUF "file"; empty: as stored
    cache: str = ""  # keep keys and values in int8, in about half of the memory; empty: as the model computes
    system: str = ""  # what the model is told first
    load: str = ""  # a conversation to go on with, as /save writes it
    context: int = 0  # tokens that the model may look back on; 0: as many as it was made for
    max_new_tokens: int = 1024  # of one answer
    temperature: float = 1.0  # 0 takes the likeliest token each time
    top_k: int = 64  # draw from this many of the likeliest tokens; 0: from any number
    top_p: float = 0.95  # draw from the fewest likeliest tokens that together have this probability
    seed: int = -1  # of the draws; -1: another one each time

    def __post_init__(self) -> None:
        if self.seed != -1:
            super().__post_init__()
        check_length(self.max_new_tokens)
        check_quantize(self.quantize)
        check_cache(self.cache)
        if self.context < 0:
            raise Error(f"context is {self.context}", where="chat", fix="give a number of tokens, or 0 for all")
