"""Run by test_resume.py in a process of its own: kills runs and lets them go on, by forking after torch is imported.

Usage: crashes.py CORPUS FOLDER save|all|random COUNT. Prints how many runs were killed, or fails.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

# Imported here once, so that no child has to: it is their time that a child takes.
import torch
import torch.utils.tensorboard
from conftest import make_recipe
from torch.distributed.checkpoint import FileSystemReader, load

import gemstill.checkpoint.huggingface
import gemstill.data.loader
import gemstill.distill.store  # noqa: F401
from crash import Crash
from gemstill.train.metrics import TIMES, read
from gemstill.train.run import train

STEPS = 5
CHANGES: dict[str, Any] = {"steps": STEPS, "save_every": 2, "evaluate_every": 4, "windows_per_step": 2, "keep_last": 1}


def in_child(corpus: Path, run: Path, *, at: int | None = None, log: Path | None = None, after: float = 0.0) -> bool:
    """Train in a forked child, killed at disk operation `at` or `after` seconds. True where it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            if at is not None or log is not None:
                Crash(at, log)
            train(make_recipe(corpus, run, **CHANGES))
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    if after:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, f"{run} failed"
    return os.WIFEXITED(status)


def result(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], bytes]:
    """All that must be the same: last state, figures without times, the finished model."""
    states = sorted((run / "state").glob("step-*"))
    assert states[-1].name == f"step-{STEPS:08d}", states
    assert len(states) <= 2, states  # the last and the best
    entries = FileSystemReader(states[-1]).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load(tensors, storage_reader=FileSystemReader(states[-1]))
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read(run / "metrics.jsonl")]
    return tensors, lines, (run / "model" / "model.safetensors").read_bytes()


def same(expected: Any, run: Path) -> None:
    tensors, lines, model = result(run)
    assert tensors.keys() == expected[0].keys()
    assert len(tensors) > 30
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[0][name]), f"{run}: {name} differs"
    assert lines == expected[1], f"{run}: figures differ"
    assert model == expected[2], f"{run}: model differs"


def main() -> None:
    corpus, folder, mode, count = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    log = folder / "operations"
    assert in_child(corpus, folder / "reference", log=log)
    expected = result(folder / "reference")
    operations = log.read_text().splitlines()
    killed = 0
    if mode == "random":
        start = time.monotonic()
        assert in_child(corpus, folder / "whole")
        whole = time.monotonic() - start
        rng = random.Random(count)
        for number in range(count):
            run = folder / f"random-{number}"
            while not in_child(corpus, run, after=rng.uniform(0.05, 1.0) * whole):
                killed += 1
                if rng.random() < 0.3:  # often enough it is let go on
                    assert in_child(corpus, run)
                    break
            same(expected, run)
    else:
        # Of many writes to one file in a row, the first and the last.
        around = [None, *operations, None]
        chosen = [at for at, line in enumerate(operations) if not around[at] == line == around[at + 2]]
        if mode == "save":  # from the folder's making to the dropping of the state before
            first = next(at for at in chosen if f"step-{4:08d}.partial" in operations[at])
            last = max(at for at in chosen if f"step-{2:08d}" in operations[at])
            chosen = [at for at in chosen if first <= at <= last]
        for at in chosen[:: max(1, len(chosen) // count)]:
            run = folder / f"at-{at}"
            assert not in_child(corpus, run, at=at + 1), f"operation {at} ({operations[at]}) did not come"
            assert in_child(corpus, run)
            killed += 1
            same(expected, run)
    print(json.dumps({"killed": killed, "operations": len(operations)}))


if __name__ == "__main__":
    main()
