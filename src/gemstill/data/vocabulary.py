"""Train a tokenizer on a source: `gemstill tokenizer`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gemstill.core.errors import Error
from gemstill.core.progress import Progress
from gemstill.data.shards import HELDOUT, is_heldout
from gemstill.data.sources import Source, read_source, source_files
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import SAMPLE, train_tokenizer


@dataclass(frozen=True)
class TokenizerConfig:
    """`gemstill tokenizer`: train a tokenizer on a source."""

    source: Source  # where the text comes from
    out: Path  # the folder to make
    vocab_size: int  # entries in all, the control tokens and the 256 byte pieces among them
    multiple_of: int = 64  # vocab_size is rounded up to a multiple of this: matrix products like round sizes
    heldout_fraction: float = HELDOUT  # leaves out the documents that `gemstill data` holds out by the same number
    sample: int = SAMPLE  # characters of text to learn from at most

    def __post_init__(self) -> None:
        for name in ("vocab_size", "multiple_of", "sample"):
            value: int = getattr(self, name)
            if value < 1:
                raise Error(f"{name} is {value}", fix="choose a positive number")
        if not 0 <= self.heldout_fraction < 1:
            raise Error(f"heldout_fraction is {self.heldout_fraction}", fix="choose a number from 0 up to 1")


def run(config: TokenizerConfig) -> Tokenizer:
    """Make the tokenizer that `config` asks for. Raises Error as `read_source` and `train_tokenizer` do."""
    size = sum(path.stat().st_size for path in source_files(config.source))
    with Progress(size, "bytes", "tokenizer") as progress:
        texts = _texts(config, progress)
        return train_tokenizer(
            texts, config.out, config.vocab_size, multiple_of=config.multiple_of, sample=config.sample
        )


def plan(config: TokenizerConfig) -> dict[str, object]:
    """What `run` would read and make, from the sizes of the files alone."""
    found = source_files(config.source)
    size = sum(path.stat().st_size for path in found)
    entries = -(-config.vocab_size // config.multiple_of) * config.multiple_of
    return {"files": len(found), "bytes": size, "sampled_characters": min(size, config.sample), "vocab_size": entries}


def _texts(config: TokenizerConfig, progress: Progress) -> Iterator[str]:
    seen = False
    for document in read_source(config.source):
        progress.advance(document.read)
        if not is_heldout(hashlib.sha256(document.text.encode()).digest(), config.heldout_fraction):
            seen = True
            yield document.text
    if not seen:
        raise Error("no text in it to learn from", where=config.source.path, fix="name a source of text")
