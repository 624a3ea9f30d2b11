"""Ids as they come into text as it can be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from gemstill.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no UTF-8 (yet)


class WholeText:
    """Decodes ids as they come, holding back a character whose bytes are not all there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # ids since the last piece began, and of that piece itself: decoders look back
        self._fresh = 0  # where in the window the ids not yet given out begin

    def push(self, token: int) -> str:
        """The text that is clear with one id more, "" where none is."""
        self._window.append(token)
        piece = self.rest()
        # A character has at most four bytes: a fourth replacement in a row is no beginning of one.
        if not piece or (piece.endswith(REPLACEMENT) and len(self._window) - self._fresh < 4):
            return ""
        self._window, self._fresh = self._window[self._fresh :], len(self._window) - self._fresh
        return piece

    def rest(self) -> str:
        """What is held back."""
        before = self._tokenizer.decode(self._window[: self._fresh])
        return self._tokenizer.decode(self._window)[len(before) :]


class Until:
    """The text before the first of the stop strings to be complete, as it comes; `found` says that there was one.

    Text that may be the beginning of a stop string is held back until it is clear, so that nothing of one is
    ever given out, however the text is cut into pieces.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.found = False
        self._stop, self._held = stop, ""

    def push(self, piece: str) -> str:
        """The text that is clear with one piece more, "" where none is; nothing after a stop string."""
        if self.found:
            return ""
        held = self._held + piece
        if ends := sorted((at + len(text), at) for text in self._stop if (at := held.find(text)) >= 0):
            self.found, self._held = True, ""
            return held[: ends[0][1]]
        clear = len(held) - max((_begun(held, text) for text in self._stop), default=0)
        self._held = held[clear:]
        return held[:clear]

    def rest(self) -> str:
        """What is held back."""
        return self._held


def _begun(held: str, text: str) -> int:
    """How many characters at the end of `held` are the beginning of `text`."""
    return next((n for n in range(min(len(held), len(text) - 1), 0, -1) if held.endswith(text[:n])), 0)
