"""How many floating-point operations a model's work takes, counted from its shape."""

from __future__ import annotations

from gemstill.model.adapter import ForeignConfig
from gemstill.model.config import ModelConfig


def forward_flops(config: ModelConfig | ForeignConfig, window: int) -> float:
    """Operations of one token's forward pass in windows of `window` tokens, a product and a sum counted as two.

    2·(N + V·D) + Σ_layers 4·H·d·(keys seen): N parameters without embedding, V·D the head (the input
    embedding is a look-up), and for each key that a query sees H·d products for the score and H·d for the
    value. A query of a global layer sees (T + 1)/2 keys on average, of a local one at most its window.
    Elementwise work is not counted.
    """
    matrices = 2.0 * (config.body_parameters + config.vocab_size * config.hidden_size)
    windows = [config.sliding_window if config.is_local(layer) else window for layer in range(config.num_layers)]
    seen = sum(_mean_keys(window, w) for w in windows)
    return matrices + 4.0 * config.num_heads * config.head_dim * seen


def train_flops(config: ModelConfig | ForeignConfig, window: int) -> float:
    """Operations of training on one token: forward once, backward twice that; 6·N plus head and attention."""
    return 3.0 * forward_flops(config, window)


def _mean_keys(tokens: int, window: int) -> float:
    """Keys that a causal query sees on average over `tokens` positions with a sliding window."""
    w = min(tokens, window)
    return (w * (w + 1) / 2 + (tokens - w) * w) / tokens
