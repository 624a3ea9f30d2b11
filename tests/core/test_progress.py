"""Progress lines: rate, time left, figures."""

from __future__ import annotations

import io

import pytest

from gemstill.core import progress
from gemstill.core.progress import Progress, duration, short


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_numbers_and_times_in_few_characters() -> None:
    assert [short(x) for x in (0.012345, 7.0, 1234, 1_234_567, 6e13)] == ["0.01235", "7", "1.23k", "1.23M", "60T"]
    assert [duration(x) for x in (0.4, 59.6, 185, 7385)] == ["0 s", "1:00", "3:05", "2:03:05"]


def test_plain_lines_every_ten_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with Progress(1000, "tokens", "train", stream=out) as work:
        for _ in range(10):
            clock.now += 4
            work.advance(100, loss=2.5)
    lines = out.getvalue().splitlines()
    assert len(lines) == 4  # after 12, 24 and 36 seconds, and at the end
    assert lines[0] == "train   30%  300 of 1k tokens · 25 tokens/s · 28 s left · loss 2.5"
    assert lines[-1] == "train  100%  1k of 1k tokens · 25 tokens/s · loss 2.5 · took 40 s"


def test_a_resumed_job_and_a_slow_start_do_not_spoil_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with Progress(10_000, "steps", "train", done=5000, stream=io.StringIO()) as work:
        clock.now += 60
        work.advance(1)  # compilation
        for _ in range(40):
            clock.now += 1
            work.advance(10)
        assert work.rate == pytest.approx(10)


def test_a_failed_job_does_not_claim_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    with pytest.raises(KeyError), Progress(10, "steps", "train", stream=out):
        raise KeyError
    assert out.getvalue() == ""


def test_on_a_terminal_one_line_is_redrawn() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress(10, "steps", "train", stream=out) as work:
        work.advance(10, loss=1.5)
    assert "loss 1.5" in out.getvalue()
    assert "100%" in out.getvalue()
