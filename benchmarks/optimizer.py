"""Muon against AdamW: tokens and time to the same held-out loss, on Python's own library, `mini-1m`.

AdamW, at the rates that a sweep found best (TUNED below; `--full` sweeps anew), trains on `--tokens` and
sets the mark. Muon's need is read between two whole runs of fewer tokens, each with its own full schedule. Of
`--seeds` pairs (initial weights and order of the windows), the ratio's median and extremes.
Time a step is measured apart, step for step in turn, in the machine's fast precision.
"""

from __future__ import annotations

import math
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common import Row, alternate, arguments, compare, finish
from gemstill.core.machine import fast_dtype
from gemstill.data.dataset import TokenDataset
from gemstill.data.loader import Loader
from gemstill.data.shards import write_dataset
from gemstill.data.sources import Source, read_source
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.training import train_tokenizer
from gemstill.train.config import DataChoice, ModelChoice, OptimizerConfig, ScheduleConfig, SourceConfig, TrainConfig
from gemstill.train.objectives import NextToken
from gemstill.train.optimizer import Optimizer
from gemstill.train.run import train

WINDOW, WINDOWS, VOCAB = 256, 4, 4096
SKIPPED = ["test", "tests", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages"]
TUNED = {  # the best of some thirty runs: rates, decay, and the first moment's memory, which so few steps want short
    "adamw": OptimizerConfig(
        name="adamw", learning_rate=0.006, embedding_rate=0.03, betas=[0.5, 0.99], weight_decay=1.0
    ),
    "muon": OptimizerConfig(
        name="muon", learning_rate=0.03, embedding_rate=0.04, betas=[0.8, 0.99], momentum=0.75, weight_decay=0.3
    ),
}
SWEEP = [(rate, embedding, decay) for rate in (0.003, 0.006) for embedding in (0.03, 0.06) for decay in (0.3, 1.0, 2.0)]


def corpus(folder: Path) -> None:
    """tokenizer/ and data/ from the standard library's sources."""
    source = Source(Path(sysconfig.get_paths()["stdlib"]), pattern="**/*.py", exclude=SKIPPED, name="python")
    tokenizer = train_tokenizer((document.text for document in read_source(source)), folder / "tokenizer", VOCAB)
    write_dataset(source, tokenizer, folder / "data", heldout_fraction=0.02)


def heldout_nll(folder: Path, optimizer: OptimizerConfig, tokens: int, seed: int = 0) -> float:
    """Train on `tokens`; nats a token on the held-out documents."""
    with tempfile.TemporaryDirectory() as run:
        config = TrainConfig(
            run=run,
            seed=seed,
            tokens=tokens,
            windows_per_step=WINDOWS,
            micro_windows=WINDOWS,
            compile="off",
            save_minutes=0,
            keep_last=1,
            optimizer=optimizer,
            schedule=ScheduleConfig("cosine", final=0.0),
            model=ModelChoice("mini-1m"),
            data=DataChoice([SourceConfig(str(folder / "data"))], str(folder / "tokenizer"), WINDOW),
        )
        found: float = train(config)["heldout_nll"]
    rates = f"{optimizer.learning_rate} {optimizer.embedding_rate} {optimizer.weight_decay}"
    print(f"{optimizer.name} {rates}, seed {seed}: {tokens} tokens, NLL {found:.4f}")
    return found


def tokens_to(folder: Path, mark: float, tokens: int, seed: int) -> tuple[float, list[float]]:
    """Tokens that Muon needs to `mark`: log-linear between two runs, on either side where the runs fall so."""
    sizes = [tokens // 2, tokens * 3 // 4]
    scores = [heldout_nll(folder, TUNED["muon"], size, seed) for size in sizes]
    slope = math.log(sizes[1] / sizes[0]) / (scores[1] - scores[0])
    need = sizes[0] * math.exp(slope * (mark - scores[0]))
    return need, scores


def step_job(folder: Path, name: str) -> Callable[[], float]:
    """Seconds of one whole training step, forward and backward included."""
    data = TokenDataset.open(folder / "data" / "train")
    model = Transformer(ModelConfig.preset("mini-1m").with_vocab(VOCAB), compute_dtype=fast_dtype())
    optimizer = Optimizer(model.named_parameters(), TUNED[name], dtype=fast_dtype())
    objective, loader = NextToken(), Loader([(data, 1.0)], WINDOW, WINDOWS, 0)
    numbers = iter(range(10**9))

    def job() -> float:
        start = time.perf_counter()
        for _ in range(5):
            step = next(numbers)
            prepared = objective.prepare(loader.batch(step), step)
            loss = objective.loss(model, prepared)[0] / objective.weight(prepared)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(0.1)
        return (time.perf_counter() - start) / 5

    return job


def main() -> None:
    options = arguments(__doc__, tokens=300_000, seeds=3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus(folder)
        peer = TUNED["adamw"]
        more: dict[str, Any] = {}
        if options.full:
            tried = [replace(peer, learning_rate=a, embedding_rate=b, weight_decay=c) for a, b, c in SWEEP]
            scores = [heldout_nll(folder, each, options.tokens) for each in tried]
            peer = tried[scores.index(min(scores))]
            more["sweep"] = [[*rates, score] for rates, score in zip(SWEEP, scores, strict=True)]
        marks = [heldout_nll(folder, peer, options.tokens, seed) for seed in range(options.seeds)]
        found = [tokens_to(folder, mark, options.tokens, seed) for seed, mark in enumerate(marks)]
        needs = [need for need, _ in found]
        need, ratios = statistics.median(needs), [options.tokens / need for need in needs]
        times = alternate({name: step_job(folder, name) for name in TUNED}, rounds=15)
        settings = f"torch.optim.AdamW {torch.__version__}, rates {peer.learning_rate} and {peer.embedding_rate}"
        tokens = Row(
            name=f"tokens to NLL {statistics.median(marks):.3f}, {settings}, divided by Muon's",
            ours=need, peer=float(options.tokens), unit="tokens", ratio=options.tokens / need, low=min(ratios),
            high=max(ratios), limit=None, share=None, bar=1.5, met=options.tokens / need >= 1.5,
        )  # fmt: skip
        step = compare("seconds a step", times["muon"], times["adamw"], "s", bar=1.05, small=True)
        wall = need * step.ours / (options.tokens * (step.peer or math.nan))
        more |= {"marks": marks, "muon_nll": [scores for _, scores in found]}
        finish([tokens, step], precision=str(fast_dtype()), time_to_mark_ratio=wall, **more)


if __name__ == "__main__":
    main()
