"""Ids as they come into text as it can be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from gemstill.text.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder gives for bytes that are no UTF-8 (yet)


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


def until(pieces: Iterator[str], stop: Sequence[str], found: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The text before the first of the stop strings to be complete, as it comes; `found` is called if there is one.

    Text that may be the beginning of a stop string is held back until it is clear, so that nothing of one is
    ever given out, however the text is cut into pieces.
    """
    held = ""
    for piece in pieces:
        held += piece
        if ends := sorted((at + len(text), at) for text in stop if (at := held.find(text)) >= 0):
            found()
            if before := held[: ends[0][1]]:
                yield before
            return
        clear = len(held) - max((_begun(held, text) for text in stop), default=0)
        if clear:
            yield held[:clear]
            held = held[clear:]
    if held:
        yield held


def _begun(held: str, text: str) -> int:
    """How many characters at the end of `held` are the beginning of `text`."""
    return next((n for n in range(min(len(held), len(text) - 1), 0, -1) if held.endswith(text[:n])), 0)
