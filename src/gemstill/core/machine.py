"""What this machine can do, measured: flags mislead (bfloat16 may be there and slow)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemstill.core.errors import Error
from gemstill.core.files import cached, read_json, write_json

if TYPE_CHECKING:
    import torch

OVERRIDE = "GEMSTILL_PRECISION"  # float32 or bfloat16, whatever the probe says
_VERSION = 2  # of the cached record
_PASSES = 3
_SECONDS = 0.04  # spent on each of the four measurements in one pass
_SIZES = (256, 512, 1024)  # of the square products: the largest that takes no longer than _LONG seconds,
_LONG = 0.1  # because a dtype without a fast path may be a thousand times slower
_BYTES = 256 * 2**20  # read for the bandwidth: more than any cache
_WORTH = 1.3  # bfloat16 also costs casts: it must be this much faster to be chosen


@dataclass(frozen=True)
class Machine:
    """Rates of one machine with one number of threads, the best of a short measurement."""

    cpu: str  # its name
    cores: int  # threads that torch uses
    torch_version: str
    float32: float  # matrix products, GFLOP/s
    bfloat16: float  # matrix products, GFLOP/s
    int8: float  # matrix products with int32 sums, GOP/s; 0 where torch has none
    read: float  # memory, GB/s
    fast: str  # float32 or bfloat16, by the processor time of one thread: other programs cannot turn the choice

    @property
    def fast_dtype(self) -> torch.dtype:
        """The dtype of the fastest products, float32 or bfloat16."""
        import torch

        return torch.bfloat16 if self.fast == "bfloat16" else torch.float32

    def rate(self, dtype: torch.dtype) -> float:
        """Products in `dtype` (float32, bfloat16 or int8), GFLOP/s."""
        return float(getattr(self, str(dtype).removeprefix("torch.")))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a run's or a benchmark's record."""
        return {k: round(v, 1) if isinstance(v, float) else v for k, v in asdict(self).items()}


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def processor_flags() -> frozenset[str]:
    """The instruction sets that the processor has, as Linux names them; empty where the system does not say."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


@functools.cache
def probe(*, fresh: bool = False) -> Machine:
    """Measure this machine, in about a second, or read what was measured before.

    The record lies under $XDG_CACHE_HOME/gemstill, one for each processor, torch version and number
    of threads. `fresh` measures anew.
    """
    import torch

    threads = torch.get_num_threads()
    key = hashlib.sha256(f"{_VERSION}|{cpu_name()}|{torch.__version__}|{threads}".encode()).hexdigest()[:16]
    path = cached(f"machine-{key}.json")
    if not fresh:
        with contextlib.suppress(Error, TypeError):  # no record yet, or one of another shape
            return Machine(**read_json(path))
    machine = _measure(threads)
    with contextlib.suppress(Error):  # no home to write to: it is measured again next time
        write_json(path, asdict(machine))
    return machine


def own_device() -> torch.device:
    """Where this process computes: the CUDA device of its number among those of its machine, else the CPU."""
    import torch

    local = int(os.environ.get("LOCAL_RANK", "0"))  # set by torchrun
    there = torch.cuda.is_available() and torch.cuda.device_count() > local
    return torch.device("cuda", local) if there else torch.device("cpu")


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype that computes fastest on `device`, or what the environment variable GEMSTILL_PRECISION says.

    Raises:
        Error: the variable holds something else than float32 or bfloat16.
    """
    import torch

    named = os.environ.get(OVERRIDE)
    if named:
        if named not in ("float32", "bfloat16"):
            raise Error(f"'{named}' is no precision", where=OVERRIDE, fix="set it to float32 or bfloat16")
        return torch.float32 if named == "float32" else torch.bfloat16
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return probe().fast_dtype


def _best(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds, by `clock`, of the fastest of several rounds of `work`."""
    begin = clock()
    best, rounds = float("inf"), 0
    while rounds == 0 or clock() - begin < _SECONDS:
        start = clock()
        work()
        best, rounds = min(best, clock() - start), rounds + 1
    return best


def _product(dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A product in `dtype`, as large as takes a moment, and its operations in 1e9."""
    import torch

    multiply = torch._int_mm if dtype == torch.int8 else torch.mm

    def sized(size: int) -> Callable[[], object]:
        left, right = torch.ones(size, size).to(dtype), torch.ones(size, size).to(dtype)
        return functools.partial(multiply, left, right)

    size = _SIZES[0]
    sized(size)()  # the first call sets up threads and kernels
    for larger in _SIZES[1:]:
        if _best(sized(larger)) > _LONG:
            break
        size = larger
    return sized(size), 2e-9 * size**3


def _measure(threads: int) -> Machine:
    import torch

    rates = dict.fromkeys(("float32", "bfloat16", "int8", "read"), 0.0)
    try:
        with torch.inference_mode():
            memory = torch.ones(_BYTES // 8, dtype=torch.float64)
            jobs: dict[str, tuple[Callable[[], object], float]] = {"read": (memory.sum, _BYTES / 1e9)}
            torch.set_num_threads(1)
            for dtype in (torch.float32, torch.bfloat16, torch.int8):
                name = str(dtype).removeprefix("torch.")
                with contextlib.suppress(RuntimeError):  # no product in this dtype
                    work, amount = jobs[name] = _product(dtype)
                    rates[name] = amount / _best(work, time.thread_time)
            fast = "bfloat16" if rates["bfloat16"] > _WORTH * rates["float32"] else "float32"
            torch.set_num_threads(threads)
            for _ in range(_PASSES):  # in turn, so that a busy moment of the machine hits all alike
                for name, (work, amount) in jobs.items():
                    rates[name] = max(rates[name], amount / _best(work))
    finally:
        torch.set_num_threads(threads)
    return Machine(cpu_name(), threads, str(torch.__version__), **rates, fast=fast)


if __name__ == "__main__":
    print(json.dumps(probe(fresh=True).as_dict()))
