"""Texts that begin alike, in one pass: what they have in common is computed once.

A trunk is the beginning, its keys and values kept. From it go branches, which may fork again. All their tokens lie
in one row, each text's beginning before the forks that come from it, so that a token sees exactly the trunk and the
tokens whose subtree it lies in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gemstill.model.config import ModelConfig
from gemstill.ops.attention import Mask


class Trunk:
    """Keys and values [1, num_kv_heads, capacity, head_dim] of one text in every layer; `length` tokens are held."""

    def __init__(
        self, config: ModelConfig, capacity: int, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        shape = (2, 1, config.num_kv_heads, capacity, config.head_dim)
        # Not zeroed: pages that no token has touched then cost no memory.
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.config, self.capacity = config, capacity
        self.device = torch.device(device)
        self.length = 0

    def cut(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        assert 0 <= length <= self.length
        self.length = length


class Branches:
    """The cache of Transformer.forward for a row of tokens [1, T] that go on from a trunk as a forest.

    positions: [T] int64, of each token in its text. ends: [T] int64; token i is seen by itself and by those between
    it and ends[i], which are the texts that go through it. edges: the row cut into tiles, from 0 to T, none of which
    cuts a text: attention is computed for each tile by itself. keep: the tokens, one text, become part of the trunk.
    """

    def __init__(
        self, trunk: Trunk, positions: Tensor, ends: Tensor, edges: Sequence[int], *, keep: bool = False
    ) -> None:
        assert not keep or len(edges) == 2
        self.trunk, self.keep = trunk, keep
        self.positions, self.edges = positions, edges
        self.capacity = trunk.length + len(positions)
        self.next_position = torch.tensor([trunk.length], device=trunk.device)
        self._masks: dict[int | None, Mask] = {}
        self._ends = ends
        self.layers = [BranchesLayer(self, layer) for layer in trunk.layers]

    @property
    def length(self) -> int:
        """Tokens of the trunk."""
        return self.trunk.length

    def first(self, window: int | None) -> int:
        """The first token of the trunk that any branch sees."""
        return 0 if window is None else max(0, self.trunk.length - window + 1)

    def mask(self, window: int | None) -> Mask:
        """The mask of all layers with this window: each tile's queries against the trunk and the tile itself."""
        if window not in self._masks:
            trunk = torch.arange(self.first(window), self.trunk.length, device=self.trunk.device)
            tiles, seen, first = [], [], 0
            for start, stop in pairwise(self.edges):
                at, place = torch.arange(start, stop, device=trunk.device), self.positions[start:stop]
                below = (at[:, None] >= at) & (at[:, None] < self._ends[start:stop])
                keys = torch.cat([trunk, place])
                part = torch.cat([below.new_ones(len(at), len(trunk)), below], 1)
                if window is not None:
                    part &= place[:, None] - keys < window
                tiles.append((start, stop, first, first + len(keys)))
                seen.append(part[None, None, :, None])
                first += len(keys)
            self._masks[window] = Mask(tuple(tiles), tuple(seen))
        return self._masks[window]

    def advance(self, documents: Tensor) -> None:
        """Count the tokens as part of the trunk where they are to be."""
        if self.keep:
            self.trunk.length += documents.shape[1]


class BranchesLayer:
    """One layer of Branches."""

    def __init__(self, branches: Branches, kept: Tensor) -> None:
        self.branches, self.kept = branches, kept

    def extend(
        self, keys: Tensor, values: Tensor, positions: Tensor, start: int, window: int | None
    ) -> tuple[Tensor, Tensor, Mask]:
        """As LayerCache.extend; the keys of each tile follow a copy of the trunk's."""
        branches, first = self.branches, self.branches.first(window)
        if branches.keep:
            stop = start + keys.shape[2]
            self.kept[0, :, :, start:stop], self.kept[1, :, :, start:stop] = keys, values
            keys, values = self.kept[0, :, :, first:stop], self.kept[1, :, :, first:stop]
        elif start > first:
            tiles = list(pairwise(branches.edges))
            keys, values = (
                torch.cat([part for a, b in tiles for part in (trunk[:, :, first:start], new[:, :, a:b])], 2)
                for trunk, new in zip(self.kept, (keys, values), strict=True)
            )
        return keys, values, branches.mask(window)
