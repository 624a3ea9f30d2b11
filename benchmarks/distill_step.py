"""One distillation step over 262,144 entries (forward, backward, AdamW): ours against transformers and TRL.

Student and teacher have one configuration on both sides and learn from the same tokens in one run, alternated.
store: 12 entries a token of a teacher's distribution, read beforehand for both; the peer is transformers' model with
the plain loss (log_softmax of its logits, gather), in the fastest of float32, bfloat16 weights and bfloat16 autocast.
online: the teacher runs in the step; the peer is TRL's DistillationTrainer (forward KL, its chunked divergence) over
transformers' models of the same two configurations, which is given its completions, so that it need not write them:
its step's own time, as its training_step takes, with the optimizer's. The limit of a step from stored entries is its
own matrix products, back to back.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor

from common import Row, alternate, arguments, compare, finish, peak_bytes
from gemstill.checkpoint.hf_config import to_hf
from gemstill.core.allocator import keep_freed_memory
from gemstill.core.machine import fast_dtype
from gemstill.model.config import ModelConfig
from gemstill.model.readout import Loss
from gemstill.model.transformer import Transformer
from gemstill.ops.target import OnlineTarget, Target
from train_step import products

VOCAB, WINDOW, BATCH, ENTRIES = 262_144, 256, 4, 12
PRECISIONS = ("float32", "bfloat16", "autocast")
Step = Callable[[], Any]


def config(preset: str) -> ModelConfig:
    return ModelConfig.preset(preset).with_vocab(VOCAB)


def tokens_of() -> Tensor:
    return torch.randint(3, VOCAB, (BATCH, WINDOW), generator=torch.Generator().manual_seed(0))


def sparse() -> Target:
    g = torch.Generator().manual_seed(1)
    rows = BATCH * WINDOW
    probs = torch.rand(rows, ENTRIES, generator=g).softmax(1)
    return Target(torch.randint(VOCAB, (rows, ENTRIES), generator=g), probs, torch.ones(rows))


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def ours(student: str, teacher: str = "") -> Step:
    """A step from stored entries, or with a teacher at hand."""
    keep_freed_memory()
    dtype = fast_dtype("cpu")
    model, tokens, target = Transformer(config(student), compute_dtype=dtype).train(), tokens_of(), sparse()
    other = Transformer(config(teacher), compute_dtype=dtype).to(dtype).eval() if teacher else None
    optimizer = adamw(model)

    def step() -> None:
        learned: Target | OnlineTarget = target
        if other is not None:
            with torch.no_grad():
                hidden, head, cap = other(tokens, readout=lambda *given: given)
            learned = OnlineTarget(hidden.flatten(0, 1), head, cap, 1.0, target.weight)
        (model(tokens, readout=Loss(learned)) / len(target.weight)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def network(preset: str) -> Any:
    raw = to_hf(config(preset))
    raw.pop("dtype", None)
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**raw, attn_implementation="eager"))


def plain(student: str, precision: str) -> Step:
    """transformers' student with the plain loss on the same entries."""
    keep_freed_memory()
    model, tokens, target = network(student).train(), tokens_of(), sparse()
    model = model.to(torch.bfloat16) if precision == "bfloat16" else model
    optimizer = adamw(model)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            logits = model(input_ids=tokens, use_cache=False).logits  # capped by the model
        log_q = logits.float().flatten(0, 1).log_softmax(1)
        (-(target.probs * log_q.gather(1, target.ids)).sum() / len(target.weight)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trls(student: str, teacher: str, precision: str) -> Step:
    """A step of TRL's trainer on completions that it is given."""
    import datasets
    import tokenizers
    import trl

    keep_freed_memory()
    prompt, completions = tokens_of()[:, :1], tokens_of()[:, 1:].tolist()

    class Given(trl.DistillationTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            return prompt.tolist(), completions, None, None, None

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1, "a": 2}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    settings = trl.DistillationConfig(
        tempfile.mkdtemp(), per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, max_steps=10**6,
        max_completion_length=WINDOW - 1, beta=0.0, bf16=precision == "autocast", use_cpu=True, report_to=[],
        gradient_checkpointing=False, disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    student_model, teacher_model = network(student), network(teacher)
    if precision == "bfloat16":
        student_model, teacher_model = student_model.to(torch.bfloat16), teacher_model.to(torch.bfloat16)
    data = datasets.Dataset.from_dict({"prompt": ["a"] * BATCH * 4})
    trainer = Given(student_model, teacher_model, settings, data, processing_class=tokenizer)
    optimizer = adamw(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = [{"prompt": "a"}] * BATCH

    def step() -> None:
        trainer._step = 0
        trainer.training_step(trainer.model, batch, torch.tensor(BATCH * (WINDOW - 1)))
        optimizer.step()
        optimizer.zero_grad()

    return step


def rate(step: Step, at_least: float) -> float:
    """Tokens a second over about `at_least` seconds of steps."""
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < at_least:
        step()
        count += 1
    return BATCH * WINDOW * count / (time.perf_counter() - start)


def fastest(make: Callable[[str], Step], precisions: tuple[str, ...]) -> tuple[str, Step]:
    """The precision with the shortest step, two steps each, and its step."""
    found = {}
    for precision in precisions:
        step = make(precision)
        step()
        start = time.perf_counter()
        step()
        found[precision] = time.perf_counter() - start
        del step
    print({name: f"{value:.2f} s" for name, value in found.items()}, flush=True)
    best = min(found, key=lambda name: found[name])
    return best, make(best)


def pair(name: str, steps: dict[str, Step], bar: float, rounds: int, at_least: float) -> Row:
    """`ours` against `peer`, alternated, and against `limit` where that is among the steps."""
    jobs = {key: functools.partial(rate, step, at_least) for key, step in steps.items()}
    found = alternate(jobs, rounds=rounds)
    limit = statistics.median(found["limit"]) if "limit" in found else None
    return compare(name, found["ours"], found["peer"], "tokens/s", bar=bar, limit=limit)


def memory(name: str, mine: str, peer: str) -> Row:
    """Peak bytes of two steps above a process that has imported the same, of three processes each.

    They differ: what is freed is kept, and where it lies decides what fits into it.
    """
    setup = "import trl, datasets\nfrom distill_step import *" if "trls" in peer else "from distill_step import *"
    twice = "step = {}; step(); step()"
    a, b = ([peak_bytes(twice.format(code), setup) / 2**20 for _ in range(3)] for code in (mine, peer))
    return compare(name, a, b, "MiB", bar=0.4, small=True)


def main() -> None:
    args = arguments(
        __doc__, student="mini-5m", teacher="mini-15m", rounds=3, seconds=4.0, parts="store,online,memory",
        precision="",
    )  # fmt: skip
    parts, rows = args.parts.split(","), []
    choices = (args.precision,) if args.precision else PRECISIONS
    best = {"store": args.precision or "autocast", "online": args.precision or "autocast"}
    if "store" in parts:
        best["store"], peer = fastest(lambda p: plain(args.student, p), choices)
        name = f"{args.student} from stored entries / transformers {transformers.__version__}, {best['store']}"
        limit = products(config(args.student), BATCH, WINDOW, "cpu")
        steps = {"ours": ours(args.student), "peer": peer, "limit": limit}
        rows.append(pair(name, steps, 2.0, args.rounds, args.seconds))
    if "online" in parts:
        best["online"], peer = fastest(lambda p: trls(args.student, args.teacher, p), choices)
        name = f"{args.teacher} → {args.student} online / TRL {version('trl')}, {best['online']}"
        steps = {"ours": ours(args.student, args.teacher), "peer": peer}
        rows.append(pair(name, steps, 1.3, args.rounds, args.seconds))
    if "memory" in parts:
        student, both = f"{args.student!r}", f"{args.student!r}, {args.teacher!r}"
        rows.append(memory("memory: from stored entries", f"ours({student})", f"plain({student}, {best['store']!r})"))
        rows.append(memory("memory: online", f"ours({both})", f"trls({both}, {best['online']!r})"))
    finish(rows, vocab=VOCAB, window=WINDOW, batch=BATCH)


if __name__ == "__main__":
    main()
