"""What becomes of freed memory: kept for the next step of a loop, or given back where it will not be wanted again."""

from __future__ import annotations

import ctypes
import sys

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # mallopt's names for them in malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep all that is freed for the next allocation (no effect with other C libraries).

    By default it takes large blocks from the system and returns them at once, and each new one is cleared page by
    page: a fifth of a small model's training step, for PyTorch programs of any kind.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)  # never


def give_back_freed_memory() -> None:
    """Have glibc give the system all that is free (no effect with other C libraries); takes milliseconds.

    For after work that needs far more memory than it leaves in use: what comes next would otherwise come on top.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
