"""Rounding a whole network with care for its data, matrix by matrix in the order in which they are run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemstill.core.progress import Progress
from gemstill.data.calibration import Calibration
from gemstill.model.transformer import Transformer, Where
from gemstill.ops.fused import joint_linear
from gemstill.ops.rounding import Rounded, gptq

BATCH = 2048  # tokens run at once
OUTER = 0.3  # damping for embedding and head: what looks a row up knows of no direction that matters less
BELIEVED = 0.1  # damping of the correction for the inputs' own error
TINY = 1e-12


@torch.no_grad()
def round_network(model: Transformer, text: Calibration) -> dict[str, Rounded]:
    """All matrices of a network, by their parameters' names, rounded by `gptq` (arXiv 2210.17323).

    Each is rounded on the inputs x that it gets from the network rounded so far, run over `text`, so that its
    product comes near to that of the whole matrix with the inputs y of the unrounded network (arXiv 2504.02692):
    it is first moved by W·Σ(y - x)xᵀ·(Σxxᵀ + damping)⁻¹. Embedding and head are rounded on the last hidden states of
    the unrounded network. The model is left as it was.
    """
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.ndim == 2}
    last = [model(batch.tokens, readout=lambda x, *_: x)[batch.real] for batch in text.batches(BATCH)]
    hessian = _products(last, last)
    outer = {name: gptq(w.float(), hessian, OUTER) for name, w in matrices.items() if not name.startswith("layers.")}
    unrounded = _streams(model, text)
    embedding = model.embed_tokens.weight
    model.embed_tokens.weight = _fixed(outer["embed_tokens.weight"].weights().to(embedding.dtype))
    try:
        streams = _streams(model, text)
    finally:
        model.embed_tokens.weight = embedding
    found, real = dict(outer), [batch.real for batch in text.batches(BATCH)]
    with Progress(len(model.layers), "blocks", "gptq") as progress:
        for number, block in enumerate(model.layers):
            mine, theirs = _Side(copy.deepcopy(block), streams), _Side(block, unrounded)
            found |= {f"layers.{number}.{name}": each for name, each in _round_block(mine, theirs, real).items()}
            streams, unrounded = mine.streams, theirs.streams
            progress.advance()
    return {name: found[name] for name in matrices}


Stream = tuple[Tensor, Where]  # what goes into a block, [B, T, D]


class _Grab(nn.Module):
    """Stands for all blocks and keeps what the first one gets."""

    def forward(self, x: Tensor, where: Where, *_: Any) -> Tensor:
        self.seen = (x, where)
        return x


def _streams(model: Transformer, text: Calibration) -> list[Stream]:
    grab, found = _Grab(), []
    blocks, model.layers = model.layers, nn.ModuleList([grab])
    try:
        for batch in text.batches(BATCH):
            model(batch.tokens, readout=lambda *_: None)
            found.append(grab.seen)
    finally:
        model.layers = blocks
    return found


class _Side:
    """A block with the streams on their way through it. inputs: of the matrices whose turn it is, [B, T, K]."""

    def __init__(self, block: Any, streams: list[Stream]) -> None:
        self.block, self.streams = block, streams
        self.inputs: list[Tensor] = []

    def to_attention(self) -> None:
        self.inputs = [self.block.input_layernorm(x) for x, _ in self.streams]

    def to_output(self) -> None:
        attention = self.block.self_attn
        with _passing(attention.o_proj):
            self._map(lambda x, where: attention(x, where, None, 0))

    def to_mlp(self) -> None:
        self._add(self.block.self_attn.o_proj, self.block.post_attention_layernorm)
        self.inputs = [self.block.pre_feedforward_layernorm(x) for x, _ in self.streams]

    def to_down(self) -> None:
        with _passing(self.block.mlp.down_proj):
            self._map(lambda x, _: self.block.mlp(x))

    def to_next(self) -> None:
        self._add(self.block.mlp.down_proj, self.block.post_feedforward_layernorm)

    def _map(self, work: Callable[[Tensor, Where], Tensor]) -> None:
        self.inputs = [work(x, where) for x, (_, where) in zip(self.inputs, self.streams, strict=True)]

    def _add(self, linear: nn.Linear, norm: nn.Module) -> None:
        pairs = zip(self.inputs, self.streams, strict=True)
        self.streams = [(norm(joint_linear(x, linear.weight), old), where) for x, (old, where) in pairs]


ORDER = (
    (_Side.to_attention, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    (_Side.to_output, ("self_attn.o_proj",)),
    (_Side.to_mlp, ("mlp.gate_proj", "mlp.up_proj")),
    (_Side.to_down, ("mlp.down_proj",)),
    (_Side.to_next, ()),
)


def _round_block(mine: _Side, theirs: _Side, real: list[Tensor]) -> dict[str, Rounded]:
    """Round the matrices of mine, which are those of theirs, as both go through. real: of each batch [B, T] bool."""
    found = {}
    for step, names in ORDER:
        step(mine)
        step(theirs)
        if not names:
            continue
        x, y = ([each[some] for each, some in zip(side.inputs, real, strict=True)] for side in (mine, theirs))
        hessian, lack = _products(x, x), _products([b.float() - a.float() for a, b in zip(x, y, strict=True)], x)
        ridge = hessian + torch.eye(len(hessian)) * (BELIEVED * hessian.diagonal().mean() + TINY)
        moved = torch.linalg.solve(ridge, lack.t())
        for name in names:
            linear = mine.block.get_submodule(name)
            weight = linear.weight.float()
            found[f"{name}.weight"] = each = gptq(weight + weight @ moved.t(), hessian)
            linear.weight = _fixed(each.weights().to(linear.weight.dtype))
    return found


def _products(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Σ l·rᵀ [K, K] float32 of vectors [n, K]."""
    total = torch.zeros(left[0].shape[-1], left[0].shape[-1])
    for a, b in zip(left, right, strict=True):
        total.addmm_(a.float().t(), b.float())
    return total


def _fixed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


@contextmanager
def _passing(linear: nn.Linear) -> Iterator[None]:
    """Make a matrix the identity, so that its product is what it is multiplied with."""
    weight = linear.weight
    linear.weight = _fixed(torch.eye(weight.shape[1], dtype=weight.dtype))
    try:
        yield
    finally:
        linear.weight = weight
