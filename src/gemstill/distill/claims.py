"""Several processes at work on one store: who writes which block, and who begins and ends it.

Locks lie on single bytes of one file, `.lock`: byte n for block n, and one far behind for the store as a
whole. The system lets go of them when their process dies, however it dies, and they hold on all machines
that share the folder where the file system has such locks.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from gemstill.core import files

WHOLE = 1 << 40  # the byte that stands for the store as a whole


class Claims:
    """The blocks of a store that this process has claimed.

    >>> with Claims(folder) as claims, claims.block(3) as mine:  # doctest: +SKIP
    ...     if mine:
    ...         write()

    Raises:
        Error: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = open(folder / ".lock", "a+")  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise files.unwritable(folder, error) from error

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._handle.close()

    @contextmanager
    def store(self) -> Iterator[None]:
        """The store as a whole, to begin it or to finish it; waits for others."""
        fcntl.lockf(self._handle, fcntl.LOCK_EX, 1, WHOLE)
        try:
            yield
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, WHOLE)

    @contextmanager
    def block(self, number: int) -> Iterator[bool]:
        """One block; gives False where another process has it."""
        try:
            fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._handle, fcntl.LOCK_UN, 1, number)
