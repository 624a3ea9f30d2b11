"""What a ladder is told: every field with its meaning, refused early where it makes no sense."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from gemstill.core.errors import Error
from gemstill.distill.estimators import Estimator
from gemstill.model.config import ModelConfig
from gemstill.train.config import HardConfig, ModelChoice, OptimizerConfig, ScheduleConfig

MULTIPLE = 64  # of a trained tokenizer's entries


def _positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise Error(f"{name} is {value}", where=where, fix="it must be above 0")


@dataclass(frozen=True)
class TeacherConfig:
    """A teacher, from scratch on all of the text."""

    model: ModelChoice  # its network
    tokens: int  # that it is trained on

    def __post_init__(self) -> None:
        _positive("teacher", tokens=self.tokens)


@dataclass(frozen=True)
class StudentConfig:
    """One size of student."""

    name: str  # what tables call it
    model: ModelChoice  # its network


@dataclass(frozen=True)
class BaselineConfig:
    """The rows that a sceptic asks for. Students from scratch read all of the text here, not the sample alone."""

    times_tokens: list[float] = field(default_factory=lambda: [2.0, 4.0])  # the middle size from scratch, longer
    same_flops: bool = True  # the middle size from scratch with the FLOPs of teacher, store and student together
    teacher_shape: bool = True  # the teacher's network from scratch on the students' tokens: the curve's far end
    tokens_per_parameter: float = 20.0  # the smallest size for so many tokens a parameter without embedding; 0: none
    long_seeds: int = 3  # seeds of that pair

    def __post_init__(self) -> None:
        if any(not times > 1 for times in self.times_tokens) or sorted(self.times_tokens) != self.times_tokens:
            what = f"times_tokens is {self.times_tokens}"
            raise Error(what, where="baselines", fix="give rising factors above 1")
        if self.tokens_per_parameter < 0 or self.long_seeds < 1:
            what = f"tokens_per_parameter is {self.tokens_per_parameter} and long_seeds is {self.long_seeds}"
            raise Error(what, where="baselines", fix="give 0 or more, and at least one seed")


@dataclass(frozen=True)
class AblationConfig:
    """What else could have been chosen, one thing at a time, with the smallest student."""

    seeds: int = 3  # the first ones of the comparison, so that each run has its partner there; 0: no ablations
    hard: list[HardConfig] = field(default_factory=list)  # other mixtures of hard labels
    temperatures: list[float] = field(default_factory=list)  # that the teacher's logits are divided by in the store
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)  # other teachers, by name

    def __post_init__(self) -> None:
        if self.seeds < 0:
            raise Error(f"seeds is {self.seeds}", where="ablations", fix="give 0 or more")
        for temperature in self.temperatures:
            _positive("ablations", temperatures=temperature)


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """`gemstill ladder`."""

    run: str = "runs/ladder"  # folder of the run
    data: str = ""  # a folder of text to learn from; empty: the sources of Python's own standard library
    vocab_size: int = 4096  # entries of the tokenizer, a multiple of 64
    heldout_fraction: float = 0.05  # part of the documents kept for measuring
    student_fraction: float = 0.45  # part of the other documents that students read and the store covers
    window: int = 256  # tokens of one training window
    windows_per_step: int = 4  # windows of one optimizer step
    teacher: TeacherConfig
    estimator: str = "threshold(0.06)"  # what the store keeps of a distribution
    students: list[StudentConfig]  # sizes, smallest first
    tokens: int  # that every student of the comparison is trained on
    seeds: int = 5  # pairs for each size: same initial weights, same batches
    hard: HardConfig = field(default_factory=HardConfig)  # hard labels mixed into the distilled students' targets
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)  # its two rates are the sweep's middle
    schedule: ScheduleConfig = field(default_factory=lambda: ScheduleConfig(final=0.0))
    rate_factors: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])  # of the sweep, for either kind alike
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    ablations: AblationConfig = field(default_factory=AblationConfig)
    budget: float = 6e14  # most FLOPs of everything together

    def __post_init__(self) -> None:
        _positive(
            "ladder", tokens=self.tokens, window=self.window, windows_per_step=self.windows_per_step, budget=self.budget
        )
        if self.vocab_size % MULTIPLE:
            what = f"vocab_size is {self.vocab_size}, no multiple of {MULTIPLE}"
            raise Error(what, where="ladder", fix="the tokenizer is filled up to one: name it")
        if self.seeds < 2:
            raise Error(f"seeds is {self.seeds}", where="ladder", fix="an interval takes at least 2 pairs")
        if self.ablations.seeds > self.seeds or self.ablations.seeds == 1:
            what = f"ablations.seeds is {self.ablations.seeds} beside {self.seeds} seeds"
            raise Error(what, where="ladder", fix="each needs its partner, and an interval at least 2 pairs; 0: none")
        if not 0 < self.student_fraction <= 1:
            raise Error(f"student_fraction is {self.student_fraction}", where="ladder", fix="above 0, at most 1")
        if not self.rate_factors or min(self.rate_factors) <= 0:
            raise Error(f"rate_factors is {self.rate_factors}", where="ladder", fix="give factors above 0")
        Estimator.parse(self.estimator)
        self._check_sizes()

    def _check_sizes(self) -> None:
        names = [student.name for student in self.students]
        if len(names) < 2 or len(set(names)) < len(names):
            raise Error(f"students are {names}", where="ladder", fix="name at least two sizes, each once")
        sizes = [self.shape(student.model).body_parameters for student in self.students]
        if any(a >= b for a, b in itertools.pairwise(sizes)):
            what = "students are not in rising order: " + ", ".join(
                f"{name} has {size:,} parameters" for name, size in zip(names, sizes, strict=True)
            )
            raise Error(what, where="ladder", fix="name the smallest first")

    def shape(self, model: ModelChoice) -> ModelConfig:
        """A network over this ladder's vocabulary."""
        return model.shape(self.vocab_size)

    @property
    def smallest(self) -> StudentConfig:
        """The size of ablations, and of the pair with many tokens a parameter."""
        return self.students[0]

    @property
    def middle(self) -> StudentConfig:
        """The size of the sweep of rates and of the rows that a sceptic asks for."""
        return self.students[len(self.students) // 2]

    @property
    def long_tokens(self) -> int:
        """Tokens of the pair with many tokens a parameter; 0 where there is none."""
        return round(self.baselines.tokens_per_parameter * self.shape(self.smallest.model).body_parameters)
