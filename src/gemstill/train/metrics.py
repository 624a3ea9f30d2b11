"""A run's figures: metrics.jsonl, which goes on exactly where a state stands, and TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gemstill.core.files import unwritable

# Fields that tell of the clock: all others are the same in a run that was interrupted.
TIMES = ("seconds", "tokens_per_second")


class Metrics:
    """Lines of figures in `folder`/metrics.jsonl and events in `folder`/tensorboard.

    size: bytes of metrics.jsonl that belong to the state a run goes on from; what came later is cut off
    and will come again.
    """

    def __init__(self, folder: Path, *, size: int = 0, step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        try:
            self._file = open(self.path, "ab")  # noqa: SIM115 (open for the whole run)
            os.ftruncate(self._file.fileno(), min(size, os.path.getsize(self.path)))
            self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise unwritable(self.path, error) from error
        # TensorBoard forgets events after `step` that an earlier process wrote.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Add one line of figures after `step` steps."""
        try:
            self._file.write(json.dumps({"step": step, **figures}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error
        for name, value in figures.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def sync(self) -> int:
        """Force all lines to the disk; returns the file's size."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self._file.tell()

    def close(self) -> None:
        """Close both files."""
        self._board.close()
        self._file.close()


def read(path: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics.jsonl."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
