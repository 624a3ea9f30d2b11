"""Safetensors files: those of a stranger opened with care, ours written tensor by tensor without a second copy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gemstill.checkpoint.hf_config import AGAIN, read_limited
from gemstill.checkpoint.tensors import converted, listed
from gemstill.core.errors import Error

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_SPELT = {dtype: name for name, dtype in NAMES.items()}
_SHARD = re.compile(r"[\w][\w.\-]*\.safetensors", re.ASCII)  # no folder, no way up, nothing that a terminal obeys
_MOST_HEADER = 4 << 20  # bytes; the header of a 27B model has 60,000
_MOST_INDEX = 4 << 20
_COPY = 16 << 20  # bytes converted and written at once


class Headers(NamedTuple):
    """What safetensors files say of their tensors: name -> shape, the format's name of the type, the file's name."""

    shapes: dict[str, list[int]]
    types: dict[str, str]
    files: dict[str, str]

    @property
    def unreadable(self) -> dict[str, str]:
        """Name -> type, of the tensors whose type is none that weights have."""
        return {name: kind for name, kind in self.types.items() if kind not in NAMES}


class Weights:
    """The tensors of a folder's safetensors files, none of them read yet.

    shapes: name -> shape. types: name -> the format's name of the type, for example BF16.
    """

    def __init__(self, folder: Path, device: torch.device | str | None = "cpu") -> None:
        """Open `model.safetensors`, or the files that its index names. device: None to describe, not to read.

        Raises:
            Error: neither is there, one cannot be read, an index that names files outside of the folder, a
                tensor in two files or not in the file that the index names.
        """
        self.folder = folder
        self.shapes: dict[str, list[int]] = {}
        self.types: dict[str, str] = {}
        self._files: dict[str, tuple[Path, Any]] = {}
        places = _places(folder)
        for path in _files(folder, places):
            handle = _open(path, device)
            names = list(handle.keys())
            if twice := sorted(self._files.keys() & set(names)):
                raise Error(f"holds tensors that another file holds too: {listed(twice)}", where=path, fix=AGAIN)
            for name in names:
                part = handle.get_slice(name)
                self.shapes[name], self.types[name] = [int(size) for size in part.get_shape()], str(part.get_dtype())
            self._files |= dict.fromkeys(names, (path, handle))
        elsewhere = [name for name, file in places.items() if name not in self._files or self.path(name).name != file]
        if elsewhere:
            what = f"tensors are not in the files it names: {listed(sorted(elsewhere))}"
            raise Error(what, where=folder / INDEX, fix=AGAIN)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name][0]

    @property
    def unreadable(self) -> dict[str, str]:
        """Name -> type, of the tensors whose type is none that weights have."""
        return self.headers.unreadable

    @property
    def headers(self) -> Headers:
        """What the files say."""
        return Headers(self.shapes, self.types, {name: path.name for name, (path, _) in self._files.items()})

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor: mapped from the file on the CPU, or a copy of its own in another `dtype`."""
        path, handle = self._files[name]
        try:
            return converted(handle.get_tensor(name), dtype)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise Error(f"{name} cannot be read ({error})", where=path, fix=AGAIN) from error


def _places(folder: Path) -> dict[str, str]:
    """Tensor -> file, as the index says; empty where there is one file without an index."""
    if (folder / WEIGHTS).is_file():
        return {}
    path = folder / INDEX
    if not path.is_file():
        raise Error(f"has neither {WEIGHTS} nor {INDEX}", where=folder, fix=_what_else(folder))
    index = read_limited(path, _MOST_INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise Error("has no 'weight_map' from tensors to files of this folder", where=path)
    for name, file in places.items():
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            what = f"its weight_map puts {name!r:.100} into {file!r:.100}, which is no safetensors file of this folder"
            raise Error(what, where=path)
    return places


def _files(folder: Path, places: Mapping[str, str]) -> list[Path]:
    return [folder / name for name in sorted(set(places.values()))] or [folder / WEIGHTS]


def _what_else(folder: Path) -> str:
    """What to do about a folder without safetensors, by what it has."""
    names = [path.name for path in folder.iterdir()]
    if found := sorted(name for name in names if name.endswith(".gguf")):
        return f"name the file: {folder / found[0]}"
    if any(name.startswith("pytorch_model") and name.endswith(".bin") for name in names):
        return "pickled weights are not opened here; convert the folder to safetensors"
    return "name the folder of a checkpoint"


def _open(path: Path, device: torch.device | str | None) -> Any:
    """Open one file, its header bounded first: the library reads headers of 100 MB, which take many times that."""
    try:
        if not path.is_file():
            raise Error("cannot be read as safetensors (there is no such file)", where=path, fix=AGAIN)
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
        if length > _MOST_HEADER:
            raise Error(f"cannot be read as safetensors (a header of {length:,} bytes)", where=path, fix=AGAIN)
        # torch's mapping may be written to, so that the system sets memory aside for all of it; numpy's may not.
        plain = {"framework": "np"} if device is None else {"framework": "pt", "device": str(device)}
        opened: Any = safe_open(path, **plain)
        return opened
    except (OSError, SafetensorError) as error:
        raise Error(f"cannot be read as safetensors ({error})", where=path, fix=AGAIN) from error
    except RuntimeError as error:  # torch's own, when the system has no room to map it
        raise Error(
            f"cannot be mapped ({error})", where=path, fix="free some memory, or export smaller files"
        ) from error


def shards(tensors: Mapping[str, Tensor], dtype: torch.dtype | None, most: int) -> list[dict[str, Tensor]]:
    """Cut `tensors` into runs of at most `most` bytes as stored in `dtype`, or of one tensor that is larger alone."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * (dtype or tensor.dtype).itemsize
        if parts[-1] and size + bytes_ > most:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += bytes_
    return parts


def write_weights(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, most: int) -> None:
    """Write `tensors` in `dtype` (default: each in its own) into `folder`, as one file, or as several with an index.

    Equal weights make equal bytes. Memory: a few megabytes above the tensors themselves.
    """
    parts = shards(tensors, dtype, most)
    if len(parts) == 1:
        _write(folder / WEIGHTS, tensors, dtype)
        return
    places: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        _write(folder / file, part, dtype)
        places |= dict.fromkeys(part, file)
    total = sum(tensor.numel() * (dtype or tensor.dtype).itemsize for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """One file: length of the header, header (JSON), bytes of all tensors without a gap."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # `transformers` asks for it
    offset = 0
    for name, tensor in tensors.items():
        kind = dtype or tensor.dtype
        stop = offset + tensor.numel() * kind.itemsize
        header[name] = {"dtype": _SPELT[kind], "shape": list(tensor.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of eight bytes
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            handle.writelines(_bytes(tensor.detach(), dtype or tensor.dtype))


def _bytes(tensor: Tensor, dtype: torch.dtype) -> Iterable[memoryview]:
    """The bytes of a tensor as `dtype`, little-endian as all machines here are, some rows at a time."""
    flat = tensor.contiguous().view(-1)
    for part in torch.split(flat, _COPY // dtype.itemsize):
        yield part.to("cpu", dtype).view(torch.uint8).numpy().data
