"""Published weights, pruned: Gemma 3 270M, and SmolLM2-135M by `transformers`. Run with -s to see the figures."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from gemstill.checkpoint.source import load, save
from gemstill.distill import prune
from gemstill.distill.prune import PruneConfig
from tests.checkpoint.conftest import place, published, smollm2
from tests.checkpoint.real import WINDOW, logprobs, windows

__all__ = ["place", "published", "smollm2"]  # fixtures
pytestmark = pytest.mark.real_weights


def test_gemma_3_270m(published: Path, tmp_path: Path) -> None:
    """Fifteen of eighteen blocks, every fifth global, and half of the channels: transformers and llama.cpp run it."""
    config = PruneConfig(str(published), tmp_path / "small", 15, 1024, 5, tokens=1024, window=512)
    figures = prune.run(config)
    print(figures)
    kept = [int(block) for block in figures["kept_layers"].split(", ")]
    assert [block % 6 == 5 for block in kept] == [place % 5 == 4 for place in range(15)]
    assert {0, 1, 5} <= set(kept)  # without one of these hardly anything is left of this model
    assert figures["loss_before"] < figures["loss_without_layers"] < math.log(262_144)
    assert figures["loss_before"] < figures["loss_pruned"] < math.log(262_144)
    model, tokenizer = load(tmp_path / "small", dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == figures["parameters"]
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    row = windows(tokenizer)[0][: WINDOW * 3 // 4]  # longer than the window of the local blocks
    with torch.no_grad():
        mine, other = model(torch.tensor([row]))[0], theirs(torch.tensor([row])).logits[0]
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    pytest.importorskip("llama_cpp")
    from tests.checkpoint.test_gguf_llama import open_llama, scores

    save(model, tokenizer, tmp_path / "small.gguf", dtype="f32")
    there = scores(open_llama(tmp_path / "small.gguf", WINDOW, logits_all=True), row)
    apart = float(logprobs(mine, row).mean() - logprobs(there, row).mean())
    print(f"perplexity {float(logprobs(mine, row).mean().neg().exp()):.3f}, llama.cpp apart {math.expm1(apart):+.4%}")
    assert abs(apart) < 1e-3


def test_smollm2_135m(smollm2: Path, tmp_path: Path) -> None:
    config = PruneConfig(str(smollm2), tmp_path / "small", 27, 1024, tokens=512, window=256)
    figures = prune.run(config)
    print(figures)
    assert figures["layers"] == "27 of 30"
    assert figures["channels"] == "1024 of 1536"
    assert figures["loss_before"] < figures["loss_without_layers"] < figures["loss_before"] + 1.5
    assert figures["loss_pruned"] < math.log(49_152)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert isinstance(theirs, LlamaForCausalLM)
    assert sum(parameter.numel() for parameter in theirs.parameters()) == figures["parameters"]
    with pytest.raises(prune.Error, match="layers is 31, the model has 30"):
        prune.run(replace(config, layers=31))
