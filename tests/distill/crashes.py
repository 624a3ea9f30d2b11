"""Run by test_crashes.py in a process of its own: kills processes that teach, and lets others go on, by forking.

Usage: crashes.py FOLDER all|random|together|full COUNT. Prints how many were killed, or fails.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from test_teach import Stream, contents, settings, tiny

from crash import Crash
from gemstill.core.errors import Error
from gemstill.distill.teach import describe, teach_model

BLOCK = 48  # tokens: nine blocks


def teach(folder: Path, block_tokens: int) -> None:
    model, stream = tiny(), Stream()
    teach_model(model, stream, folder, describe(model, stream, **settings(block_tokens=block_tokens)))


def child(work: Callable[[], object]) -> int:
    """Do it in a forked process; returns its number."""
    number = os.fork()
    if number == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
            os._exit(1)
    return number


def ended(number: int) -> bool:
    """Wait for a child; True where it came to its end, False where it was killed."""
    status = os.waitpid(number, 0)[1]
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def all_ended(folder: Path, workers: int, block_tokens: int = BLOCK) -> None:
    numbers = [child(lambda: teach(folder, block_tokens)) for _ in range(workers)]
    for number in numbers:
        assert ended(number)


def at_every_operation(root: Path) -> int:
    """Killed at each operation that changes the disk, gone on with by one process or by two at once."""
    log = root / "operations"

    def logged() -> None:
        Crash(None, log)
        teach(root / "whole", 224)

    assert ended(child(logged))
    operations = log.read_text().splitlines()
    for at in range(len(operations)):
        folder = root / str(at)

        def crashing(at: int = at, folder: Path = folder) -> None:
            Crash(at + 1)
            teach(folder, 224)

        assert not ended(child(crashing)), f"operation {at} ({operations[at]}) did not come"
        all_ended(folder, 1 + at % 2, 224)
        assert contents(folder) == contents(root / "whole"), operations[at]
    return len(operations)


def at_random(root: Path, count: int) -> int:
    """`count` kills at random times among processes that teach one store together."""
    start = time.monotonic()
    all_ended(root / "whole", 1)
    whole, rng, killed, run = time.monotonic() - start, random.Random(count), 0, 0
    while killed < count:
        folder, run = root / f"random-{run}", run + 1
        for _ in range(4):
            workers = [child(lambda folder=folder: teach(folder, BLOCK)) for _ in range(rng.randint(1, 3))]
            time.sleep(rng.uniform(0.0, 1.2) * whole)
            os.kill(rng.choice(workers), signal.SIGKILL)
            killed += sum(not ended(number) for number in workers)
        all_ended(folder, rng.randint(1, 3))
        assert contents(folder) == contents(root / "whole"), folder
    return killed


def together(root: Path, count: int) -> int:
    """`count` processes that start at once on nothing."""
    all_ended(root / "whole", 1)
    all_ended(root / "store", count)
    assert contents(root / "store") == contents(root / "whole")
    return 0


def disk_full(root: Path) -> int:
    """A file that may grow no further, in the middle of a block: nothing half is left, and it is gone on with."""
    all_ended(root / "whole", 1, 416)

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(Error, match=r"block-000000.*cannot be written"):
            teach(root / "store", 416)

    assert ended(child(limited))
    assert not list((root / "store" / "data").iterdir())
    all_ended(root / "store", 1, 416)
    assert contents(root / "store") == contents(root / "whole")
    return 0


def main() -> None:
    root, mode, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    if mode == "all":
        print(at_every_operation(root))
    elif mode == "random":
        print(at_random(root, count))
    else:
        print(together(root, count) if mode == "together" else disk_full(root))


if __name__ == "__main__":
    main()
