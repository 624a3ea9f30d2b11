"""The command: python -m fuzz --seed 1 --count 2000."""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from fuzz import cases, seeds
from fuzz.runner import SECONDS, Runner, Verdict

KEEP = Path("runs") / "fuzz"


def main() -> int:
    """Run what the command line asks for. Status 1: a case broke a promise."""
    parser = argparse.ArgumentParser(prog="python -m fuzz", description="Open hostile checkpoints.")
    parser.add_argument("--seed", type=int, default=1, help="cases are a function of it and their number")
    parser.add_argument("--count", type=int, default=2000, help="number of cases")
    parser.add_argument("--case", type=int, help="run this case of the seed alone")
    parser.add_argument("--only", default="", help="only cases whose story holds this: gemma2, tokenizer.json, …")
    parser.add_argument("--keep", type=Path, default=KEEP, help="folder for the cases that failed")
    options = parser.parse_args()
    numbers = range(options.count) if options.case is None else [options.case]
    again = f".venv/bin/python -m fuzz --seed {options.seed} --case "
    failures = sweep(options.seed, numbers, only=options.only, keep=options.keep, again=again)
    return 1 if failures else 0


def sweep(seed: int, numbers: Iterable[int], *, only: str, keep: Path, again: str, quiet: bool = False) -> list[str]:
    """Run cases, print a line for each that failed and a table at the end. Returns the failures' folders."""
    good = seeds.make()
    ends: collections.Counter[tuple[str, str]] = collections.Counter()
    slowest, largest, failures, start, count = 0.0, 0, [], time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="gemstill-fuzz-") as place:
        runner = Runner(Path(place).resolve(), good)
        try:
            for number in numbers:
                case = cases.case(good, seed, number)
                if only not in case.story:
                    continue
                verdict = runner.run(case.seed, save=number % 4 == 0)
                count += 1
                ends[case.story.split(":")[0], verdict.ended] += 1
                slowest, largest = max(slowest, verdict.seconds), max(largest, verdict.grown)
                if verdict.failed:
                    failures.append(_keep(case, verdict, keep / f"{seed}-{number}", f"{again}{number}"))
        finally:
            runner.close()
    if not quiet:
        for name in sorted({name for name, _ in ends}):
            told = ", ".join(f"{ends[name, ended]} {ended}" for ended in ("loaded", "refused", "failed"))
            print(f"{name}: {told}")
        print(
            f"{count} cases of seed {seed} in {time.monotonic() - start:.0f} s: {len(failures)} failed; slowest "
            f"{slowest:.1f} s of {SECONDS:.0f}, most memory {largest >> 20} MiB, {runner.starts} worker processes"
        )
    return failures


def _keep(case: cases.Case, verdict: Verdict, folder: Path, again: str) -> str:
    """Keep a failed case's files and what became of it; say so in a line."""
    seeds.write(case.seed.files, folder / "files", replace=True)
    report = f"{case.story}\nagain: {again}\n{verdict.seconds:.2f} s, {verdict.grown >> 20} MiB\n\n{verdict.what}\n"
    (folder / "report.txt").write_text(report, encoding="utf-8", errors="replace")
    last = verdict.what.strip().splitlines()[-1][:150]
    print(f"FAILED {case.number} {case.story}\n       {last}\n       {folder}; again: {again}", flush=True)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
