"""Cases led by coverage: atheris keeps those that reach new code of ours and goes on from them.

The mutations are those of `fuzz.cases`, one upon the other. All run in one process under libFuzzer, whose own
limits end it when a case crashes, hangs or takes memory that no Python sees.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fuzz.seeds import Seed

LARGEST = 2**22  # bytes of a packed case
PATIENCE, MEBIBYTES = 60, 3000  # for one case, and of the process: beyond, libFuzzer ends it


def there() -> bool:
    """Whether atheris is installed: pip install atheris."""
    import importlib.util

    return importlib.util.find_spec("atheris") is not None


def pack(seed: Seed) -> bytes:
    """A checkpoint as one string of bytes."""
    sizes = {name: len(data) for name, data in seed.files.items()}
    head = json.dumps({"name": seed.name, "source": seed.source, "sizes": sizes})
    return head.encode() + b"\n" + b"".join(seed.files.values())


def unpack(data: bytes) -> Seed:
    """The checkpoint of `pack`. Raises ValueError or KeyError for other bytes."""
    from fuzz.seeds import Seed

    head, _, rest = data.partition(b"\n")
    known, files = json.loads(head), {}
    for name, size in known["sizes"].items():
        files[name], rest = rest[:size], rest[size:]
    return Seed(known["name"], files, known["source"])


def sweep(root: Path, good: list[Seed], seed: int, count: int) -> tuple[list[tuple[Seed, str]], str]:
    """Run `count` cases from `good` in a new process with its files in `root`.

    Returns the cases that failed with what was said of them, and what was covered in libFuzzer's words.
    """
    from fuzz.runner import FOLDERS, surroundings
    from fuzz.seeds import write

    for name in (*FOLDERS, "corpus", "failed"):
        (root / name).mkdir(parents=True)
    for start in good:
        write(start.files, root / "good" / start.name)
        (root / "corpus" / start.name).write_bytes(pack(start))
    sources = [str(root / "good" / start.name / start.source) for start in good]
    command = [sys.executable, "-m", "fuzz.guided", str(root), str(seed), str(count), *sources]
    log = root / "log"
    with log.open("wb") as stream:
        worker = subprocess.Popen(
            command, stdout=stream, stderr=stream, cwd=root / "here", env=surroundings(root), start_new_session=True
        )
        try:
            status = worker.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # whatever a case left running
    said = log.read_text(errors="replace")
    failed = [(unpack(path.read_bytes()), path.with_suffix(".txt").read_text()) for path in root.glob("failed/*.case")]
    ended = [
        path for path in root.glob("failed/*-*") if path.suffix == ""
    ]  # libFuzzer's own: crash-…, timeout-…, oom-…
    failed += [(unpack(path.read_bytes()), f"{path.name}\n{said[-3000:]}") for path in ended]
    if status and not failed:
        raise RuntimeError(f"the guided process failed\n{said[-3000:]}")
    covered = re.findall(r"#(\d+)\s+(?:DONE|NEW|REDUCE|pulse).*?cov: (\d+) .*?corp: (\d+)", said)
    return failed, "{} cases, {} points of code, {} cases kept".format(*covered[-1]) if covered else "nothing covered"


def main() -> None:
    """Fuzz in this process, until the cases are through or one ends it."""
    import atheris

    with atheris.instrument_imports(include=["gemstill"]):
        for name in ("checkpoint.gguf", "checkpoint.google", "checkpoint.source", "text.turns"):
            importlib.import_module(f"gemstill.{name}")
    from fuzz import cases, worker
    from fuzz.seeds import write

    root, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    watch = worker.Watch([str(root / name) for name in ("out", "tmp", "cache")])
    good: list[dict[str, Any]] = [{"source": source} for source in sys.argv[4:]]
    worker.warm_up(good, watch)  # a compiler's memory, once
    limits = worker.warm_up(good, watch)
    folder, failed = root / "case" / "model", root / "failed"

    def one(data: bytes) -> None:
        try:
            case = unpack(data)
        except (ValueError, KeyError):
            return
        shutil.rmtree(folder.parent, ignore_errors=True)
        write(case.files, folder)
        answer = worker.run({"source": str(folder / case.source)}, watch)
        if found := worker.faults(answer, limits):
            place = failed / f"{len(list(failed.glob('*.case')))}.case"
            place.write_bytes(data)
            place.with_suffix(".txt").write_text("\n".join(found), errors="replace")

    def another(data: bytes, most: int, number: int) -> bytes:
        try:
            made = pack(cases.mutate(Random(number), unpack(data)).seed)
        except cases.UNCHANGEABLE:
            return data
        return made if len(made) <= most else data

    options = {
        "runs": count, "seed": seed + 1, "max_len": LARGEST, "timeout": PATIENCE, "report_slow_units": PATIENCE,
        "rss_limit_mb": MEBIBYTES, "artifact_prefix": f"{failed}{os.sep}", "len_control": 0, "reload": 0,
    }  # fmt: skip
    arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in options.items()), str(root / "corpus")]
    atheris.Setup(arguments, one, custom_mutator=another)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
