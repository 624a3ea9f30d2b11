"""Generation of text, token by token, from cached keys and values."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemstill.checkpoint.huggingface import load
from gemstill.checkpoint.sidecars import END_OF_TURN
from gemstill.core.errors import Error
from gemstill.model.cache import Cache
from gemstill.model.readout import last_logits
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no UTF-8 (yet)
CHUNK = 512  # prompt tokens fed at once: bounds the memory of a long prompt


@dataclass(frozen=True)
class GenerateConfig:
    """What `gemstill generate` needs to know."""

    model: Path  # checkpoint folder
    prompt: str = ""  # text to go on from
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0 takes the likeliest token each time
    seed: int = 0  # of the draws at a temperature above 0

    def __post_init__(self) -> None:
        _check(self.max_new_tokens, self.temperature)


def run(config: GenerateConfig) -> None:
    """Print what the model writes after the prompt, as it comes."""
    model, tokenizer = load(config.model)
    pieces = stream(
        model,
        tokenizer,
        config.prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def plan(config: GenerateConfig) -> dict[str, Any]:
    """What `run` would do, in figures; the model is mapped, not read."""
    model, tokenizer = load(config.model)
    prompt = prompt_ids(tokenizer, config.prompt)
    flops = 2 * (model.config.body_parameters + model.config.vocab_size * model.config.hidden_size)
    cache = Cache(model.config, 1, len(prompt) + config.max_new_tokens, _dtype(model), "meta")
    return {
        "prompt_tokens": len(prompt),
        "new_tokens_at_most": config.max_new_tokens,
        "flops_at_most": flops * (len(prompt) + config.max_new_tokens),
        "cache_bytes": cache.bytes,
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
    }


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """The text that the model writes after `prompt`: all pieces of `stream` (see there) as one string."""
    return "".join(stream(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed))


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield the text that the model writes after `prompt`, piece by piece, each of whole characters.

    temperature: 0 takes the likeliest token each time, above it they are drawn from softmax(logits / temperature)
    with `seed`. Generation ends with <eos> or <end_of_turn>, after max_new_tokens, or when the model's longest
    context is full. Padding rows of the vocabulary and control tokens are never drawn.

    Raises:
        Error: max_new_tokens or temperature below 0; a prompt longer than the model's context.
    """
    _check(max_new_tokens, temperature)
    prompt_tokens = prompt_ids(tokenizer, prompt)
    if len(prompt_tokens) > model.config.max_position:
        what = f"{len(prompt_tokens)} tokens exceed the model's context of {model.config.max_position}"
        raise Error(what, where="prompt", fix="shorten it")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    return whole_text(tokenizer, generate_ids(model, tokenizer, prompt_tokens, **options))


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt's ids behind one <bos>; a control token spelled out in the prompt is text, so no other can come in."""
    return [tokenizer.bos_id, *tokenizer.encode(prompt)]


def generate_ids(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield the ids that follow `prompt`; the token that ends generation is not among them."""
    stops, allowed = stop_ids(tokenizer), _allowed(model, tokenizer)
    capacity = min(len(prompt) + max_new_tokens, model.config.max_position)
    generator = torch.Generator().manual_seed(seed)
    cache = Cache(model.config, 1, capacity, _dtype(model), model.embed_tokens.weight.device)
    fresh = list(prompt)
    for _ in range(capacity - len(prompt)):
        token = _draw(_feed(model, cache, fresh).masked_fill(~allowed, -torch.inf), temperature, generator)
        if token in stops:
            return
        yield token
        fresh = [token]


def whole_text(tokenizer: Tokenizer, ids: Iterator[int]) -> Iterator[str]:
    """Decode ids as they come, holding back a character whose bytes are not all there."""
    window: list[int] = []  # ids since the last piece began, and of that piece itself: a decoder may look back
    fresh = 0  # where in `window` the ids not yet given out begin
    for token in ids:
        window.append(token)
        before, now = tokenizer.decode(window[:fresh]), tokenizer.decode(window)
        # A character has at most four bytes: a fourth replacement in a row is no beginning of one.
        if len(now) > len(before) and not (now.endswith(REPLACEMENT) and len(window) - fresh < 4):
            yield now[len(before) :]
            window, fresh = window[fresh:], len(window) - fresh
    rest = tokenizer.decode(window)[len(tokenizer.decode(window[:fresh])) :]
    if rest:
        yield rest


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids that end a text: <eos>, and <end_of_turn> where there is one."""
    turn = tokenizer.token_id(END_OF_TURN)
    return {tokenizer.eos_id} if turn is None else {tokenizer.eos_id, turn}


def _check(max_new_tokens: int, temperature: float) -> None:
    if max_new_tokens < 0:
        raise Error(f"max_new_tokens is {max_new_tokens}, it must not be below 0", where="generate")
    if not 0 <= temperature < float("inf"):
        raise Error(f"temperature is {temperature}, it must be a number from 0 up", where="generate")


def _dtype(model: Transformer) -> torch.dtype:
    return model.compute_dtype or model.embed_tokens.weight.dtype


def _allowed(model: Transformer, tokenizer: Tokenizer) -> Tensor:
    """Which entries may be drawn: [V] bool; no padding row, no control token but those that end the text."""
    allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    allowed[: tokenizer.vocab_size] = True
    allowed[sorted(tokenizer.control_ids)] = False
    allowed[sorted(stop_ids(tokenizer))] = True
    return allowed


@torch.inference_mode()
def _feed(model: Transformer, cache: Cache, ids: list[int]) -> Tensor:
    """Feed ids to the model and return the logits [V] of the token after them, on the CPU."""
    tokens = torch.tensor([ids], device=model.embed_tokens.weight.device)
    for part in torch.split(tokens, CHUNK, 1):
        logits: Tensor = model(part, cache=cache, readout=last_logits)
    return logits[0].float().cpu()


def _draw(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits.double() / temperature, -1), 1, generator=generator))
