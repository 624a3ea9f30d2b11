"""What a person should know though nothing failed: a warning of our own kind, one line on the command line."""

from __future__ import annotations

import sys
import warnings
from typing import TextIO


class Notice(UserWarning):
    """Something decided for the user, who may want to know. Silence it with `warnings.simplefilter`."""


def note(what: str, *, where: object = "") -> None:
    """Say `what`, of the thing at `where`, once for each text and place."""
    warnings.warn(f"{where}: {what}" if str(where) else what, Notice, stacklevel=3)


def on_one_line() -> None:
    """Print each Notice as one line on stderr from now on, as a command line does; other warnings stay as they are."""
    usual = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, Notice):
            print(f"gemstill: {message}", file=file or sys.stderr)
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show
