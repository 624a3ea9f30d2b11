"""Published weights teach and learn: Gemma 3 270M by two loaders, SmolLM2-135M by `transformers`. -s shows figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemstill.checkpoint.foreign import load_foreign
from gemstill.checkpoint.gguf import load_gguf
from gemstill.data.dataset import TokenDataset
from gemstill.data.shards import write_dataset
from gemstill.distill.store import Store
from gemstill.distill.teach import TeachConfig, describe, run, teach_model
from gemstill.model.adapter import Adapter
from gemstill.text.tokenizer import Tokenizer
from gemstill.train.config import DataChoice, ModelChoice, OptimizerConfig, SourceConfig, TeacherChoice, TrainConfig
from gemstill.train.metrics import read
from gemstill.train.run import train
from tests.checkpoint.conftest import place, published, smollm2
from tests.checkpoint.real import CHAPTERS, prose, topics

__all__ = ["place", "published", "smollm2"]  # fixtures
pytestmark = pytest.mark.real_weights
WINDOW = 128


class Prose:
    """A data set in memory: real prose in documents of 100 tokens, so that windows hold several."""

    fingerprint = "c" * 64

    def __init__(self, tokenizer: Tokenizer, tokens: int) -> None:
        ids = prose(tokenizer)[:tokens]
        self.document_starts = np.arange(0, tokens, 100)
        self.tokens = np.array(ids)
        self.tokens[self.document_starts] = tokenizer.bos_id
        self.vocab_size, self.num_tokens, self.bos_id = tokenizer.vocab_size, tokens, tokenizer.bos_id
        self.tokenizer_fingerprint = tokenizer.fingerprint

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]


def dense(store: Store) -> torch.Tensor:
    ids, probs, _ = store[:]
    return torch.zeros(len(store), store.vocab_size).scatter_add_(1, ids, probs)


def test_gemma_3_270m_gives_the_same_rows_through_either_loader(published: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gguf(published, dtype=torch.float32)
    model.compute_dtype = torch.float32
    data = Prose(tokenizer, 2 * WINDOW)
    settings = {"window": WINDOW, "block_tokens": WINDOW, "batch": 1}
    infos = {name: describe(model, data, estimator=name, **settings) for name in ("topk(20)", "threshold(0.05)")}
    ours = [teach_model(model, data, tmp_path / f"ours {name}", info) for name, info in infos.items()]
    del model
    theirs = AutoModelForCausalLM.from_pretrained(published.parent, gguf_file=published.name, dtype=torch.float32)
    adapter = Adapter(theirs.eval())
    stores = []
    for name in infos:
        info = describe(adapter, data, estimator=name, **settings)
        stores.append(teach_model(adapter, data, tmp_path / f"theirs {name}", info))
    top, drawn = ((dense(a) - dense(b)).abs().sum(1) for a, b in zip(ours, stores, strict=True))
    print(f"topk(20): {float(top.mean()):.2e} of the mass of a row differs, at most {float(top.max()):.2e}")
    print(f"threshold(0.05): {float((drawn < 0.01).float().mean()):.2%} of the rows have the same draws")
    assert float(top.mean()) < 1e-3
    assert float((drawn < 0.01).float().mean()) > 0.95


def test_smollm2_135m_teaches_and_learns(smollm2: Path, tmp_path: Path) -> None:
    """Its store says what it says; it distils itself to no loss but the store's; what is written, others open."""
    model, tokenizer = load_foreign(smollm2, dtype=torch.float32)
    (tmp_path / "text").mkdir()
    for name in CHAPTERS[1:4]:
        (tmp_path / "text" / f"{name}.txt").write_text(topics[name][:4000])
    tokenizer.save(tmp_path / "tokenizer")
    write_dataset(tmp_path / "text", tokenizer, tmp_path / "data", heldout_fraction=0.0, workers=1)
    dataset = TokenDataset.open(tmp_path / "data" / "train")
    config = TeachConfig(
        str(smollm2), tmp_path / "data" / "train", tmp_path / "store", window=WINDOW, block_tokens=4 * WINDOW, batch=4,
        precision="float32",
    )  # fmt: skip
    store = run(config)
    hit = store.check_alignment(dataset)
    print(f"probability of the token before, at and after: {hit}")
    assert hit[1] > 5 * max(hit[0], hit[2])
    tokens = torch.from_numpy(dataset.read(0, WINDOW))[None]
    documents = torch.from_numpy(dataset.document_at(np.arange(WINDOW)))[None]
    with torch.no_grad():
        known = model(tokens, documents=documents)[0].softmax(-1)
    kept = dense(store)[:WINDOW]
    heavy = known > 0.05
    assert float((kept[heavy] - known[heavy]).abs().max()) < 1.01 / store.info.units  # rounded at random
    entropy = float(-(known * known.log()).sum(1).mean())
    del model, known

    rates = OptimizerConfig(name="adamw", learning_rate=1e-5, embedding_rate=1e-5, weight_decay=0.0)
    recipe = TrainConfig(
        run=str(tmp_path / "run"), steps=3, windows_per_step=2, micro_windows=2, save_minutes=0, optimizer=rates,
        precision="float32", model=ModelChoice(start=str(smollm2)), teacher=TeacherChoice(str(smollm2)),
        data=DataChoice([SourceConfig(str(tmp_path / "data"))], str(tmp_path / "tokenizer"), window=WINDOW),
    )  # fmt: skip
    train(recipe)
    lines = [line for line in read(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    print(f"entropy of the first window {entropy:.3f}; loss and norm: {[(x['loss'], x['grad_norm']) for x in lines]}")
    # The student is its teacher: cross-entropy is entropy, and its gradient is nothing.
    assert lines[0]["loss"] == pytest.approx(entropy, rel=0.4)
    assert lines[0]["grad_norm"] < 0.05
    assert lines[-1]["loss"] < math.log(49_152) / 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")("The capital of France is", return_tensors="pt")
    assert tokenizer.decode([int(again(**ids).logits[0, -1].argmax())]) == " Paris"
