"""What a training run is told: every field with its meaning, refused early where it makes no sense."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from gemstill.core.config import as_dict, parse
from gemstill.core.errors import Error
from gemstill.model.config import ModelConfig

PADDING_ROWS = 128  # a vocabulary may be padded by this much (Gemma 2: 256,000 entries, 256,128 rows)


def _above(where: str, config: Any, *names: str, zero: bool = False) -> None:
    for name in names:
        value = getattr(config, name)
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            raise Error(f"{name} is {value}", where=where, fix=f"it must be {'0 or more' if zero else 'above 0'}")


def _within(where: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise Error(f"{name} is {value}", where=where, fix="it lies between 0 and 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon on the hidden matrices with AdamW on embeddings and norms, or AdamW on everything."""

    name: Literal["muon", "adamw"] = "muon"
    learning_rate: float = 0.01  # of the hidden matrices, at the schedule's height
    embedding_rate: float = 0.01  # of embeddings, head and norms, by AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # AdamW's two decay rates
    momentum: float = 0.95  # Muon's
    weight_decay: float = 0.1  # of the hidden matrices, decoupled: each step takes learning_rate·weight_decay of them
    clip: float = 1.0  # largest global norm of the gradient; 0 does not clip

    def __post_init__(self) -> None:
        _above("optimizer", self, "learning_rate", "embedding_rate")
        _above("optimizer", self, "weight_decay", "clip", zero=True)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise Error(
                f"betas are {self.betas} and momentum is {self.momentum}",
                where="optimizer",
                fix="give two betas and one momentum, each at least 0 and below 1",
            )


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the run: up in a line, then a cosine down, or level and a line down at the end (WSD)."""

    name: Literal["cosine", "wsd"] = "cosine"
    warmup: float = 0.02  # part of all steps in which the rate rises from 0
    decay: float = 0.3  # part of all steps in which WSD falls, at the end
    final: float = 0.1  # part of the full rate that is left at the end

    def __post_init__(self) -> None:
        _within("schedule", self, "warmup", "decay", "final")
        if self.name == "wsd" and self.warmup + self.decay > 1:
            what = f"warmup {self.warmup} and decay {self.decay} overlap"
            raise Error(what, where="schedule", fix="their sum is at most 1")


@dataclass(frozen=True)
class HardConfig:
    """How much of the true next token is mixed into a teacher's target: a line from start to end over the run."""

    start: float = 0.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _within("hard", self, "start", "end")

    def fraction(self, step: int, steps: int) -> float:
        """The part that hard labels have at `step` of `steps`, counted from 0."""
        return self.start + (self.end - self.start) * min(1.0, step / max(1, steps - 1))


@dataclass(frozen=True)
class TeacherChoice:
    """A teacher that answers while the student learns, its whole distribution; in place of stores."""

    source: str = ""  # a model (folder, .gguf file, hub name) of any architecture, or a server; empty: none
    temperature: float = 1.0  # both sides' logits are divided by it, and the loss multiplied by its square
    divergence: Literal["forward", "reverse", "jensen-shannon"] = "forward"  # from teacher to student, or between them
    beta: float = 0.5  # of the Jensen-Shannon divergence: near 0 like forward, near 1 like reverse
    entries: int = 20  # of a server's answer, which holds the likeliest entries alone

    def __post_init__(self) -> None:
        _above("teacher", self, "temperature", "entries")
        if self.divergence == "jensen-shannon" and not 0 < self.beta < 1:
            what = f"beta is {self.beta}"
            raise Error(what, where="teacher", fix="it lies between 0 and 1; at its ends are forward and reverse")
        if self.divergence != "forward" and self.source.startswith(("http://", "https://")):
            what = f"a server tells its likeliest entries alone, which bias the {self.divergence} divergence"
            raise Error(what, where="teacher", fix="take forward, or a teacher at hand")


@dataclass(frozen=True)
class ModelChoice:
    """Which network is trained: a preset with changes, or one that is there already."""

    preset: str = "mini-1m"  # a name of gemstill.model.config.PRESETS
    overrides: dict[str, Any] = field(default_factory=dict)  # fields of ModelConfig that differ from the preset
    start: str = (
        ""  # a model (folder, .gguf file, hub name) to start from, its network and weights, in place of a preset
    )
    like: str = ""  # a model (folder, hub name) of any architecture whose shape is taken, with random weights

    def __post_init__(self) -> None:
        if self.start and self.like:
            raise Error("both start and like are given", where="model", fix="drop one: like has random weights")
        if (given := "start" if self.start else "like" if self.like else "") and self.overrides:
            raise Error(f"overrides are given, but the network comes from '{given}'", where="model", fix="drop one")
        if not given:
            self.shape()

    def shape(self, vocab_size: int | None = None) -> ModelConfig:
        """The preset with its changes, for a tokenizer of `vocab_size` entries; that many rows unless overridden.

        Raises:
            Error: a change of an unknown name or wrong value, or a vocabulary not the tokenizer's (up to 128
                rows of padding).
        """
        config = ModelConfig.preset(self.preset)
        if vocab_size is not None:
            config = config.with_vocab(vocab_size)
        try:
            config = parse(ModelConfig, dataclasses.asdict(config) | self.overrides)
        except Error as error:
            raise Error(error.what, where="model.overrides", fix=error.fix) from None
        if vocab_size is not None:
            check_vocabulary(config.vocab_size, vocab_size, "model")
        return config


def check_vocabulary(rows: int, entries: int, where: str, *, any_padding: bool = False) -> None:
    """Refuse a model whose `rows` of the embedding are not the tokenizer's `entries` (padding rows allowed).

    any_padding: allow any number of them; other families have hundreds.
    """
    if rows < entries or (rows > entries + PADDING_ROWS and not any_padding):
        raise Error(
            f"the model's vocabulary has {rows} entries, the data's tokenizer {entries}",
            where=where,
            fix="take the tokenizer that belongs to the model, or leave vocab_size out of the overrides",
        )


@dataclass(frozen=True)
class SourceConfig:
    """One data set of the mixture."""

    folder: str  # made by `gemstill data`; its train/ is trained on, its heldout/ evaluated on
    weight: float = 1.0  # windows are drawn in proportion to the weights
    store: str = ""  # a teacher's probability store over train/, to distil from; empty: learn the next token

    def __post_init__(self) -> None:
        _above("data.sources", self, "weight")


@dataclass(frozen=True)
class DataChoice:
    """The text that is learned from."""

    sources: list[SourceConfig]
    tokenizer: str  # the tokenizer's folder: the data was made with it, and the finished model carries it
    window: int = 256  # tokens of one training window

    def __post_init__(self) -> None:
        _above("data", self, "window")
        if not self.sources:
            raise Error("there is no source", where="data.sources", fix="name a folder made by `gemstill data`")
        if len({bool(source.store) for source in self.sources}) > 1:
            raise Error("some sources have a store, some have none", where="data.sources", fix="give all one, or none")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """What every run of the loop is told, whatever its objective."""

    run: str = "runs/train"  # folder of the run
    seed: int = 0  # of initial weights and of the order of the windows
    steps: int = 0  # optimizer steps; give these or tokens
    tokens: int = 0  # tokens to train on, rounded up to whole steps
    windows_per_step: int = 16  # windows of one optimizer step, over all ranks
    micro_windows: int = 16  # windows of one forward and backward pass on one rank: memory, not results
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # of products; weights are kept in float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile: auto on a GPU; a CPU has native kernels
    activation_checkpointing: bool = False  # keep each block's input only: less memory, a third more products
    evaluate_every: int = 0  # steps between two evaluations on held-out text; 0: at the end alone
    evaluate_windows: int = 0  # held-out windows of one evaluation; 0: all
    save_every: int = 0  # steps between two states; 0: by minutes alone
    save_minutes: float = 5.0  # minutes between two states; 0: by steps alone
    keep_last: int = 2  # states that are kept beside the best
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        _above("recipe", self, "windows_per_step", "micro_windows", "keep_last")
        zero = ("seed", "steps", "tokens", "evaluate_every", "evaluate_windows", "save_every", "save_minutes")
        _above("recipe", self, *zero, zero=True)
        if bool(self.steps) == bool(self.tokens):
            what = f"steps is {self.steps} and tokens is {self.tokens}"
            raise Error(what, where="recipe", fix="give exactly one of the two")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(LoopConfig):
    """A run of `gemstill train`: from scratch, on from a checkpoint, or distilled from a store or a teacher at hand."""

    data: DataChoice
    model: ModelChoice = field(default_factory=ModelChoice)
    teacher: TeacherChoice = field(default_factory=TeacherChoice)
    hard: HardConfig = field(default_factory=HardConfig)  # the part of hard labels when distilling
    backward: Literal["exact", "sampled"] = "exact"  # of the loss: all of the vocabulary, or drawn columns, unbiased

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher.source and any(source.store for source in self.data.sources):
            what = "there is a teacher and a source has a store"
            raise Error(what, where="recipe", fix="distil from one of the two: drop teacher.source or the stores")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.windows_per_step * self.data.window

    @property
    def total_steps(self) -> int:
        """All steps of the run, from `steps` or from `tokens`."""
        return self.steps or -(-self.tokens // self.tokens_per_step)


# Where a run lies, how often it saves and over how many passes it spreads a step are no part of what it computes.
_FREE = ("run", "save_every", "save_minutes", "keep_last")


def identity(config: LoopConfig, **more: Any) -> dict[str, Any]:
    """All that a run's result depends on, flat: dotted field -> value, and `more` (fingerprints of the data)."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            walk(prefix, {str(index): item for index, item in enumerate(value)})
        else:
            flat[prefix] = value

    walk("", {key: value for key, value in (as_dict(config) | more).items() if key not in _FREE})
    # Data and teachers are known by their fingerprints, not by where they lie.
    places = (".folder", ".store", ".tokenizer")
    unused = {"teacher.source": "teacher.source"}
    unused |= {name: name.partition("source")[0] for name in ("teacher.source", "model.like") if not flat.get(name)}
    kept = {key: value for key, value in flat.items() if not key.startswith(tuple(unused.values()))}
    return {key: value for key, value in kept.items() if not (key.startswith("data.") and key.endswith(places))}


def check_same(saved: dict[str, Any], now: dict[str, Any], where: object) -> None:
    """Refuse to go on with a run whose recipe or data changed.

    Raises:
        Error: naming each difference, old and new.
    """
    changed = [key for key in sorted(saved.keys() | now.keys()) if saved.get(key) != now.get(key)]
    if changed:
        shown = ", ".join(f"{key} was {saved.get(key)!r} and is {now.get(key)!r}" for key in changed[:5])
        what = f"this run was begun with another recipe: {shown}"
        raise Error(what, where=where, fix="undo that, or name another run folder")
