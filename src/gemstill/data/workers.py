"""Encode documents in other processes.

Plain processes and pipes instead of `multiprocessing`: they need no fork (unsafe beside threads) and
do not run the caller's main module again, so scripts without a `__main__` guard and notebooks work.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO

import numpy as np

from gemstill.core.errors import Error
from gemstill.data.dataset import Ints, Tokens, token_dtype
from gemstill.text.tokenizer import Tokenizer

BATCH = 1 << 20  # characters encoded at once: an encoding takes some 100 bytes a token while it lives


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tokens, Ints]:
    """Documents, each [bos] + ids + [eos], as one stream [N] (uint16 or uint32), and their starts [D] int64."""
    dtype = token_dtype(tokenizer.vocab_size)
    bos, eos = np.array([tokenizer.bos_id], dtype), np.array([tokenizer.eos_id], dtype)
    parts: list[Tokens] = []
    starts, position, first = [], 0, 0
    while first < len(texts):
        last, size = first + 1, len(texts[first])
        while last < len(texts) and size + len(texts[last]) <= BATCH:
            size += len(texts[last])
            last += 1
        for ids in tokenizer.encode_batch(texts[first:last]):
            parts += [bos, np.array(ids, dtype), eos]
            starts.append(position)
            position += len(ids) + 2
        first = last
    return np.concatenate(parts), np.array(starts, np.int64)


class Encoders:
    """Up to `workers` processes that encode documents, started when there is work for them; 1 is this process."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._local = threading.local()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._alone = workers == 1
        self._threads = ThreadPoolExecutor(workers)

    def __enter__(self) -> Encoders:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for process in self._processes:
                process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.communicate()  # closes its input, which ends it

    def submit(self, finish: Any, texts: Sequence[str], *arguments: Any) -> Future[Any]:
        """Have `texts` encoded, then call `finish(tokens, starts, *arguments)` in one of our threads.

        The future raises Error when a process ends early.
        """
        return self._threads.submit(lambda: finish(*self._encode(texts), *arguments))

    def _encode(self, texts: Sequence[str]) -> tuple[Tokens, Ints]:
        if self._alone:
            return encode_documents(self._tokenizer, texts)
        process: subprocess.Popen[bytes] | None = getattr(self._local, "process", None)
        if process is None:
            process = self._local.process = self._start()
        questions, answers = _pipes(process)
        try:
            pickle.dump(texts, questions)
            questions.flush()
            answer = pickle.load(answers)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            fix = "was memory short? try fewer workers or smaller shards"
            raise Error(f"an encoding process ended early (status {process.wait()})", fix=fix) from error
        if isinstance(answer, str):
            raise Error(answer)
        tokens, starts = answer
        return tokens, starts

    def _start(self) -> subprocess.Popen[bytes]:
        # One thread each: the processes are the parallelism.
        threads = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from gemstill.data.workers import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": path},
        )
        self._processes.append(process)
        pickle.dump((self._tokenizer.data, self._tokenizer.source), _pipes(process)[0])
        return process


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def serve() -> None:
    """The life of an encoding process: documents in on standard input, tokens out, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    source: BinaryIO = sys.stdin.buffer
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints shall not get between the answers
    tokenizer = Tokenizer(*pickle.load(source))
    while True:
        try:
            texts = pickle.load(source)
        except EOFError:
            return
        try:
            answer: Any = encode_documents(tokenizer, texts)
        except MemoryError:
            answer = "an encoding process has no memory left; try fewer workers or smaller shards"
        try:
            pickle.dump(answer, sink, protocol=pickle.HIGHEST_PROTOCOL)
            sink.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent is gone, and nobody is left to tell
