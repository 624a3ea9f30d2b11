"""A small real tokenizer, trained once for a test session."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer

TEXT = [f"def area_{n}(width, height):\n    return width * height + {n}  # straße, 東京, 🙂\n" for n in range(60)]


@cache
def small_tokenizer(vocab_size: int = 320) -> Tokenizer:
    return train_tokenizer(TEXT, Path(mkdtemp(prefix="gemstill-test-")) / "tokenizer", vocab_size)
