"""One line that says how far a long job is, how fast, and how long it will take."""

from __future__ import annotations

import sys
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.live import Live
    from rich.text import Text

PLAIN_SECONDS = 10.0  # between two lines where no terminal redraws them
WINDOW_SECONDS = 30.0  # the rate is that of the last half minute: a slow start (compilation) is forgotten
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """A number in few characters: 1234567 -> '1.23M', 0.0123 -> '0.0123', 7.0 -> '7'."""
    for size, prefix in _PREFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{prefix}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time in few characters: '12 s', '3:05', '2:03:05'."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


class Progress:
    """Report the progress of a job of `total` units on standard error.

    On a terminal one line is redrawn; elsewhere (a log, a pipe) a plain line comes about every ten
    seconds and at the end. `done` units were there already (a resumed job) and do not count for the rate.

    >>> with Progress(1000, "tokens", "train") as progress:
    ...     progress.advance(500, loss=4.2)
    """

    def __init__(
        self, total: float, unit: str, label: str, *, done: float = 0, stream: TextIO | None = None, quiet: bool = False
    ) -> None:
        self.total, self.unit, self.label, self.done = float(total), unit, label, float(done)
        self.quiet = quiet  # ranks other than the first count, and print nothing
        self._stream = stream or sys.stderr
        self._figures: dict[str, float | str] = {}
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        self._start = self._printed = time.monotonic()
        self._initial = self.done
        self._history = deque([(self._start, self.done)])
        if not self.quiet and self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream)
            self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
            self._live.start()
        return self

    def advance(self, amount: float = 1, **figures: float | str) -> None:
        """Say that `amount` more units are done; `figures` (loss=2.3) stand at the end of the line."""
        now = time.monotonic()
        self.done += amount
        self._figures.update(figures)
        self._history.append((now, self.done))
        while len(self._history) > 2 and now - self._history[1][0] > WINDOW_SECONDS:
            self._history.popleft()
        if self._live is None and now - self._printed >= PLAIN_SECONDS:
            self._print(now)

    @property
    def rate(self) -> float:
        """Units a second over the last half minute."""
        (then, before), (now, done) = self._history[0], self._history[-1]
        return (done - before) / (now - then) if now > then else 0.0

    def line(self) -> str:
        """The line without its bar: 'train  42 %  4.2M of 10M tokens · 21k tokens/s · 4:36 left · loss 3.9'."""
        share = self.done / self.total if self.total else 1.0
        parts = [f"{self.label}  {min(share, 1):4.0%}  {short(self.done)} of {short(self.total)} {self.unit}"]
        if self.rate:
            parts.append(f"{short(self.rate)} {self.unit}/s")
            if self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        for name, value in self._figures.items():
            parts.append(f"{name} {value if isinstance(value, str) else short(value)}")
        return " · ".join(parts)

    def _render(self) -> Text:
        from rich.text import Text

        full = round(20 * min(1.0, self.done / self.total)) if self.total else 20
        bar = Text("━" * full, style="green") + Text("━" * (20 - full), style="dim")
        line = bar + Text("  " + self.line())
        line.no_wrap, line.overflow = True, "ellipsis"
        return line

    def _print(self, now: float) -> None:
        self._printed = now
        if not self.quiet:
            print(self.line(), file=self._stream, flush=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = time.monotonic()
        if self._live is not None:
            self._live.stop()
        elif kind is None:
            self._history.append((now, self.done))
            took = f" · took {duration(now - self._start)}" if self.done > self._initial else ""
            if not self.quiet:
                print(self.line() + took, file=self._stream, flush=True)
