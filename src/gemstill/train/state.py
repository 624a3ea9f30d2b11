"""Training states: PyTorch Distributed Checkpoints, each whole or not at all, the last few and the best.

A state's index is read by pickle: states are local and the run's own, never something to fetch from elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gemstill.core.errors import Error
from gemstill.core.files import TEMPORARY, fsync, read_json, recover, unwritable, write_json, writing
from gemstill.train.parallel import Ranks

RECORD = "record.json"  # plain facts beside the tensors


class States:
    """The states of one run, folders `step-00000123`; a folder of that name is always whole."""

    def __init__(self, folder: str | Path, here: Ranks | None = None, *, keep_last: int = 2) -> None:
        self.folder, self.here, self.keep_last = Path(folder), here or Ranks(), keep_last

    def clean(self) -> None:
        """Drop what a killed process left half written or half deleted. For rank 0, before anything else."""
        if self.folder.is_dir():
            for path in sorted(self.folder.glob("step-*")):
                if path.name.endswith((TEMPORARY, ".old")):
                    recover(self.folder / path.name.removesuffix(TEMPORARY).removesuffix(".old"))

    def path(self, step: int) -> Path:
        """Where the state after `step` steps lies."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """The steps that have a state, oldest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, tensors: dict[str, Any], record: dict[str, Any], *, best: int | None = None) -> Path:
        """Write the state after `step` steps, on all ranks together, then drop all but the last few and `best`.

        tensors: nested dicts of tensors (sharded or not) and picklable values. record: plain facts.

        Raises:
            Error: it cannot be written (disk full, read-only). States that were there stay as they were.
        """
        path = self.path(step)
        first = self.here.rank == 0
        temporary = path.with_name(path.name + TEMPORARY)
        with writing(path, folder=True) if first else contextlib.nullcontext():
            self.here.wait()
            with _quiet(), _readable_errors(path):
                save(tensors, storage_writer=FileSystemWriter(temporary, sync_files=True))
            if first:
                write_json(temporary / RECORD, record)
        self.here.wait()
        if first:
            self._prune(best)
        return path

    def record(self, step: int) -> dict[str, Any]:
        """The plain facts that were saved with a state."""
        record: dict[str, Any] = read_json(self.path(step) / RECORD)
        return record

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Read a state into `tensors` in place, whatever number of ranks wrote it; plain values are replaced.

        Raises:
            Error: the state is damaged or belongs to another model.
        """
        path = self.path(step)
        with _quiet(), _readable_errors(path):
            load(tensors, storage_reader=FileSystemReader(path))

    def _prune(self, best: int | None) -> None:
        for step in self.steps()[: -self.keep_last]:
            if step != best:
                path = self.path(step)
                doomed = path.with_name(path.name + TEMPORARY)
                os.rename(path, doomed)  # a half deleted state must not look whole
                shutil.rmtree(doomed, ignore_errors=True)
        fsync(self.folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _readable_errors(path: Path) -> Iterator[None]:
    """torch wraps what went wrong on each rank; say it in one line."""
    try:
        yield
    except CheckpointException as error:
        cause = next((wrapped[0] for wrapped in error.failures.values()), error)
        if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
            raise unwritable(path, cause) from error
        text = " ".join(str(cause).split())[:300]
        what = f"is no state of this run ({text or type(cause).__name__})"
        raise Error(what, where=path, fix="delete this one folder, and the run goes on from the one before") from error
