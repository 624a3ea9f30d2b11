"""The probability store: a teacher's distribution of every next token of a data set, a few entries each.

A folder: `store.json` (what it is made of, and the SHA-256 of each block), `README.md` (a Hub data set's
card) and `data/block-000000.safetensors`, …, each for `block_tokens` tokens. A block holds three strings
of bytes: `counts` uint8 [tokens, 2], the entries kept exactly and those drawn; `ids`, of all entries, at
⌈log2 vocabulary⌉ bits each; `weights`, at `weight_bits` each (see gemstill.distill.packing). Row i is the
distribution of token i + 1 given the tokens of its document up to i in its window.

Weights are whole numbers of 1/(2^12 − 1). They are rounded at random so that their mean is the
probability: the store is as unbiased as its estimator, and the rounding adds less than 2·10⁻⁸ of variance
an entry, a thousandth of what `threshold(0.02)` has. The entries drawn by `threshold` share what the exact
ones leave of 1 equally, so their weight is not stored. For `sample` the weights are the counts, less one.

This module needs torch, numpy and safetensors alone, so that other training loops can read stores.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.distill.estimators import Draw, Estimator
from gemstill.distill.packing import MAX_BITS, pack, packed_size, unpack
from gemstill.ops.target import Target

FORMAT = "gemstill-probability-store"
VERSION = 1
INDEX = "store.json"
WEIGHT_BITS = 12
STRIDE = 256  # rows between the remembered places in a block
OPEN_BLOCKS = 64  # each holds one open file


class Shards(Protocol):
    """What a store needs to know of the data set it was made from (gemstill.data.shards.TokenDataset has it)."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def tokenizer_fingerprint(self) -> str: ...
    def read(self, start: int, stop: int) -> NDArray[Any]: ...


class Vocabulary(Protocol):
    """What a store needs to know of a tokenizer (gemstill.text.tokenizer.Tokenizer has it)."""

    @property
    def fingerprint(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class StoreInfo:
    """What a store is made of; with (teacher, block, seed) it fixes every byte of a block."""

    teacher: str  # its name
    teacher_fingerprint: str  # SHA-256 over its configuration and weights
    teacher_licence: str
    tokenizer_fingerprint: str  # SHA-256 of tokenizer.json
    dataset_fingerprint: str  # SHA-256 of the data set's index.json
    num_tokens: int
    vocab_size: int  # entries that may occur
    stored_vocab_size: int  # rows of the teacher's head, padding included
    window: int  # tokens the teacher saw at once; token i's window starts at i - i % window
    block_tokens: int  # a multiple of window
    estimator: str
    temperature: float
    seed: int
    batch: int  # windows the teacher took at once
    precision: str  # dtype of the teacher's products
    weight_bits: int = WEIGHT_BITS
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        if Estimator.parse(self.estimator).name == "dense":
            raise Error("dense distributions cannot be stored", where="store", fix="choose threshold(0.05)")
        if not 0 < self.vocab_size <= min(self.stored_vocab_size, 1 << MAX_BITS):
            raise Error(f"a vocabulary of {self.vocab_size} cannot be stored", where="store")
        if self.window < 1 or self.block_tokens < 1 or self.block_tokens % self.window:
            raise Error(
                f"a block of {self.block_tokens} tokens is no whole number of windows of {self.window}",
                where="store",
                fix="make block_tokens a multiple of window",
            )

    @property
    def id_bits(self) -> int:
        """Bits of one id."""
        return max(1, (self.vocab_size - 1).bit_length())

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the last of which may be shorter."""
        return -(-self.num_tokens // self.block_tokens)

    def span(self, block: int) -> tuple[int, int]:
        """First token of a block, and the one after its last."""
        return block * self.block_tokens, min((block + 1) * self.block_tokens, self.num_tokens)

    @property
    def counting(self) -> int:
        """Number of draws when weights are counts (`sample`), else 0."""
        estimator = Estimator.parse(self.estimator)
        return int(estimator.parameter) if estimator.name == "sample" else 0

    @property
    def bits(self) -> int:
        """Bits of one weight."""
        return max(1, (self.counting - 1).bit_length()) if self.counting else self.weight_bits

    @staticmethod
    def parse(record: Any, where: Path) -> StoreInfo:
        """Read the fields from store.json's content. Raises Error when it is not of this format, or lies."""
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise Error("is no probability store", where=where)
        if record.get("version") != VERSION:
            raise Error(f"has version {record.get('version')}, this gemstill reads {VERSION}", where=where)
        values: dict[str, Any] = {}
        for field in fields(StoreInfo):
            value = record.get(field.name)
            kinds = {"int": (int,), "str": (str,), "float": (int, float)}[str(field.type)]
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise Error(f"'{field.name}' is {value!r}", where=where, fix="fetch or make the store again")
            values[field.name] = value
        return StoreInfo(**values)


class Rows(NamedTuple):
    """Encoded rows: counts [N, 2] uint8, and the ids and weights [entries] of all, before packing."""

    counts: NDArray[np.uint8]
    ids: NDArray[np.uint32]
    weights: NDArray[np.uint32]


def encode(draw: Draw, info: StoreInfo, u: Tensor) -> Rows:
    """Encode a draw of N rows; u [N] float64, uniform in [0, 1), decides the rounding of the exact weights.

    Systematic rounding: code j is ⌊c_j + u⌋ − ⌊c_{j−1} + u⌋ with c the cumulative probability in units, so
    the mean of a code is the probability and all codes of a full row sum to one.
    """
    counts = torch.stack([draw.exact, draw.drawn], 1)
    slot = torch.arange(draw.ids.shape[1], device=draw.ids.device)
    used = slot < counts.sum(1, keepdim=True)
    if info.counting:
        weights = (draw.probs * info.counting).round().long()[used] - 1
    else:
        exact = slot < draw.exact[:, None]
        unit = (1 << info.weight_bits) - 1
        sums = torch.where(exact, draw.probs, 0).cumsum(1) * unit
        last = exact & (slot == draw.exact[:, None] - 1) & (draw.drawn == 0)[:, None]
        sums = torch.where(last, unit, sums.clamp(max=unit))
        steps = (sums + (u[:, None] * 2.0**32).floor() * 2.0**-32).floor()
        weights = torch.diff(steps, dim=1, prepend=steps.new_zeros(len(u), 1))[exact].long()
    return Rows(_numpy(counts, np.uint8), _numpy(draw.ids[used], np.uint32), _numpy(weights, np.uint32))


def _numpy(tensor: Tensor, dtype: Any) -> NDArray[Any]:
    return tensor.cpu().numpy().astype(dtype)


def block_path(folder: Path, block: int) -> Path:
    """Where a block's file lies."""
    return folder / "data" / f"block-{block:06d}.safetensors"


def write_block(folder: Path, info: StoreInfo, block: int, parts: Sequence[Rows]) -> None:
    """Write one block, whole or not at all. The bytes depend on nothing but the arguments."""
    counts = np.concatenate([part.counts for part in parts])
    first, stop = info.span(block)
    assert len(counts) == stop - first
    tensors = {
        "counts": counts,
        "ids": pack(np.concatenate([part.ids for part in parts]), info.id_bits),
        "weights": pack(np.concatenate([part.weights for part in parts]), info.bits),
    }
    # One key: safetensors writes several in no fixed order.
    label = {"block": block, "first_token": first, "dataset": info.dataset_fingerprint, "version": VERSION}
    files.write(block_path(folder, block), save(tensors, metadata={"gemstill": json.dumps(label)}))


def write_index(folder: Path, info: StoreInfo, blocks: list[str] | None) -> None:
    """Write store.json; blocks: the SHA-256 of each, or None while the store is being made."""
    files.write_json(folder / INDEX, asdict(info) | {"complete": blocks is not None, "blocks": blocks or []})


class _Block:
    """One block's file, mapped into memory, with the places of every STRIDE-th row's entries."""

    def __init__(self, folder: Path, info: StoreInfo, block: int) -> None:
        self.path, self.info = block_path(folder, block), info
        self.weighted = 1 if info.counting else 0  # the column of counts whose entries have a weight each
        first, stop = info.span(block)
        try:
            with safe_open(self.path, framework="pt") as handle:
                label = json.loads((handle.metadata() or {})["gemstill"])
                counts, self.ids, self.weights = (
                    handle.get_tensor(name).numpy() for name in ("counts", "ids", "weights")
                )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise self.damaged(f"cannot be read ({error})") from error
        self.counts: NDArray[np.uint8] = counts
        if not isinstance(label, dict) or any(part.dtype != np.uint8 for part in (counts, self.ids, self.weights)):
            raise self.damaged("is no block of a store")
        if label.get("block") != block or label.get("dataset") != info.dataset_fingerprint:
            raise self.damaged(f"is block {label.get('block')} of another place")
        if counts.shape != (stop - first, 2):
            raise self.damaged(f"has {len(counts)} rows instead of {stop - first}")
        per_row = np.stack([counts.sum(1, dtype=np.int64), counts[:, self.weighted]], 1)
        places = np.concatenate([np.zeros((1, 2), np.int64), per_row.cumsum(0, dtype=np.int64)])
        self.places = places[::STRIDE].copy()
        entries, weights = places[-1]
        sizes = packed_size(int(entries), info.id_bits), packed_size(int(weights), info.bits)
        if (len(self.ids), len(self.weights)) != sizes:
            raise self.damaged("has not as many entries as it says")

    def damaged(self, what: str) -> Error:
        return Error(what, where=self.path, fix="fetch or make this block again")

    def _sizes(self, counts: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Entries and weights of these rows together."""
        return np.array([counts.sum(dtype=np.int64), counts[:, self.weighted].sum(dtype=np.int64)])

    def rows(self, start: int, stop: int) -> Rows:
        """Decode rows start..stop of the block."""
        counts = self.counts[start:stop]
        first = self.places[start // STRIDE] + self._sizes(self.counts[start - start % STRIDE : start])
        last = first + self._sizes(counts)
        ids = unpack(self.ids, self.info.id_bits, int(first[0]), int(last[0]))
        if len(ids) and int(ids.max()) >= self.info.vocab_size:
            raise self.damaged(f"names entry {int(ids.max())} of a vocabulary of {self.info.vocab_size}")
        return Rows(counts, ids, unpack(self.weights, self.info.bits, int(first[1]), int(last[1])))


class Store:
    """A finished store, read through a memory map. Use `Store.open`.

    >>> store = Store.open("runs/quickstart/store")         # doctest: +SKIP
    >>> loss = linear_cross_entropy(hidden, head, store[a:b])  # doctest: +SKIP
    """

    def __init__(self, folder: Path, info: StoreInfo, digests: list[str]) -> None:
        self.folder, self.info, self.digests = folder, info, digests
        self.window, self.vocab_size = info.window, info.vocab_size
        self.estimator = Estimator.parse(info.estimator)
        self._blocks: OrderedDict[int, _Block] = OrderedDict()

    @staticmethod
    def open(
        folder: str | Path,
        dataset: Shards | None = None,
        tokenizer: Vocabulary | None = None,
        *,
        vocab_size: int | None = None,
        window: int | None = None,
    ) -> Store:
        """Open a finished store, to be used with this data set, tokenizer, student's vocabulary and window.

        vocab_size: rows of the student's head; more than the store's entries are padding and are fine.

        Raises:
            Error: it is no store, unfinished, or was made from other shards, another tokenizer, vocabulary
                or window; both are named.
        """
        folder = Path(folder)
        path = folder / INDEX
        record = files.read_json(path)
        info = StoreInfo.parse(record, path)
        digests = record.get("blocks")
        if not record.get("complete"):
            raise Error("is not finished", where=folder, fix="give the same `gemstill teach` again: it goes on")
        if not isinstance(digests, list) or len(digests) != info.num_blocks:
            raise Error(f"does not list the {info.num_blocks} blocks", where=path, fix="fetch or make the store again")

        def refuse(what: str, made: object, given: object) -> None:
            if made != given:
                raise Error(
                    f"was made for {what} {str(made)[:16]}, not for {str(given)[:16]}",
                    where=folder,
                    fix="use what it was made from, or teach again",
                )

        if tokenizer is not None:
            refuse("the tokenizer", info.tokenizer_fingerprint, tokenizer.fingerprint)
            refuse("a vocabulary of", info.vocab_size, tokenizer.vocab_size)
        if dataset is not None:
            refuse("the tokenizer", info.tokenizer_fingerprint, dataset.tokenizer_fingerprint)
            refuse("the shards", info.dataset_fingerprint, dataset.fingerprint)
            refuse("a number of tokens of", info.num_tokens, dataset.num_tokens)
        if vocab_size is not None and vocab_size < info.vocab_size:
            refuse("a vocabulary of", info.vocab_size, vocab_size)
        if window is not None:
            refuse("windows of", info.window, window)
        return Store(folder, info, digests)

    def __len__(self) -> int:
        return self.info.num_tokens

    def __getitem__(self, rows: slice) -> Target:
        """Rows a..b as a Target with ids and probs of [b − a, most entries of a row], weight one."""
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise Error(f"rows {rows} are no plain range", where=self.folder)
        return self._decode(self._rows(start, max(start, stop)))

    def target(self, starts: Tensor | Sequence[int], length: int) -> Target:
        """The rows starts[b] … starts[b] + length − 1 of each b, one window after the other: B·length rows."""
        parts = []
        for start in torch.as_tensor(starts).tolist():
            if start < 0 or start + length > len(self):
                raise Error(
                    f"has no rows {start} to {start + length}", where=self.folder, fix=f"it has {len(self)} rows"
                )
            parts += self._rows(start, start + length)
        return self._decode(parts)

    def _rows(self, start: int, stop: int) -> list[Rows]:
        parts = []
        while start < stop:
            number = start // self.info.block_tokens
            first, end = self.info.span(number)
            end = min(end, stop)
            parts.append(self._block(number).rows(start - first, end - first))
            start = end
        return parts

    def _block(self, number: int) -> _Block:
        block = self._blocks.pop(number, None) or _Block(self.folder, self.info, number)
        self._blocks[number] = block
        if len(self._blocks) > OPEN_BLOCKS:
            self._blocks.popitem(last=False)
        return block

    def _decode(self, parts: list[Rows]) -> Target:
        if not parts:
            return Target(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), torch.zeros(0))
        counts = np.concatenate([part.counts for part in parts]).astype(np.int64)
        exact, total = counts[:, :1], counts.sum(1, keepdims=True)
        weights = np.concatenate([part.weights for part in parts])
        slot = np.arange(max(1, int(total.max())))
        used = slot < total
        ids = np.zeros(used.shape, np.int64)
        ids[used] = np.concatenate([part.ids for part in parts])
        probs = np.zeros(used.shape, np.float32)
        if self.info.counting:
            probs[used] = (weights + 1) / self.info.counting
        else:
            unit = (1 << self.info.weight_bits) - 1
            kept = slot < exact
            probs[kept] = weights  # whole numbers below 2^24: their sums are exact in float32
            rest = unit - probs.sum(1, keepdims=True)
            share = rest / np.maximum(counts[:, 1:], 1).astype(np.float32)
            probs = np.where(used & ~kept, share, probs) * np.float32(1 / unit)
        if np.abs(probs.sum(1) - 1).max() > 1e-4 or probs.min() < 0:
            raise Error(
                "has rows that do not sum to one", where=self.folder, fix="look for the block with Store.verify()"
            )
        return Target(torch.from_numpy(ids), torch.from_numpy(probs), torch.ones(len(ids)))

    def verify(self) -> None:
        """Read the whole store and compare each block's SHA-256. Raises Error naming the first damaged block."""
        for number, digest in enumerate(self.digests):
            path = block_path(self.folder, number)
            if not path.is_file():
                raise Error("is missing", where=path, fix="fetch or make this block again")
            if files.sha256(path) != digest:
                raise Error("is damaged (its SHA-256 is another)", where=path, fix="fetch or make this block again")

    def check_alignment(self, dataset: Shards, rows: int = 16_384) -> list[float]:
        """The mean probability the store gives to the token before, at and after the one each row is about.

        Looks at `rows` rows evenly from all over. Raises Error when a neighbour is clearly likelier than the
        right one: the store is shifted against the data set.
        """
        piece = min(self.window, len(self))
        pieces = max(1, min(rows, len(self)) // piece)
        hits: list[list[Tensor]] = [[], [], []]
        for start in np.linspace(0, len(self) - piece, pieces).astype(int).tolist():
            ids, probs, _ = self[start : start + piece]
            stop = min(start + piece + 2, len(self))
            tokens = torch.from_numpy(np.asarray(dataset.read(start, stop)).astype(np.int64))
            for shift in range(3):
                label = tokens[shift : stop - start - 2 + shift, None]
                hits[shift].append(torch.where(ids[: len(label)] == label, probs[: len(label)], 0).sum(1))
        before, right, after = (torch.cat(part) for part in hits)
        for name, other in (("before", before), ("after", after)):
            gain = other - right
            if len(gain) > 1 and float(gain.mean()) > 5 * float(gain.std()) / len(gain) ** 0.5:
                raise Error(f"is shifted: its rows are about the token {name}", where=self.folder, fix="teach again")
        return [float(part.mean()) if len(part) else 0.0 for part in (before, right, after)]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the whole folder, card and index included, over tokens."""
        sizes = (path.stat().st_size for path in self.folder.rglob("*") if path.is_file() and path.name != ".lock")
        return sum(sizes) / max(1, len(self))
