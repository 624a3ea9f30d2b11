"""The probability store: a teacher's distribution of every next token of a data set, a few entries each.

A folder: `store.json` (what it is made of, and the SHA-256 of each file), `README.md` (a Hub data set's card),
`code.safetensors` (how ids are written, see gemstill.distill.code) and `data/block-000000.safetensors`, …
(see gemstill.distill.block), each for `block_tokens` tokens. Row i is the distribution of token i + 1 given
the tokens of its document up to i in its window, whose first token is read as bos.

Weights are whole numbers of 1/units. They are rounded at random so that their mean is the probability: the
store is as unbiased as its estimator. The entries drawn by `threshold` share what the exact ones leave of 1
equally, so their weight is not stored; nor is that of an entry that `sample` drew once.

This module needs torch, numpy and safetensors alone, so that other training loops can read stores.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.distill import code as id_code
from gemstill.distill.block import Block, Rows, block_path, decode
from gemstill.distill.code import IdCode
from gemstill.distill.estimators import Estimator
from gemstill.distill.packing import MAX_BITS
from gemstill.ops.target import Target

FORMAT = "gemstill-probability-store"
VERSION = 3
INDEX = "store.json"
MOST_ROWS = 1 << 19  # of a block: the bits of their places are counted in 32 bits
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
    window: int  # tokens the teacher saw at once; token i's window starts at i - i % window, and there bos was read
    block_tokens: int  # a multiple of window
    estimator: str
    temperature: float
    seed: int
    batch: int  # windows the teacher took at once
    precision: str  # dtype of the teacher's products
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
        if self.block_tokens > MOST_ROWS:
            raise Error(f"a block of {self.block_tokens} tokens is too long", where="store", fix=f"{MOST_ROWS} at most")

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the last of which may be shorter."""
        return -(-self.num_tokens // self.block_tokens)

    def span(self, block: int) -> tuple[int, int]:
        """First token of a block, and the one after its last."""
        return block * self.block_tokens, min((block + 1) * self.block_tokens, self.num_tokens)

    @property
    def counting(self) -> bool:
        """Whether weights are counts of draws (`sample`)."""
        return Estimator.parse(self.estimator).name == "sample"

    @property
    def units(self) -> int:
        """A stored weight is a whole number of 1/units."""
        return Estimator.parse(self.estimator).units

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


def write_index(folder: Path, info: StoreInfo, blocks: list[str] | None) -> None:
    """Write store.json, once code.safetensors is there; blocks: the SHA-256 of each, or None while they are made."""
    derived = {"units": info.units, "code": files.sha256(folder / id_code.FILE)}
    record = asdict(info) | derived | {"complete": blocks is not None, "blocks": blocks or []}
    files.write_json(folder / INDEX, record)


class Store:
    """A finished store, read through a memory map. Use `Store.open`.

    >>> store = Store.open("runs/quickstart/store")         # doctest: +SKIP
    >>> loss = linear_cross_entropy(hidden, head, store[a:b])  # doctest: +SKIP
    """

    def __init__(self, folder: Path, info: StoreInfo, code: IdCode, digests: dict[Path, str]) -> None:
        self.folder, self.info, self.code, self.digests = folder, info, code, digests
        self.window, self.vocab_size = info.window, info.vocab_size
        self.estimator = Estimator.parse(info.estimator)
        self._blocks: OrderedDict[int, Block] = OrderedDict()

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
        blocks = record.get("blocks")
        if not record.get("complete"):
            raise Error("is not finished", where=folder, fix="give the same `gemstill teach` again: it goes on")
        if not isinstance(blocks, list) or len(blocks) != info.num_blocks:
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
            refuse("a vocabulary of", info.vocab_size, min(tokenizer.vocab_size, info.stored_vocab_size))
        if dataset is not None:
            refuse("the tokenizer", info.tokenizer_fingerprint, dataset.tokenizer_fingerprint)
            refuse("the shards", info.dataset_fingerprint, dataset.fingerprint)
            refuse("a number of tokens of", info.num_tokens, dataset.num_tokens)
        if vocab_size is not None and vocab_size < info.vocab_size:
            refuse("a vocabulary of", info.vocab_size, vocab_size)
        if window is not None:
            refuse("windows of", info.window, window)
        digests = {folder / id_code.FILE: record.get("code")}
        digests |= {block_path(folder, number): digest for number, digest in enumerate(blocks)}
        return Store(folder, info, IdCode.read(folder, info.vocab_size), digests)

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

    def _block(self, number: int) -> Block:
        block = self._blocks.pop(number, None) or Block(self.folder, self.info, self.code, number)
        self._blocks[number] = block
        if len(self._blocks) > OPEN_BLOCKS:
            self._blocks.popitem(last=False)
        return block

    def _decode(self, parts: list[Rows]) -> Target:
        if not parts:
            return Target(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1), torch.zeros(0))
        ids, probs = decode(parts, self.info.units)
        return Target(torch.from_numpy(ids), torch.from_numpy(probs), torch.ones(len(ids)))

    def verify(self) -> None:
        """Read the whole store, compare each file's SHA-256 and decode each row. Raises Error naming the first
        damaged file."""
        for path, digest in self.digests.items():
            if not path.is_file():
                raise Error("is missing", where=path, fix="fetch or make this block again")
            if files.sha256(path) != digest:
                raise Error("is damaged (its SHA-256 is another)", where=path, fix="fetch or make this block again")
        for number in range(self.info.num_blocks):
            Block(self.folder, self.info, self.code, number).check()

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
