"""Text, and a small network that has learned it: for what takes a trained model and changes it."""

from __future__ import annotations

import random
from pathlib import Path

from gemstill.checkpoint.source import save
from gemstill.data.shards import write_dataset
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.train.config import DataChoice, ModelChoice, SourceConfig, TrainConfig
from gemstill.train.run import train
from tests.model.tokenizers import small_tokenizer
from tests.train.conftest import sentences


def write_books(folder: Path) -> Path:
    """Twenty documents of sentences that can be learned, in lines."""
    folder.mkdir()
    for number in range(20):
        draw = random.Random(number)
        paragraphs = (sentences(draw.randint(1, 4), 100 * number + turn) for turn in range(40))
        (folder / f"{number:02}.txt").write_text("\n".join(paragraphs))
    return folder


def taught(shape: ModelConfig, books: Path, folder: Path) -> Path:
    """A network of that shape after sixty steps on the text, so that there is something to lose: its folder."""
    save(Transformer(shape), small_tokenizer(), folder / "start")
    write_dataset(books, small_tokenizer(), folder / "data", heldout_fraction=0, workers=1)
    data = DataChoice([SourceConfig(str(folder / "data"))], str(folder / "start"), window=64)
    start = ModelChoice(start=str(folder / "start"))
    train(TrainConfig(run=str(folder / "run"), steps=60, windows_per_step=4, data=data, model=start, compile="off"))
    return folder / "run" / "model"
