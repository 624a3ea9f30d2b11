"""A small corpus, tokenizer and data set, made once by the real parts."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path
from typing import Any

import pytest

os.environ["GEMSTILL_PRECISION"] = "float32"  # equality across ranks is a matter of float32

from gemstill.data.shards import write_dataset
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer
from gemstill.train.config import DataChoice, ModelChoice, SourceConfig, TrainConfig

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16.0,
    "sliding_window": 16,
}


def sentences(count: int, seed: int) -> str:
    """Sentences of a small grammar: a model can learn them, and they never end too soon."""
    rng = random.Random(seed)
    names = ["the cat", "a dog", "my old friend", "the king", "she", "nobody"]
    verbs = ["sees", "follows", "paints", "remembers", "sells"]
    ends = ["in the garden", "at night", "for 12 coins", "without a word", "again and again"]
    return "".join(
        f"{rng.choice(names)} {rng.choice(verbs)} {rng.choice(names)} {rng.choice(ends)}.\n" for _ in range(count)
    )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text/, tokenizer/ and data/ (train and heldout)."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    texts = [sentences(5 + i % 17, i) for i in range(120)]
    for i, text in enumerate(texts):
        (folder / "text" / f"{i:03}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, folder / "tokenizer", 300)
    assert isinstance(tokenizer, Tokenizer)
    write_dataset(folder / "text", tokenizer, folder / "data", heldout_fraction=0.1, workers=1)
    return folder


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> TrainConfig:
    """A run of twelve steps that takes a second."""
    return make_recipe(corpus, tmp_path / "run")


def make_recipe(corpus: Path, run: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        run=str(run),
        steps=12,
        windows_per_step=4,
        micro_windows=2,
        evaluate_every=4,
        save_every=3,
        save_minutes=0,
        compile="off",
        model=ModelChoice("mini-1m", TINY),
        data=DataChoice([SourceConfig(str(corpus / "data"))], str(corpus / "tokenizer"), window=32),
    )
    return dataclasses.replace(config, **changes)
