"""A network rounded matrix by matrix: nearer to the unrounded one than plain rounding, and left as it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gemstill.data.calibration import Calibration
from gemstill.distill.gptq import round_network
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.ops.blocks import quantize
from gemstill.ops.rounding import Rounded, unpack
from gemstill.train.divergence import divergence, logits_of
from tests.checkpoint.gguf_models import GEMMA2, GEMMA3


def text(seed: int) -> Calibration:
    tokens = torch.randint(0, 96, (24, 32), generator=torch.Generator().manual_seed(seed))
    lengths = torch.full((24,), 32)
    lengths[0] = 20
    return Calibration(tokens, lengths, "made up")


def with_matrices(model: Transformer, rounded: dict[str, Rounded]) -> Transformer:
    other = Transformer(model.config)
    weights: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    other.load_state_dict(weights | {name: each.weights() for name, each in rounded.items()})
    return other


@pytest.mark.parametrize("shape", [GEMMA3, GEMMA2, replace(GEMMA3, tie_embeddings=False)], ids=["3", "2", "untied"])
def test_nearer_than_plain_rounding(shape: ModelConfig) -> None:
    shape = replace(shape, vocab_size=96, num_layers=3, layer_pattern=2, hidden_size=64, intermediate_size=96)
    model = Transformer(shape, seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = round_network(model, text(0))
    assert list(found) == [name for name, p in model.named_parameters() if p.ndim == 2]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    plain = {name: unpack(quantize(before[name], "Q4_0")) for name in found}
    losses = [
        divergence(logits_of(model), logits_of(with_matrices(model, each)), text(1)).figures()["kl"]
        for each in (found, plain)
    ]
    assert losses[0] < 0.75 * losses[1]
