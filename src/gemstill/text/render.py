"""Renders a stranger's chat template: all that a child process does, under limits that it sets on itself.

Run as a script by `gemstill.text.template` with a request on standard input; nothing here is imported elsewhere, so
that the child starts fast and the template finds nothing of ours to hold on to.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from typing import Any, NoReturn

MEMORY, CPU_SECONDS, SECONDS = 192 << 20, 2, 8  # address space in bytes; of its own computing, and by the clock
LONGEST = 4 << 20  # characters of all that is rendered


def limit() -> None:
    """Let this process die rather than take more than its share, whether or not its parent still lives."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    signal.alarm(SECONDS)
    limits = {
        resource.RLIMIT_CPU: CPU_SECONDS,
        resource.RLIMIT_AS: MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        with suppress(ValueError, OSError):  # macOS knows no limit on address space
            resource.setrlimit(kind, (most, most))


def environment() -> Any:
    """The Jinja environment that templates of the Hugging Face hub are written for, as a sandbox."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the model says, for training; it renders as what it holds."""

        tags = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation], cache_size=0
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def main() -> None:
    """Answer {"template", "cases": [variables, …]} with [{"text"} or {"error"}, …]."""
    limit()
    request = json.load(sys.stdin)
    answers: list[dict[str, str]] = []
    template, room = None, LONGEST
    for variables in request["cases"]:
        try:
            template = template or environment().from_string(request["template"])
            parts = []
            for part in template.generate(**variables):
                room -= len(part)
                if room < 0:
                    raise MemoryError
                parts.append(part)
            answers.append({"text": "".join(parts)})
        except MemoryError:
            sys.exit(1)
        except Exception as error:  # whatever a template may do wrong
            answers.append({"error": str(error) or type(error).__name__})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
