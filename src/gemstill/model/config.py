"""The shape of a network: Gemma 2's, with the three fields more that Gemma 3's text models need."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace

from gemstill.core.errors import Error

# Far above every model there is, and small enough that the bytes of a matrix can be counted in 64 bits and
# the network be laid out in seconds: a file may state any number.
LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_layers": 1024,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**16,
    "sliding_window": 2**31,
    "max_position": 2**31,
    "layer_pattern": 2**31,
}


@dataclass(frozen=True)
class ModelConfig:
    """Widths, depths and constants of one model (Gemma 2 report, Tables 1 and 2)."""

    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of one branch of the gated MLP
    num_layers: int
    num_heads: int  # query heads
    num_kv_heads: int  # key-value heads; each serves num_heads / num_kv_heads query heads
    head_dim: int  # width of one head, independent of hidden_size / num_heads
    query_pre_attn_scalar: float  # queries are multiplied by this to the power of -1/2
    sliding_window: int  # a local query sees itself and the sliding_window - 1 tokens before it
    max_position: int = 8192  # longest context the model is made for, tokens
    attn_logit_softcap: float | None = 50.0  # attention logits become c·tanh(x/c), before the mask
    final_logit_softcap: float | None = 30.0  # the same for the vocabulary's logits
    rope_theta: float = 10_000.0  # rotary base
    rope_local_theta: float | None = None  # rotary base of the local layers where it differs (Gemma 3)
    layer_pattern: int = 2  # every layer_pattern-th layer is global, the others local
    qk_norm: bool = False  # RMSNorm on queries and keys (Gemma 3)
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = True  # the output head is the input embedding

    def __post_init__(self) -> None:
        for name, most in LARGEST.items():
            if (size := getattr(self, name)) <= 0:
                raise Error(f"{name} is {size}, it must be above 0", where="model")
            if size > most:
                raise Error(f"{name} is {_short(size)}, it may be {most} at most", where="model")
        for name in ("query_pre_attn_scalar", "rope_theta", "rope_local_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise Error(f"{name} is {value}, it must be above 0 and finite", where="model")
        if self.num_heads % self.num_kv_heads:
            raise Error(f"num_heads {self.num_heads} is no multiple of num_kv_heads {self.num_kv_heads}", where="model")
        if self.head_dim % 2:
            raise Error(f"head_dim {self.head_dim} is odd; rotary embedding turns pairs", where="model")
        for name in ("attn_logit_softcap", "final_logit_softcap"):
            cap = getattr(self, name)
            if cap is not None and not (math.isfinite(cap) and cap > 0):
                raise Error(f"{name} is {cap}, it must be above 0, or null for no cap", where="model")

    def is_local(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, attends within the sliding window only."""
        return (layer + 1) % self.layer_pattern != 0

    @property
    def family(self) -> str:
        """What cards call it."""
        return "Gemma 3 text" if self.qk_norm else "Gemma 2"

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding, and of the head where it is not tied."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def body_parameters(self) -> int:
        """Parameters without embedding and head (Table 2, 'non-embedding')."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        norms = 4 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size + norms) + self.hidden_size

    @staticmethod
    def preset(name: str) -> ModelConfig:
        """A named model. Raises Error for an unknown name, with the nearest known one."""
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, 1) or list(PRESETS)
            raise Error(f"no model is named '{name}'", fix=f"did you mean '{near[0]}'? known: {', '.join(PRESETS)}")
        return PRESETS[name]

    def with_vocab(self, vocab_size: int) -> ModelConfig:
        """The same model for another vocabulary."""
        return replace(self, vocab_size=vocab_size)


def _short(number: int) -> str:
    """A number in a sentence, which may have thousands of digits."""
    return str(number) if number < 1e30 else f"a number of {math.log10(number):.0f} digits"


def _gemma2(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int, scalar: float
) -> ModelConfig:
    return ModelConfig(
        256_128,
        hidden,
        intermediate,
        layers,
        heads,
        kv_heads,
        head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=4096,
    )


def _mini(hidden: int, intermediate: int, layers: int, heads: int, head_dim: int) -> ModelConfig:
    # Widths are multiples of 32 and the query scale is head_dim's, as llama.cpp's formats and graph want them.
    return ModelConfig(
        4096, hidden, intermediate, layers, heads, heads // 2, head_dim,
        query_pre_attn_scalar=head_dim, sliding_window=128, max_position=1024,
    )  # fmt: skip


PRESETS = {
    "gemma2-2b": _gemma2(2304, 9216, 26, 8, 4, 256, 256),
    "gemma2-9b": _gemma2(3584, 14336, 42, 16, 8, 256, 256),
    "gemma2-27b": _gemma2(4608, 36864, 46, 32, 16, 128, 144),
    "gemma3-270m": ModelConfig(
        262_144, 640, 2048, 18, 4, 1, 256, query_pre_attn_scalar=256, sliding_window=512, max_position=32_768,
        attn_logit_softcap=None, final_logit_softcap=None, rope_theta=1_000_000.0, rope_local_theta=10_000.0,
        layer_pattern=6, qk_norm=True,
    ),
    "mini-1m": _mini(128, 384, 4, 4, 32),
    "mini-5m": _mini(256, 768, 6, 4, 64),
    "mini-15m": _mini(384, 1280, 8, 6, 64),
}  # fmt: skip
