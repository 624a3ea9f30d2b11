"""Prune a trained model and heal it by distillation, beside the same model healed by next tokens, and not at all.

Every step is a command of its own; this script calls their functions in order. Killed at any moment, the same
call goes on where it stopped.
"""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gemstill.core import files
from gemstill.core.config import as_dict
from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.core.steps import Steps
from gemstill.data.sources import Source
from gemstill.distill.estimators import Estimator
from gemstill.distill.prune import PruneConfig
from gemstill.distill.teach import TeachConfig
from gemstill.train.config import (
    DataChoice,
    ModelChoice,
    OptimizerConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)

STUDENTS = ("next_token", "distilled")
ROWS = ("teacher", "pruned", *STUDENTS)
ANSWERED = 4  # windows at once when models are compared
SHARE = 0.5  # of the products' rate that a step reaches


@dataclass(frozen=True, kw_only=True)
class HealConfig:
    """`gemstill heal`."""

    teacher: str  # a model: a folder, a .gguf file, a name on the hub
    data: Source  # the text to heal with: long documents of prose
    run: str = "runs/heal"  # folder of the run
    layers: int | None = None  # blocks that are kept, as `gemstill prune` has it; null keeps all
    intermediate_size: int | None = None  # MLP channels kept in each block; null keeps all
    layer_pattern: int | None = None  # of the kept blocks every n-th is global; null keeps the teacher's n
    calibration_tokens: int = 4096  # of the text, that importance is measured on
    tokens: int = 1_000_000  # that each student is trained on
    window: int = 512  # tokens of one training window
    windows_per_step: int = 4  # windows of one optimizer step
    micro_windows: int = 4  # windows at once: memory, not results
    estimator: Estimator = field(default_factory=Estimator)  # what the store keeps of the teacher's distribution
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig("adamw", 3e-4, 1e-4, [0.9, 0.95], weight_decay=0.0)
    )
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(warmup=0.05, final=0.1))
    rates: list[float] = field(default_factory=lambda: [0.1, 0.3, 1.0])  # factors of both rates, tried on each student
    trial_tokens: int = 50_000  # of one trial; 0 takes the first factor untried
    backward: Literal["exact", "sampled"] = "exact"  # of both students' loss: sampled is faster with a large vocabulary
    heldout_fraction: float = 0.05  # part of the documents kept for measuring, chosen by hash of their content
    heldout_tokens: int = 50_000  # of them, that models are compared on
    seed: int = 0  # of the order of windows, the store's draws and the calibration text
    dtype: str = "q8_0"  # of the GGUF files

    def __post_init__(self) -> None:
        sizes = ("tokens", "window", "windows_per_step", "micro_windows", "heldout_tokens", "calibration_tokens")
        for name in sizes:
            if getattr(self, name) < 1:
                raise Error(f"{name} is {getattr(self, name)}", where="heal", fix="it must be above 0")
        if not self.rates or min(self.rates) <= 0 or self.trial_tokens < 0:
            what = f"rates are {self.rates} and trial_tokens is {self.trial_tokens}"
            raise Error(what, where="heal", fix="give factors above 0, and trial_tokens of 0 or more")
        if self.heldout_tokens < 2 * self.window:
            raise Error(f"heldout_tokens is {self.heldout_tokens}", where="heal", fix="give two windows or more")


def run(config: HealConfig) -> dict[str, Any]:
    """Do what is not yet done, write summary.json and the GGUF files, and print the comparison.

    Raises:
        Error: teacher or text cannot be read, there is too little text, the folder holds a run of another recipe
            or another process works in it, or cannot be written.
    """
    from gemstill.distill import prune
    from gemstill.quickstart import bootstrap
    from gemstill.report.heal import show, summarise

    folder = Path(config.run)
    with files.locked(folder):
        steps = Steps(folder, recipe={key: value for key, value in as_dict(config).items() if key != "run"})
        steps.do("text", lambda: _text(config))
        steps.do("prune", lambda: prune.run(pruning(config)))
        steps.do("data", lambda: _data(config))
        steps.do("teach", lambda: _teach(config))
        for name in STUDENTS:
            for factor in config.rates if config.trial_tokens else []:
                steps.do(f"trial {name} {factor:g}", partial(_trial, config, name, factor))
        for name in STUDENTS:
            steps.do(name, partial(_student, config, steps, name))
        steps.do("compare", lambda: _compare(config))
        steps.do("export", lambda: _export(config))
        scores = {name: steps.result("compare")[name] for name in STUDENTS}
        tokens = scores["next_token"]["tokens"]
        ratio = bootstrap(scores["distilled"]["nll"], scores["next_token"]["nll"], tokens)
        summary = summarise(config.tokens, steps, ratio)
        files.write_json(folder / "summary.json", summary)
        show(summary)
    return {"summary": str(folder / "summary.json"), "gguf": str(folder / "distilled.gguf")}


def plan(config: HealConfig) -> dict[str, Any]:
    """What `run(config)` would take, before anything runs."""
    from gemstill.checkpoint.foreign import shape_of
    from gemstill.core.machine import fast_dtype, probe
    from gemstill.distill import prune
    from gemstill.train.flops import forward_flops, train_flops

    pruned = prune.plan(pruning(config))
    whole = shape_of(config.teacher)
    small = prune.shape_after(whole, pruning(config))
    training = 2 * train_flops(small, config.window)  # two students
    comparing = forward_flops(whole, config.window) + 3 * forward_flops(small, config.window)
    flops = {
        "prune": pruned["flops_at_most"],
        "teach": forward_flops(whole, config.window) * config.tokens,
        "trials": training * len(config.rates) * config.trial_tokens,
        "students": training * config.tokens,
        "compare": comparing * config.heldout_tokens,
    }
    total = sum(flops.values())
    shown = ("layers", "channels", "parameters", "parameters_without_embedding", "part_without_embedding")
    return {key: pruned[key] for key in shown if key in pruned} | {
        "tokens_of_a_student": config.tokens,
        **{f"flops of {name}": value for name, value in flops.items()},
        "flops": total,
        "seconds": total / (1e9 * probe().rate(fast_dtype()) * SHARE),
    }


def _text(config: HealConfig) -> dict[str, int]:
    from gemstill.data.passages import write_passages

    return write_passages(
        config.data,
        Path(config.run) / "text",
        window=config.window,
        train=max(config.tokens, config.trial_tokens, config.calibration_tokens),
        heldout=config.heldout_tokens,
        heldout_fraction=config.heldout_fraction,
    )


def pruning(config: HealConfig) -> PruneConfig:
    """The pruned model, by what matters on the text that heals it."""
    return PruneConfig(
        config.teacher,
        Path(config.run) / "pruned",
        config.layers,
        config.intermediate_size,
        config.layer_pattern,
        text=str(Path(config.run) / "text" / "train.jsonl"),
        tokens=config.calibration_tokens,
        window=config.window,
        seed=config.seed,
    )


def _data(config: HealConfig) -> dict[str, int]:
    """The passages as shards: data/train and heldout/train, by the teacher's tokenizer."""
    from gemstill.data import shards

    folder, counts = Path(config.run), {}
    for name, split in (("data", "train"), ("heldout", "heldout")):
        source = Source(folder / "text" / f"{split}.jsonl", name=f"{config.data.name or config.data.path.name} {split}")
        made = shards.run(shards.DataConfig(source, folder / "pruned", folder / name, heldout_fraction=0))
        counts[f"{split}_tokens"] = made.train.num_tokens
    return counts


def teaching(config: HealConfig) -> TeachConfig:
    """The teacher's distributions over the training text, once."""
    folder = Path(config.run)
    return TeachConfig(
        teacher=config.teacher,
        data=folder / "data" / "train",
        output=folder / "store",
        estimator=config.estimator,
        window=config.window,
        block_tokens=16 * config.window,
        batch=4,
        seed=config.seed,
    )


def _teach(config: HealConfig) -> dict[str, Any]:
    from gemstill.distill.teach import run as teach

    store = teach(teaching(config))
    return {"tokens": len(store), "bytes_per_token": store.bytes_per_token}


def student(config: HealConfig, name: str, factor: float) -> TrainConfig:
    """The pruned model's training: `next_token` learns the next token, `distilled` the store; all else is the same."""
    folder = Path(config.run)
    rates = config.optimizer
    return TrainConfig(
        run=str(folder / name),
        seed=config.seed,
        tokens=config.tokens,
        windows_per_step=config.windows_per_step,
        micro_windows=config.micro_windows,
        keep_last=1,
        data=DataChoice(
            [SourceConfig(str(folder / "data"), store=str(folder / "store") if name == "distilled" else "")],
            tokenizer=str(folder / "pruned"),
            window=config.window,
        ),
        model=ModelChoice(start=str(folder / "pruned")),
        optimizer=replace(
            rates, learning_rate=factor * rates.learning_rate, embedding_rate=factor * rates.embedding_rate
        ),
        schedule=config.schedule,
        backward=config.backward,
    )


def _train(config: TrainConfig) -> dict[str, Any]:
    from gemstill.train.run import train

    summary = train(config)
    shutil.rmtree(Path(config.run) / "state", ignore_errors=True)  # several times the model, and of no more use
    return summary | {"seconds_of_run": summary["seconds"], "learning_rate": config.optimizer.learning_rate}


def _trial(config: HealConfig, name: str, factor: float) -> dict[str, Any]:
    """A short training with one pair of rates, by its held-out loss; nothing else of it stays."""
    from gemstill.checkpoint.foreign import open_any
    from gemstill.data.dataset import TokenDataset
    from gemstill.train.answers import answers

    recipe = student(config, name, factor)
    folder = Path(config.run) / "trials" / f"{name}-{factor:g}"
    summary = _train(replace(recipe, run=str(folder), tokens=config.trial_tokens))
    heldout = TokenDataset.open(Path(config.run) / "heldout" / "train")
    windows = max(1, config.heldout_tokens // config.window // 4)
    found = answers(open_any(folder / "model")[0], heldout, config.window, windows=windows, batch=ANSWERED)
    shutil.rmtree(folder)
    return {"heldout_nll": float(found.nll.mean()), "seconds": summary["seconds"], "flops": summary["flops"]}


def best(config: HealConfig, steps: Steps, name: str) -> float:
    """The factor of the rates that did best in the trials of a student."""
    if not config.trial_tokens:
        return config.rates[0]
    return min(config.rates, key=lambda factor: steps.result(f"trial {name} {factor:g}")["heldout_nll"])


def _place(config: HealConfig, name: str) -> str:
    folder = Path(config.run)
    return {"teacher": config.teacher, "pruned": str(folder / "pruned")}.get(name, str(folder / name / "model"))


def _compare(config: HealConfig) -> dict[str, Any]:
    """Every model on the same held-out text."""
    from gemstill.checkpoint.foreign import open_any
    from gemstill.data.dataset import TokenDataset
    from gemstill.train.answers import Answers, answers

    heldout = TokenDataset.open(Path(config.run) / "heldout" / "train")
    windows = max(1, config.heldout_tokens // config.window)
    found: dict[str, Answers] = {}
    for name in ROWS:
        model = open_any(_place(config, name))[0]
        found[name] = answers(model, heldout, config.window, windows=windows, batch=ANSWERED)
    out: dict[str, Any] = {}
    for name, each in found.items():
        nll, tokens = each.by_document()
        out[name] = {
            "heldout_nll": float(each.nll.mean()),
            "perplexity": each.perplexity,
            "agreement": each.agreement(found["teacher"]),
            "nll": nll.tolist(),
            "tokens": tokens.tolist(),
        }
    return out


def _export(config: HealConfig) -> dict[str, Any]:
    """All models as GGUF files, their bytes, and what llama.cpp makes of the healed one where it is installed.

    Networks of other architectures stay folders: llama.cpp's own converter takes them.
    """
    from gemstill.checkpoint.foreign import is_foreign, place_of
    from gemstill.checkpoint.source import load, save

    if is_foreign(place_of(config.teacher)):
        return {"dtype": "", "bytes": dict.fromkeys(ROWS), "llama_cpp": None}
    out: dict[str, Any] = {"dtype": config.dtype, "bytes": {}}
    for name in ROWS:
        model, tokenizer = load(_place(config, name))
        path = Path(config.run) / f"{name}.gguf"
        save(model, tokenizer, path, dtype=config.dtype)
        out["bytes"][name] = path.stat().st_size
        if name in ("teacher", "pruned"):
            path.unlink()
    out["llama_cpp"] = _in_llama_cpp(config)
    return out


def _student(config: HealConfig, steps: Steps, name: str) -> Any:
    return _train(student(config, name, best(config, steps, name)))


def _in_llama_cpp(config: HealConfig) -> dict[str, Any] | None:
    """The distilled model's file in llama.cpp: its perplexity on one held-out window, and ours of the same file."""
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
    except ImportError:
        note("llama-cpp-python is not installed: the GGUF file was not run there", where=config.run)
        return None
    import numpy as np
    import torch

    from gemstill.checkpoint.source import load
    from gemstill.data.dataset import TokenDataset

    path = Path(config.run) / "distilled.gguf"
    heldout = TokenDataset.open(Path(config.run) / "heldout" / "train")
    length = min(config.window, int(heldout.document_starts[1]) if heldout.num_documents > 1 else config.window)
    ids = [int(token) for token in heldout.read(0, length)]
    theirs = llama_cpp.Llama(str(path), n_ctx=config.window, logits_all=True, verbose=False)
    theirs.eval(ids)
    with torch.no_grad():
        ours = load(path)[0](torch.tensor([ids]))[0]
    labels = torch.tensor(ids[1:])

    def perplexity(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[:-1].float(), labels).exp())

    scores = torch.from_numpy(np.array(theirs.scores[:length]))
    return {
        "tokens": length - 1,
        "perplexity": perplexity(scores),
        "ours": perplexity(ours),
        "same_best": float((scores.argmax(1) == ours.argmax(1)).float().mean()),
        "version": llama_cpp.__version__,
    }
