"""The native kernels: a few C++ files, compiled for this processor at first use, and the gate to them.

Without a compiler everything runs in plain PyTorch operations, slower. The environment variable
GEMSTILL_KERNELS forces one way: `torch`, or kernels for all that this processor has (`native`), for AVX2 alone
(`avx2`) or for AVX-512 with VNNI (`avx512`), with an Error where these cannot be built or run.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.core.machine import cpu_name, processor_flags

CHOICE = "GEMSTILL_KERNELS"
SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
DTYPES = frozenset({torch.float32, torch.bfloat16})
# No flag here lets the compiler reorder sums or drop NaN: results are the same at every optimization.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
WIDE = "-mprefer-vector-width=512"
# Instruction sets that can be asked for: the compiler's flags, and what the processor must have, as Linux names it.
SETS = {
    "avx2": (["-march=x86-64-v3"], {"avx2", "fma", "f16c", "bmi2"}),
    "avx512": (["-march=x86-64-v4", "-mavx512vnni", WIDE], {"avx512bw", "avx512dq", "avx512vl", "avx512_vnni"}),
}
SECONDS = 120  # a build takes about ten


def kernels(x: Tensor) -> Any | None:
    """`torch.ops.gemstill` where it can work on tensors like `x`, else None: plain PyTorch it is, then.

    Without gradients nothing is built here, so that a first answer never waits for a compiler; what was built
    before is used.

    Raises:
        Error: GEMSTILL_KERNELS asks for kernels that cannot be built or run here, or is no known word.
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
        if choice:
            raise Error(f"the native kernels are not to be had: {reason}", where=CHOICE) from error
        return reason
    return None


def _at_hand() -> bool:
    """Whether the kernels are loaded or can be without being built, or were asked for by name."""
    known = why_not.cache_info().currsize > 0
    return (known or _choice() not in ("", "torch") or _library().exists()) and why_not() is None


def _choice() -> str:
    choice = os.environ.get(CHOICE, "")
    if choice not in ("", "torch", "native", *SETS):
        fix = f"set it to torch, {', '.join(SETS)} or native, or leave it unset"
        raise Error(f"'{choice}' is no choice", where=CHOICE, fix=fix)
    return choice


@functools.cache
def _library() -> Path:
    """Where the compiled kernels belong: one library for each source, flags, processor and PyTorch."""
    texts = [path.read_text(encoding="utf-8") for path in (*SOURCES, *HEADERS)]
    key = [*texts, " ".join(_flags()), cpu_name(), str(torch.__version__)]
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:16]
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gemstill" / f"kernels-{name}.so"


def _flags() -> list[str]:
    choice = _choice()
    if choice in SETS:
        flags, needed = SETS[choice]
        if missing := needed - processor_flags():
            raise Error(f"this processor has no {', '.join(sorted(missing))}")
        return FLAGS + flags
    if platform.machine() not in ("x86_64", "AMD64"):
        return [*FLAGS, "-mcpu=native"]
    # "wide" vectors are only a wish: a processor without them is not given any.
    return [*FLAGS, "-march=native", *([WIDE] if platform.machine() == "x86_64" else [])]


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
    objects = [to.parent / f"{source.stem}.o" for source in SOURCES]
    common = [compiler, *_flags(), f"-I{root / 'include'}"]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        jobs = [[*common, "-c", str(source), "-o", str(at)] for source, at in zip(SOURCES, objects, strict=True)]
        list(pool.map(_run, jobs))
    link = [compiler, "-shared", *map(str, objects), "-o", str(to)]
    if sys.platform == "darwin":
        link += ["-undefined", "dynamic_lookup"]
    else:
        link += [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run(link)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise Error(f"{command[0]} took more than {SECONDS} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [f"exit status {done.returncode}"]
        raise Error(f"{command[0]} refuses: {lines[0]}")
