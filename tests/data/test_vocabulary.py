"""The tokenizer command."""

from __future__ import annotations

from pathlib import Path

import pytest

from gemstill.core.errors import Error
from gemstill.data.sources import Source
from gemstill.data.vocabulary import TokenizerConfig, plan, run
from gemstill.text.training import train_tokenizer
from tests.data.conftest import document


def test_it_learns_from_what_is_not_held_out(documents: Path, tmp_path: Path) -> None:
    config = TokenizerConfig(Source(documents), tmp_path / "made", 300, multiple_of=64, heldout_fraction=0.2)
    figures = plan(config)
    assert figures["files"] == 120
    assert figures["vocab_size"] == 320
    assert not (tmp_path / "made").exists()
    made = run(config)
    assert made.vocab_size == 320
    everything = train_tokenizer((document(number) for number in range(120)), tmp_path / "all", 320)
    assert made.fingerprint != everything.fingerprint
    same = run(TokenizerConfig(Source(documents), tmp_path / "whole", 320, heldout_fraction=0))
    assert same.fingerprint == everything.fingerprint


def test_nothing_to_learn_from(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0" * 99)
    with pytest.raises(Error, match="no text in it to learn from"):
        run(TokenizerConfig(Source(tmp_path), tmp_path / "made", 512))


@pytest.mark.parametrize(
    ("option", "value"), [("vocab_size", 0), ("multiple_of", -1), ("sample", 0), ("heldout_fraction", 1)]
)
def test_settings_out_of_range(option: str, value: float) -> None:
    with pytest.raises(Error, match=option):
        TokenizerConfig(**{"source": Source(Path("a")), "out": Path("b"), "vocab_size": 512} | {option: value})
