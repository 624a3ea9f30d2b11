"""`gemstill generate`: prompts in, text out as it comes. torch is loaded when the input is known to be right."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemstill.checkpoint.look import expect_model
from gemstill.core.errors import Error
from gemstill.core.terminal import printable
from gemstill.infer.config import GenerateConfig, Sampling

if TYPE_CHECKING:
    from gemstill.infer.generate import Generation
    from gemstill.model.transformer import Transformer
    from gemstill.text.tokenizer import Tokenizer

Prompt = str | Sequence[Mapping[str, str]]
PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")


def run(config: GenerateConfig) -> None:
    """Print what the model writes after each prompt, as it comes; with `json`, an object a line.

    Raises:
        Error: no such model; prompts that cannot be read or do not fit its context.
    """
    expect_model(config.source)
    prompts = _prompts(config)
    from gemstill.infer.engine import Engine
    from gemstill.infer.generate import Generation, Limits, fitting

    model, tokenizer = load(config.source, config.quantize)
    limits = Limits(config.max_new_tokens, tuple(config.stop))
    engine = Engine(model, cache=config.cache)
    texts = [
        Generation(
            engine,
            tokenizer,
            fitting(tokenizer, prompt, engine.context, f"prompt {number}"),
            sampling(config),
            limits,
            logprobs=config.json,
        )
        for number, prompt in enumerate(prompts, 1)
    ]
    for text in texts:
        text.start()
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        if config.json:
            print(json.dumps(_record(prompt, text, tokenizer), ensure_ascii=False), flush=True)
        else:
            sys.stdout.write("\n" if number else "")  # an empty line between the answers
            show(text)


def plan(config: GenerateConfig) -> dict[str, Any]:
    """What `run` would do, in figures; the model is mapped, not read."""
    expect_model(config.source)
    prompts = _prompts(config)
    from gemstill.infer.engine import MOST, Engine
    from gemstill.infer.generate import prompt_ids
    from gemstill.model.quantized import weight_bytes

    model, tokenizer = load(config.source, config.quantize)
    lengths = [len(prompt_ids(tokenizer, prompt)) for prompt in prompts]
    flops = 2 * (model.config.body_parameters + model.config.vocab_size * model.config.hidden_size)
    capacity = min(max(lengths) + config.max_new_tokens, model.config.max_position)
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(lengths),
        "new_tokens_at_most": config.max_new_tokens * len(prompts),
        "flops_at_most": flops * (sum(lengths) + config.max_new_tokens * len(prompts)),
        "cache_bytes": min(len(prompts), MOST) * Engine(model, cache=config.cache).needs(capacity),
        "weight_bytes": weight_bytes(model),
    }


def sampling(config: Sampling) -> Sampling:
    """The sampling that is part of a command's configuration."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return Sampling(**{name: getattr(config, name) for name in names})


def show(pieces: Generation) -> None:
    """Print text as it comes, and a line's end; on a terminal without what a terminal would obey."""
    terminal = sys.stdout.isatty()
    for piece in pieces:
        sys.stdout.write(printable(piece) if terminal else piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def load(source: str, quantize: str = "") -> tuple[Transformer, Tokenizer]:
    """Open a model, torch and all."""
    from gemstill.checkpoint import source as sources

    return sources.load(source, quantize=quantize or None)


def _record(prompt: Prompt, generation: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    text = "".join(generation)
    tokens = [{"id": t.id, "text": tokenizer.decode([t.id]), "logprob": t.logprob} for t in generation.tokens]
    return {
        "prompt": prompt,
        "prompt_tokens": len(generation.prompt),
        "text": text,
        "ended": generation.ended,
        "tokens": tokens,
    }


def _prompts(config: GenerateConfig) -> list[Prompt]:
    """The prompts, from the command line, a file or standard input; with `chat` those that are text become turns."""
    if config.prompts:
        found = read_prompts(Path(config.prompts))
    elif config.prompt != "-":
        if config.prompt.lower().endswith(PICTURES) and Path(config.prompt).is_file():
            raise Error("is a picture, and this is a text model", where=config.prompt, fix="give a text")
        found = [config.prompt]
    else:
        if sys.stdin.isatty():
            print("reading the prompt from the terminal; Ctrl-D on a line of its own ends it", file=sys.stderr)
        found = [_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")]
    if not config.chat:
        return found
    return [[{"role": "user", "content": item}] if isinstance(item, str) else item for item in found]


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: one a line, or in .jsonl a JSON text or an object with "prompt" or "messages" a line.

    Raises:
        Error: it cannot be read, holds no prompt, or a line that is none, which is named by its number.
    """
    try:
        lines = _text(path.read_bytes(), path).replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path, fix="name a file of prompts") from error
    found: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found.append(line if path.suffix != ".jsonl" else _json_prompt(line, f"{path}, line {number}"))
    if not found:
        raise Error("holds no prompt", where=path, fix="put one in each line")
    return found


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        item = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Error(f"is not valid JSON ({error})", where=where) from error
    value = item.get("prompt", item.get("messages")) if isinstance(item, dict) else item
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(m, dict) for m in value)):
        return value
    raise Error("is no prompt", where=where, fix='write a text, {"prompt": text} or {"messages": [...]}')


def _text(data: bytes, where: object) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise Error("is no UTF-8 text", where=where) from error
