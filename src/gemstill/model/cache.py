"""Keys and values of the tokens already seen: all of them for global layers, a ring for local ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
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

    def grow(self, slots: int) -> None:
        """Have `slots` slots instead of fewer. Only while no slot has been used twice."""
        if slots > self.slots:
            extra = slots - self.slots
            self.keys, self.values = (F.pad(x, (0, 0, 0, extra)) for x in (self.keys, self.values))
            self.positions = F.pad(self.positions, (0, extra), value=-1)
            self.slots = slots

    def drop(self, start: int, stop: int) -> None:
        """Forget the tokens fed as number start … stop - 1, the last ones."""
        at = torch.arange(max(start, stop - self.slots), stop, device=self.positions.device) % self.slots
        self.positions[:, at] = -1

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
        self._windows = [config.sliding_window if config.is_local(n) else None for n in range(config.num_layers)]
        self.next_position = torch.zeros(batch, dtype=torch.int64, device=device)
        self.layers = [
            LayerCache(
                batch,
                config.num_kv_heads,
                _slots(capacity, window),
                config.head_dim,
                dtype,
                torch.device(device),
            )
            for window in self._windows
        ]

    def advance(self, documents: Tensor) -> None:
        """Count the tokens of `documents` [B, T] as fed; below 0 they are padding."""
        self.length += documents.shape[1]
        self.next_position = self.next_position + (documents >= 0).sum(1)

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens where there was room for fewer; what is stored stays."""
        # A ring that is to grow is still shorter than its window, so it has a slot for every token so far.
        for layer, window in zip(self.layers, self._windows, strict=True):
            layer.grow(_slots(capacity, window))
        self.capacity = max(self.capacity, capacity)

    def rewind(self, length: int) -> bool:
        """Forget all tokens but the first `length`; those forgotten must be no padding.

        Returns False, and forgets nothing, where a ring no longer holds what the next token must see: once a
        local layer's window is full, no more than one token can be taken back, or all of them.
        """
        for layer in self.layers:
            overwritten = self.length - layer.slots  # tokens 0 … overwritten - 1 are gone
            if length > 0 and overwritten > max(0, length - layer.slots + 1):
                return False
        for layer in self.layers:
            layer.drop(length, self.length)
        self.next_position = self.next_position - (self.length - length)
        self.length = length
        return True

    @property
    def bytes(self) -> int:
        """Memory of all keys and values."""
        return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in self.layers)


def _slots(capacity: int, window: int | None) -> int:
    return capacity if window is None else min(capacity, window)
