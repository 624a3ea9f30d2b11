"""A conversation with a model: turns, and a cache that is fed with nothing but what each of them adds."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.files import read_json, write_json
from gemstill.infer.engine import Engine
from gemstill.infer.generate import Generation, Limits
from gemstill.infer.sampling import Sampling
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.turns import encode_turns

FORMAT, VERSION = "gemstill conversation", 1
ANSWER_ROOM = 4  # an answer must find at least one part in so many of the context free
AFTER_LEAVING = 2  # when turns leave, what stays fills at most one part in so many, so that it is not soon again

Message = dict[str, str]


@dataclass(frozen=True)
class Turns:
    """What a conversation is, on disk and off: what the model was told first, and turns of user and assistant."""

    system: str
    messages: list[Message]


class Conversation:
    """A conversation. `say` streams the answer to one message after another.

    system: what the model is told first. messages: the finished turns, user and assistant in turn. left: how
    many of them, from the beginning, the model no longer sees because its context was full. reply: the last
    answer, with its tokens and why it ended.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        sampling: Sampling | None = None,
        max_new_tokens: int = 1024,
        system: str = "",
        context: int = 0,
        cache: str = "",
    ) -> None:
        self.engine = Engine(model, slots=1, context=context, cache=cache)
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.messages: list[Message] = []
        self.left = 0
        self.reply: Generation | None = None
        self._text: list[int] = []  # of the turns that the model sees, the answers in the tokens it wrote

    def say(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to `text` in pieces. An answer that is cancelled stays as far as it came.

        When the context would be full, the oldest turns leave: `left` grows.

        Raises:
            Error: the message alone is too long for the context.
        """
        prompt = self._prompt(text)
        number = len(self.messages)  # other seeds for other turns, or equal questions had equal answers for ever
        sampling = Sampling(**{**vars(self.sampling), "seed": (self.sampling.seed + number) % (1 << 63)})
        limits = Limits(self.max_new_tokens)
        self.reply = reply = Generation(self.engine, self.tokenizer, prompt, sampling, limits)
        parts: list[str] = []
        try:
            for piece in reply:
                parts.append(piece)
                yield piece
        finally:
            if reply.tokens or reply.ended not in ("", "cancelled"):
                self.messages += [_message("user", text), _message("assistant", "".join(parts))]
                self._text = [*prompt, *(token.id for token in reply.tokens)]

    def reset(self, turns: Turns | None = None) -> None:
        """Begin anew, or with the turns of another conversation."""
        self.system = turns.system if turns else self.system
        self.messages = list(turns.messages) if turns else []
        self.left, self.reply, self._text = 0, None, []

    def stop(self) -> None:
        """End the answer that is under way before its next token."""
        if self.reply is not None:
            self.reply.cancel()

    def tell(self, system: str) -> None:
        """Change what the model is told first; the turns stay."""
        self.system, self._text = system, []

    def save(self, path: str | Path) -> None:
        """Write the conversation as JSON. Raises Error when it cannot be written."""
        turns = {"system": self.system, "messages": self.messages}
        write_json(Path(path).expanduser(), {"format": FORMAT, "version": VERSION} | turns)

    def _seen(self) -> list[Message]:
        return self.messages[self.left :]

    def _encode(self, messages: list[Message]) -> list[int]:
        told = [_message("system", self.system)] if self.system else []
        return encode_turns(self.tokenizer, [*told, *messages])

    def _prompt(self, text: str) -> list[int]:
        """The ids that the answer to `text` goes on from, with room for it; `left` is moved on where it must."""
        message = _message("user", text)
        prompt, context = self._continued(message), self.engine.context
        most = context - min(self.max_new_tokens, max(1, context // ANSWER_ROOM))
        if len(prompt) <= most:
            return prompt
        alone = len(self._encode([message]))
        if alone > most:
            what = f"the message takes {alone} tokens of a context of {context} and leaves too few for an answer"
            raise Error(what, where="chat", fix="shorten it")
        left = self.left
        for left in range(self.left + 2, len(self.messages) + 1, 2):
            prompt = self._encode([*self.messages[left:], message])
            if len(prompt) <= min(most, context // AFTER_LEAVING):
                break
        self.left = left
        return prompt

    def _continued(self, message: Message) -> list[int]:
        """All turns that the model sees and `message`, the last answer in the very tokens that the model wrote.

        Written out and read again an answer may become other tokens: the cache would be lost with them.
        """
        seen = self._seen()
        whole = self._encode([*seen, message])
        if not self._text or not seen:
            return whole
        mark = "x"
        opening, probe = self._encode(seen[:-1]), self._encode([*seen[:-1], _message("assistant", mark), message])
        end = len(opening) + len(answer := self.tokenizer.encode(mark))
        if probe[:end] != opening + answer:  # a template that rewrites turns that are over
            return whole
        return self._text + probe[end:]


def read_turns(path: str | Path) -> Turns:
    """Read a conversation that `save` wrote.

    Raises:
        Error: it cannot be read, or is no conversation with user and assistant in turn.
    """
    path = Path(path).expanduser()
    record: Any = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise Error("is no conversation", where=path, fix="name a file that /save wrote")
    if record.get("version") != VERSION:
        raise Error(f"has version {record.get('version')}, this gemstill reads {VERSION}", where=path)
    system, messages = record.get("system"), record.get("messages")
    roles = ("user", "assistant")
    if not isinstance(system, str) or not isinstance(messages, list) or len(messages) % 2:
        raise Error("is damaged: system and messages are not what they should be", where=path)
    for number, item in enumerate(messages):
        right = isinstance(item, dict) and item.get("role") == roles[number % 2]
        if not right or not isinstance(item.get("content"), str):
            raise Error(f"is damaged: message {number + 1} is no text of the {roles[number % 2]}", where=path)
    return Turns(system, [_message(item["role"], item["content"]) for item in messages])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
