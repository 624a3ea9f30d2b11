"""The native kernels: a few C++ files, compiled for this processor at first use, and the gate to them.

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
SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
DTYPES = frozenset({torch.float32, torch.bfloat16})
# No flag here lets the compiler reorder sums or drop NaN: results are the same at every optimization.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-shared", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
PROCESSOR = {"x86_64": ["-march=native", "-mprefer-vector-width=512"], "AMD64": ["-march=native"]}
SECONDS = 120  # a build takes about five


def kernels(x: Tensor) -> Any | None:
    """`torch.ops.gemstill` where it can work on tensors like `x`, else None: plain PyTorch it is, then.

    Without gradients nothing is built here, so that a first answer never waits for a compiler; what was built
    before is used.

    Raises:
        Error: GEMSTILL_KERNELS is `native` and the kernels cannot be built, or it is no known word.
    """
    if x.device.type != "cpu" or x.dtype not in DTYPES or torch.compiler.is_compiling():
        return None
    there = why_not() is None if torch.is_grad_enabled() else _at_hand()
    return torch.ops.gemstill if there else None


def loaded() -> bool:
    """Whether the kernels are there, built now if need be. Raises Error as `kernels` does."""
    return why_not() is None


@functools.cache
def why_not() -> str | None:
    """Builds and loads the kernels; gives the reason where that fails. Raises Error as `kernels` does."""
    choice = _choice()
    if choice == "torch":
        return f"{CHOICE} is torch"
    try:
        library = _library()
        if not library.exists():
            _build(library)
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
    except (Error, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        if choice == "native":
            raise Error(f"the native kernels are not to be had: {reason}", where=CHOICE) from error
        return reason
    return None


def _at_hand() -> bool:
    """Whether the kernels are loaded or can be without being built, or were asked for by name."""
    known = why_not.cache_info().currsize > 0
    return (known or _choice() == "native" or _library().exists()) and why_not() is None


def _choice() -> str:
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "native", "torch"):
        raise Error(f"'{choice}' is no choice", where=CHOICE, fix="set it to native or torch, or leave it unset")
    return choice


@functools.cache
def _library() -> Path:
    """Where the compiled kernels belong: one library for each source, flags, processor and PyTorch."""
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    key = [*texts, " ".join(_flags()), cpu_name(), str(torch.__version__)]
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemstill" / f"kernels-{name}.so"


def _flags() -> list[str]:
    return FLAGS + PROCESSOR.get(platform.machine(), ["-mcpu=native"])


def _build(library: Path) -> None:
    names = (os.environ.get("CXX"), "g++", "clang++")
    compiler = next((found for name in names if name and (found := shutil.which(name))), None)
    if compiler is None:
        raise Error("there is no C++ compiler")
    library.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may build at once; all get the same.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        partial = Path(folder) / library.name
        _compile(compiler, partial)
        os.replace(partial, library)


def _compile(compiler: str, to: Path) -> None:
    root = Path(torch.__file__).parent
    command = [compiler, *_flags(), f"-I{root / 'include'}", *map(str, SOURCES), "-o", str(to)]
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
