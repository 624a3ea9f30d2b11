"""The process that opens cases, one after another, and says how each ended. Run by `fuzz.runner`.

It reads a line of JSON for each case from its input and writes one for each to its output; whatever the
libraries below print goes to its error output.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS = 10.0  # for one case, without the time in which other programs have the machine
MEMORY = 256 * 2**20  # bytes above a good load, for one case
ADDRESSES = 2 * 2**30  # of address space above a good load: more ends in MemoryError, or in an abort of native code
MAXRSS = 1 if sys.platform == "darwin" else 1024  # bytes in the unit of ru_maxrss
TEXTS = (
    "Hello, world!  12345\n\n\tÄpfel 色は 😀 ▁<bos><start_of_turn>",
    "a" * 60,
    "",
    "\0\ud800\U0010ffff" + "ab " * 300,
)
TURNS = [
    {"role": "user", "content": "Hi <eos>"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "!"},
]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = frozenset(
    {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}
)
FORBIDDEN = frozenset({"os.system", "os.exec", "socket.connect", "pickle.find_class"})


class Watch:
    """Notes what a case does beyond reading: writes outside `allowed`, programs, sockets, unpickled classes."""

    def __init__(self, allowed: list[str]) -> None:
        self.allowed = tuple(os.path.realpath(path) + os.sep for path in allowed)
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            if isinstance(args[2], int) and args[2] & WRITES:
                self._path(event, args[0])
        elif event in CHANGES:
            self._path(event, args[0], args[-1])
        elif event == "ctypes.dlopen" and args[0] is not None:  # None is the C library
            self._path(event, args[0])
        elif event in FORBIDDEN or (event == "subprocess.Popen" and os.fspath(args[0]) != sys.executable):
            self.seen.append(f"{event} {args!r:.200}")

    def _path(self, event: str, path: object, folder: object = -1) -> None:
        """Note a path that is not allowed. folder: number of the open folder that it starts from, -1 for none."""
        if not isinstance(path, str | bytes | os.PathLike):
            return  # an open file
        start = f"/proc/self/fd/{folder}" if isinstance(folder, int) and folder >= 0 else ""
        if start and not os.path.exists(start):
            return  # not on Linux
        real = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        if not (real + os.sep).startswith((*self.allowed, "/dev/")):
            self.seen.append(f"{event} {real}")


def memory(reset: bool = False) -> tuple[int, int]:
    """Bytes resident now and at the highest since `reset`; where there is no /proc, the highest of all time twice."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmHWM", "VmRSS"))}
        return int(values["VmRSS"]) * 1024, int(values["VmHWM"]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS
        return peak, peak


def clock() -> float:
    """Seconds that pass while this process runs or sleeps, not those in which it waits for a core that others have."""
    try:
        waited = int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        waited = 0.0
    return time.monotonic() - waited


def examine(source: Path, out: Path | None) -> str:
    """Open `source` and use what comes of it; with `out`, also save it there. Returns what was loaded."""
    import torch

    import gemstill

    model, tokenizer = gemstill.load(source)
    sizes = [parameter.shape for parameter in model.parameters()]
    elements = sum(shape.numel() for shape in sizes)
    assert elements < 2**24, f"{elements} parameters out of a small file"
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert all(0 <= id < model.config.vocab_size for id in ids), "ids without a row"
        tokenizer.decode(ids)
    tokenizer.encode(TEXTS[0], special=True)
    if encode_turns := _encode_turns():
        encode_turns(tokenizer, TURNS)
    with torch.no_grad():
        tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("ab")][:4]])
        shape = model(tokens).shape
    assert shape == (1, tokens.shape[1], model.config.vocab_size), f"logits of shape {shape}"
    if out is not None:
        gemstill.save(model, tokenizer, out / "folder")
        gemstill.load(out / "folder")
    return f"{len(sizes)} tensors, {elements} parameters, {tokenizer.vocab_size} entries"


def _encode_turns() -> Any:
    try:
        from gemstill.text.turns import encode_turns
    except ImportError:
        return None
    return encode_turns


def run(case: dict[str, Any], watch: Watch) -> dict[str, Any]:
    """Examine one case and say how it ended: loaded, refused, or failed with the reason."""
    from gemstill.core.errors import Error

    out = Path(case["out"]) if case.get("out") else None
    before, _ = memory(reset=True)
    start, watch.seen, watch.on = clock(), [], True
    try:
        ended, what = "loaded", examine(Path(case["source"]), out)
    except Error as error:
        ended, what = "refused", str(error)
    except BaseException:  # the library of tokenizers panics with one that is no Exception
        ended, what = "failed", traceback.format_exc()
    watch.on = False
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * MAXRSS
    return {
        "ended": ended, "what": what[-6000:], "seconds": clock() - start, "grown": memory()[1] - before,
        "child": children, "outside": watch.seen[:5],
    }  # fmt: skip


def faults(answer: dict[str, Any], good: dict[str, int]) -> list[str]:
    """Which promises a case broke. answer: what `run` said. good: `grown` and `child` of good checkpoints."""
    found = [answer["what"]] if answer["ended"] == "failed" else []
    if answer["seconds"] > SECONDS:
        found.append(f"took {answer['seconds']:.1f} s")
    if answer["grown"] > good["grown"] + MEMORY:
        found.append(f"took {answer['grown'] >> 20} MiB, a good load {good['grown'] >> 20}")
    if answer["child"] > good["child"] + MEMORY:
        found.append(f"a child process took {answer['child'] >> 20} MiB")
    return found + [f"did outside: {event}" for event in answer["outside"]]


def warm_up(good: list[dict[str, Any]], watch: Watch) -> dict[str, int]:
    """Examine good checkpoints: `grown` and `child`, the most bytes that one took here and in a child process.

    compiled: whether a child took more than this process, as a compiler does that fills the cache of kernels.
    """
    for case in good:
        run(case, watch)  # what is done once, imports and the like, is no part of any case
    rounds = [run(case, watch) for case in good]
    for case, ended in zip(good, rounds, strict=True):
        if ended["ended"] != "loaded" or ended["outside"]:
            raise SystemExit(f"a good checkpoint did not load: {case['source']}: {ended}")
    # A child begins as a copy of this process, and the system counts that as the child's.
    own, child = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS, rounds[-1]["child"]
    return {"grown": max(ended["grown"] for ended in rounds), "child": max(own, child), "compiled": child > own}


def main() -> None:
    """Load the good checkpoints named in the arguments, limit this process, then serve cases."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    watch = Watch([str(root / name) for name in ("out", "tmp", "cache")])
    good = [{"source": source, "out": str(root / "out" / f"good-{n}")} for n, source in enumerate(sys.argv[2:])]
    limits = warm_up(good, watch)
    limit = _address_space() + ADDRESSES
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(limits), file=answers)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line), watch)), file=answers)


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main()
