"""A model's own chat template: how it lays a conversation out, found by rendering marks in place of what is said.

A template is a program from a stranger. It runs in a child process without our memory, time and files, and what
people say never goes through it: what it writes around the marks is all that is taken from it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemstill.core import files
from gemstill.core.errors import Error

_SCRIPT = Path(__file__).with_name("render.py")
_SECONDS = 9  # by the clock; the child ends itself before
_VERSION = 1  # of the cached verdicts
# Around each mark stands white space, which a template that trims what is said takes away.
_LEFT, _RIGHT = " \n", "\n "
_MARK = re.compile(f"({_LEFT})?\ue000gemstill:(\\d+)\ue001({_RIGHT})?")


@dataclass(frozen=True)
class Slot:
    """Where what is said in a message goes, stripped of white space at its ends or not."""

    message: int  # its place in the conversation
    strip_left: bool = True
    strip_right: bool = True

    def fill(self, contents: Sequence[str]) -> str:
        """What stands there."""
        content = contents[self.message]
        content = content.lstrip() if self.strip_left else content
        return content.rstrip() if self.strip_right else content


Layout = list[str | Slot]  # a conversation: text that may hold control tokens, and what is said


@dataclass(frozen=True)
class Case:
    """A conversation's outline. roles: "system", "user", "assistant" in turn; prompt: the model is to answer."""

    roles: tuple[str, ...]
    prompt: bool


# Up to three rounds: what a template does from then on, it has done before.
_OUTLINES = [("user", "assistant") * rounds + ("user",) * odd for rounds in range(3) for odd in (1, 0) if rounds or odd]
GRID = [
    Case(system + roles, prompt)
    for system in ((), ("system",))
    for roles in _OUTLINES
    for prompt in ((False, True) if roles[-1] == "user" else (False,))
]


@dataclass(frozen=True)
class Verdict:
    """How a template's layouts compare with ours. takes_system: it has a place for a system message."""

    same: bool
    takes_system: bool


def layouts(template: str, cases: Sequence[Case], tokens: tuple[tuple[str, str], ...]) -> list[Layout | str]:
    """How `template` lays each of `cases` out, or why it would not. tokens: bos_token and others by name.

    Raises:
        Error: it takes too much time or memory.
    """
    request = json.dumps({"template": template, "cases": [_variables(case, tokens) for case in cases]})
    try:
        answers = json.loads(_child(request.encode()))
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        raise Error("its chat template takes too much time or memory") from error
    return [_split(answer["text"]) if "text" in answer else _line(answer["error"]) for answer in answers]


def _child(request: bytes) -> bytes:
    """What the child process answers: nothing where it died of its limits. It is gone when this returns or raises."""
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if name in os.environ}
    with subprocess.Popen(
        [sys.executable, "-P", "-X", "utf8", str(_SCRIPT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=kept,
        start_new_session=True,  # Ctrl-C reaches us alone
    ) as process:
        try:
            return process.communicate(request, timeout=_SECONDS)[0]
        finally:
            process.kill()
            process.wait()


def joined(layout: Layout) -> Layout:
    """The layout with neighbouring texts made one and empty ones left out: equal ones are then equal lists."""
    found: Layout = []
    for part in layout:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        elif part:
            found.append(part)
    return found


@functools.lru_cache(maxsize=256)
def layout(template: str, case: Case, tokens: tuple[tuple[str, str], ...]) -> tuple[str | Slot, ...]:
    """How `template` lays one conversation out. Raises Error where it would not."""
    found = layouts(template, [case], tokens)[0]
    if isinstance(found, str):
        raise Error(f"its chat template refuses this conversation ({found})")
    return tuple(found)


@functools.lru_cache(maxsize=64)
def judge(template: str, ours: tuple[tuple[str | Slot, ...], ...], tokens: tuple[tuple[str, str], ...]) -> Verdict:
    """Compare `template` with `ours`, a layout for each case of `GRID`; remembered on disk by what was compared.

    Raises:
        Error: it takes too much time or memory, or refuses every conversation.
    """
    described = [
        _VERSION,
        template,
        tokens,
        [[part if isinstance(part, str) else asdict(part) for part in each] for each in ours],
    ]
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    file = files.cached(f"template-{key[:32]}.json")
    with suppress(Error, TypeError):
        return Verdict(**files.read_json(file))
    theirs = layouts(template, GRID, tokens)
    if isinstance(theirs[0], str):
        raise Error(f"its chat template cannot be used ({theirs[0]})")
    if not _says_all(theirs[0], GRID[0]):
        raise Error("its chat template leaves out what the user says")
    plain = [place for place, case in enumerate(GRID) if case.roles[0] != "system"]
    with_system = [place for place, case in enumerate(GRID) if case.roles[0] == "system"]
    takes_system = any(
        isinstance(theirs[place], list) and _says_all(theirs[place], GRID[place]) for place in with_system
    )
    compared = plain + with_system if takes_system else plain
    verdict = Verdict(all(theirs[place] == list(ours[place]) for place in compared), takes_system)
    with suppress(Error):
        files.write_json(file, asdict(verdict))
    return verdict


def _says_all(layout: Layout | str, case: Case) -> bool:
    """Is everything that was said in it? Some templates pass over a system message without a word."""
    return {part.message for part in layout if isinstance(part, Slot)} == set(range(len(case.roles)))


def _variables(case: Case, tokens: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    said = [f"{_LEFT}\ue000gemstill:{place}\ue001{_RIGHT}" for place in range(len(case.roles))]
    messages = [{"role": role, "content": content} for role, content in zip(case.roles, said, strict=True)]
    return {
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": case.prompt,
        **dict(tokens),
    }


def _split(text: str) -> Layout:
    parts = _MARK.split(text)  # text, white space, place, white space, text, …
    found: Layout = [parts[0]]
    for left, place, right, after in zip(parts[1::4], parts[2::4], parts[3::4], parts[4::4], strict=True):
        found += [Slot(int(place), not left, not right), after]
    return joined(found)


def _line(message: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in message).split())[:200]
