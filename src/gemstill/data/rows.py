"""Models without a row for the tokenizer's last entries, such as Gemma 3's: its tokenizer also marks images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from numpy.typing import NDArray

from gemstill.core.errors import Error

MOST = 8  # entries without a row; with more the tokenizer is another model's
_TOKENS = 1 << 22  # read at once


class Text(Protocol):
    """A data set's tokens (gemstill.data.dataset.TokenDataset is one)."""

    @property
    def num_tokens(self) -> int: ...
    def read(self, start: int, stop: int, /) -> NDArray[Any]: ...


def entries_used(rows: int, entries: int, texts: Iterable[Text], where: object) -> int:
    """How many of a tokenizer's `entries` a model (`where`) of so many `rows` is used with on these texts.

    All of them, or its rows where no text has the last few entries, for which all texts are read.

    Raises:
        Error: a text has one of the entries without a row.
    """
    if not 0 < entries - rows <= MOST:
        return entries
    for text in texts:
        for start in range(0, text.num_tokens, _TOKENS):
            largest = int(text.read(start, min(start + _TOKENS, text.num_tokens)).max())
            if largest >= rows:
                what = f"has {rows} rows and none for the entry {largest} of its tokenizer, which the data uses"
                raise Error(what, where=where, fix="take a model that has one, or leave those documents out")
    return rows
