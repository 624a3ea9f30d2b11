"""The loop: what it writes, how a batch may be cut, what it learns from, what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY

from gemstill.core.config import parse
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.model.config import PRESETS
from gemstill.model.transformer import Transformer
from gemstill.train.config import ModelChoice, OptimizerConfig, TrainConfig
from gemstill.train.flops import forward_flops, train_flops
from gemstill.train.heldout import evaluate
from gemstill.train.loop import Loop
from gemstill.train.metrics import read
from gemstill.train.run import plan, train


def losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in read(Path(config.run) / "metrics.jsonl") if "loss" in line]


def test_a_run_writes_its_folder_and_learns(recipe: TrainConfig) -> None:
    summary = train(recipe)
    folder = Path(recipe.run)
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "state", "model/model.safetensors", "summary.json"):
        assert (folder / name).exists(), name
    found = losses(recipe)
    assert len(found) == 12
    assert found[-1] < found[0] - 0.5
    lines = read(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "heldout_nll" in line] == [4, 8, 12]
    assert summary["tokens_seen"] == 12 * 4 * 32
    settled = parse(TrainConfig, folder / "config.yaml")
    assert settled.precision == "float32"
    assert settled.steps == 12


def test_the_finished_model_scores_as_the_run_said(recipe: TrainConfig, corpus: Path) -> None:
    from gemstill.checkpoint import source

    summary = train(recipe)
    model, tokenizer = source.load(Path(recipe.run) / "model")
    dataset = TokenDataset.open(corpus / "data" / "heldout")
    result = evaluate(model, dataset, 32, batch=5)
    assert tokenizer.fingerprint == dataset.tokenizer_fingerprint
    assert result.nll_per_token == pytest.approx(summary["heldout_nll"], rel=1e-5)
    assert len(result.nll) == len(result.tokens) == dataset.num_documents


def test_evaluation_is_the_plain_sum_of_log_probabilities(corpus: Path) -> None:
    """Window by window, with plain logits: without the first token of a document, or what follows a bos lent."""
    dataset = TokenDataset.open(corpus / "data" / "heldout")
    shape = ModelChoice("mini-1m", TINY).shape(dataset.vocab_size)
    model = Transformer(shape, seed=3)
    result = evaluate(model, dataset, 16, batch=4)
    stream = dataset.read(0, dataset.num_tokens)
    nll, count = np.zeros(dataset.num_documents), np.zeros(dataset.num_documents, dtype=np.int64)
    for start in range(0, dataset.num_tokens - 15, 16):
        tokens = torch.from_numpy(stream[start : start + 16].copy())
        lent = int(tokens[0]) != dataset.bos_id
        tokens[0] = dataset.bos_id
        owner = dataset.document_at(np.arange(start, start + 16))
        with torch.no_grad():
            scores = model(tokens[None], documents=torch.from_numpy(owner)[None])[0].log_softmax(-1)
        for i in range(lent, 16):
            following = start + i + 1
            if following < dataset.num_tokens and dataset.document_at(np.array([following]))[0] == owner[i]:
                nll[owner[i]] -= float(scores[i, stream[following]])
                count[owner[i]] += 1
    assert np.array_equal(result.tokens, count)
    np.testing.assert_allclose(result.nll, nll, rtol=1e-5)
    scored = count.sum() / (dataset.num_tokens - dataset.num_documents)
    assert result.bits_per_byte == pytest.approx(nll.sum() / np.log(2) / (dataset.bytes * scored), rel=1e-5)
    part = evaluate(model, dataset, 16, batch=4, windows=6)
    assert 0 < part.tokens.sum() <= 6 * 16


def test_cutting_a_batch_changes_nothing(recipe: TrainConfig) -> None:
    """Accumulation is normalised by the whole batch's weight (transformers#34191 averaged averages)."""
    found = []
    for micro in (1, 3, 4):
        config = dataclasses.replace(recipe, run=f"{recipe.run}-{micro}", micro_windows=micro)
        train(config)
        found.append(losses(config))
    np.testing.assert_allclose(found[0], found[2], rtol=1e-5)
    np.testing.assert_allclose(found[1], found[2], rtol=1e-5)


@pytest.mark.parametrize("change", [{"activation_checkpointing": True}, {"precision": "bfloat16"}])
def test_other_ways_to_compute_learn_alike(recipe: TrainConfig, change: dict[str, Any]) -> None:
    other = dataclasses.replace(recipe, run=recipe.run + "-other", **change)
    train(recipe)
    train(other)
    exact = "precision" not in change
    np.testing.assert_allclose(losses(other), losses(recipe), rtol=1e-6 if exact else 0.02)


def test_training_goes_on_from_a_finished_model(recipe: TrainConfig) -> None:
    train(recipe)
    start = ModelChoice(start=str(Path(recipe.run) / "model"))
    config = dataclasses.replace(recipe, run=recipe.run + "-on", model=start, steps=2)
    train(config)
    assert losses(config)[0] < losses(recipe)[0] - 0.5


def test_a_loss_that_is_not_finite_stops_the_run(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step, batch and last good state are named, and the state is intact."""
    parts = Loop._parts

    def poisoned(self: Loop) -> Any:
        if self.step == 7:
            next(self.model.parameters()).data.fill_(float("nan"))
        return parts(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_parts", poisoned)
        with pytest.raises(Error, match=r"loss is nan .* at step 8, windows that start at tokens \[.*step-00000006"):
            train(recipe)
    train(recipe)
    assert len(losses(recipe)) == 12


def test_a_full_disk_is_said_and_the_last_state_is_intact(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def full(handle: int) -> None:
        if "step-00000006" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            Error, match=r"step-00000006: cannot be written \(No space left on device\); free some space"
        ):
            train(recipe)
    names = [path.name for path in (Path(recipe.run) / "state").iterdir()]
    assert "step-00000003" in names
    assert not [name for name in names if "00000006" in name]
    train(recipe)
    assert len(losses(recipe)) == 12


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimizer: {learning_rat: 1}", "learning_rate"),
        ("optimizer: {learning_rate: -1}", "learning_rate is -1"),
        ("optimizer: {name: sgd}", "muon"),
        ("windows_per_step: many", "a whole number"),
        ("model: {preset: mini-2m}", "mini-"),
        ("model: {overrides: {num_layer: 3}}", "num_layers"),
        ("model: {overrides: {num_layers: x}}", "num_layers"),
        ("steps: 0", "exactly one"),
        ("steps: 5\ntokens: 5", "exactly one"),
        ("windows_per_step: 0", "windows_per_step is 0"),
    ],
)
def test_bad_recipes_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    data = {"steps": 3, "data": {"sources": [{"folder": "x"}], "tokenizer": "t"}} | yaml.safe_load(text)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(Error, match=said):
        parse(TrainConfig, tmp_path / "recipe.yaml")


@pytest.mark.parametrize("size", [100, 299, 1000])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(recipe: TrainConfig, size: int) -> None:
    config = dataclasses.replace(recipe, model=ModelChoice("mini-1m", {**TINY, "vocab_size": size}))
    with pytest.raises(Error, match=rf"vocabulary has {size} entries, the data's tokenizer 300"):
        train(config)


def test_windows_longer_than_the_text_are_refused(recipe: TrainConfig) -> None:
    config = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, window=10**7))
    with pytest.raises(Error, match="fewer than one window"):
        train(config)


def test_a_file_where_the_run_should_be_is_refused(recipe: TrainConfig) -> None:
    Path(recipe.run).write_text("")
    with pytest.raises(Error, match="run"):
        train(recipe)


def test_the_plan_tells_what_the_run_takes(recipe: TrainConfig) -> None:
    figures = plan(recipe)
    summary = train(recipe)
    assert figures["tokens"] == summary["tokens_seen"]
    assert figures["flops"] == pytest.approx(summary["flops"])
    assert figures["parameters"] == summary["parameters"]
    assert not {"memory_bytes", "disk_bytes", "seconds"} - figures.keys()
    tokens = dataclasses.replace(recipe, run=recipe.run + "-tokens", steps=0, tokens=1000)
    assert plan(tokens)["steps"] == 8


def test_flops_are_counted_by_hand() -> None:
    """One query of a window of 4 with a local window of 2 sees 1, 2, 2, 2 keys; globally 1, 2, 3, 4."""
    config = dataclasses.replace(PRESETS["mini-1m"], num_layers=2, sliding_window=2)
    matrices = config.body_parameters + config.vocab_size * config.hidden_size
    keys = 7 / 4 + 10 / 4
    assert forward_flops(config, 4) == 2 * matrices + 4 * config.num_heads * config.head_dim * keys
    assert train_flops(config, 4) == 3 * forward_flops(config, 4)


def test_adamw_learns_too(recipe: TrainConfig) -> None:
    config = dataclasses.replace(recipe, optimizer=OptimizerConfig(name="adamw"))
    train(config)
    assert losses(config)[-1] < losses(config)[0] - 0.3
