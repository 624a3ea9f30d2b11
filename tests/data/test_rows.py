"""A model without rows for its tokenizer's last entries is used where no text has them."""

from __future__ import annotations

import numpy as np
import pytest

from gemstill.core.errors import Error
from gemstill.data import rows
from gemstill.data.rows import MOST, entries_used


class Tokens:
    def __init__(self, ids: list[int]) -> None:
        self.ids, self.num_tokens = np.array(ids), len(ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def test_all_texts_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_TOKENS", 3)
    good = Tokens([1, 2, 99, 3, 4, 0, 7, 98])
    assert entries_used(100, 101, [good, good], "model") == 100
    for place in range(8):
        bad = Tokens([100 if number == place else 1 for number in range(8)])
        with pytest.raises(Error, match="model: has 100 rows and none for the entry 100"):
            entries_used(100, 101, [good, bad], "model")


def test_other_vocabularies_are_not_read_for() -> None:
    """Rows enough, or far too few, are for others to judge."""
    for count in (100, 101, 200):
        assert entries_used(count, 100, [Tokens([5000])], "model") == 100
    assert entries_used(100 - MOST - 1, 100, [Tokens([5000])], "model") == 100
