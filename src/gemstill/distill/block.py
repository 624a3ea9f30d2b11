"""One block of a probability store: a file of some thousand rows, written whole and read from anywhere.

Five tensors (docs/formats.md has a reader of thirty lines): `classes`, the classes of all entries in unary
(see gemstill.distill.code); `places`, each entry's place within its class; `own`, a bit for each entry that
says whether it has a weight of its own; `weights`, those weights, less one, in units of 1/units; and
`index`, how many entries, weights and bits of places come before each 256th row. The entries without a
weight of their own share equally what the others leave of 1: those that `threshold` drew, and those that
`sample` drew once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from gemstill.distill.code import IdCode
from gemstill.distill.estimators import Draw
from gemstill.distill.packing import bits_of, pack, packed_size, unpack

AT_ONCE = 1 << 13  # rows decoded at once by `check`
STRIDE = 256  # rows from one line of the index to the next
TENSORS = {"classes": np.uint8, "places": np.uint8, "own": np.uint8, "weights": np.uint8, "index": np.uint32}


class Form(Protocol):
    """What a block needs to know of its store (gemstill.distill.store.StoreInfo has it)."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def dataset_fingerprint(self) -> str: ...
    @property
    def counting(self) -> bool: ...
    @property
    def units(self) -> int: ...
    @property
    def version(self) -> int: ...
    def span(self, block: int) -> tuple[int, int]: ...


class Rows(NamedTuple):
    """Rows as they are stored. counts: [N] int64, entries a row. ids: [E] uint32, of the entries, row after row.
    own: [E] uint32, the entry's weight in units, or 0 where it shares what the others leave of 1."""

    counts: NDArray[np.int64]
    ids: NDArray[np.uint32]
    own: NDArray[np.uint32]


def weight_bits(units: int) -> int:
    """Bits of one weight, a whole number of 1 to `units`, less one."""
    return max(1, (units - 1).bit_length())


def block_path(folder: Path, block: int) -> Path:
    """Where a block's file lies."""
    return folder / "data" / f"block-{block:06d}.safetensors"


def encode(draw: Draw, info: Form, u: Tensor) -> Rows:
    """Encode a draw of N rows; u [N] float64, uniform in [0, 1), decides the rounding of the exact weights.

    Systematic rounding: weight j becomes ⌊c_j + u⌋ − ⌊c_{j−1} + u⌋ with c the cumulative probability in units, so
    the mean of a weight is its probability and all weights of a row sum to one. What is rounded to nothing is
    left out. Weights of drawn entries that are whole units, the counts of `sample`, stay as they are.
    """
    units = info.units
    slot = torch.arange(draw.ids.shape[1], device=draw.ids.device)
    exact = slot < draw.exact[:, None]
    drawn = ~exact & (slot < (draw.exact + draw.drawn)[:, None])
    sums = torch.where(exact, draw.probs, 0).cumsum(1) * units
    last = exact & (slot == draw.exact[:, None] - 1) & (draw.drawn == 0)[:, None]
    sums = torch.where(last, units, sums.clamp(max=units))
    steps = (sums + (u[:, None] * 2.0**32).floor() * 2.0**-32).floor()
    own = torch.diff(steps, dim=1, prepend=steps.new_zeros(len(u), 1)).long() * exact
    left = units - own.sum(1, keepdim=True)
    used = (own > 0) | (drawn & (left > 0))
    if info.counting:
        counts = (draw.probs * units).round().long()
        own = torch.where(drawn & (counts > 1), counts, 0)
    return Rows(_numpy(used.sum(1), np.int64), _numpy(draw.ids[used], np.uint32), _numpy(own[used], np.uint32))


def _numpy(tensor: Tensor, dtype: Any) -> NDArray[Any]:
    return tensor.cpu().numpy().astype(dtype)


def write_block(folder: Path, info: Form, block: int, parts: Sequence[Rows]) -> None:
    """Write one block, whole or not at all. The bytes depend on the arguments and the store's id code alone.

    Raises:
        Error: the store has no id code, or the file cannot be written.
    """
    code = IdCode.read(folder, info.vocab_size)
    first, stop = info.span(block)
    assert sum(len(part.counts) for part in parts) == stop - first
    # One key: safetensors writes several in no fixed order.
    label = {"block": block, "first_token": first, "dataset": info.dataset_fingerprint, "version": info.version}
    content = save(packed(parts, info.units, code), metadata={"gemstill": json.dumps(label)})
    files.write(block_path(folder, block), content)


def packed(parts: Sequence[Rows], units: int, code: IdCode) -> dict[str, NDArray[Any]]:
    """The tensors of a block."""
    counts, ids, own = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    row = np.repeat(np.arange(len(counts)), counts)
    ranks = code.ranks[ids]
    order = np.lexsort((ranks, row))
    ranks, own = ranks[order], own[order]
    weighted = own > 0
    classes, height = code.classes(ranks), len(code.widths)
    widths = code.widths[classes].astype(np.int64)
    ones = np.zeros(len(ranks) + height * len(counts), np.uint8)
    ones[np.arange(len(ranks)) + height * row + classes] = 1
    sums = np.stack([np.ones_like(widths), weighted, widths], 1).cumsum(0)
    before = np.concatenate([np.zeros((1, 3), np.int64), sums])[np.concatenate([[0], counts.cumsum()])]
    return {
        "classes": np.packbits(ones, bitorder="little"),
        "places": pack(ranks - code.first[classes], widths),
        "own": np.packbits(weighted, bitorder="little"),
        "weights": pack(own[weighted] - 1, np.full(int(weighted.sum()), weight_bits(units))),
        "index": np.concatenate([before[:-1:STRIDE], before[-1:]]).astype(np.uint32),
    }


class Block:
    """One block's file, mapped into memory. Raises Error when it is no whole block of this store."""

    def __init__(self, folder: Path, info: Form, code: IdCode, block: int) -> None:
        self.path, self.code, self.units = block_path(folder, block), code, info.units
        self.bits = weight_bits(info.units)
        first, stop = info.span(block)
        self.num_rows = stop - first
        try:
            with safe_open(self.path, framework="pt") as handle:
                label = json.loads((handle.metadata() or {})["gemstill"])
                parts: dict[str, NDArray[Any]] = {name: handle.get_tensor(name).numpy() for name in TENSORS}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise self.damaged(f"cannot be read ({error})") from error
        if not isinstance(label, dict) or any(parts[name].dtype != dtype for name, dtype in TENSORS.items()):
            raise self.damaged("is no block of a store")
        if label.get("block") != block or label.get("dataset") != info.dataset_fingerprint:
            raise self.damaged(f"is block {label.get('block')} of another place")
        if label.get("first_token") != first:
            raise self.damaged(f"begins at token {label.get('first_token')} instead of {first}")
        self.classes, self.places, self.own, self.weights = (
            parts[name] for name in ("classes", "places", "own", "weights")
        )
        lines = -(-self.num_rows // STRIDE) + 1
        if parts["index"].shape != (lines, 3):
            raise self.damaged(f"has not the {self.num_rows} rows that it should")
        self.index = parts["index"].astype(np.int64)
        self._check_sizes()

    def _check_sizes(self) -> None:
        entries, weights, places = self.index[-1].tolist()
        marks = entries + len(self.code.widths) * self.num_rows
        sizes = (marks + 7) // 8, packed_size(places), (entries + 7) // 8, packed_size(weights * self.bits)
        there = len(self.classes), len(self.places), len(self.own), len(self.weights)
        if there != sizes or bool((np.diff(self.index, axis=0) < 0).any()):
            raise self.damaged("has not as many entries as it says")

    def damaged(self, what: str) -> Error:
        return Error(what, where=self.path, fix="fetch or make this block again")

    def check(self) -> None:
        """Decode every row. Raises Error as `rows` does."""
        for start in range(0, self.num_rows, AT_ONCE):
            self.rows(start, min(start + AT_ONCE, self.num_rows))

    def rows(self, start: int, stop: int) -> Rows:
        """Decode rows start..stop of the block. Raises Error when what is there is no row."""
        first, last = self.index[start // STRIDE], self.index[-(-stop // STRIDE)]
        base, end = start - start % STRIDE, min(-(-stop // STRIDE) * STRIDE, self.num_rows)
        entries, height = int(last[0] - first[0]), len(self.code.widths)
        ones = np.flatnonzero(bits_of(self.classes, int(first[0]) + height * base, int(last[0]) + height * end))
        if len(ones) != entries:
            raise self.damaged("has not as many entries as it says")
        row, kind = np.divmod(ones - np.arange(entries), height)
        widths = self.code.widths[kind].astype(np.int64)
        own = bits_of(self.own, int(first[0]), int(last[0])).astype(np.int64)
        place, weight = first[2] + widths.cumsum() - widths, first[1] + own.cumsum() - own
        if entries and (place[-1] + widths[-1], weight[-1] + own[-1]) != (last[2], last[1]):
            raise self.damaged("has not as many entries as it says")
        wanted = slice(*np.searchsorted(row, [start - base, stop - base]).tolist())
        row, own = row[wanted] - (start - base), own[wanted]
        ranks = unpack(self.places, place[wanted], widths[wanted]) + self.code.first[kind[wanted]]
        if len(ranks) and int(ranks.max()) >= self.code.vocab_size:
            raise self.damaged(f"names entry {int(ranks.max())} of a vocabulary of {self.code.vocab_size}")
        if bool(((np.diff(ranks) <= 0) & (np.diff(row) == 0)).any()):
            raise self.damaged("names an entry twice in one row")
        own[own > 0] += unpack(self.weights, weight[wanted][own > 0] * self.bits, np.array(self.bits))
        counts = np.bincount(row, minlength=stop - start)
        return self._checked(Rows(counts, self.code.ids[ranks], own.astype(np.uint32)))

    def _checked(self, rows: Rows) -> Rows:
        """`rows`, whose weights sum to one. Raises Error where they do not."""
        row = np.repeat(np.arange(len(rows.counts)), rows.counts)
        left = self.units - np.bincount(row, weights=rows.own, minlength=len(rows.counts))
        sharing = np.bincount(row, weights=rows.own == 0, minlength=len(rows.counts))
        if bool(((left < 0) | ((left > 0) != (sharing > 0))).any()):
            raise self.damaged("has rows that do not sum to one")
        return rows


def decode(parts: Sequence[Rows], units: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows as ids and probabilities [N, K], unused slots 0."""
    counts, entries, own = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    used = np.arange(max(1, int(counts.max()))) < counts[:, None]
    ids, probs = np.zeros(used.shape, np.int64), np.zeros(used.shape, np.float32)
    ids[used] = entries
    probs[used] = own  # whole numbers below 2^24: their sums are exact in float32
    shares = used & (probs == 0)
    share = (units - probs.sum(1, keepdims=True)) / np.maximum(shares.sum(1, keepdims=True), 1)
    return ids, np.where(shares, share, probs).astype(np.float32) / np.float32(units)
