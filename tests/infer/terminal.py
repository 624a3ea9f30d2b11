"""A program at a terminal of its own, typed to and read from."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_READY, _BUSY = "\x1b[?2004h", "\x1b[?2004l"  # a prompt tells the terminal that it takes pasted text as such
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """`python -m gemstill …` behind a pseudo-terminal; `shown` is all it wrote, without what moves the cursor."""

    def __init__(self, words: Sequence[str], environment: dict[str, str]) -> None:
        # A real terminal answers where its cursor is; this one says that it does not.
        extra = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"}
        self.raw, self._found = "", 0
        self.pid, self._handle = pty.fork()
        if self.pid == 0:
            os.execve(
                sys.executable, [sys.executable, "-m", "gemstill", *words], {**os.environ, **extra, **environment}
            )

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._handle)

    @property
    def shown(self) -> str:
        return _CODES.sub("", self.raw)

    def type(self, text: str, *, at_prompt: bool = True) -> None:
        """Type, by default once the program reads keys one by one: before that a terminal makes them into lines."""
        end = time.monotonic() + 240
        while at_prompt and self.raw.rfind(_READY) <= self.raw.rfind(_BUSY):
            if time.monotonic() > end or not self.read(0.2):
                raise AssertionError(f"no prompt came; shown: {self.shown!r}")
        os.write(self._handle, text.encode())

    def wait(self, text: str, seconds: float = 240.0) -> str:
        """Read until `text` is shown behind what an earlier wait has found; gives all that came with it."""
        end, begin = time.monotonic() + seconds, self._found
        while text not in self.shown[begin:]:
            if time.monotonic() > end or not self.read(0.2):
                raise AssertionError(f"{text!r} did not come; {self._state()}; shown: …{self.shown[begin:][-2000:]!r}")
        self._found = self.shown.index(text, begin) + len(text)
        return self.shown[begin:]

    def _state(self) -> str:
        """Whether the terminal makes Ctrl-C a signal, and what the program does with that."""
        signals = bool(termios.tcgetattr(self._handle)[3] & termios.ISIG)
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            status = ""
        masks = " ".join(line for line in status.splitlines() if line.startswith(("Sig", "Shd")))
        return f"the terminal makes signals: {signals} {masks}"

    def end(self, seconds: float = 30.0) -> int:
        """Wait until the program ends; its exit status."""
        stop = time.monotonic() + seconds
        while time.monotonic() < stop and self.read(0.2):
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def read(self, seconds: float) -> bool:
        """Read what there is, waiting a while for it; False when the program has ended."""
        if not select.select([self._handle], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self._handle, 1 << 16)
        except OSError:  # how Linux says that the other side is gone
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)
