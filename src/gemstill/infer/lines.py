"""Messages as a person gives them: at a terminal with history and line editing, or as the lines of a pipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

QUOTE = '"""'  # around a message of several lines


class Lines(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """The next message, None when there are no more. Raises KeyboardInterrupt for Ctrl-C."""


class Piped:
    """The lines of a pipe or a file, each a message; several between triple quotes are one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self) -> str | None:
        """The next message, None at the end."""
        line = self._stream.readline()
        if not line:
            return None
        while is_open(line) and (more := self._stream.readline()):
            line += more
        return unquoted(line)


class Terminal:
    """A prompt with line editing and a history that is kept. Alt-Enter or triple quotes make several lines."""

    def __init__(self, prompt: str, history: Path | None) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, History, InMemoryHistory

        kept: History = FileHistory(str(history)) if history else InMemoryHistory()
        self._session: PromptSession[str] = PromptSession(
            prompt,
            history=kept,
            multiline=True,
            key_bindings=_bindings(),
            prompt_continuation="." * (len(prompt) - 1) + " ",
        )

    def read(self) -> str | None:
        """The next message, None after Ctrl-D."""
        try:
            return unquoted(self._session.prompt())
        except EOFError:
            return None


def lines(prompt: str) -> Lines:
    """Where messages come from: the terminal if there is one, else standard input."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return Terminal(prompt, history_file())
    return Piped(sys.stdin)


def history_file() -> Path | None:
    """The file of what was typed, for its owner's eyes alone, made if missing; None where that cannot be."""
    base = os.environ.get("XDG_STATE_HOME")
    path = (Path(base) if base else Path.home() / ".local" / "state") / "gemstill" / "chat_history"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.fchmod(handle, 0o600)
        finally:
            os.close(handle)
    except OSError:
        return None
    return path


def is_open(text: str) -> bool:
    """Whether triple quotes at the beginning still wait for their end."""
    text = text.strip()
    return text.startswith(QUOTE) and (len(text) < 2 * len(QUOTE) or not text.endswith(QUOTE))


def unquoted(text: str) -> str:
    """A message without the triple quotes around it and the white space around those."""
    text = text.strip()
    if text.startswith(QUOTE):
        text = text.removeprefix(QUOTE).removesuffix(QUOTE).strip("\n")
    return text


def _bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_open(buffer.text):
            buffer.newline()
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return keys
