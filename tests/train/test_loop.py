"""The loop: what it writes, how it goes on, how a batch may be cut, what it refuses."""

from __future__ import annotations

from pathlib import Path

from gemstill.train.config import TrainConfig
from gemstill.train.metrics import read
from gemstill.train.run import train


def test_a_run_writes_its_folder_and_learns(recipe: TrainConfig) -> None:
    summary = train(recipe)
    folder = Path(recipe.run)
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "state", "model/model.safetensors", "summary.json"):
        assert (folder / name).exists(), name
    lines = read(folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.5
    assert [line["step"] for line in lines if "heldout_nll" in line] == [4, 8, 12]
    assert summary["tokens_seen"] == 12 * 4 * 32
