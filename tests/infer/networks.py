"""Rough random networks over the small tokenizer, which want to write on and on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from gemstill.infer.generate import stop_ids
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from tests.model.reference import BASE, GEMMA3, roughen
from tests.model.tokenizers import small_tokenizer

VOCAB = 320
SMALL = replace(BASE, vocab_size=VOCAB + 64, tie_embeddings=False)  # 64 rows of padding
TIED, SMALL3 = replace(SMALL, tie_embeddings=True), replace(GEMMA3, vocab_size=VOCAB)


def network(config: ModelConfig = SMALL, seed: int = 0) -> Transformer:
    """A rough network that does not want to end: the ends' rows of the head are zero."""
    model = Transformer(config)
    roughen(model, seed)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    with torch.no_grad():
        head.weight[sorted(stop_ids(small_tokenizer()))] = 0.0
    return model.eval()


@torch.no_grad()
def lean(model: Transformer, ids: Sequence[int], by: float = 1.0) -> Transformer:
    """Make `ids` the likeliest by far, wherever the model stands: their rows of the head alone get every vote."""
    assert model.lm_head is not None
    model.lm_head.weight.zero_()
    model.norm.weight.fill_(-1.0)  # a gain of 0 ...
    model.norm.weight[0] = 9.0  # ... but for one entry, whose sign then decides
    model.lm_head.weight[list(ids), 0] = by
    return model


@torch.no_grad()
def plain(model: Transformer) -> Transformer:
    """Make all entries unlikely that are not ASCII text: what it writes is read back as it was written."""
    assert model.lm_head is not None
    for number in range(VOCAB):
        if not small_tokenizer().decode([number]).isascii() or number in small_tokenizer().control_ids:
            model.lm_head.weight[number] = 0.0
    return model
