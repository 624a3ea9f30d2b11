"""Batches of packed windows, whose order is a function of the seed and the step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.data.dataset import Ints, TokenDataset

BLOCK = 1024  # windows over which the mixture's weights are kept exactly, to one part in as many
ROUNDS = 6  # of the Feistel network

Words = npt.NDArray[np.uint64]


class Batch(NamedTuple):
    """Windows of T tokens, each from one place of one data set.

    tokens: [B, T] int64, the first of each window bos: where the window begins within a document it stands in the
    place of the token there, because published models read text badly without it. labels: [B, T] int64, the token that
    follows each in the stream. weight: [B, T] float32, 0 where that token belongs to another document, where there
    is none, and after a bos that is not the document's own, else 1. documents: [B, T] int32, equal within a
    document, counting from 0 in each window. positions: [B, T] int64, from 0 in each document's part of the window.
    source: [B] int64, which of the loader's sources. start: [B] int64, where in that source's stream the window
    begins.
    """

    tokens: Tensor
    labels: Tensor
    weight: Tensor
    documents: Tensor
    positions: Tensor
    source: Tensor
    start: Tensor


def _mix(value: Words) -> Words:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): every bit of the input turns half of the output's."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = value ^ (value >> np.uint64(31))
    return mixed


def _key(*numbers: int | npt.NDArray[np.int64]) -> Words:
    """One 64-bit key from several numbers, elementwise."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        word = np.asarray(number, dtype=np.int64).astype(np.uint64)
        key = _mix((key + np.uint64(0x9E3779B97F4A7C15)) ^ word)
    return key


def permute(index: npt.ArrayLike, size: int, key: Words) -> Ints:
    """Where a pseudorandom permutation of range(size) takes each `index`, without writing the permutation down.

    A Feistel network (Luby, Rackoff 1988) permutes the next power of four; what leaves [0, size) is
    sent through again until it is back, less than four times on average (cycle walking: Black,
    Rogaway 2002). index: [N], key: [N] or [1] uint64. Returns [N] int64.
    """
    half = np.uint64((max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    value = np.atleast_1d(np.asarray(index, dtype=np.int64)).astype(np.uint64)
    key = np.broadcast_to(key, value.shape)
    outside = np.arange(len(value))
    while len(outside):
        part, keys = value[outside], key[outside]
        left, right = part >> half, part & mask
        for turn in range(ROUNDS):
            keys = _mix(keys + np.uint64(turn + 1))
            left, right = right, left ^ (_mix(right ^ keys) & mask)
        part = (left << half) | right
        value[outside] = part
        outside = outside[part >= np.uint64(size)]
    return value.astype(np.int64)


def quotas(weights: Sequence[float], total: int) -> list[int]:
    """`total` shared out by `weights`: largest remainders first, and at least one each.

    >>> quotas([2, 1, 1e-9], 10)
    [6, 3, 1]
    """
    exact = np.array(weights, dtype=np.float64) / np.sum(weights) * total
    shares = np.maximum(np.floor(exact), 1)
    while shares.sum() != total:
        step = 1 if shares.sum() < total else -1
        gap = np.where((shares > 1) | (step > 0), (exact - shares) * step, -np.inf)
        shares[int(np.argmax(gap))] += step
    return [int(share) for share in shares]


class Loader:
    """Shuffled windows of several data sets, mixed by weight.

    Window w of a data set is tokens [w·T, (w+1)·T) of its stream. Every block of 1,024 windows holds
    each source as often as its weight says, in shuffled order; each source is gone through wholly,
    in a new order every time, before anything comes again. There is no state but the step: batch
    (seed, step) is the same on every machine, for any number of ranks, and costs the same for any size.
    """

    def __init__(
        self, sources: Sequence[tuple[TokenDataset, float]], window: int, windows_per_step: int, seed: int
    ) -> None:
        """sources: data sets with weights (their sum does not matter). window: T. windows_per_step: of all ranks.

        Raises:
            Error: no source, a weight that is not positive, data sets of different tokenizers, one with
                less than a window of tokens, or sizes that are not positive.
        """
        if not sources:
            raise Error("there is no data set to load", fix="name at least one")
        for name, value in (("window", window), ("windows_per_step", windows_per_step)):
            if value < 1:
                raise Error(f"{name} is {value}", fix="choose a positive number")
        first = sources[0][0]
        for dataset, weight in sources:
            if not 0 < weight < float("inf"):
                raise Error(f"its weight in the mixture is {weight}", where=dataset.folder, fix="choose a positive one")
            if dataset.tokenizer_fingerprint != first.tokenizer_fingerprint:
                ours, theirs = dataset.tokenizer_fingerprint[:12], first.tokenizer_fingerprint[:12]
                what = f"was encoded with tokenizer {ours}…, {first.folder} with {theirs}…"
                raise Error(what, where=dataset.folder, fix="encode both with the same tokenizer")
            _check_window(dataset, window)
        self.datasets = [dataset for dataset, _ in sources]
        self.weights = [float(weight) for _, weight in sources]
        self.window, self.windows_per_step, self.seed = window, windows_per_step, seed
        self.tokens_per_step = window * windows_per_step
        self._quotas = np.array(quotas(self.weights, max(BLOCK, len(sources))), dtype=np.int64)
        self._block = int(self._quotas.sum())
        self._blocks: dict[int, tuple[Ints, Ints]] = {}

    def describe(self) -> dict[str, object]:
        """All that the order depends on, and the data: two loaders with equal descriptions give equal batches."""
        return {
            "datasets": [dataset.fingerprint for dataset in self.datasets],
            "weights": self.weights,
            "window": self.window,
            "windows_per_step": self.windows_per_step,
            "seed": self.seed,
        }

    def steps_per_epoch(self) -> float:
        """Steps after which the source that is used up first has been gone through once."""
        windows = [dataset.num_tokens // self.window for dataset in self.datasets]
        shares = self._quotas / self._block
        return float(min(count / share for count, share in zip(windows, shares, strict=True)) / self.windows_per_step)

    def places(self, step: int) -> tuple[Ints, Ints]:
        """Source and start of each window of a step's global batch, each [windows_per_step] int64."""
        number = step * self.windows_per_step + np.arange(self.windows_per_step, dtype=np.int64)
        block, within = np.divmod(number, self._block)
        source, used = np.empty_like(number), np.empty_like(number)
        for which in np.unique(block).tolist():
            here = block == which
            source[here], used[here] = (part[within[here]] for part in self._mixture(which))
        start = np.empty_like(number)
        for which, dataset in enumerate(self.datasets):
            here = source == which
            windows = dataset.num_tokens // self.window
            epoch, index = np.divmod(used[here], windows)
            start[here] = permute(index, windows, _key(self.seed, which + 1, epoch)) * self.window
        return source, start

    def _mixture(self, block: int) -> tuple[Ints, Ints]:
        """Source of each window of a block, and how many of that source's came before it since the beginning."""
        found = self._blocks.get(block)
        if found is None:
            slot = permute(np.arange(self._block), self._block, _key(self.seed, 0, block))
            source = np.searchsorted(np.cumsum(self._quotas), slot, side="right").astype(np.int64)
            used = np.empty_like(source)
            for which, quota in enumerate(self._quotas.tolist()):
                used[source == which] = block * quota + np.arange(quota)
            found = source, used
            self._blocks = {block: found}  # the next steps ask for the same one
        return found

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The part of a step's global batch that `rank` of `world` has: ranks' parts in order make the whole.

        Raises:
            Error: windows_per_step is not a multiple of world.
        """
        if self.windows_per_step % world:
            what = f"{self.windows_per_step} windows a step cannot be shared by {world} ranks"
            raise Error(what, fix=f"make windows_per_step a multiple of {world}")
        share = self.windows_per_step // world
        source, start = (part[rank * share : (rank + 1) * share] for part in self.places(step))
        return pack([self.datasets[which] for which in source], source, start, self.window)


def heldout_batches(dataset: TokenDataset, window: int, batch: int) -> Iterator[Batch]:
    """All full windows of a data set in order, `batch` at a time, the last time what is left.

    Raises:
        Error: the data set has less than a window of tokens.
    """
    _check_window(dataset, window)
    windows = dataset.num_tokens // window
    for first in range(0, windows, batch):
        start = np.arange(first, min(first + batch, windows), dtype=np.int64) * window
        yield pack([dataset] * len(start), np.zeros_like(start), start, window)


def pack(datasets: Sequence[TokenDataset], source: Ints, start: Ints, window: int) -> Batch:
    """The batch of the windows that begin at `start` [B] of `datasets` [B]; `source` [B] goes along."""
    stream = np.full((len(start), window + 1), -1, dtype=np.int64)
    bos = np.empty((len(start), 1), dtype=np.int64)
    for row, (dataset, begin) in enumerate(zip(datasets, start.tolist(), strict=True)):
        tokens = dataset.read(begin, min(begin + window + 1, dataset.num_tokens))
        stream[row, : len(tokens)] = tokens
        bos[row] = dataset.bos_id
    tokens, labels = stream[:, :-1], stream[:, 1:]
    begins = tokens == bos
    place = np.arange(window, dtype=np.int64)
    documents = np.cumsum(begins[:, 1:], axis=1, dtype=np.int32)
    documents = np.concatenate([np.zeros((len(start), 1), np.int32), documents], axis=1)
    positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    weight = ((labels != bos) & (labels >= 0)).astype(np.float32)
    weight[~begins[:, 0], 0] = 0
    tokens = np.concatenate([bos, tokens[:, 1:]], axis=1)
    arrays = (tokens, np.maximum(labels, 0), weight, documents, positions, source.copy(), start.copy())
    return Batch(*(torch.from_numpy(array) for array in arrays))


def _check_window(dataset: TokenDataset, window: int) -> None:
    if dataset.num_tokens < window:
        what = f"has {dataset.num_tokens} tokens, less than one window of {window}"
        raise Error(what, where=dataset.folder, fix="give more text or choose a shorter window")
