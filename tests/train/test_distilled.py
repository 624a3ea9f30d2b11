"""Training from a teacher's store: aligned rows, hard labels mixed in, several sources."""

from __future__ import annotations

import dataclasses
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, make_recipe

from gemstill.checkpoint.source import load, save
from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.data.dataset import TokenDataset, read_header
from gemstill.data.loader import Loader
from gemstill.data.shards import write_dataset
from gemstill.distill.store import Store
from gemstill.distill.teach import TeachConfig, describe, teach_model
from gemstill.distill.teach import run as teach
from gemstill.model.readout import logits
from gemstill.model.transformer import Transformer
from gemstill.ops.target import Target
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.vocabulary import CONTROL
from gemstill.train.config import DataChoice, HardConfig, ModelChoice, SourceConfig, TrainConfig
from gemstill.train.metrics import read
from gemstill.train.objectives import FromStore, NextToken
from gemstill.train.run import plan, train


@pytest.fixture(scope="module")
def teacher(corpus: Path) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelChoice("mini-1m", TINY).shape(300), seed=7)
    with torch.no_grad():  # far from uniform, so that a wrong row shows
        model.embed_tokens.weight.mul_(8)
    return model.eval()


@pytest.fixture(scope="module")
def store(corpus: Path, teacher: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Store:
    dataset = TokenDataset.open(corpus / "data" / "train")
    info = describe(teacher, dataset, estimator="threshold(0.05)", window=32, block_tokens=1024)
    return teach_model(teacher, dataset, tmp_path_factory.mktemp("store") / "store", info)


def test_the_loss_against_the_store_is_that_against_the_teacher(
    corpus: Path, teacher: Transformer, store: Store
) -> None:
    """In expectation: over some thousand rows, the sampled cross-entropy meets the dense one."""
    dataset = TokenDataset.open(corpus / "data" / "train")
    student = Transformer(teacher.config, seed=1)
    loader = Loader([(dataset, 1.0)], 32, 64, 0)
    objective = FromStore([store], HardConfig(), 10)
    batch = loader.batch(0)
    prepared = objective.prepare(batch, 0)
    with torch.no_grad():
        found = float(objective.loss(student, prepared)[0]) / objective.weight(prepared)
        q = teacher(batch.tokens, documents=batch.documents).flatten(0, 1).softmax(-1)
        logp = student(batch.tokens, documents=batch.documents, readout=logits).flatten(0, 1).log_softmax(-1)
    weight = batch.weight.flatten()
    exact = float((-(q * logp).sum(-1) * weight).sum() / weight.sum())
    assert found == pytest.approx(exact, rel=0.01)


def test_hard_labels_are_mixed_in_by_the_step(corpus: Path, teacher: Transformer, store: Store) -> None:
    """At 1 the store does not matter, and between the loss lies between."""
    dataset = TokenDataset.open(corpus / "data" / "train")
    batch = Loader([(dataset, 1.0)], 32, 8, 0).batch(0)
    objective = FromStore([store], HardConfig(start=0.0, end=1.0), 11)
    student = Transformer(teacher.config, seed=1)
    with torch.no_grad():
        soft, half, hard = (float(objective.loss(student, objective.prepare(batch, step))[0]) for step in (0, 5, 10))
        plain = NextToken()
        labels = float(plain.loss(student, plain.prepare(batch, 0))[0])
    assert hard == pytest.approx(labels, rel=1e-5)
    assert half == pytest.approx((soft + hard) / 2, rel=1e-5)


def test_every_source_is_learned_from_its_own_store(corpus: Path, teacher: Transformer, store: Store) -> None:
    dataset = TokenDataset.open(corpus / "data" / "train")
    batch = Loader([(dataset, 1.0), (dataset, 1.0)], 32, 8, 0).batch(0)
    narrow = FromStore([store], HardConfig(), 10).prepare(batch, 0).target
    wide = FromStore([store, store], HardConfig(), 10).prepare(batch, 0).target
    dense = [torch.zeros(len(t.ids), 300).scatter_add_(1, t.ids, t.probs) for t in (narrow, wide)]
    assert torch.equal(dense[0], dense[1])
    assert torch.equal(narrow.weight, wide.weight)
    assert isinstance(wide, Target)


def test_a_distilled_run_learns_its_teacher(corpus: Path, store: Store, tmp_path: Path) -> None:
    config = make_recipe(corpus, tmp_path / "run", steps=30)
    source = SourceConfig(str(corpus / "data"), store=str(store.folder))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=[source]))
    train(config)
    losses = [line["loss"] for line in read(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    assert losses[-1] < losses[0] - 0.3


def test_a_store_of_other_windows_is_refused(corpus: Path, store: Store, recipe: TrainConfig) -> None:
    source = SourceConfig(str(corpus / "data"), store=str(store.folder))
    data = dataclasses.replace(recipe.data, sources=[source], window=16)
    with pytest.raises(Error, match="windows of 32"):
        train(dataclasses.replace(recipe, data=data))


def test_stores_for_some_sources_only_are_refused(recipe: TrainConfig) -> None:
    sources = [SourceConfig("a"), SourceConfig("b", store="c")]
    with pytest.raises(Error, match="all one, or none"):
        dataclasses.replace(recipe.data, sources=sources)


def test_from_a_model_without_a_row_for_its_tokenizers_last_entry(tmp_path: Path, corpus: Path) -> None:
    """As Gemma 3 is published, with a mark for images that its text models have no row for: taught by and trained."""
    vocabulary = Tokenizer.open(corpus / "tokenizer").vocabulary()
    size = len(vocabulary.pieces)
    tokenizer = Tokenizer.from_vocabulary(
        dataclasses.replace(
            vocabulary,
            pieces=[*vocabulary.pieces, "<image_soft_token>"],
            scores=[*vocabulary.scores, 0.0],
            types=[*vocabulary.types, CONTROL],
        )
    )
    tokenizer.save(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for file in sorted((corpus / "text").iterdir())[:24]:
        shutil.copy(file, tmp_path / "text")
    write_dataset(tmp_path / "text", tokenizer, tmp_path / "data", heldout_fraction=0.3, workers=1)
    model = Transformer(ModelChoice("mini-1m", TINY | {"vocab_size": size}).shape(), seed=3)
    with pytest.warns(Notice, match="has no row in the model and is never used"):
        save(model, tokenizer, tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        store = teach(TeachConfig(str(tmp_path / "model"), tmp_path / "data" / "train", tmp_path / "store", window=32))
        assert (store.vocab_size, tokenizer.vocab_size) == (size, size + 1)
        source = SourceConfig(str(tmp_path / "data"), store=str(tmp_path / "store"))
        recipe = make_recipe(
            corpus, tmp_path / "run", steps=2, model=ModelChoice(start=str(tmp_path / "model")),
            data=DataChoice([source], str(tmp_path / "tokenizer"), window=32),
        )  # fmt: skip
        assert train(recipe)["steps"] == 2
        trained, _ = load(tmp_path / "run" / "model")
    assert trained.config.vocab_size == size
    plain = DataChoice([SourceConfig(str(tmp_path / "data"))], recipe.data.tokenizer, window=32)
    fresh = dataclasses.replace(recipe, run=str(tmp_path / "fresh"), data=plain)
    plan(fresh)
    for part in ("heldout", "train"):
        path = next((tmp_path / "data" / part).glob("*.safetensors"))
        dtype, offset, _ = read_header(path).tokens
        ids = np.memmap(path, dtype, "r+", offset)
        ids[5], before = size, ids[5]
        with pytest.raises(Error, match=f"has {size} rows and none for the entry {size} of its tokenizer"):
            plan(fresh)
        ids[5] = before
