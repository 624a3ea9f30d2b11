"""`gemstill chat`: a conversation at the terminal, or with the lines of a pipe."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from gemstill.checkpoint.look import expect_model
from gemstill.core.config import nearest, parse
from gemstill.core.errors import Error
from gemstill.core.progress import short
from gemstill.core.terminal import printable
from gemstill.infer.config import ChatConfig, Sampling, check_length
from gemstill.infer.lines import Lines, lines

if TYPE_CHECKING:
    from gemstill.infer.conversation import Conversation

PROMPT, ERASE = "> ", "\r\x1b[K"
COMMANDS = {
    "/reset": "begin anew; the model forgets all turns",
    "/save FILE": "write the conversation as JSON",
    "/load FILE": "go on with a conversation that /save wrote",
    "/system [TEXT]": "show, or set, what the model is told first; - for nothing",
    "/params [NAME=VALUE …]": "show or set temperature, top_k, top_p, min_p, repetition_penalty, max_new_tokens, seed",
    "/exit": "end; so does Ctrl-D",
    "/help": "this list",
}
KEYS = 'Alt-Enter begins a new line, """ around several lines makes them one message, Ctrl-C stops an answer.'
_COMMAND = re.compile(r"/[a-z]+(?!\S)")


@dataclass(frozen=True)
class Params(Sampling):
    """What /params sets."""

    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length(self.max_new_tokens)


def run(config: ChatConfig) -> None:
    """Hold a conversation until /exit or the end of the input.

    Raises:
        Error: no such model, or one without turns; in a pipe also what a command of it does wrong.
    """
    expect_model(config.source)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print("\x1b[2mloading …\x1b[0m", end="", flush=True)
    conversation = _open(config)
    if interactive:
        print(ERASE, end="", flush=True)
    chat = Chat(conversation, lines(PROMPT), interactive=interactive)
    chat.say(_banner(config, conversation))
    chat.run()


def plan(config: ChatConfig) -> dict[str, Any]:
    """What a conversation takes when its context is full; the model is mapped, not read."""
    expect_model(config.source)
    from gemstill.model.quantized import weight_bytes

    conversation = _open(config)
    model, context = conversation.engine.model, conversation.engine.context
    return {
        "context_tokens": context,
        "cache_bytes_at_most": conversation.engine.needs(context),
        "weight_bytes": weight_bytes(model),
    }


class Chat:
    """A conversation with someone: reads messages and commands, shows answers and what there is to know.

    interactive: at a terminal. Elsewhere standard output gets the answers alone, and what a command does
    wrong is raised instead of shown.
    """

    def __init__(self, conversation: Conversation, messages: Lines, *, interactive: bool) -> None:
        self.conversation, self.messages, self.interactive = conversation, messages, interactive

    def run(self) -> None:
        """Go on until /exit or the end of the messages."""
        while True:
            try:
                text = self.messages.read()
                if text is None or (text and not self.obey(text)):
                    return
            except KeyboardInterrupt:  # at the prompt, or in the moment before it
                if not self.interactive:
                    raise
                self.say("Ctrl-D or /exit ends the conversation")
            except Error as error:
                if not self.interactive:
                    raise
                self.say(str(error))

    def obey(self, text: str) -> bool:
        """Do a command or answer a message; False when it says to end."""
        if not (command := _COMMAND.match(text)):
            self.answer(text)
            return True
        name, rest = command[0], text[command.end() :].strip()
        if name in ("/exit", "/quit", "/bye"):
            return False
        known = {usage.split()[0]: usage for usage in COMMANDS}
        if name not in known:
            raise Error(f"there is no command {name}", fix=nearest(name, known))
        if "FILE" in known[name] and not rest:
            raise Error(f"{name} needs the name of a file", fix=f"write {known[name]}")
        getattr(self, "_" + name.removeprefix("/"))(rest)
        return True

    def answer(self, text: str) -> None:
        """Show the answer as it comes; at a terminal Ctrl-C stops it, and its speed stands below."""
        talk, before, begin = self.conversation, self.conversation.left, time.monotonic()
        first, gone = 0.0, False
        try:
            with closing(talk.say(text)) as pieces, _interrupts(talk.stop, self.interactive):
                for piece in pieces:
                    first = first or time.monotonic()
                    if talk.left > before and not gone:
                        gone = self._tell_who_left()
                    sys.stdout.write(printable(piece) if self.interactive else piece)
                    sys.stdout.flush()
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        sys.stdout.write("\n")
        sys.stdout.flush()
        if talk.left > before and not gone:
            self._tell_who_left()
        now = time.monotonic()
        self._tell_how((first or now) - begin, now - (first or now))

    def say(self, text: str) -> None:
        """Tell the person something, quietly; nothing in a pipe."""
        if self.interactive:
            print(f"\x1b[2m{printable(text)}\x1b[0m", flush=True)

    def _tell_who_left(self) -> bool:
        talk = self.conversation
        what = f"the context of {talk.engine.context:,} tokens is full: the oldest turns left, {talk.left // 2} by now"
        if self.interactive:
            self.say(what)
        else:
            print(f"gemstill: {what}", file=sys.stderr)
        return True

    def _tell_how(self, waited: float, took: float) -> None:
        reply = self.conversation.reply
        if reply is None:
            return
        count = len(reply.tokens)
        parts = [f"{count} tokens"] if count != 1 else ["1 token"]
        if count > 1 and took > 0:
            parts.append(f"{short(round((count - 1) / took, 1))} tokens/s")
        if waited > 0:
            parts.append(f"read {reply.prefilled} of {len(reply.prompt)} in {waited:.1f} s")
        why = {"cancelled": "stopped", "length": "cut at max_new_tokens", "context": "cut: the context is full"}
        self.say(" · ".join([*parts, *([why[reply.ended]] if reply.ended in why else [])]))

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self.say("the conversation begins anew")

    def _save(self, file: str) -> None:
        self.conversation.save(file)
        self.say(f"{len(self.conversation.messages) // 2} turns are in {file}")

    def _load(self, file: str) -> None:
        from gemstill.infer.conversation import read_turns

        self.conversation.reset(read_turns(file))
        self.say(f"{len(self.conversation.messages) // 2} turns are back")

    def _system(self, text: str) -> None:
        if text:
            self.conversation.tell("" if text == "-" else text)
        self.show(self.conversation.system or "the model is told nothing first")

    def _params(self, text: str) -> None:
        talk = self.conversation
        now = Params(**asdict(talk.sampling), max_new_tokens=talk.max_new_tokens)
        if text:
            now = parse(Params, asdict(now), re.split(r"[\s,]+(?=\w+=)", text))
            values = asdict(now)
            talk.max_new_tokens = values.pop("max_new_tokens")
            talk.sampling = Sampling(**values)
        self.show("  ".join(f"{name}={value}" for name, value in asdict(now).items()))

    def _help(self, _: str) -> None:
        width = max(map(len, COMMANDS))
        self.show("\n".join([*(f"{usage:{width}}  {what}" for usage, what in COMMANDS.items()), KEYS]))

    def show(self, text: str) -> None:
        """Tell what was asked for; in a pipe on standard error, so that answers stay alone."""
        if self.interactive:
            self.say(text)
        else:
            print(text, file=sys.stderr)


def _open(config: ChatConfig) -> Conversation:
    from gemstill.infer.command import load
    from gemstill.infer.conversation import Conversation, read_turns
    from gemstill.text.turns import encode_turns

    turns = read_turns(config.load) if config.load else None
    model, tokenizer = load(config.source, config.quantize)
    encode_turns(tokenizer, [{"role": "user", "content": "x"}])  # a tokenizer without turns is told now
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    values = {name: getattr(config, name) for name in names}
    if config.seed == -1:
        values["seed"] = time.time_ns() % (1 << 31)
    conversation = Conversation(
        model,
        tokenizer,
        sampling=Sampling(**values),
        max_new_tokens=config.max_new_tokens,
        system=config.system,
        context=config.context,
        cache=config.cache,
    )
    if turns:
        conversation.reset(replace(turns, system=config.system or turns.system))
    return conversation


def _banner(config: ChatConfig, conversation: Conversation) -> str:
    shape = conversation.engine.model.config
    size = short(shape.body_parameters + shape.embedding_parameters)
    context = f"context {conversation.engine.context:,} tokens"
    return f"{config.source} · {size} parameters · {context} · /help lists the commands"


@contextmanager
def _interrupts(stop: Callable[[], None], wanted: bool) -> Iterator[None]:
    """Have Ctrl-C call `stop`, which ends an answer at a place where the cache is whole; a second one raises."""
    if not wanted:
        yield
        return

    def handler(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
