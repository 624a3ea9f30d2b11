"""Does a student care that its teacher was stored in a few bytes? Vocabulary 16,384, paired seeds.

A teacher (`mini-1m`) learns from text; then small students of one shape learn from it over the same windows
in the same order: from all of its distribution (online, the reference), and from stores of `threshold`,
`topk` and `sample` of at most --bytes bytes a token, the whole folder counted. For each seed the students differ
in nothing else. On held-out text: perplexity, how often the student's likeliest token is the teacher's, and
the expected calibration error (arXiv 1706.04599, 15 bins). All is kept in --run and gone on with from there.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from common import arguments, compare, finish
from gemstill.checkpoint.source import load
from gemstill.core import files
from gemstill.core.machine import fast_dtype
from gemstill.data.dataset import TokenDataset
from gemstill.data.loader import Batch, Loader, heldout_batches
from gemstill.data.shards import write_dataset
from gemstill.data.sources import Source, read_source
from gemstill.distill.block import encode, packed
from gemstill.distill.code import IdCode
from gemstill.distill.estimators import Estimator
from gemstill.distill.store import Store
from gemstill.distill.teach import describe, teach_model
from gemstill.model.config import ModelConfig
from gemstill.model.readout import Readout
from gemstill.model.transformer import Transformer
from gemstill.ops.loss import linear_cross_entropy
from gemstill.ops.target import OnlineTarget
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer
from gemstill.train.config import DataChoice, ModelChoice, OptimizerConfig, ScheduleConfig, SourceConfig, TrainConfig
from gemstill.train.optimizer import Optimizer
from gemstill.train.run import train

VOCAB, WINDOW, TEACHER, HELDOUT_WINDOWS, BAR = 16_384, 256, "mini-1m", 64, 1.01
STUDENT = ModelConfig(VOCAB, 64, 192, 2, 2, 1, 32, query_pre_attn_scalar=32, sliding_window=128)
MUON = OptimizerConfig(name="muon", learning_rate=0.03, embedding_rate=0.06, momentum=0.75)
CHOICES = {
    "threshold": [0.2 * 0.97**i for i in range(106)],
    "topk": [float(k) for k in range(1, 40)],
    "sample": [float(n) for n in range(1, 100)],
}


@dataclass(frozen=True)
class Plan:
    """How much teacher and students learn, and of how many bytes a token a store may be."""

    teacher_tokens: int
    steps: int
    windows: int  # of WINDOW tokens, of one step of a student
    bytes: float


@dataclass(frozen=True)
class Figures:
    """What a student is on held-out text. agreement, calibration: shares of one."""

    perplexity: float
    agreement: float
    calibration: float


def prepare(run: Path, text: Path, pattern: str, plan: Plan) -> tuple[TokenDataset, TokenDataset, Transformer]:
    """The students' data, the held-out data and the teacher."""
    source = Source(text, pattern=pattern, exclude=["test", "tests", "site-packages", "idlelib"], name="text")
    if not (run / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer((document.text for document in read_source(source)), run / "tokenizer", VOCAB)
    tokenizer = Tokenizer.open(run / "tokenizer")
    if not (run / "data" / "train" / "index.json").exists():
        write_dataset(source, tokenizer, run / "data", heldout_fraction=0.05)
    students, fraction = run / "data-students" / "train", 0.02
    wanted = plan.steps * plan.windows * WINDOW
    while not (students / "index.json").exists() or TokenDataset.open(students).num_tokens < wanted:
        # Books differ in size, and are taken by their hashes: no more of them than the students see once.
        fraction *= 2
        shutil.rmtree(students.parent, ignore_errors=True)
        write_dataset(source, tokenizer, students.parent, heldout_fraction=0.05, fraction=fraction)
    if not (run / "teacher" / "model" / "config.json").exists():
        train(
            TrainConfig(
                run=str(run / "teacher"), tokens=plan.teacher_tokens, windows_per_step=4, micro_windows=4,
                compile="off", optimizer=MUON, schedule=ScheduleConfig("cosine", final=0.0),
                model=ModelChoice(TEACHER), keep_last=1, evaluate_every=10_000,
                data=DataChoice([SourceConfig(str(run / "data"))], str(run / "tokenizer"), WINDOW),
            )
        )  # fmt: skip
    model, _ = load(run / "teacher" / "model", dtype=torch.float32)
    model.compute_dtype = fast_dtype()
    heldout = TokenDataset.open(run / "data" / "heldout")
    return TokenDataset.open(students), heldout, model


def hidden_states(run: Path, teacher: Transformer, data: TokenDataset) -> torch.Tensor:
    """The teacher's last hidden states of every token of `data`, [windows · WINDOW, D], made once."""
    path = run / "hidden.pt"
    if not path.exists():
        parts = []
        with torch.inference_mode():
            for batch in heldout_batches(data, WINDOW, 16):
                states = teacher(batch.tokens, documents=batch.documents, readout=lambda hidden, head, cap: hidden)
                parts.append(states.flatten(0, 1))
        with files.writing(path) as temporary:
            torch.save(torch.cat(parts), temporary)
    states: torch.Tensor = torch.load(path)
    return states


def fitting(name: str, logits: torch.Tensor, teacher: Transformer, data: TokenDataset, most: float) -> Estimator:
    """The estimator of this name that comes nearest to `most` bytes a token from below, on these rows."""
    best = Estimator(name, CHOICES[name][0])
    for parameter in CHOICES[name]:
        estimator = Estimator(name, parameter)
        info = describe(teacher, data, estimator=estimator, window=WINDOW, block_tokens=WINDOW)
        u = torch.rand(len(logits), estimator.uniforms + 1, dtype=torch.float64, generator=torch.Generator())
        rows = encode(estimator.of_logits(logits.clone(), u, teacher.config.final_logit_softcap), info, u[:, -1])
        parts = packed([rows], info.units, IdCode.of(data, estimator.entries))
        size = sum(part.nbytes for part in parts.values()) / len(logits) + 0.1  # the card, the code and the index
        if size > 0.98 * most:
            break
        best = estimator
    return best


def stores(run: Path, teacher: Transformer, data: TokenDataset, states: torch.Tensor, most: float) -> dict[str, Store]:
    """A store of each estimator, of at most `most` bytes a token."""
    rows = states[:: len(states) // 2048][:2048]
    logits = F.linear(rows, teacher.embed_tokens.weight.detach().to(rows.dtype))
    found = {}
    for name in CHOICES:
        chosen = run / f"{name}.json"
        if not chosen.exists():
            files.write_json(chosen, fitting(name, logits, teacher, data, most).parameter)
        estimator = Estimator(name, files.read_json(chosen))
        info = describe(teacher, data, estimator=estimator, window=WINDOW, block_tokens=1 << 16, batch=16)
        found[name] = teach_model(teacher, data, run / "stores" / name, info)
        print(f"{estimator}: {found[name].bytes_per_token:.2f} bytes a token", flush=True)
    return found


Aim = Callable[[Batch], Any]


def learn(aim: Aim, data: TokenDataset, seed: int, plan: Plan) -> Transformer:
    """A student after the plan's steps towards `aim`, its weights and its data drawn by `seed`."""
    student = Transformer(STUDENT, seed=seed)
    student.compute_dtype = fast_dtype()
    loader, optimizer = Loader([(data, 1.0)], WINDOW, plan.windows, seed), Optimizer(student.named_parameters(), MUON)
    for step in range(plan.steps):
        batch = loader.batch(step)
        loss = student(batch.tokens, documents=batch.documents, readout=_loss(aim(batch), batch))
        loss.backward()
        optimizer.step(0.5 * (1 + math.cos(math.pi * step / plan.steps)))
    return student


def _loss(target: Any, batch: Batch) -> Readout:
    def loss(hidden: torch.Tensor, head: torch.Tensor, softcap: float | None) -> torch.Tensor:
        weight = batch.weight.flatten()
        total: torch.Tensor = linear_cross_entropy(hidden.flatten(0, 1), head, target, softcap=softcap, weight=weight)
        return total / weight.sum()

    return loss


@torch.inference_mode()
def judge(student: Transformer, teacher: Transformer, heldout: TokenDataset) -> Figures:
    """The student on the first HELDOUT_WINDOWS windows of held-out text."""
    nll = agree = count = 0.0
    confidence, right, number = torch.zeros(3, 15, dtype=torch.float64).unbind()
    for index, batch in enumerate(heldout_batches(heldout, WINDOW, 8)):
        if index * 8 >= HELDOUT_WINDOWS:
            break
        seen = batch.weight.flatten() > 0
        labels = batch.labels.flatten()[seen]
        q = student(batch.tokens, documents=batch.documents).flatten(0, 1)[seen].log_softmax(1)
        p = teacher(batch.tokens, documents=batch.documents).flatten(0, 1)[seen]
        top = q.max(1)
        nll -= float(q.gather(1, labels[:, None]).sum())
        agree += float((top.indices == p.argmax(1)).sum())
        count += len(labels)
        bins = (top.values.exp() * 15).long().clamp(max=14)
        confidence += torch.bincount(bins, top.values.exp().double(), 15)
        right += torch.bincount(bins, (top.indices == labels).double(), 15)
        number += torch.bincount(bins, minlength=15)
    error = float((confidence - right).abs().sum() / number.sum())
    return Figures(math.exp(nll / count), agree / count, error)


def results(
    run: Path, seeds: int, data: TokenDataset, heldout: TokenDataset, teacher: Transformer, plan: Plan
) -> dict[str, Any]:
    """The figures of every student, "kind seed" -> Figures as a dict; those that `run` holds are not made again."""
    path = run / "results.json"
    done: dict[str, Any] = files.read_json(path) if path.exists() else {}
    states = hidden_states(run, teacher, data)
    head, cap = teacher.embed_tokens.weight.detach(), teacher.config.final_logit_softcap
    made = stores(run, teacher, data, states, plan.bytes)

    def online(batch: Batch) -> OnlineTarget:
        rows = (batch.start[:, None] + torch.arange(WINDOW)).flatten()
        return OnlineTarget(states[rows], head, cap, 1.0, torch.ones(len(rows)))

    aims: dict[str, Aim] = {"dense": online}
    for name, store in made.items():
        aims[name] = lambda batch, store=store: store.target(batch.start, WINDOW)
    for seed in range(seeds):
        for name, aim in aims.items():
            if f"{name} {seed}" not in done:
                done[f"{name} {seed}"] = asdict(judge(learn(aim, data, seed, plan), teacher, heldout))
                files.write_json(path, done)
            print(name, seed, done[f"{name} {seed}"], flush=True)
    if "teacher" not in done:
        done["teacher"] = asdict(judge(teacher, teacher, heldout))
        files.write_json(path, done)
    return done


def main() -> None:
    args = arguments(
        __doc__, run="store-students", text=sysconfig.get_path("stdlib"), pattern="**/*.py", seeds=5,
        teacher_tokens=256 * 1024, steps=128, windows=4, bytes=16.0,
    )  # fmt: skip
    run, plan = Path(args.run), Plan(args.teacher_tokens, args.steps, args.windows, args.bytes)
    if (run / "plan.json").exists() and files.read_json(run / "plan.json") != asdict(plan):
        raise SystemExit(f"{run} was made with another plan: give another --run")
    run.mkdir(parents=True, exist_ok=True)
    files.write_json(run / "plan.json", asdict(plan))
    data, heldout, teacher = prepare(run, Path(args.text), args.pattern, plan)
    done = results(run, args.seeds, data, heldout, teacher, plan)
    rows = []
    for field in ("perplexity", "agreement", "calibration"):
        values = {name: [done[f"{name} {seed}"][field] for seed in range(args.seeds)] for name in ("dense", *CHOICES)}
        for name in CHOICES:
            bar = BAR if (name, field) == ("threshold", "perplexity") and plan.bytes <= 16 else None
            chosen = f"{name}({json.loads((run / f'{name}.json').read_text()):.4g})"
            rows.append(compare(f"{chosen}, {field}", values[name], values["dense"], field, bar=bar, small=True))
        spread = statistics.stdev(values["dense"]) if args.seeds > 1 else 0.0
        print(f"{field}: teacher {done['teacher'][field]:.4g}, dense {values['dense']}, deviation {spread:.3g}")
    size = {name: Store.open(run / "stores" / name).bytes_per_token for name in CHOICES}
    finish(rows, bytes_per_token=size, results=done)


if __name__ == "__main__":
    main()
