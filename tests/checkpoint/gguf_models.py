"""Small networks of both architectures that llama.cpp runs as they are meant, and a tokenizer for them."""

from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import torch

from gemstill.model.config import PRESETS, ModelConfig
from gemstill.model.transformer import Transformer
from tests.model import reference

ROWS = 384  # of the embedding: 64 more than the small tokenizer has entries
GEMMA2 = replace(PRESETS["mini-1m"], vocab_size=ROWS, hidden_size=64, intermediate_size=96, sliding_window=32)
GEMMA3 = replace(
    GEMMA2, vocab_size=320, num_layers=7, layer_pattern=6, qk_norm=True, rope_theta=1e6, rope_local_theta=1e4,
    attn_logit_softcap=None, final_logit_softcap=None,
)  # fmt: skip
BOTH = {"gemma2": GEMMA2, "gemma3": GEMMA3}


def network(config: ModelConfig, *, rough: bool = True, dtype: torch.dtype = torch.float32) -> Transformer:
    """Rough weights, or fresh ones with a gain of its own for each norm."""
    if rough:
        return reference.network(config, dtype)
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def library(*names: str) -> list[str]:
    """Files of Python's own library."""
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / name).read_text() for name in names]
