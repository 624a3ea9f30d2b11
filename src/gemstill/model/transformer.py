"""The network, top to bottom: RMSNorm, rotary embedding, gated MLP, attention, block, Transformer.

Shapes: B batch, T time, D hidden_size, H query heads, G key-value heads, d head_dim, V vocabulary.
Parameters keep their storage dtype; every product casts its weights to the dtype of its input, so a
run computes in bfloat16 from float32 masters, or in float32 from bfloat16 weights, alike.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemstill.core.errors import Error
from gemstill.model.config import ModelConfig
from gemstill.model.readout import Readout, logits
from gemstill.model.slots import Cache, LayerCache
from gemstill.ops import flex
from gemstill.ops.attention import AnyMask, attention, make_mask
from gemstill.ops.fused import geglu, joint_linear, rms_norm, rotate, rotated_heads, split_heads
from gemstill.ops.packed import Packed, no_training
from gemstill.ops.tied import tied


class RMSNorm(nn.Module):
    """A layer of `rms_norm`: x [..., size] -> [..., size]; weight [size], the gain less one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps, residual)


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, d/2] float32 of rotary embedding (arXiv 2104.09864) at positions [B, T]."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angles = positions[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


class _Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing: `initialize` draws all weights, or a checkpoint brings them."""


class _Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing, as in `_Linear`."""

    def forward(self, tokens: Tensor) -> Tensor:
        weight: Any = self.weight
        return weight.gather(tokens) if isinstance(weight, Packed) else super().forward(tokens)


def _is_table(embedding: nn.Module) -> bool:
    """Whether an embedding does nothing but look up rows of a tensor that a CPU has."""
    # Elsewhere the order in which gradients of one row are added is not the same every time.
    weight: Any = embedding.weight
    return type(embedding) is _Embedding and isinstance(weight, Tensor) and weight.device.type == "cpu"


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return _Linear(inputs, outputs, bias=False)


class MLP(nn.Module):
    """GeGLU: down(gelu(gate(x)) · up(x)), with the tanh form of gelu. x: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = _linear(config.hidden_size, config.intermediate_size)
        self.up_proj = _linear(config.hidden_size, config.intermediate_size)
        self.down_proj = _linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return joint_linear(geglu(joint_linear(x, self.gate_proj.weight, self.up_proj.weight)), self.down_proj.weight)


class Where(NamedTuple):
    """Where the T tokens stand, and what follows from it for all layers of a kind, as pairs (global, local)."""

    places: Tensor  # [B, T] int64, of each token in its document, -1 for padding; a cache takes these
    angles: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]  # rotary cosines and sines
    masks: tuple[AnyMask, AnyMask] | None  # None with a cache, whose layers make their own


class Attention(nn.Module):
    """Grouped-query attention with soft cap; local layers see `sliding_window` tokens. x: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.groups, self.rows = config.num_kv_heads, config.num_heads // config.num_kv_heads
        self.scale = config.query_pre_attn_scalar**-0.5
        self.softcap = config.attn_logit_softcap
        self.local = config.is_local(layer)
        self.window = config.sliding_window if self.local else None
        self.q_proj = _linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = _linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = _linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = _linear(config.num_heads * config.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, where: Where, cache: LayerCache | None, start: int) -> Tensor:
        joint = joint_linear(x, self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        angles = where.angles[self.local]
        if self.q_norm is None or self.k_norm is None:
            q, k, v = rotated_heads(joint, self.groups, self.rows, angles, self.scale)
        else:
            q, k, v = split_heads(joint, self.groups, self.rows)
            q, k = rotate(self.q_norm(q), angles) * self.scale, rotate(self.k_norm(k), angles)
        if cache is not None:
            k, v, mask = cache.extend(k, v, where.places, start, self.window)
        else:
            assert where.masks is not None
            mask = where.masks[self.local]
        return joint_linear(attention(q, k, v, mask, softcap=self.softcap), self.o_proj.weight)


class Block(nn.Module):
    """One layer: x + norm(attention(norm(x))), then x + norm(mlp(norm(x))) (Table 1: pre- and post-norm)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(size, eps)

    def forward(self, x: Tensor, where: Where, cache: LayerCache | None = None, start: int = 0) -> Tensor:
        x = self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), where, cache, start), x)
        out: Tensor = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)), x)
        return out


class Transformer(nn.Module):
    """Gemma 2 (report, section 2): embedding, blocks, final norm, and a head that is the embedding when tied.

    compute_dtype: of all products and activations; None means the parameters' own. checkpointing:
    whether training keeps only each block's input and computes the rest again in backward.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.checkpointing = False
        self.embed_tokens = _Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else _linear(config.hidden_size, config.vocab_size)
        self._run_block: Any = Block.__call__
        if not self.embed_tokens.weight.is_meta:
            self.initialize(seed)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Draw all weights anew, each a function of (seed, its name), so that any sharding starts alike.

        Matrices: normal of deviation 1/√inputs; embedding: 1/√hidden_size, which the embedding's scale
        turns into unit variance; norms: a gain of one.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.zero_()
                continue
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(parameter.shape[1] ** -0.5))

    def train(self, mode: bool = True) -> Transformer:
        """As every module's. Raises Error for a quantized model, which is not trained."""
        if mode and isinstance(self.embed_tokens.__dict__.get("weight"), Packed):
            raise no_training()
        return super().train(mode)

    def compile_blocks(self) -> None:
        """Train on compiled blocks: one graph for local and one for global layers, not one a layer.

        Without gradients the blocks stay as they are: evaluation and generation have many shapes, and each
        would be compiled anew, which takes longer than it saves.
        """
        self._run_block = torch.compile(Block.forward, dynamic=False)

    def forward(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        readout: Readout | None = None,
    ) -> Any:
        """Run the network on tokens [B, T] int64.

        positions: [B, T] int64, of each token within its document; by default counted up from where the
        cache stands, or from 0 at the start of each document. documents: [B, T] int64, equal for tokens of
        the same document, which must lie together; below 0 for padding, which nobody sees; default one
        document. cache: keys and values of earlier tokens, extended in place; it holds one document a row
        (SlotCache.view), or several that begin alike (Branches).
        readout: what becomes of the last hidden states (see gemstill.model.readout).

        Returns the readout's result: logits [B, T, V] float32 by default.

        Raises:
            Error: tokens that are not [B, T], or more tokens than the cache holds.
        """
        if tokens.ndim != 2:
            raise Error(f"tokens of shape {list(tokens.shape)} are not [batch, time]", where="model")
        if cache is not None and cache.length + tokens.shape[1] > cache.capacity:
            raise Error(
                f"{cache.length + tokens.shape[1]} tokens do not fit a cache of {cache.capacity}", where="model"
            )
        documents = torch.zeros_like(tokens) if documents is None else documents.long()
        ordered = positions is None
        if positions is None:
            positions = count_positions(documents, cache)
        theta = self.config.rope_theta
        angles = rotary_angles(positions, self.config.head_dim, theta)
        local = self.config.rope_local_theta
        local_angles = angles if local is None else rotary_angles(positions, self.config.head_dim, local)
        head: Any = (self.embed_tokens if self.lm_head is None else self.lm_head).weight
        if torch.is_grad_enabled() and self.lm_head is None and _is_table(self.embed_tokens):
            embedding, head = tied(tokens, head)
        else:
            embedding = self.embed_tokens(tokens)
        x = embedding.to(self.compute_dtype or embedding.dtype)
        # The scale is rounded to the compute dtype, as the published weights were trained with it.
        x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype)
        masks = None
        if cache is None:
            same = (positions, positions, documents, documents)
            blocks = flex.suits(x.device, x.dtype, self.config.head_dim, x.shape[1])
            masks = (
                make_mask(*same, None, ordered=ordered, blocks=blocks),
                make_mask(*same, self.config.sliding_window, ordered=ordered, blocks=blocks),
            )
        where = Where(torch.where(documents < 0, -1, positions), (angles, local_angles), masks)

        start = 0 if cache is None else cache.length
        run = self._run_block if torch.is_grad_enabled() else Block.__call__
        for number, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[number]
            if self.checkpointing and self.training and state is None:
                x = checkpoint(run, layer, x, where, use_reentrant=False)
            else:
                x = run(layer, x, where, state, start)
        if cache is not None:
            cache.advance(documents)
        return (readout or logits)(self.norm(x), head, self.config.final_logit_softcap)


def count_positions(documents: Tensor, cache: Cache | None = None) -> Tensor:
    """Positions that count up within each document; with a cache, from where each of its rows stands."""
    if cache is not None:
        real = (documents >= 0).long()
        return cache.next_position[:, None] + real.cumsum(1) - real
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.zeros_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(first, index, 0).cummax(1).values
