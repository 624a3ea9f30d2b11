"""The whole recipe in miniature: text, tokenizer, shards, teacher, store, two students, comparison, report.

One fixed recipe, the same on every machine. Every step is a command of its own (recipes/quickstart/ has
them); this script calls their functions in order. Killed at any moment, it goes on where it stopped.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemstill.core import files
from gemstill.core.steps import Steps
from gemstill.data.shards import DataConfig
from gemstill.data.sources import Source
from gemstill.data.vocabulary import TokenizerConfig
from gemstill.distill.estimators import Estimator
from gemstill.distill.teach import TeachConfig
from gemstill.train.config import (
    DataChoice,
    HardConfig,
    ModelChoice,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)

VOCAB = 4096
WINDOW = 256
HELDOUT = 0.05
STDLIB_EXCLUDED = ["test", "tests", "idle_test", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages"]
TEACHER, TEACHER_TOKENS = "mini-5m", 800_000
STUDENT, STUDENT_TOKENS = "mini-1m", 700_000
ESTIMATOR = "threshold(0.06)"
FEWEST = 30  # documents of the students' sample; where it would have fewer, students learn from all of the text
BATCH = 4  # windows a step: with so few tokens, more steps are worth more than larger ones
RATES = OptimizerConfig(  # docs/quickstart.md has the sweep; so few steps want a short memory
    learning_rate=0.02, embedding_rate=0.03, betas=[0.8, 0.99], momentum=0.85, weight_decay=0.3
)
HARD = HardConfig(end=0.5)  # true next tokens, mixed in more and more: what the student has left to learn at the end
BOOTSTRAP = 10_000  # resamples of the held-out documents
ROWS = ("teacher", "scratch", "distilled")


@dataclass(frozen=True)
class QuickstartConfig:
    """`gemstill quickstart`."""

    data: str = ""  # a folder of text to learn from; empty: the sources of Python's own standard library
    run: str = "runs/quickstart"  # folder of the run
    compare_compute: bool = False  # train a further student from scratch with the FLOPs of teacher, store and student


def run(config: QuickstartConfig) -> dict[str, Any]:
    """Do what is not yet done of the recipe, print the comparison and write summary.json and report.html.

    Raises:
        Error: the text cannot be read or is too little, or the folder cannot be written or holds a run over
            other text.
    """
    from gemstill.data import vocabulary
    from gemstill.report.quickstart import quickstart_report, show

    folder = Path(config.run)
    with files.locked(folder):
        steps = Steps(folder, text=str(text_source(config.data).path))
        steps.do("tokenizer", lambda: {"fingerprint": vocabulary.run(tokenizer(config)).fingerprint})
        steps.do("data", lambda: _data(config))
        steps.do("teacher", lambda: _train(teacher(config)))
        steps.do("teach", lambda: _teach(config))
        steps.do("scratch", lambda: _train(student(config, "scratch")))
        steps.do("distilled", lambda: _train(student(config, "distilled")))
        steps.do("evaluate", lambda: _evaluate(folder, ROWS))
        rows = [*ROWS]
        if config.compare_compute:  # also in a folder that is finished without it
            steps.do("scratch_longer", lambda: _train(longer(config, steps)))
            steps.do("evaluate_longer", lambda: _evaluate(folder, ["scratch_longer"]))
            rows.append("scratch_longer")
        steps.do("model", lambda: _publish(config))
        summary = _summary(folder, steps, rows)
        files.write_json(folder / "summary.json", summary)
        quickstart_report(folder)
        show(summary)
    return {"report": str(folder / "report.html"), "model": str(folder / "model")}


def plan(config: QuickstartConfig) -> dict[str, Any]:
    """What `run(config)` would take, before anything runs."""
    from gemstill.core.machine import probe
    from gemstill.train.flops import forward_flops, train_flops

    big, small = (ModelChoice(preset=name).shape(VOCAB) for name in (TEACHER, STUDENT))
    flops = train_flops(big, WINDOW) * TEACHER_TOKENS + forward_flops(big, WINDOW) * STUDENT_TOKENS
    flops += 2 * train_flops(small, WINDOW) * STUDENT_TOKENS
    machine = probe()
    rate = 1e9 * max(machine.float32, machine.bfloat16)
    return {
        "text": str(text_source(config.data).path),
        "teacher_tokens": TEACHER_TOKENS,
        "student_tokens": STUDENT_TOKENS,
        "flops": flops,
        "seconds": 60 + flops / rate / 0.4,
    }


def text_source(data: str) -> Source:
    """The text in the folder `data`, or the sources of Python's own standard library where none is named."""
    if data:
        return Source(Path(data))
    return Source(Path(sysconfig.get_paths()["stdlib"]), pattern="**/*.py", exclude=STDLIB_EXCLUDED, name="python")


def tokenizer(config: QuickstartConfig) -> TokenizerConfig:
    """The tokenizer; what is held out does not shape it either."""
    return TokenizerConfig(text_source(config.data), Path(config.run) / "tokenizer", VOCAB, heldout_fraction=HELDOUT)


def data(config: QuickstartConfig, name: str, fraction: float = 1.0) -> DataConfig:
    """A data set: all of the text for the teacher, or a sample of its documents for the students."""
    folder = Path(config.run)
    return DataConfig(
        text_source(config.data),
        folder / "tokenizer",
        folder / name,
        heldout_fraction=HELDOUT,
        fraction=fraction,
        drop_near_copies=True,
    )


def _data(config: QuickstartConfig) -> dict[str, Any]:
    from gemstill.data import shards

    whole = shards.run(data(config, "data"))
    part = 1.1 * STUDENT_TOKENS / whole.train.num_tokens
    if part > 1 or part * whole.train.num_documents < FEWEST:
        part = 1.0
    sample = shards.run(data(config, "data-students", part))
    assert whole.heldout is not None
    return {
        "counts": whole.counts,
        "train_tokens": whole.train.num_tokens,
        "student_tokens": sample.train.num_tokens,
        "heldout_tokens": whole.heldout.num_tokens,
        "heldout_documents": whole.heldout.num_documents,
        "corpus": files.read_json(whole.train.folder / "index.json")["corpus"],
    }


def _recipe(config: QuickstartConfig, name: str, data: str, preset: str, tokens: int, store: str = "") -> TrainConfig:
    folder = Path(config.run)
    return TrainConfig(
        run=str(folder / name),
        data=DataChoice(
            [SourceConfig(str(folder / data), store=store)], window=WINDOW, tokenizer=str(folder / "tokenizer")
        ),
        model=ModelChoice(preset=preset),
        tokens=tokens,
        windows_per_step=BATCH,
        micro_windows=BATCH,
        optimizer=RATES,
        schedule=ScheduleConfig(final=0.0),
        hard=HARD if store else HardConfig(),
        evaluate_every=max(1, tokens // (BATCH * WINDOW) // 10),
        evaluate_windows=32,
        save_minutes=1.0,
    )


def teacher(config: QuickstartConfig) -> TrainConfig:
    """The teacher: larger, from scratch, on all of the text."""
    return _recipe(config, "teacher", "data", TEACHER, TEACHER_TOKENS)


def student(config: QuickstartConfig, name: str) -> TrainConfig:
    """A student: `scratch` learns the next token, `distilled` the teacher's distribution; all else is the same."""
    store = str(Path(config.run) / "store") if name == "distilled" else ""
    return _recipe(config, name, "data-students", STUDENT, STUDENT_TOKENS, store)


def longer(config: QuickstartConfig, steps: Steps) -> TrainConfig:
    """A student from scratch on all of the text, with the FLOPs that teacher, store and student took together."""
    from gemstill.train.flops import train_flops

    flops = sum(steps.result(name)["flops"] for name in ("teacher", "teach", "distilled"))
    tokens = int(flops / train_flops(ModelChoice(preset=STUDENT).shape(VOCAB), WINDOW))
    return _recipe(config, "scratch_longer", "data", STUDENT, tokens)


def _train(config: TrainConfig) -> dict[str, Any]:
    from gemstill.train.run import train

    summary = train(config)
    return summary | {"seconds_of_run": summary["seconds"]}


def teaching(config: QuickstartConfig) -> TeachConfig:
    """The teacher's distributions over the students' text, once."""
    folder = Path(config.run)
    return TeachConfig(
        teacher=str(folder / "teacher" / "model"),
        data=folder / "data-students" / "train",
        output=folder / "store",
        estimator=Estimator.parse(ESTIMATOR),
        window=WINDOW,
    )


def _teach(config: QuickstartConfig) -> dict[str, Any]:
    from gemstill.distill.teach import run as teach
    from gemstill.train.flops import forward_flops

    store = teach(teaching(config))
    shape = ModelChoice(preset=TEACHER).shape(VOCAB)
    return {
        "tokens": len(store),
        "bytes_per_token": store.bytes_per_token,
        "estimator": ESTIMATOR,
        "flops": forward_flops(shape, WINDOW) * len(store),
    }


def _evaluate(folder: Path, rows: Sequence[str]) -> dict[str, Any]:
    """Score every model on all held-out documents, and let it write."""
    from gemstill.checkpoint.source import load
    from gemstill.data.dataset import TokenDataset
    from gemstill.evaluation.perplexity import dataset_texts, score
    from gemstill.infer.generate import generate

    heldout = TokenDataset.open(folder / "data" / "heldout")
    result: dict[str, Any] = {}
    for name in rows:
        model, words = load(folder / name / "model")
        scores = score(model, words, dataset_texts(heldout, words), context=WINDOW, total=heldout.bytes)
        begin = int(heldout.document_starts[0])
        prompt = words.decode([int(token) for token in heldout.read(begin + 1, begin + 25)])
        text = generate(model, words, prompt, max_new_tokens=120, temperature=0.7, seed=1)
        result[name] = {
            "nll": scores.nll.tolist(),
            "tokens": scores.tokens.tolist(),
            "heldout_nll": scores.nll_per_token,
            "perplexity": scores.perplexity,
            "bits_per_byte": scores.bits_per_byte,
            "prompt": prompt,
            "sample": text,
        }
    return result


def bootstrap(a: Any, b: Any, tokens: Any, seed: int = 0) -> tuple[float, float, float]:
    """exp(mean NLL of a − mean NLL of b) over documents, with its 95 % interval by paired bootstrap.

    a, b: [documents] summed NLL in nats of the same documents. tokens: [documents]. Documents are drawn
    with replacement, both models' scores of a document together (Efron and Tibshirani 1993).
    """
    a, b, tokens = (np.asarray(x, dtype=np.float64) for x in (a, b, tokens))
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(a), np.full(len(a), 1 / len(a)), size=BOOTSTRAP).astype(np.float64)
    counts = draws @ tokens
    ratios = np.exp((draws @ (a - b))[counts > 0] / counts[counts > 0])
    low, high = np.quantile(ratios, [0.025, 0.975])
    return math.exp((a - b).sum() / tokens.sum()), float(low), float(high)


def _publish(config: QuickstartConfig) -> dict[str, Any]:
    """The distilled student as `model/`, with a card that names its teacher."""
    from gemstill.checkpoint.source import load, save

    folder = Path(config.run)
    model, words = load(folder / "distilled" / "model")
    text = f"the text in {Path(config.data).name}" if config.data else "the Python standard library"
    card = (
        f"# A {STUDENT} model, distilled\n\nMade by `gemstill quickstart`: {STUDENT_TOKENS:,} tokens of "
        f"{text}, learned from the "
        f"stored distributions ({ESTIMATOR}) of a {TEACHER} teacher that was trained from scratch on the same text. "
        "The teacher has no licence of its own; what is made from the text follows the text's licence.\n"
    )
    save(model, words, folder / "model", card=card)
    return {"folder": "model"}


def _summary(folder: Path, steps: Steps, rows: list[str]) -> dict[str, Any]:
    scores = steps.result("evaluate") | (steps.result("evaluate_longer") if "scratch_longer" in rows else {})
    ratio, low, high = bootstrap(scores["distilled"]["nll"], scores["scratch"]["nll"], scores["scratch"]["tokens"])
    summary: dict[str, Any] = {
        "wall_seconds": steps.seconds,
        "peak_rss_bytes": steps.done["peak_rss_bytes"],
        "disk_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "store_bytes_per_token": steps.result("teach")["bytes_per_token"],
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "text": steps.done["text"],
        "data": steps.result("data"),
        "teach": steps.result("teach"),
        "seconds": steps.each,
        "rows": rows,
    }
    for name in rows:
        trained, scored = steps.result(name), scores[name]
        summary[name] = {
            "parameters": trained["parameters"],
            "parameters_without_embedding": trained["parameters_without_embedding"],
            "tokens_seen": trained["tokens_seen"],
            "flops": trained["flops"],
            "heldout_nll": scored["heldout_nll"],
            "perplexity": scored["perplexity"],
            "bits_per_byte": scored["bits_per_byte"],
            "tokens_per_second": trained["tokens_per_second"],
            "precision": trained["precision"],
            "prompt": scored["prompt"],
            "sample": scored["sample"],
        }
    return summary
