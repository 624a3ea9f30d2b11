"""Settings of the measures. Nothing here loads torch, so help and wrong values are answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gemstill.core.errors import Error
from gemstill.infer.config import check_quantize

CONTEXT = 2048  # tokens in a window where nothing is said


@dataclass(frozen=True)
class PerplexityConfig:
    """`gemstill eval perplexity`."""

    source: str  # the model: a folder, a GGUF file, a hub name
    texts: str  # held-out text: a folder, a file or JSONL, compressed or not, or a data set's folder of shards
    quantize: str = ""  # compute on weights in int8 or int4, or in the blocks of a GGUF "file"; empty: as stored
    context: int = CONTEXT  # tokens in a window; less where the model was made for less
    pattern: str = "**/*"  # which files of a folder
    field: str = "text"  # where a JSONL record keeps its text
    out: str = ""  # a JSON file that gets the figures, those of every document too

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        check_context(self.context)


def check_context(context: int) -> None:
    """Raise Error for a window in which nothing could be predicted from anything."""
    if context < 2:
        raise Error(f"context is {context}", where="perplexity", fix="give a number of tokens from 2 up")


@dataclass(frozen=True)
class MemorizationConfig:
    """`gemstill eval memorization`."""

    source: str  # the model: a folder, a GGUF file, a hub name
    data: tuple[str, ...]  # a data set's folder of shards that it was trained on; may be given several times
    out: str = "memorization"  # a folder: answers as they come, results.json, memorized.jsonl
    samples: int = 1000  # windows of 100 tokens that are tried
    seed: int = 0  # of the sample
    names: str = ""  # a spaCy pipeline that finds names of people and places (en_core_web_lg); empty: no names
    quantize: str = ""  # compute on weights in int8 or int4, or in the blocks of a GGUF "file"; empty: as stored

    def __post_init__(self) -> None:
        check_quantize(self.quantize)
        if not self.data:
            raise Error("no data set is named", where="memorization", fix="give --data FOLDER")
        if self.samples < 1:
            raise Error(f"samples is {self.samples}", where="memorization", fix="give a number from 1 up")
        if self.seed < 0:
            raise Error(f"seed is {self.seed}", where="memorization", fix="give a number from 0 up")


@dataclass(frozen=True)
class ContaminatedConfig:
    """`gemstill data contaminated`."""

    shards: str  # a data set's folder of shards
    tokenizer: Path  # the tokenizer that it was made with
    suite: str = ""  # a table of benchmarks: gemma2-pretrained, gemma2-open-llm
    tasks: str = ""  # or tasks of lm-eval by their names, with commas between
    data_root: Path | None = None  # a folder with the items, laid out as docs/evaluation.md says; else the hub
    items: str = ""  # or items of your own: a folder, a file or JSONL of texts, each one an item
    out: str = "contaminated"  # a folder: documents.jsonl, results.json
    clean: str = ""  # a new folder for the data set without these documents
    workers: int = 0  # threads; 0 for one a core

    def __post_init__(self) -> None:
        if self.suite and self.tasks:
            raise Error("names a suite and tasks", where="contaminated", fix="give one of them")
        if not (self.suite or self.names or self.items):
            raise Error("no items are named", where="contaminated", fix="give --suite, --tasks or --items")
        if self.workers < 0:
            raise Error(f"workers is {self.workers}", where="contaminated", fix="give a number, or 0 for one a core")

    @property
    def names(self) -> list[str]:
        """The tasks."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]
