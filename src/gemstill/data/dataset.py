"""The token shard format, and a data set of shards read as one stream."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from gemstill.core import files
from gemstill.core.errors import Error

FORMAT, VERSION = "gemstill tokens", 1
INDEX = "index.json"
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}
_REMAKE = "make the data set again with `gemstill data`"

Tokens = npt.NDArray[np.unsignedinteger[Any]]
Ints = npt.NDArray[np.int64]


def gemstill_version() -> str:
    """The installed version, "unknown" where the package runs without being installed."""
    try:
        return importlib.metadata.version("gemstill")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16 where every id fits, else uint32."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class ShardHeader:
    """What the head of a shard file says. tokens, starts: (dtype, offset in the file, number of entries)."""

    metadata: dict[str, Any]
    tokens: tuple[np.dtype[Any], int, int]
    starts: tuple[np.dtype[Any], int, int]


def write_shard(path: Path, tokens: Tokens, starts: Ints, metadata: dict[str, Any]) -> str:
    """Write one shard, whole or not at all, and return its SHA-256.

    A shard is a safetensors file with `tokens` [N] (uint16 or uint32) and `document_starts` [D]
    (int64, the places in `tokens` where documents begin). Raises Error when it cannot be written.
    """
    # One entry of text: the library orders several at random, and equal shards shall have equal bytes.
    described = {"gemstill": json.dumps(metadata, sort_keys=True, ensure_ascii=False)}
    with files.writing(path) as temporary:
        try:
            save_file({"tokens": tokens, "document_starts": starts}, temporary, metadata=described)
        except OSError:
            raise
        except Exception as error:  # safetensors wraps the system's errors in its own
            raise Error(f"cannot be written ({error})", where=path, fix="free some space") from error
        digest = files.sha256(temporary)
    return digest


def read_header(path: Path) -> ShardHeader:
    """Read the head of a shard and check it against the size of the file.

    Raises:
        Error: no such file, truncated, or no token shard.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 2 <= length <= size - 8:
                raise Error("is truncated or no token shard", where=path, fix=_REMAKE)
            header = json.loads(handle.read(length))
        metadata = json.loads(header["__metadata__"]["gemstill"])
        if (metadata["format"], metadata["version"]) != (FORMAT, VERSION):
            found = f"{metadata['format']!r} version {metadata['version']}"
            raise Error(f"is {found}, this is for {FORMAT!r} version {VERSION}", where=path, fix=_REMAKE)
        spans = {name: _span(header[name], length + 8) for name in ("tokens", "document_starts")}
        ends = [begin + dtype.itemsize * count for dtype, begin, count in spans.values()]
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path, fix=_REMAKE) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Error("is damaged or no token shard", where=path, fix=_REMAKE) from error
    if max(ends) != size:
        raise Error(f"is {'truncated' if size < max(ends) else 'too long'}", where=path, fix=_REMAKE)
    return ShardHeader(metadata, spans["tokens"], spans["document_starts"])


def _span(entry: dict[str, Any], base: int) -> tuple[np.dtype[Any], int, int]:
    dtype = _DTYPES[entry["dtype"]]
    (count,), (begin, end) = entry["shape"], entry["data_offsets"]
    if count < 1 or begin < 0 or end - begin != count * dtype.itemsize:
        raise ValueError("shape and offsets disagree")
    return dtype, base + begin, count


class TokenDataset:
    """A folder of token shards, read as one stream of tokens.

    Every document is [bos] + its ids + [eos], so a document begins where the bos is: text never
    encodes to it. Shards are mapped into memory when first read.

    num_tokens, num_documents, bytes: totals, the last in bytes of UTF-8 text. fingerprint: SHA-256 of
    index.json, which names that of each shard. tokenizer_fingerprint, vocab_size, bos_id, eos_id: of
    the tokenizer. index: all that index.json says.
    """

    def __init__(self, folder: Path, index: dict[str, Any], fingerprint: str) -> None:
        """Use `open`."""
        self.folder, self.index, self.fingerprint = folder, index, fingerprint
        self.num_tokens: int = index["tokens"]
        self.num_documents: int = index["documents"]
        self.bytes: int = index["bytes"]
        self.tokenizer_fingerprint: str = index["tokenizer"]
        self.vocab_size: int = index["vocab_size"]
        self.bos_id: int = index["bos_id"]
        self.eos_id: int = index["eos_id"]
        self._paths = [folder / shard["file"] for shard in index["shards"]]
        self._headers = [read_header(path) for path in self._paths]
        counts = [shard["tokens"] for shard in index["shards"]]
        self._offsets = np.array([0, *itertools.accumulate(counts)], dtype=np.int64)
        self._tokens: list[Tokens | None] = [None] * len(counts)
        self._starts: Ints | None = None

    @staticmethod
    def open(folder: str | Path) -> TokenDataset:
        """Open a data set and check what can be checked without reading the tokens (`verify` reads them).

        Raises:
            Error: no data set there, or index and shards contradict each other or themselves.
        """
        folder = Path(folder)
        path = folder / INDEX
        if not path.is_file():
            inside = [name for name in ("train", "heldout") if (folder / name / INDEX).is_file()]
            fix = f"did you mean {folder / inside[0]}?" if inside else "`gemstill data` makes data sets"
            raise Error(f"holds no data set (no {INDEX})", where=folder, fix=fix)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise Error(f"cannot be read ({error.strerror})", where=path) from error
        index = files.read_json(path)
        _check_index(index, path)
        dataset = TokenDataset(folder, index, hashlib.sha256(data).hexdigest())
        for shard, header, file in zip(index["shards"], dataset._headers, dataset._paths, strict=True):
            _check_shard(index, shard, header, file, path)
        return dataset

    def read(self, start: int, stop: int) -> Ints:
        """Tokens [start, stop) of the stream, int64. Raises IndexError outside of it."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens {start} to {stop} of a data set of {self.num_tokens}")
        shard = int(np.searchsorted(self._offsets, start, side="right")) - 1
        parts = []
        while start < stop:
            base, end = int(self._offsets[shard]), int(self._offsets[shard + 1])
            parts.append(self._map(shard)[start - base : min(stop, end) - base].astype(np.int64))
            start = min(stop, end)
            shard += 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    @property
    def document_starts(self) -> Ints:
        """Where each document begins in the stream, [num_documents] int64: 8 bytes a document once asked for."""
        if self._starts is None:
            mapped = [_starts(path, header) for path, header in zip(self._paths, self._headers, strict=True)]
            shifted = (starts + offset for starts, offset in zip(mapped, self._offsets, strict=False))
            self._starts = mapped[0] if len(mapped) == 1 else np.concatenate(list(shifted))
        return self._starts

    def document_at(self, positions: Ints) -> Ints:
        """The number of the document that each position of the stream belongs to, same shape."""
        found: Ints = np.searchsorted(self.document_starts, positions, side="right") - 1
        return found

    def verify(self) -> None:
        """Read everything and compare it with the index. Raises Error naming the first shard that is not as it was."""
        for number, (path, shard) in enumerate(zip(self._paths, self.index["shards"], strict=True)):
            if files.sha256(path) != shard["sha256"]:
                raise Error(f"is not as it was written (SHA-256 differs from {INDEX})", where=path, fix=_REMAKE)
            tokens = self._map(number)
            starts = _starts(path, self._headers[number])
            if not np.array_equal(np.flatnonzero(tokens == self.bos_id), starts):
                raise _no_starts(path)
            if int(tokens.max()) >= self.vocab_size:
                raise Error(f"holds ids outside the vocabulary of {self.vocab_size}", where=path, fix=_REMAKE)

    def _map(self, shard: int) -> Tokens:
        tokens = self._tokens[shard]
        if tokens is None:
            tokens = self._tokens[shard] = _mapped(self._paths[shard], self._headers[shard].tokens)
        return tokens


def _mapped(path: Path, span: tuple[np.dtype[Any], int, int]) -> npt.NDArray[Any]:
    dtype, offset, count = span
    try:
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,)))
    except (OSError, ValueError) as error:
        raise Error(f"cannot be read ({error})", where=path, fix=_REMAKE) from error


def _starts(path: Path, header: ShardHeader) -> Ints:
    """Where the documents of a shard begin: at its first token, and each with room for its two marks."""
    starts: Ints = _mapped(path, header.starts)
    if starts[0] != 0 or (np.diff(starts, append=header.tokens[2]) < 2).any():
        raise _no_starts(path)
    return starts


def _no_starts(path: Path) -> Error:
    return Error("document_starts are not where documents begin", where=path, fix=_REMAKE)


def _check_index(index: Any, path: Path) -> None:
    """Refuse an index that is not one, or that contradicts itself."""
    numbers = ("tokens", "documents", "bytes", "vocab_size", "bos_id", "eos_id")
    try:
        if (index["format"], index["version"]) != (FORMAT, VERSION):
            found = f"{index['format']!r} version {index['version']}"
            raise Error(f"describes {found}, this is for {FORMAT!r} version {VERSION}", where=path, fix=_REMAKE)
        shards = index["shards"]
        sound = isinstance(index["tokenizer"], str) and all(type(index[name]) is int for name in numbers)
        sound &= isinstance(index["source"], list) and all(isinstance(one["name"], str) for one in index["source"])
        json.dumps(index, ensure_ascii=False).encode()  # what is told of it can be written
        for shard in shards:
            sound &= all(type(shard[name]) is int and shard[name] > 0 for name in ("tokens", "documents", "bytes"))
            sound &= isinstance(shard["sha256"], str) and Path(shard["file"]).name == shard["file"]
        sums = {name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")}
    except (KeyError, TypeError, IndexError, UnicodeEncodeError) as error:
        raise Error(f"is no index of a data set ({error!r})", where=path, fix=_REMAKE) from error
    if not sound or not shards or index["vocab_size"] < 1:
        raise Error("is no sound index of a data set", where=path, fix=_REMAKE)
    for name, total in sums.items():
        if total != index[name]:
            raise Error(f"says {index[name]} {name}, its shards have {total}", where=path, fix=_REMAKE)


def _check_shard(index: dict[str, Any], shard: dict[str, Any], header: ShardHeader, file: Path, path: Path) -> None:
    """Refuse a shard that is not what the index says."""
    said = {"tokens": shard["tokens"], "documents": shard["documents"], "tokenizer": index["tokenizer"]}
    has = {
        "tokens": header.tokens[2],
        "documents": header.starts[2],
        "tokenizer": header.metadata.get("tokenizer"),
    }
    for name, value in said.items():
        if has[name] != value:
            raise Error(f"has {name} {has[name]}, but {path.name} says {value}", where=file, fix=_REMAKE)
    expected = token_dtype(index["vocab_size"])
    if header.tokens[0] != expected or header.starts[0] != np.dtype("<i8"):
        kind = f"{header.tokens[0]} and {header.starts[0]}"
        raise Error(f"holds {kind} where {expected} and int64 are due", where=file, fix=_REMAKE)
