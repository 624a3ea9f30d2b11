"""Keys and values of the tokens already seen: all of them for global layers, a ring for local ones."""

from __future__ import annotations

import torch
from torch import Tensor

from gemstill.model.config import ModelConfig


class LayerCache:
    """One layer's keys and values for a batch, in arbitrary slots; each slot knows its position.

    keys, values: [B, num_kv_heads, S, head_dim]. positions: [B, S] int64, -1 where nothing is stored.
    """

    def __init__(
        self, batch: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(batch, heads, slots, head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.positions = torch.full((batch, slots), -1, dtype=torch.int64, device=device)
        self.slots = slots

    def extend(self, keys: Tensor, values: Tensor, positions: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Store T new tokens and return the keys, values and positions that their queries may look at.

        keys, values: [B, G, T, D]; positions: [B, T], below 0 for padding; start: tokens fed before.
        """
        T = keys.shape[2]
        if start + T <= self.slots:  # no slot is reused: a view of what is stored suffices
            self._store(keys, values, positions, start)
            stop = start + T
            return self.keys[:, :, :stop], self.values[:, :, :stop], self.positions[:, :stop]
        # The ring is about to lose keys that the first of the new queries still see: look, then store.
        seen = (
            torch.cat([self.keys, keys], 2),
            torch.cat([self.values, values], 2),
            torch.cat([self.positions, positions], 1),
        )
        keep = min(T, self.slots)
        self._store(keys[:, :, -keep:], values[:, :, -keep:], positions[:, -keep:], start + T - keep)
        return seen

    def _store(self, keys: Tensor, values: Tensor, positions: Tensor, start: int) -> None:
        at = torch.arange(start, start + keys.shape[2], device=keys.device) % self.slots
        self.keys[:, :, at] = keys
        self.values[:, :, at] = values
        self.positions[:, at] = positions


class Cache:
    """The caches of all layers of a model for `batch` sequences of at most `capacity` tokens.

    Padding on the left counts as tokens here. `length`: tokens fed so far.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self.length = 0
        self.capacity = capacity
        self.next_position = torch.zeros(batch, dtype=torch.int64, device=device)
        self.layers = [
            LayerCache(
                batch,
                config.num_kv_heads,
                min(capacity, config.sliding_window) if config.is_local(layer) else capacity,
                config.head_dim,
                dtype,
                torch.device(device),
            )
            for layer in range(config.num_layers)
        ]

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers)
