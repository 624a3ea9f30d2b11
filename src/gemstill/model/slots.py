"""Keys and values of several texts at once: each has a slot of its own in one block of memory for each layer.

A slot holds one text without padding, whose positions count from 0. The token at position p lies at index p % S of
its slot: S is the capacity for a global layer, and a little more than the window for a local one, a ring.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.model.config import ModelConfig
from gemstill.ops import flex
from gemstill.ops.attention import AnyMask, make_mask
from gemstill.ops.blocks import empty

# A ring keeps so many tokens more than its window: so many, and one, can be taken back, and as many rows of one
# text can be stored before the first of them has looked.
SPARE = 256


BLOCK = 32  # numbers of a head that share a scale
STEP = 512  # keys that are read at least where they are read in steps


def blocks_of(head_dim: int) -> int:
    """The scales of one head's keys or values at one position, in int8."""
    return -(-head_dim // BLOCK)


def _widened(scales: Tensor, head_dim: int) -> Tensor:
    return scales.repeat_interleave(BLOCK, -1)[..., :head_dim]


def _room(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device, zeroed: bool) -> Tensor:
    """Not zeroed without need: pages that no token has touched then cost no memory."""
    if zeroed or device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return empty(math.prod(shape[:3]), shape[3], dtype).view(shape)


def _put(x: Tensor, at: Any, new: Tensor, live: Tensor | None) -> None:
    x[at] = new if live is None else torch.where(live[:, None, None, None], new, x[at])


def ring(config: ModelConfig, layer: int, capacity: int) -> int:
    """S, the tokens that a layer keeps of a text of at most `capacity` tokens."""
    return min(capacity, config.sliding_window + SPARE) if config.is_local(layer) else capacity


def reach(count: int, size: int, stepped: bool) -> int:
    """How many indices of a slot are looked at where `count` may be in use and `size` are there.

    In steps, the next power of two: then GPU kernels and graphs see few shapes.
    """
    return min(max(STEP, 1 << (count - 1).bit_length()) if stepped else count, size)


class LayerCache(Protocol):
    """One layer of a `Cache`."""

    def extend(
        self, keys: Tensor, values: Tensor, positions: Tensor, start: int, window: int | None
    ) -> tuple[Tensor, Tensor, AnyMask]:
        """Take T new tokens; the keys and values that their queries may look at, and the mask of which sees which.

        keys, values: [n, G, T, d]; positions: [n, T]; start: tokens that the longest text held before. window: of
        the layer, None for a global one. Returns keys and values [n, G, m, d] in the same dtype.
        """


class Cache(Protocol):
    """What Transformer.forward keeps keys and values in. capacity: the most tokens that a row may have."""

    capacity: int

    @property
    def layers(self) -> Sequence[LayerCache]: ...

    @property
    def length(self) -> int:
        """Tokens of the longest row."""

    @property
    def next_position(self) -> Tensor:
        """The position [n] int64 of each row's next token."""

    def advance(self, documents: Tensor) -> None:
        """Count the tokens of `documents` [n, T] as held."""


class SlotLayer:
    """One layer's keys and values: [slots, num_kv_heads, S, head_dim] each.

    What was never written is undefined, but 0 where slots are read in steps (`stepped`): then all of it is read, and
    multiplied by 0 where a query does not see it.

    Of dtype int8 each is kept as integers of [-127, 127] and, for each BLOCK numbers of a head, a float32 scale: the
    largest magnitude by 127. One scale for a whole head would do for values, but keys have entries far larger than
    the rest. tensors: keys, values, and for int8 their scales [slots, num_kv_heads, S, blocks].
    """

    def __init__(
        self, shape: tuple[int, int, int, int], window: int, dtype: torch.dtype, device: torch.device, stepped: bool
    ) -> None:
        self.tensors = [_room(shape, dtype, device, stepped) for _ in range(2)]
        if dtype == torch.int8:
            scales = (*shape[:3], blocks_of(shape[3]))
            self.tensors += [_room(scales, torch.float32, device, stepped) for _ in range(2)]
        self.size, self.window, self.stepped = shape[2], window, stepped

    @property
    def keys(self) -> Tensor:
        return self.tensors[0]

    @property
    def values(self) -> Tensor:
        return self.tensors[1]

    def write(self, slots: Tensor, positions: Tensor, keys: Tensor, values: Tensor, live: Tensor | None = None) -> None:
        """Store keys and values [n, G, T, d] of `slots` [n] at `positions` [n, T], no two T of which share an index.

        live: [n] bool, which of the slots take theirs, by default all.
        """
        at = slots[:, None], slice(None), positions % self.size
        for number, x in enumerate((keys.transpose(1, 2), values.transpose(1, 2))):
            if self.keys.dtype == torch.int8:
                padded = F.pad(x.float().abs(), (0, -x.shape[-1] % BLOCK))
                scales = torch.unflatten(padded, -1, (-1, BLOCK)).amax(-1) / 127
                _put(self.tensors[number + 2], at, scales, live)
                x = (x.float() / _widened(scales, x.shape[-1]).clamp_min(1e-30)).round()
            _put(self.tensors[number], at, x.to(self.keys.dtype), live)

    def positions(self, ends: Tensor, count: int) -> Tensor:
        """The positions [n, count] that the first indices of slots hold which end before `ends` [n]; -1: nothing."""
        last = ends[:, None] - 1
        # The latest token that belongs at each index. After a rewind an older one's index may hold a younger one,
        # which then stands for a token that no window reaches any more.
        return (last - (last - torch.arange(count, device=ends.device)) % self.size).clamp(min=-1)

    def read(
        self, slots: Sequence[int], ends: Tensor, longest: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `slots` hold when they end before positions `ends` [n]: keys, values [n, G, m, d], positions [n, m].

        longest: the largest of `ends`. A position is -1 where there is nothing; keys and values are finite there.
        """
        count = reach(longest, self.size, self.stepped)
        positions = self.positions(ends, count)
        side_by_side = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        at = slice(slots[0], slots[0] + len(slots)) if side_by_side else list(slots)  # a slice is no copy
        found = [x[at, :, :count].to(dtype) for x in self.tensors]
        if len(found) == 4:
            found = [x * _widened(scales, x.shape[-1]) for x, scales in zip(found[:2], found[2:], strict=True)]
        if len(slots) > 1 and not self.stepped:
            empty = (positions < 0)[:, None, :, None]
            found = [x.masked_fill(empty, 0) for x in found]
        return found[0], found[1], positions

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` indices of a slot to another."""
        for x in self.tensors:
            x[target, :, :count] = x[source, :, :count]

    @torch.inference_mode()  # memory that was made in a step is written in that mode alone
    def clear(self, slot: int, first: int, last: int) -> None:
        """Make the keys and values at positions [first, last) of a slot 0: what reads them may be another's text."""
        at = torch.arange(first, min(last, first + self.size), device=self.keys.device) % self.size
        for x in self.tensors:
            x[slot].index_fill_(1, at, 0)

    def resize(self, keep: Sequence[int], slots: int, size: int, reached: Sequence[int]) -> None:
        """Have `slots` slots of `size` indices, the first with the reached[n] tokens that slots keep[n] have."""
        for number, old in enumerate(self.tensors):
            new = _room((slots, old.shape[1], size, old.shape[3]), old.dtype, old.device, self.stepped)
            for row, slot in enumerate(keep):
                count = min(reached[row], size, self.size)
                new[row, :, :count] = old[slot, :, :count]
            self.tensors[number] = new
        self.size = size

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)


class SlotCache:
    """The keys and values of `slots` texts of at most `capacity` tokens each, in every layer of a model.

    dtype: of keys and values, a float one or int8. lengths: tokens that each slot holds. layers: see SlotLayer; native
    code reads and writes them in place. shaped: how often `resize` has put them elsewhere. stepped: whether keys are
    read in steps (see `reach`), by default on a GPU.

    >>> cache = SlotCache(model.config, slots=4, capacity=2048)              # doctest: +SKIP
    >>> model(tokens, cache=cache.view(2))         # a prompt [1, T], whole or in chunks  # doctest: +SKIP
    >>> model(tokens, cache=cache.view(0, 2, 3))   # the next token of three texts [3, 1]  # doctest: +SKIP
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        *,
        stepped: bool | None = None,
    ) -> None:
        self.config, self.slots, self.capacity, self.dtype = config, slots, capacity, dtype
        self.device = torch.device(device)
        self.stepped = self.device.type != "cpu" if stepped is None else stepped
        self.lengths = [0] * slots
        self.shaped = 0
        self._reached = [0] * slots  # the most tokens that each slot held since it was empty
        self.layers = [
            SlotLayer(
                (slots, config.num_kv_heads, ring(config, n, capacity), config.head_dim),
                config.sliding_window if config.is_local(n) else capacity,
                dtype,
                self.device,
                self.stepped,
            )
            for n in range(config.num_layers)
        ]

    @staticmethod
    def bytes_of(config: ModelConfig, capacity: int, dtype: torch.dtype = torch.float32) -> int:
        """Memory of one slot, once it is full."""
        tokens = sum(ring(config, n, capacity) for n in range(config.num_layers))
        head = config.head_dim * dtype.itemsize + (4 * blocks_of(config.head_dim) if dtype == torch.int8 else 0)
        return 2 * tokens * config.num_kv_heads * head

    @property
    def bytes(self) -> int:
        """Memory of all slots, once they are full."""
        return sum(layer.bytes for layer in self.layers)

    def view(self, *slots: int) -> SlotView:
        """The cache of Transformer.forward for tokens [n, T] that go on the texts in these n slots."""
        return SlotView(self, slots)

    def advance(self, slot: int, tokens: int) -> None:
        """Count `tokens` more as held, after every layer has stored them."""
        self.lengths[slot] += tokens
        self._reached[slot] = max(self._reached[slot], self.lengths[slot])

    def rewind(self, slot: int, length: int) -> bool:
        """Forget all tokens of a slot but the first `length`; 0 empties it.

        Returns False, and forgets nothing, where a ring no longer holds what the next token must see: once a
        text has outgrown it, no more than SPARE + 1 tokens can be taken back, or all of them.
        """
        if not self.holds(slot, length):
            return False
        for layer in self.layers if self.stepped else []:
            # Where nothing goes round, what lay behind the end of a slot that has become shorter is gone.
            end = self._reached[slot] if layer.size < self.capacity else min(self._reached[slot], self.capacity)
            layer.clear(slot, length, end)
        self.lengths[slot] = length
        if length == 0:
            self._reached[slot] = 0
        return True

    def copy_prefix(self, source: int, target: int, length: int) -> bool:
        """Make the first `length` tokens of slot `source` the text of slot `target`, computing nothing.

        Returns False, and leaves `target` as it is, where a ring of `source` no longer holds what the token
        after them must see (as `rewind`).
        """
        if not self.holds(source, length):
            return False
        for layer in self.layers:
            whole = layer.size == self.capacity
            layer.copy(source, target, length if whole else min(self._reached[source], layer.size))
        self.lengths[target] = length
        self._reached[target] = self._reached[source] if length else 0
        return True

    def holds(self, slot: int, length: int) -> bool:
        """Whether a text in `slot` can go on after its first `length` tokens."""
        assert 0 <= length <= self.lengths[slot]
        rings = [layer for layer in self.layers if layer.size < self.capacity]
        lost = [self._reached[slot] - layer.size - max(0, length - layer.window + 1) for layer in rings]
        return length == 0 or max(lost, default=0) <= 0

    def resize(self, keep: Sequence[int], slots: int, capacity: int) -> None:
        """Become a block of `slots` slots of `capacity` tokens, the first of which have the texts of slots `keep`.

        Layer by layer, so that no more than one is there twice. A slot is emptied whose text has outgrown a ring that
        is to become smaller. Where memory is short torch's error comes out, and the cache is of no use any more.
        """
        lengths, reached = [0] * slots, [0] * slots
        sizes = [ring(self.config, n, capacity) for n in range(self.config.num_layers)]
        pairs = list(zip(self.layers, sizes, strict=True))
        for row, slot in enumerate(keep):
            assert self.lengths[slot] <= capacity
            outgrown = [(layer.size, size) for layer, size in pairs if self._reached[slot] > layer.size]
            if all(old == new < capacity for old, new in outgrown):
                lengths[row] = self.lengths[slot]
                reached[row] = self._reached[slot] if outgrown else self.lengths[slot]
        self.shaped += 1
        for number, (layer, size) in enumerate(pairs):
            layer.resize(keep, slots, size, reached)
            layer.window = self.config.sliding_window if self.config.is_local(number) else capacity
        self.slots, self.capacity, self.lengths, self._reached = slots, capacity, lengths, reached


class SlotView:
    """Some slots of a cache as Transformer.forward takes them: row n of its tokens [n, T] belongs to slots[n].

    The slots differ, their lengths may. Where forward is left by an error, empty these slots.
    """

    def __init__(self, cache: SlotCache, slots: Sequence[int]) -> None:
        self.cache, self.slots = cache, list(slots)
        self.capacity = cache.capacity
        self.layers = [SlotLayerView(self, layer) for layer in cache.layers]
        self.rows = torch.tensor(self.slots, device=cache.device)
        self.live: Tensor | None = None  # [n] bool: which slots take their tokens, by default all
        self._masks: dict[int | None, tuple[Tensor, AnyMask]] = {}

    @property
    def length(self) -> int:
        """Tokens of the longest of the texts."""
        return max(self.cache.lengths[slot] for slot in self.slots)

    @property
    def next_position(self) -> Tensor:
        """The position [n] int64 of each row's next token."""
        return torch.tensor([self.cache.lengths[slot] for slot in self.slots], device=self.cache.device)

    def mask(self, positions: Tensor, stored: Tensor, window: int | None, blocks: bool) -> AnyMask:
        """The mask of queries at positions [n, T] and keys at `stored` [n, m]: made once for all layers of a kind."""
        made = self._masks.get(window)
        if made is None or made[0] is not positions:
            same = positions.clamp(max=0), stored.clamp(max=0)
            made = self._masks[window] = positions, make_mask(positions, stored, *same, window, blocks=blocks)
        return made[1]

    def advance(self, documents: Tensor) -> None:
        """Count the tokens of `documents` [n, T] as held. Raises Error for padding, which a slot has no place for."""
        self._masks = {}
        if bool((documents < 0).any()):
            raise Error("padding does not fit a slot", where="model", fix="feed each text by itself")
        for slot in self.slots:
            self.cache.advance(slot, documents.shape[1])


class SlotLayerView:
    """One layer of a SlotView."""

    def __init__(self, view: SlotView, layer: SlotLayer) -> None:
        self.view, self.layer = view, layer

    def extend(
        self, keys: Tensor, values: Tensor, positions: Tensor, start: int, window: int | None
    ) -> tuple[Tensor, Tensor, AnyMask]:
        """As LayerCache.extend; positions count up."""
        blocks = flex.suits(keys.device, keys.dtype, keys.shape[-1], keys.shape[2])
        keys, values, stored = self._stored(keys, values, positions, start)
        return keys, values, self.view.mask(positions, stored, window, blocks)

    def _stored(self, keys: Tensor, values: Tensor, positions: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Store new tokens; the keys and values to look at, and their positions [n, m], -1 where there is nothing."""
        layer, slots, T = self.layer, self.view.slots, keys.shape[2]
        if start + T <= layer.size or T + layer.window - 1 <= layer.size:
            layer.write(self.view.rows, positions, keys, values, self.view.live)
            return layer.read(slots, positions[:, -1] + 1, start + T, keys.dtype)
        # The ring is about to lose keys that the first of the new queries still see: look, then store.
        old = layer.read(slots, positions[:, 0], start, keys.dtype)
        seen = (torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2), torch.cat([old[2], positions], 1))
        keep = min(T, layer.size)
        layer.write(self.view.rows, positions[:, -keep:], keys[:, :, -keep:], values[:, :, -keep:])
        return seen
