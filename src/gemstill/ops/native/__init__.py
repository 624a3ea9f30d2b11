"""The native kernels: one C++ file, compiled for this processor at first use, and the gate to them.

Without a compiler everything runs in plain PyTorch operations, slower. The environment variable
GEMSTILL_KERNELS forces either way: `native` (an Error where they cannot be built) or `torch`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.core.machine import cpu_name

CHOICE = "GEMSTILL_KERNELS"
SOURCE = Path(__file__).parent / "elementwise.cpp"
DTYPES = frozenset({torch.float32, torch.bfloat16})
# No flag here lets the compiler reorder sums or drop NaN: results are the same at every optimization.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
PROCESSOR = {"x86_64": ["-march=native", "-mprefer-vector-width=512"], "AMD64": ["-march=native"]}
SECONDS = 120  # a build takes about five


def kernels(x: Tensor) -> Any | None:
    """`torch.ops.gemstill` where it can work on tensors like `x`, else None: plain PyTorch it is, then.

    Raises:
        Error: GEMSTILL_KERNELS is `native` and the kernels cannot be built, or it is no known word.
    """
    if x.device.type != "cpu" or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return None
    return torch.ops.gemstill if loaded() else None


def loaded() -> bool:
    """Whether the kernels are there, built now if need be. Raises Error as `kernels` does."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """Builds and loads the kernels; gives the reason where that fails. Raises Error as `kernels` does."""
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "native", "torch"):
        raise Error(f"'{choice}' is no choice", where=CHOICE, fix="set it to native or torch, or leave it unset")
    if choice == "torch":
        return f"{CHOICE} is torch"
    try:
        torch.ops.load_library(str(_built()))  # type: ignore[no-untyped-call]
    except (Error, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if choice == "native":
            raise Error(f"the native kernels are not to be had: {reason}", where=CHOICE) from error
        return reason
    return None


def _built() -> Path:
    """The compiled library, from the cache or made now: one for each source, compiler, processor and PyTorch."""
    compiler = next((found for name in (os.environ.get("CXX"), "g++", "clang++") if name
                     and (found := shutil.which(name))), None)  # fmt: skip
    machine = platform.machine()
    flags = FLAGS + PROCESSOR.get(machine, ["-mcpu=native"])
    key = [SOURCE.read_text(encoding="utf-8"), " ".join(flags), cpu_name(), machine, str(torch.__version__)]
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemstill"
    library = cache / f"kernels-{name}.so"
    if library.exists():
        return library
    if compiler is None:
        raise Error("there is no C++ compiler")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # several processes may build at once; all get the same
        partial = Path(folder) / library.name
        _compile(compiler, flags, partial)
        os.replace(partial, library)
    return library


def _compile(compiler: str, flags: list[str], to: Path) -> None:
    root = Path(torch.__file__).parent
    command = [compiler, *flags, f"-I{root / 'include'}", str(SOURCE), "-o", str(to)]
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    else:
        command += [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Error(f"{compiler} took more than {SECONDS} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        raise Error(f"{compiler} refuses: {lines[0]}")
