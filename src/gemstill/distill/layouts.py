"""The networks that can be pruned: ours, and those of `transformers` whose blocks are laid out like Llama's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemstill.core.errors import Error
from gemstill.model.adapter import Adapter, ForeignConfig
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Block, Transformer
from gemstill.ops.fused import geglu, joint_linear
from gemstill.ops.loss import log_probs

MATRICES = ("gate_proj", "up_proj", "down_proj")  # of the gated MLP


class Prunable:
    """A network of blocks with gated MLPs, of which blocks and channels can be left out.

    Raises:
        Error: the blocks have no `mlp` with gate_proj, up_proj and down_proj; a foreign network whose blocks are
            of several kinds.
    """

    def __init__(self, model: Transformer | Adapter) -> None:
        self.model = model
        layers = model.layers
        self._owner: Any = next((m for m in model.modules() if m._modules.get("layers") is layers), None)
        laid_out = (isinstance(getattr(getattr(b, "mlp", None), n, None), nn.Linear) for b in layers for n in MATRICES)
        if self._owner is None or not all(laid_out):
            what = f"its blocks have no mlp of {', '.join(MATRICES)}"
            raise Error(what, where=type(model).__name__, fix="prune models that are laid out like Llama or Gemma")
        if isinstance(model, Adapter) and len(set(model.config.local_layers)) > 1:
            what = "has local and global blocks, which its library tells apart by their number"
            raise Error(what, where=model.config.family, fix="prune models whose blocks are all of one kind")

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, run one after the other; another list may be put in its place."""
        blocks: nn.ModuleList = self._owner.layers
        return blocks

    @blocks.setter
    def blocks(self, blocks: nn.ModuleList) -> None:
        self._owner.layers = blocks

    def nll(self, tokens: Tensor, wanted: Tensor) -> Tensor:
        """Negative log-likelihoods [n] of the tokens after those that `wanted` [B, T] marks. tokens: [B, T] int64."""
        labels = tokens.roll(-1, 1)[wanted]

        def read(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
            return -log_probs(hidden[wanted], head, labels, softcap=softcap)

        out: Tensor = self.model(tokens, readout=read)
        return out

    def watch(self, block: nn.Module, see: Callable[[Tensor], None]) -> Any:
        """Call `see` with each activation [B, T, M] of a block's MLP channels; gives a handle with `remove()`."""
        mlp: Any = block.mlp
        if not isinstance(block, Block):
            return mlp.down_proj.register_forward_pre_hook(lambda _, args: see(args[0]))
        # Ours takes its matrices' product without calling the modules that hold them.
        return mlp.register_forward_pre_hook(
            lambda _, args: see(geglu(joint_linear(args[0], mlp.gate_proj.weight, mlp.up_proj.weight)))
        )

    def columns(self, block: nn.Module) -> Tensor:
        """[M] float32: how far one unit of each channel moves the residual stream.

        A norm after the MLP scales its output by a factor a token, alike for all channels, and a gain a dimension.
        """
        layer: Any = block
        down: Tensor = layer.mlp.down_proj.weight.detach().float()
        if isinstance(block, Block):
            down = down * (1 + layer.post_feedforward_layernorm.weight.detach().float())[:, None]
        sizes: Tensor = torch.linalg.vector_norm(down, dim=0)
        return sizes


@torch.no_grad()
def cut(net: Prunable, shape: ModelConfig | None, kept: Sequence[int], channels: Sequence[Tensor]) -> None:
    """Leave of a network the kept blocks, each with its kept MLP channels, in place.

    shape: of what is left; None for a foreign network. kept: numbers of blocks, ascending. channels: for each of
    them the channels [M] int64, ascending, as many in each.
    """
    model, blocks = net.model, net.blocks
    net.blocks = nn.ModuleList(blocks[k] for k in kept)
    for place, (block, keep) in enumerate(zip(net.blocks, channels, strict=True)):
        layer: Any = block
        if hasattr(layer.self_attn, "layer_idx"):
            layer.self_attn.layer_idx = place  # where it keeps keys and values
        for name in MATRICES:
            _cut_linear(getattr(layer.mlp, name), keep, inputs=name == "down_proj")
    if isinstance(model, Adapter):
        theirs = model.model.config
        theirs.num_hidden_layers, theirs.intermediate_size = len(kept), len(channels[0])
        if getattr(theirs, "layer_types", None):
            theirs.layer_types = theirs.layer_types[: len(kept)]
        model.config = ForeignConfig.of(model.model)
    else:
        assert shape is not None
        assert [shape.is_local(n) for n in range(len(kept))] == [model.config.is_local(k) for k in kept]
        model.config = shape


def _cut_linear(linear: nn.Linear, keep: Tensor, *, inputs: bool) -> None:
    weight = linear.weight[:, keep] if inputs else linear.weight[keep]
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    if inputs:
        linear.in_features = len(keep)
        return
    linear.out_features = len(keep)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[keep], requires_grad=linear.bias.requires_grad)
