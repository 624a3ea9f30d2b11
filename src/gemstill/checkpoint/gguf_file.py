"""The container GGUF, versions 2 and 3: a stranger's file opened with care, ours written tensor by tensor.

Layout: magic, version, counts; key-value pairs; for each tensor name, dimensions, type and offset; padding;
the tensors' bytes (ggml's docs/gguf.md). All numbers are little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.core.files import writing
from gemstill.ops.blocks import BLOCKS, Block

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
ALIGNMENT_KEY = "general.alignment"
# Formats that are read by the package `gguf`; only their sizes are known here.
RARE = {
    block.name: block
    for block in (
        Block("Q4_1", 3, 32, 20), Block("Q5_1", 7, 32, 24), Block("Q2_K", 10, 256, 84),
        Block("Q3_K", 11, 256, 110), Block("IQ4_NL", 20, 32, 18), Block("IQ4_XS", 23, 256, 136),
    )
}  # fmt: skip
AGAIN = "fetch the file again"
_TYPES = {block.type: block for block in (BLOCKS | RARE).values()}
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10
# A file may state any number. The largest models have a tenth of these.
_MOST_FIELDS, _MOST_TENSORS, _MOST_STRINGS, _LONGEST_NAME = 1 << 14, 1 << 15, 1 << 21, 1 << 16


class TensorInfo(NamedTuple):
    """One tensor of a file: its shape as torch has it, its block format, and where its bytes lie in the file."""

    name: str
    shape: tuple[int, ...]
    block: Block
    offset: int
    nbytes: int


class GgufFile:
    """An open file, mapped and not read. Changing a tensor's bytes changes this process' copy of a page alone.

    fields: key -> bool, int, float, str, list of str, or a numpy array of numbers. tensors: name -> TensorInfo.
    """

    def __init__(self, path: str | Path) -> None:
        """Open `path` and check all that it says about itself against its size.

        Raises:
            Error: there is no such file, it is no GGUF, of another version, cut off or damaged, or has tensors
                in a format that nobody here reads.
        """
        self.path = Path(path)
        try:
            if not self.path.is_file():
                what = "is no file" if self.path.exists() else "there is no such file"
                raise Error(what, where=path, fix="name a GGUF file")
            if self.path.stat().st_size < 24:
                raise Error("is too short for a GGUF file", where=path, fix=AGAIN)
            self._data = np.memmap(self.path, np.uint8, "c")
        except OSError as error:
            raise Error(f"cannot be read ({error.strerror})", where=path) from error
        reader = _Reader(self.path, self._data.data)
        self.version, tensors, fields = reader.header()
        self.fields = reader.fields(fields)
        self.tensors = reader.tensors(tensors, self.fields)

    def data(self, name: str) -> Tensor:
        """The bytes of a tensor, [..., bytes of a row] uint8, mapped from the file."""
        info = self.tensors[name]
        return _rows(info, self._data[info.offset : info.offset + info.nbytes])

    def copy(self, name: str) -> Tensor:
        """As `data`, in memory of its own: to touch a small mapped tensor brings in what lies around it, too.

        Raises:
            Error: the file is gone, or has become shorter, since it was opened.
        """
        info = self.tensors[name]
        try:
            part = np.fromfile(self.path, np.uint8, info.nbytes, offset=info.offset)
        except OSError as error:
            raise Error(f"cannot be read ({error.strerror})", where=self.path) from error
        if len(part) < info.nbytes:
            raise Error("has become shorter since it was opened", where=self.path, fix=AGAIN)
        return _rows(info, part)


def _rows(info: TensorInfo, part: npt.NDArray[np.uint8]) -> Tensor:
    """[..., bytes of a row] uint8."""
    return torch.from_numpy(part).view(*info.shape[:-1], info.shape[-1] // info.block.size * info.block.bytes)


class _Reader:
    """Reads one thing after the other, and nothing beyond the end."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path, self.view, self.at, self.end = path, data, 0, len(data)

    def error(self, what: str, fix: str = AGAIN) -> Error:
        return Error(what, where=self.path, fix=fix)

    def take(self, count: int) -> int:
        """Step over `count` bytes; returns where they begin."""
        if count > self.end - self.at:
            raise self.error("is cut off, or states a size that reaches beyond its end")
        self.at += count
        return self.at - count

    def number(self, format: str) -> Any:
        return struct.unpack_from(format, self.view, self.take(struct.calcsize(format)))[0]

    def string(self) -> str:
        size = self.number("<Q")
        start = self.take(size)
        try:
            return str(self.view[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"has text that is not UTF-8 ({error})") from error

    def strings(self, count: int) -> list[str]:
        """So many texts, one after the other: a vocabulary has hundreds of thousands."""
        found, at, view = [], self.at, self.view
        length = struct.Struct("<Q").unpack_from
        try:
            for _ in range(count):
                (size,) = length(view, at)
                at += 8 + size
                found.append(str(view[at - size : at], "utf-8"))
                if at > self.end:
                    break
        except UnicodeDecodeError as error:
            raise self.error(f"has text that is not UTF-8 ({error})") from error
        except struct.error:
            at = self.end + 1
        self.take(at - self.at)
        return found

    def name(self) -> str:
        """A key or a tensor's name."""
        text = self.string()
        if not 0 < len(text) <= _LONGEST_NAME or not text.isprintable():
            raise self.error(f"has a name that is none: {text[:40]!r}")
        return text

    def header(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of fields."""
        start = self.take(4)
        if bytes(self.view[start : self.at]) != MAGIC:
            raise self.error("is no GGUF file", fix="name a GGUF file")
        version = self.number("<I")
        if version not in (2, VERSION):
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in (2, VERSION)
            what = "is for big-endian machines" if swapped else f"is GGUF of version {version}"
            raise self.error(what, fix="only versions 2 and 3, little-endian, are read; convert the model again")
        tensors, fields = self.number("<Q"), self.number("<Q")
        if tensors > _MOST_TENSORS or fields > _MOST_FIELDS:
            raise self.error(f"states {tensors:,} tensors and {fields:,} fields, more than any model has")
        return version, tensors, fields

    def fields(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.name()
            if key in found:
                raise self.error(f"has the field {key!r} twice")
            found[key] = self.value(self.number("<I"), key)
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _BOOL:
            return bool(self.number("<B"))
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error(f"the field {key!r} is of type {kind}, which there is not")
        inner, count = self.number("<I"), self.number("<Q")
        if inner == _STRING:
            if count > min(_MOST_STRINGS, (self.end - self.at) // 8):
                raise self.error(f"the field {key!r} states {count:,} texts, more than there can be")
            return self.strings(count)
        if inner not in _SCALARS and inner != _BOOL:
            raise self.error(f"the field {key!r} is a list of type {inner}, which this reader does not have")
        dtype = np.dtype("?" if inner == _BOOL else _SCALARS[inner])
        if count > (self.end - self.at) // dtype.itemsize:
            raise self.error(f"the field {key!r} states {count:,} numbers, more than there can be")
        numbers = np.frombuffer(self.view, np.uint8 if inner == _BOOL else dtype, count, self.at)
        self.take(count * dtype.itemsize)
        return numbers != 0 if inner == _BOOL else numbers

    def tensors(self, count: int, fields: Mapping[str, Any]) -> dict[str, TensorInfo]:
        alignment = fields.get(ALIGNMENT_KEY, ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.error(f"{ALIGNMENT_KEY} is {alignment!r:.40}, which is no power of two")
        stated: list[tuple[str, tuple[int, ...], Block, int]] = []
        for _ in range(count):
            name, dimensions = self.name(), self.number("<I")
            if not 0 < dimensions <= 4:
                raise self.error(f"the tensor {name[:80]!r} has {dimensions} dimensions, 1 to 4 are possible")
            sizes = [self.number("<Q") for _ in range(dimensions)]
            stated.append((name, tuple(reversed(sizes)), self.block(name), self.number("<Q")))
        start = -(-self.at // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        for name, shape, block, offset in stated:
            if name in found:
                raise self.error(f"has the tensor {name[:80]!r} twice")
            if not all(shape) or shape[-1] % block.size:
                what = f"the tensor {name[:80]!r} has shape {list(shape)}, which {block.name} cannot have"
                raise self.error(what)
            nbytes = prod(shape) // block.size * block.bytes
            if offset % alignment or start + offset + nbytes > self.end:
                raise self.error(f"the tensor {name[:80]!r} does not lie within the file: it is cut off or damaged")
            found[name] = TensorInfo(name, shape, block, start + offset, nbytes)
        for one, next_ in pairwise(sorted(found.values(), key=lambda info: info.offset)):
            if one.offset + one.nbytes > next_.offset:
                raise self.error(f"the tensors {one.name[:80]!r} and {next_.name[:80]!r} overlap")
        return found

    def block(self, name: str) -> Block:
        number = self.number("<I")
        if number not in _TYPES:
            what = f"the tensor {name[:80]!r} is in ggml's format number {number}, which is not read here"
            raise self.error(what, fix=f"take a file in one of {', '.join(BLOCKS | RARE)}")
        return _TYPES[number]


class Out(NamedTuple):
    """A tensor to write: `parts` gives its bytes, uint8 tensors one after the other."""

    name: str
    shape: tuple[int, ...]
    block: Block
    parts: Callable[[], Iterable[Tensor]]


def write_gguf(path: str | Path, fields: Mapping[str, Any], tensors: Sequence[Out]) -> None:
    """Write a GGUF file, whole or not at all. Equal input makes equal bytes.

    fields: bool, str, list of str, int (as uint32 where it fits, else int32 or uint64), float (as float32), or
    a numpy array of float32 or int32.

    Raises:
        Error: the place cannot be written.
    """
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(fields))]
    for key, value in fields.items():
        head += [_text(key), _value(value)]
    offset, gaps = 0, []
    for out in tensors:
        size = prod(out.shape) // out.block.size * out.block.bytes
        head.append(_text(out.name) + struct.pack(f"<I{len(out.shape)}Q", len(out.shape), *reversed(out.shape)))
        head.append(struct.pack("<IQ", out.block.type, offset))
        gaps.append(-size % ALIGNMENT)
        offset += size + gaps[-1]
    start = b"".join(head)
    with writing(path) as temporary, open(temporary, "wb") as handle:
        handle.write(start + bytes(-len(start) % ALIGNMENT))
        for out, gap in zip(tensors, gaps, strict=True):
            before = handle.tell()
            handle.writelines(part.numpy().data for part in out.parts())
            assert handle.tell() - before == prod(out.shape) // out.block.size * out.block.bytes
            handle.write(bytes(gap))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Type and value of a field."""
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, int):
        kind = _INT32 if value < 0 else _UINT32 if value < 1 << 32 else _UINT64
        return struct.pack("<I", kind) + struct.pack(_SCALARS[kind], value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, np.ndarray):
        kind = {np.dtype(np.float32): _FLOAT32, np.dtype(np.int32): _INT32}[value.dtype]
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + value.astype(value.dtype.newbyteorder("<")).tobytes()
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
