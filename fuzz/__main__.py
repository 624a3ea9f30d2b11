"""The command: python -m fuzz --seed 1 --count 2000."""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from fuzz import cases, guided, seeds
from fuzz.runner import Runner
from fuzz.worker import SECONDS

KEEP = Path("runs") / "fuzz"


def main() -> int:
    """Run what the command line asks for. Status 1: a case broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Open hostile checkpoints.")
    parser.add_argument("--seed", type=int, default=1, help="cases are a function of it and their number")
    parser.add_argument("--count", type=int, default=2000, help="number of cases")
    parser.add_argument("--guided", type=int, help="how many of them coverage leads; a quarter where atheris is there")
    parser.add_argument("--case", type=int, help="run this case of the seed alone")
    parser.add_argument("--only", default="", help="only cases whose story holds this: gguf, tokenizer.json, …")
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder for the cases that failed")
    options = parser.parse_args()
    if options.case is not None:
        return 1 if sweep(options.seed, [options.case], keep=options.keep) else 0
    led = options.guided
    if led is None:
        led = options.count // 4 if guided.there() and not options.only else 0
    failures = sweep(options.seed, range(options.count - led), keep=options.keep, only=options.only)
    if led:
        failures += led_sweep(options.seed, led, keep=options.keep)
    elif not guided.there():
        print("no case was led by coverage; for that: .venv/bin/pip install atheris")
    return 1 if failures else 0


def sweep(seed: int, numbers: Iterable[int], *, keep: Path = KEEP, only: str = "") -> list[Path]:
    """Run cases by their numbers, say of each that failed how, and in the end how all did. Returns what was kept."""
    good = seeds.make()
    ends: collections.Counter[tuple[str, str]] = collections.Counter()
    slowest, largest, failures, start = 0.0, 0, [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gemstill-fuzz-") as place:
        runner = Runner(Path(place).resolve(), good)
        try:
            for number in numbers:
                case = cases.case(good, seed, number)
                if only not in case.story:
                    continue
                verdict = runner.run(case.seed, save=number % 4 == 0)
                ends[case.seed.name, verdict.ended] += 1
                slowest, largest = max(slowest, verdict.seconds), max(largest, verdict.grown)
                if verdict.failed:
                    again = f".venv/bin/python -m fuzz --seed {seed} --case {number}"
                    story = f"{case.story}; {verdict.seconds:.2f} s, {verdict.grown >> 20} MiB"
                    failures.append(_keep(case.seed, keep / f"{seed}-{number}", story, verdict.what, again))
        finally:
            runner.close()
    for name in sorted({name for name, _ in ends}):
        told = ", ".join(f"{ends[name, ended]} {ended}" for ended in ("loaded", "refused", "failed"))
        print(f"{name}: {told}")
    print(
        f"{ends.total()} cases of seed {seed} in {time.monotonic() - start:.0f} s: {len(failures)} failed; slowest "
        f"{slowest:.1f} s of {SECONDS:.0f}, most memory {largest >> 20} MiB, {runner.starts} worker processes",
        flush=True,
    )
    return failures


def led_sweep(seed: int, count: int, *, keep: Path = KEEP) -> list[Path]:
    """Run cases that coverage leads, as `sweep` does those that a number makes."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gemstill-fuzz-") as place:
        found, covered = guided.sweep(Path(place).resolve() / "guided", seeds.make(), seed, count)
    failures = []
    for number, (case, what) in enumerate(found):
        folder = keep / f"{seed}-guided-{number}"
        again = f".venv/bin/python -c 'import gemstill; gemstill.load(\"{folder / 'files' / case.source}\")'"
        failures.append(_keep(case, folder, f"{case.name}: led by coverage", what, again))
    print(f"led by coverage: {covered}, in {time.monotonic() - start:.0f} s: {len(failures)} failed")
    return failures


def _keep(case: seeds.Seed, folder: Path, story: str, what: str, again: str) -> Path:
    """Keep a failed case's files and what became of it; say so."""
    seeds.write(case.files, folder / "files", replace=True)
    (folder / "report.txt").write_text(f"{story}\nagain: {again}\n\n{what}\n", encoding="utf-8", errors="replace")
    last = what.strip().splitlines()[-1][:150]
    print(f"FAILED {story}\n       {last}\n       {folder}; again: {again}", flush=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
