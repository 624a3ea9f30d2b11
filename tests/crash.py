"""A process that dies at a chosen change of the disk; for tests that fork."""

from __future__ import annotations

import builtins
import io
import os
import signal
from pathlib import Path
from typing import Any


class Crash:
    """Counts every operation that changes the disk; the `at`-th one is cut short, and the process is gone."""

    def __init__(self, at: int | None, log: Path | None = None) -> None:
        self.at, self.count, self.log = at, 0, log
        for name in ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "ftruncate"):
            setattr(os, name, self.wrap(name, getattr(os, name)))
        opened = io.open

        def open_(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            handle = opened(file, mode, *args, **kwargs)
            if isinstance(file, int) or not set("wax+") & set(mode) or "b" not in mode:
                return handle
            return Torn(handle, self, str(file))

        for module in (io, builtins):
            vars(module)["open"] = open_

    def due(self, what: str) -> bool:
        self.count += 1
        if self.log:
            with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "w") as handle:
                handle.write(what + "\n")
        return self.count == self.at

    def wrap(self, name: str, function: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self.due(f"{name} {args[0]}"):
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped


class Torn:
    """A file whose fatal write leaves half of its bytes behind."""

    def __init__(self, handle: Any, crash: Crash, name: str) -> None:
        self.handle, self.crash, self.name = handle, crash, name

    def write(self, data: Any) -> Any:
        if self.crash.due(f"write {self.name}"):
            view = memoryview(data).cast("B")
            self.handle.write(view[: len(view) // 2])
            self.handle.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.handle.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handle, name)

    def __enter__(self) -> Torn:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.close()
