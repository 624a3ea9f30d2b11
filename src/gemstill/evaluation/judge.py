"""A judge: a model behind any OpenAI-compatible server that reads a conversation and answers in JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from gemstill.core.errors import Error
from gemstill.core.server import PassingError, Server

TRIES = 3  # times that a judge is asked again after nonsense

T = TypeVar("T")


class Judge:
    """The model at "http://host:8000/v1#model"; its key is read from GEMSTILL_API_KEY.

    Raises:
        Error: it cannot be reached, refuses, or has no such model.
    """

    def __init__(self, place: str) -> None:
        self._server = Server.open(place)
        self.name = self._server.name

    def verdict(self, question: str, read: Callable[[dict[str, Any]], T]) -> T | None:
        """What `read` makes of the JSON object in the judge's answer; None where it answers nonsense TRIES times.

        read: raises KeyError, TypeError or ValueError for an object that is no verdict.

        Raises:
            Error: the server does not answer.
        """
        body = {"model": self.name, "messages": [{"role": "user", "content": question}], "max_tokens": 512}
        for attempt in range(TRIES):
            # The same question at temperature 0 would have the same answer.
            text = self._server.ask("POST", "/chat/completions", body | {"temperature": float(attempt > 0)}, _text)
            try:
                value = json.loads(text[text.find("{") : text.rfind("}") + 1])
                if not isinstance(value, dict):
                    continue
                return read(value)
            except (KeyError, TypeError, ValueError, RecursionError):
                continue
        return None


def flag(value: Any) -> bool:
    """A yes or no of a verdict. Raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def check_judged(judged: int, nonsense: int, judge: str) -> None:
    """Refuse a judge of whom more than half of the verdicts are none."""
    if nonsense > judged:
        what = f"gave no verdict on {nonsense} of {nonsense + judged} answers"
        raise Error(what, where=f"judge {judge}", fix="take a model that follows instructions")


def _text(answer: dict[str, Any]) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise PassingError(f"gives half an answer ({type(error).__name__}: {error})") from error
    return text if isinstance(text, str) else ""
