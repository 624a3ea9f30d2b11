"""The trainings and stores of a ladder in the order they are done, each with its cost: one list for plan and run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from gemstill.core.steps import Steps
from gemstill.distill.estimators import Estimator
from gemstill.distill.teach import TeachConfig
from gemstill.ladder.config import LadderConfig, StudentConfig, TeacherConfig
from gemstill.model.config import ModelConfig
from gemstill.train.config import DataChoice, HardConfig, ModelChoice, SourceConfig, TrainConfig
from gemstill.train.flops import forward_flops, train_flops

KINDS = ("scratch", "distilled")
SWEEP_SEED = 1_000  # of the sweep of rates: none of the comparison's


class Sizes(NamedTuple):
    """Tokens of the text, counted or estimated."""

    student: int  # of the students' sample, which the store covers
    heldout: int


@dataclass(frozen=True)
class Job:
    """One step. name: in steps.json, and its folder below the run's. flops: of all its products."""

    name: str
    flops: float
    work: Callable[[Steps], dict[str, Any]]


@dataclass(frozen=True)
class Training:
    """One model to train. hard: None takes the ladder's for a distilled one; factor: None takes the sweep's best."""

    name: str
    model: ModelChoice
    tokens: int
    seed: int = 0
    store: str = ""  # name of the store; empty: from scratch
    everything: bool = False  # whether it reads all of the text or the students' sample
    hard: HardConfig | None = None
    factor: float | None = None

    @property
    def kind(self) -> str:
        """Which of KINDS it is."""
        return "distilled" if self.store else "scratch"


def jobs(config: LadderConfig, sizes: Sizes) -> list[Job]:
    """Everything after tokenizer and data: the comparison, then the other rows, the cheapest first.

    Cut off at any time, as much as can be is there to be compared.
    """
    rows = [*_baselines(config, sizes), *_ablations(config, sizes)]
    rows.sort(key=lambda row: sum(job.flops for job in row))
    return [
        *_teaching(config, sizes, "teacher", config.teacher, "store"),
        *(_training(config, sizes, training) for training in _students(config)),
        *(job for row in rows for job in row),
    ]


def _students(config: LadderConfig) -> Iterator[Training]:
    """The sweep, then the comparison seed by seed: cut off early, it has fewer seeds of every size."""
    for kind in KINDS:
        for factor in config.rate_factors:
            name = sweep_name(kind, factor)
            yield Training(name, config.middle.model, config.tokens, SWEEP_SEED, _store_of(kind), factor=factor)
    for seed in range(config.seeds):
        for student in config.students:
            for kind in KINDS:
                name = student_name(student, kind, seed)
                yield Training(name, student.model, config.tokens, seed, _store_of(kind))


def _baselines(config: LadderConfig, sizes: Sizes) -> Iterator[list[Job]]:
    asked, middle, small = config.baselines, config.middle, config.smallest
    if asked.teacher_shape:
        training = Training("baselines/teacher-shape", config.teacher.model, config.tokens)
        yield [_training(config, sizes, training)]
    for times in asked.times_tokens:
        name = longer_name(middle, times)
        training = Training(name, middle.model, round(times * config.tokens), everything=True)
        yield [_training(config, sizes, training)]
    if asked.same_flops:
        tokens = same_flops_tokens(config, sizes)
        yield [_training(config, sizes, Training("baselines/same-flops", middle.model, tokens, everything=True))]
    for seed in range(asked.long_seeds if config.long_tokens else 0):
        pair = (
            Training(long_name(kind, seed), small.model, config.long_tokens, seed, _store_of(kind)) for kind in KINDS
        )
        yield [_training(config, sizes, training) for training in pair]


def _ablations(config: LadderConfig, sizes: Sizes) -> Iterator[list[Job]]:
    asked = config.ablations
    if not asked.seeds:
        return

    def students(name: str, store: str, hard: HardConfig | None = None) -> Iterator[Job]:
        for seed in range(asked.seeds):
            each = f"ablations/{name}-{seed}"
            training = Training(each, config.smallest.model, config.tokens, seed, store, hard=hard)
            yield _training(config, sizes, training)

    for hard in asked.hard:
        yield [*students(hard_name(hard), "store", hard)]
    for temperature in asked.temperatures:
        name = temperature_name(temperature)
        store = _store(config, sizes, "teacher", config.teacher.model, f"stores/{name}", temperature)
        yield [store, *students(name, f"stores/{name}")]
    for name, teacher in asked.teachers.items():
        made = _teaching(config, sizes, f"teachers/{name}", teacher, f"stores/{name}")
        yield [*made, *students(name, f"stores/{name}")]


def _store_of(kind: str) -> str:
    return "store" if kind == "distilled" else ""


def student_name(student: StudentConfig, kind: str, seed: int) -> str:
    """The step of one model of the comparison."""
    return f"students/{student.name}-{kind}-{seed}"


def sweep_name(kind: str, factor: float) -> str:
    """The step of one trial of the sweep."""
    return f"rates/{kind}-{factor:g}"


def longer_name(student: StudentConfig, times: float) -> str:
    """The step of a student from scratch with `times` the tokens."""
    return f"baselines/{student.name}-x{times:g}"


def long_name(kind: str, seed: int) -> str:
    """The step of one model of the pair with many tokens a parameter."""
    return f"baselines/long-{kind}-{seed}"


def hard_name(hard: HardConfig) -> str:
    """An ablation's name: the mixture of hard labels."""
    return f"hard-{hard.start:g}-to-{hard.end:g}"


def temperature_name(temperature: float) -> str:
    """An ablation's name: the temperature of the store."""
    return f"temperature-{temperature:g}"


def steps_of(config: LadderConfig, tokens: int) -> int:
    """Optimizer steps for so many tokens, rounded up."""
    return -(-tokens // (config.window * config.windows_per_step))


def training_flops(config: LadderConfig, model: ModelChoice, tokens: int) -> float:
    """FLOPs of a training over `tokens`, whole steps, without its evaluation."""
    seen = steps_of(config, tokens) * config.window * config.windows_per_step
    return train_flops(config.shape(model), config.window) * seen


def store_flops(config: LadderConfig, model: ModelChoice, sizes: Sizes) -> float:
    """FLOPs of the teacher's pass over the students' text."""
    return forward_flops(config.shape(model), config.window) * sizes.student


def same_flops_tokens(config: LadderConfig, sizes: Sizes) -> int:
    """Tokens that the middle size from scratch sees for the FLOPs of teacher, store and a distilled student."""
    shape = config.shape(config.middle.model)
    flops = training_flops(config, config.teacher.model, config.teacher.tokens)
    flops += store_flops(config, config.teacher.model, sizes)
    return int((flops + training_flops(config, config.middle.model, config.tokens)) / train_flops(shape, config.window))


def best_factor(config: LadderConfig, steps: Steps, kind: str) -> float:
    """The factor of the rates with the lowest held-out loss in the sweep."""
    losses = {factor: steps.result(sweep_name(kind, factor))["heldout_nll"] for factor in config.rate_factors}
    return min(losses, key=losses.__getitem__)


def _teaching(config: LadderConfig, sizes: Sizes, name: str, teacher: TeacherConfig, store: str) -> list[Job]:
    training = Training(name, teacher.model, teacher.tokens, everything=True, factor=1.0)
    return [_training(config, sizes, training), _store(config, sizes, name, teacher.model, store)]


def _training(config: LadderConfig, sizes: Sizes, training: Training) -> Job:
    shape = config.shape(training.model)
    flops = training_flops(config, training.model, training.tokens)
    flops += forward_flops(shape, config.window) * sizes.heldout

    def work(steps: Steps) -> dict[str, Any]:
        from gemstill.train.run import train

        factor = best_factor(config, steps, training.kind) if training.factor is None else training.factor
        summary = train(recipe(config, training, factor))
        return summary | {"seconds_of_run": summary["seconds"], "rate_factor": factor}

    return Job(training.name, flops, work)


def recipe(config: LadderConfig, training: Training, factor: float) -> TrainConfig:
    """A training as `gemstill train` takes it. factor: of the optimizer's two rates."""
    folder = Path(config.run)
    rates = config.optimizer
    source = SourceConfig(
        str(folder / ("data" if training.everything else "data-students")),
        store=str(folder / training.store) if training.store else "",
    )
    hard = config.hard if training.hard is None else training.hard
    return TrainConfig(
        run=str(folder / training.name),
        seed=training.seed,
        data=DataChoice([source], window=config.window, tokenizer=str(folder / "tokenizer")),
        model=training.model,
        tokens=training.tokens,
        windows_per_step=config.windows_per_step,
        micro_windows=config.windows_per_step,
        optimizer=replace(
            rates, learning_rate=factor * rates.learning_rate, embedding_rate=factor * rates.embedding_rate
        ),
        schedule=config.schedule,
        hard=hard if training.store else HardConfig(),
        save_minutes=1.0,
        keep_last=1,
    )


def _store(
    config: LadderConfig, sizes: Sizes, teacher: str, model: ModelChoice, name: str, temperature: float = 1.0
) -> Job:
    folder = Path(config.run)
    taught = TeachConfig(
        teacher=str(folder / teacher / "model"),
        data=folder / "data-students" / "train",
        output=folder / name,
        estimator=Estimator.parse(config.estimator),
        window=config.window,
        block_tokens=config.window * max(1, 65_536 // config.window),
        temperature=temperature,
    )

    def work(steps: Steps) -> dict[str, Any]:
        from gemstill.distill.teach import run

        store = run(taught)
        shape: ModelConfig = config.shape(model)
        flops = forward_flops(shape, config.window) * len(store)
        return {"tokens": len(store), "bytes_per_token": store.bytes_per_token, "flops": flops}

    return Job(name, store_flops(config, model, sizes), work)
