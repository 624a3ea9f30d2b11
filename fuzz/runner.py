"""Runs cases in worker processes and judges how each ended."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fuzz.seeds import Seed, write
from fuzz.worker import SECONDS
from fuzz.worker import faults as broken

PATIENCE = 60.0  # before a worker is ended; far above SECONDS, for the machine may be busy with others
FOLDERS = ("out", "tmp", "cache", "here")  # of a worker
START = 300.0  # seconds for a worker to come up


@dataclass(frozen=True)
class Verdict:
    """How a case ended."""

    ended: str  # "loaded", "refused" or "failed"
    what: str
    seconds: float
    grown: int  # bytes of memory above what the process had before

    @property
    def failed(self) -> bool:
        """Whether a promise was broken."""
        return self.ended == "failed"


class EndedError(Exception):
    """The worker is gone, or was ended for taking too long."""


class Runner:
    """A worker process in a folder of its own, started anew whenever it dies.

    root/case holds the case, root/out what is saved, root/here the working folder, which must stay empty.
    """

    def __init__(self, root: Path, good: list[Seed]) -> None:
        self.root = root
        self.good = [root / "good" / seed.name / seed.source for seed in good]
        for seed in good:
            write(seed.files, root / "good" / seed.name)
        for name in FOLDERS:
            (root / name).mkdir()
        self.worker: subprocess.Popen[bytes] | None = None
        self.limits: dict[str, int] = {}
        self.starts = 0

    def close(self) -> None:
        """End the worker."""
        if self.worker is not None:
            os.killpg(self.worker.pid, signal.SIGKILL)  # its children too
            self.worker.wait()
            assert self.worker.stdin is not None
            assert self.worker.stdout is not None
            self.worker.stdin.close()
            self.worker.stdout.close()
            self.worker = None

    def run(self, seed: Seed, *, save: bool) -> Verdict:
        """Judge one case; save: also write out what was loaded. A case that takes too long gets a second chance,
        for the machine may have been busy with others."""
        verdict = self._run(seed, save)
        if verdict.seconds > SECONDS:
            self.close()
            verdict = self._run(seed, save)
        return verdict

    def _run(self, seed: Seed, save: bool) -> Verdict:
        if self.worker is None:
            self._start()
            if self.limits["compiled"]:  # the cache is filled now, and no compiler will be the measure
                self.close()
                self._start()
        folder, out = self.root / "case" / "model", self.root / "out" / "saved"
        shutil.rmtree(folder.parent, ignore_errors=True)
        write(seed.files, folder)
        if save:
            out.mkdir(exist_ok=True)
        request = {"source": str(folder / seed.source), "out": str(out) if save else None}
        try:
            answer = self._ask(request)
        except EndedError as error:
            seconds = PATIENCE if "seconds" in str(error) else 0.0
            return Verdict("failed", f"{error}\n{self._log()}", seconds, 0)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        return self._judge(seed, folder, answer)

    def _judge(self, seed: Seed, folder: Path, answer: dict[str, Any]) -> Verdict:
        faults = broken(answer, self.limits)
        faults += [f"left {path}" for path in (self.root / "here").iterdir()]
        if {path.name: path.stat().st_size for path in folder.iterdir()} != {k: len(v) for k, v in seed.files.items()}:
            faults.append("changed the checkpoint")
        if faults:
            self.close()  # what it did may stay with it
            for path in (self.root / "here").iterdir():
                path.unlink()
            return Verdict("failed", f"({answer['ended']}) " + "\n".join(faults), answer["seconds"], answer["grown"])
        return Verdict(answer["ended"], answer["what"], answer["seconds"], answer["grown"])

    def _start(self) -> None:
        environment = surroundings(self.root)
        shutil.rmtree(self.root / "out", ignore_errors=True)
        (self.root / "out").mkdir()
        self.starts += 1
        with open(self.root / "log", "wb") as log:
            self.worker = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", "-m", "fuzz.worker", str(self.root), *map(str, self.good)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=self.root / "here", env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            self.limits = self._answer(START)
        except EndedError as error:
            raise RuntimeError(f"the worker does not come up: {error}\n{self._log()}") from error

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.worker is not None
        assert self.worker.stdin is not None
        self.worker.stdin.write(json.dumps(request).encode() + b"\n")
        self.worker.stdin.flush()
        return self._answer(PATIENCE)

    def _answer(self, patience: float) -> dict[str, Any]:
        assert self.worker is not None
        assert self.worker.stdout is not None
        line = _line(self.worker.stdout, patience)
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        if line is None:
            self.close()
            raise EndedError(f"took more than {patience:.0f} seconds")
        status = self.worker.wait()
        self.close_dead()
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise EndedError(f"the process died: {reason}")

    def close_dead(self) -> None:
        """Forget a worker that has ended, and end what it left running."""
        assert self.worker is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.worker.pid, signal.SIGKILL)
        self.worker = None

    def _log(self) -> str:
        return (self.root / "log").read_bytes()[-3000:].decode(errors="replace")


def surroundings(root: Path) -> dict[str, str]:
    """Environment variables of a process that opens cases: all it may write lies in `root`, no network."""
    paths = filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")))
    return os.environ | {
        "TMPDIR": str(root / "tmp"), "XDG_CACHE_HOME": str(root / "cache"), "HOME": str(root / "cache"),
        "TORCHINDUCTOR_CACHE_DIR": str(root / "cache"), "OMP_NUM_THREADS": "1", "RUST_BACKTRACE": "0",
        "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths),
    }  # fmt: skip


def _line(stream: BinaryIO | Any, patience: float) -> bytes | None:
    """The next line, empty at the stream's end, None when it does not come in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        if not selector.select(patience):
            return None
    line: bytes = stream.readline()
    return line
