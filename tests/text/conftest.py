"""A tokenizer trained on a corpus that has a bit of everything."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer

WORLD = [
    "Übergrößenträger äßen öfter Äpfel.\r\nZweite Zeile.\tTabulator\n",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "色は匂へど散りぬるを 我が世誰ぞ常ならむ",
    "دع الأيام تفعل ما تشاء وطب نفسا إذا حكم القضاء",
    "😀😃😄 👩‍👩‍👧 café café ½ ⅷ №1 ⁇ ▅",
    "a  b   c    d     e\n\n\n  indented\n\ttabbed\n        eight\n",
]


def corpus() -> list[str]:
    library = Path(sysconfig.get_path("stdlib"))
    return [(library / name).read_text() for name in ("argparse.py", "textwrap.py", "json/decoder.py")] + WORLD * 5


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer") / "made"
    train_tokenizer(corpus(), place, 1000, multiple_of=64)
    return place


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.open(folder)
