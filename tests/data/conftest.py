"""A tokenizer, and a folder of documents."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.text.conftest import folder, tokenizer  # noqa: F401  (fixtures)

WORDS = ["the", "parser", "returns", "an", "argument", "or", "raises", "Error", "when", "self", "has", "value"]


def document(number: int, words: int = 60) -> str:
    """A text of its own: no two share much."""
    chosen = random.Random(number)
    return f"# {number}\n" + " ".join(f"{chosen.choice(WORDS)}{chosen.randrange(50)}" for _ in range(words)) + "\n"


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """120 text files in two folders."""
    place = tmp_path / "documents"
    for number in range(120):
        path = place / f"part{number % 2}" / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document(number))
    return place
