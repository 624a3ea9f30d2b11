"""Random networks that make every detail matter, and the same network in `transformers`, the reference."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from gemstill.checkpoint.hf_config import to_hf
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer

BASE = ModelConfig(
    vocab_size=61, hidden_size=48, intermediate_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    query_pre_attn_scalar=16, sliding_window=4, max_position=512,
)  # fmt: skip
GEMMA3 = replace(
    BASE, num_layers=7, layer_pattern=6, qk_norm=True, rope_theta=1e6, rope_local_theta=1e4, attn_logit_softcap=None,
    final_logit_softcap=None,
)  # fmt: skip
TIME = 13  # tokens of a test's text: more than most windows

AXES: dict[str, list[Any]] = {
    "heads": [(4, 2), (4, 1), (4, 4), (6, 2), (1, 1), (2, 2)],
    "head_dim": [8, 16, 20],  # never hidden_size / num_heads for all of them
    "query_pre_attn_scalar": [16, 7, 144],
    "sliding_window": [1, 2, 3, 4, 7, 8, 50],
    "num_layers": [1, 2, 3, 5],
    "attn_logit_softcap": [50.0, 50.0, 5.0, None],
    "final_logit_softcap": [30.0, 30.0, 4.0, None],
    "tie_embeddings": [True, False],
}


def grid(count: int, seed: int = 0) -> list[ModelConfig]:
    """`count` configurations in which every value of every axis occurs evenly often, combined at random."""
    draw = random.Random(seed)
    columns = {}
    for name, values in AXES.items():
        column = [values[number % len(values)] for number in range(count)]
        draw.shuffle(column)
        columns[name] = column
    configs = []
    for number in range(count):
        row = {name: column[number] for name, column in columns.items()}
        row["num_heads"], row["num_kv_heads"] = row.pop("heads")
        configs.append(replace(BASE, **row))
    return configs


def name_of(config: ModelConfig) -> str:
    """A test's name for a configuration."""
    c = config
    return (
        f"H{c.num_heads}G{c.num_kv_heads}d{c.head_dim}s{c.query_pre_attn_scalar:g}w{c.sliding_window}L{c.num_layers}"
        f"c{c.attn_logit_softcap}f{c.final_logit_softcap}{'t' if c.tie_embeddings else 'u'}"
    )


@torch.no_grad()
def roughen(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that caps bite, residuals mix, and every norm has a gain of its own."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            # A sub-layer's output weighs as much as the stream it joins; the last norm drives logits into the cap.
            large = name == "norm.weight" or "post_" in name
            parameter.copy_(noise * 0.5 + (2.0 if large else 0.0))
        elif "embed" in name or "lm_head" in name:
            parameter.copy_(0.25 * noise)
        else:
            factor = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.copy_(noise * factor * parameter.shape[1] ** -0.5)


def network(config: ModelConfig, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Transformer:
    """Our network with rough weights, one of its own for each call."""
    model = Transformer(config)
    roughen(model, seed)
    return model.to(dtype).eval()


@cache
def ours(config: ModelConfig, seed: int = 0) -> Transformer:
    """The same, shared between tests: leave its weights alone."""
    return network(config, seed=seed)


@cache
def theirs(config: ModelConfig, seed: int = 0) -> Any:
    """The same network, the same weights, by `transformers`, attention written out (eager)."""
    return copy_of(ours(config, seed), config)


def copy_of(model: Transformer, config: ModelConfig) -> Any:
    """`model` as a `transformers` model of the same dtype."""
    fields = to_hf(config) | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    kind, network = (Gemma3TextConfig, Gemma3ForCausalLM) if config.qk_norm else (Gemma2Config, Gemma2ForCausalLM)
    reference = network._from_config(kind(**fields), attn_implementation="eager").to(model.embed_tokens.weight.dtype)
    state = {n if n.startswith("lm_head") else f"model.{n}": tensor for n, tensor in model.state_dict().items()}
    missing, unexpected = reference.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_embeddings else [])
    return reference.eval()


def text(config: ModelConfig, batch: int = 2, time: int = TIME, seed: int = 1) -> Tensor:
    """Random tokens [batch, time]."""
    return torch.randint(config.vocab_size, (batch, time), generator=torch.Generator().manual_seed(seed))


def their_logits(model: Any, tokens: Tensor) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] without padding."""
    with torch.no_grad():
        out: Tensor = model(input_ids=tokens, use_cache=False).logits
    return out
