"""What every benchmark shares: alternate, compare, say it in one JSON line, fail below a bar.

A benchmark answers one question and ends in 15 minutes. It measures ours and the peer in turn within
one run, the peer in its own fastest settings, which its row's name tells. A bar `r` means
ours >= min(r x peer, 0.85 x limit), where the limit is what the job's own matrix products (or bytes
over read bandwidth) would allow; a bar on something that should be small (memory, tokens) means
ours <= r x peer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from gemstill.core.machine import probe

NEAR_LIMIT = 0.85  # nobody comes closer to the limit than this, so no bar asks for more


@dataclass(frozen=True)
class Row:
    """One comparison. Of `ours` and `peer` the medians; `low` and `high` are the ratio's extremes over the rounds."""

    name: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None  # ours / peer
    low: float | None
    high: float | None
    limit: float | None  # in the same unit
    share: float | None  # ours / limit
    bar: float | None
    met: bool | None  # None where there is no bar


def arguments(description: str | None, **more: Any) -> argparse.Namespace:
    """The flags that all benchmarks have (--full, --device), and `more` (name -> default)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--full", action="store_true", help="more sizes and rounds than 15 minutes hold")
    parser.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
    for name, default in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"[{default}]")
    return parser.parse_args()


def seconds(work: Callable[[], object], *, at_least: float = 0.5) -> float:
    """Seconds of one call of `work`, the mean over as many calls as fill `at_least` seconds."""
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < at_least:
        work()
        calls += 1
    return (time.perf_counter() - start) / calls


def alternate(jobs: Mapping[str, Callable[[], float]], *, rounds: int = 5) -> dict[str, list[float]]:
    """Call each job once a round, in an order that turns with each round; returns what they measured.

    One unrecorded round goes before: compilation, caches, first allocations.
    """
    names = list(jobs)
    for name in names:
        jobs[name]()
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for index in range(len(names)):
            name = names[(index + turn) % len(names)]
            found[name].append(jobs[name]())
    return found


def compare(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float] | None,
    unit: str,
    *,
    bar: float | None = None,
    limit: float | None = None,
    small: bool = False,
) -> Row:
    """Judge the rounds of `ours` against those of `peer` (none: only the figures).

    small: less is better (memory, seconds, tokens), and the bar is the largest ratio allowed; of seconds with a
    limit, ours <= max(r x peer, limit / 0.85) meets it.
    """
    mine = statistics.median(ours)
    theirs = statistics.median(peer) if peer else None
    ratios = [a / b for a, b in zip(ours, peer, strict=True)] if peer else []
    met: bool | None = None
    if bar is not None and theirs is not None:
        if small:
            met = mine <= max(bar * theirs, limit / NEAR_LIMIT if limit else 0.0)
        else:
            met = mine >= min(bar * theirs, NEAR_LIMIT * limit if limit else float("inf"))
    return Row(
        name=name,
        ours=mine,
        peer=theirs,
        unit=unit,
        ratio=mine / theirs if theirs else None,
        low=min(ratios, default=None),
        high=max(ratios, default=None),
        limit=limit,
        share=mine / limit if limit else None,
        bar=bar,
        met=met,
    )


def peak_bytes(code: str, imports: str = "") -> int:
    """Peak resident bytes that Python `code` takes above a process that runs only `imports`."""
    return max(0, _resident(f"{imports}\n{code}") - _resident(imports))


# A child's ru_maxrss begins at what its parent held when it forked; the high-water mark of its own memory does not.
PEAK = """
import os, resource, sys
if os.path.exists("/proc/self/status"):
    print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024)
else:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""


def _resident(code: str) -> int:
    # Code may import the benchmark that asks, from whatever folder that was started in.
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    command, environment = [sys.executable, "-c", f"{code}\n{PEAK}"], {**os.environ, "PYTHONPATH": path}
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise RuntimeError(f"{code}\nended with {child.returncode}: {child.stderr.strip()}")
    return int(child.stdout.split()[-1])


def machine() -> dict[str, Any]:
    """The machine's measured rates and the versions that figures depend on."""
    versions = {}
    for package in ("torch", "transformers", "tokenizers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    system = {"system": platform.platform(), "python": platform.python_version()}
    return probe(fresh=True).as_dict() | system | versions


def finish(rows: Sequence[Row], **more: Any) -> NoReturn:
    """Print a table, and as the last line everything as one JSON object; exit 1 when a bar is not met."""
    width = max([4, *(len(row.name) for row in rows)])
    heads = [f"{head:>{size}}" for head, size in (("ours", 9), ("peer", 9), ("ratio", 6), ("low", 6), ("high", 6))]
    print(f"\n{'':{width}}  {' '.join(heads)}  share    bar  unit")
    for row in rows:
        cells = [
            _cell(row.ours, 9),
            _cell(row.peer, 9),
            *(_cell(x, 6) for x in (row.ratio, row.low, row.high, row.share)),
        ]
        verdict = "" if row.met is None else ", met" if row.met else ", NOT MET"
        print(f"{row.name:{width}}  {' '.join(cells)} {_cell(row.bar, 6)}  {row.unit}{verdict}")
    print(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows], **more}))
    sys.exit(any(row.met is False for row in rows))


def _cell(value: float | None, width: int) -> str:
    return f"{'' if value is None else f'{value:.4g}':>{width}}"
