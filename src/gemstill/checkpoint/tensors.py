"""What every format checks before it reads: all parameters there, nothing else, each of its shape and type."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.model.config import ModelConfig
from gemstill.ops.packed import Packed, pack_rows
from gemstill.text.tokenizer import Tokenizer

SHOWN, LONGEST = 8, 120  # names in an error, which is one line, and characters of one
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # of parameters
_DONTNEED = 4  # Linux' MADV_DONTNEED


def listed(names: Sequence[str]) -> str:
    """The first few of `names`, which may be a stranger's, and how many more there are.

    >>> listed(["a", "b"])
    'a, b'
    """
    shown = (repr(name)[1:-1][:LONGEST] for name in names[:SHOWN])  # nothing in it that a terminal obeys
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def check_names(
    found: Mapping[str, Sequence[int]],
    model: nn.Module,
    *,
    where: object,
    spell: Callable[[str], str] = str,
    unreadable: Mapping[str, str] | None = None,
) -> None:
    """See that a file has the parameters of `model`, all of them and no others, before any is read.

    found: name in the file -> shape, in the order of our dimensions. spell: the file's name of one of our
    parameters. unreadable: names of `found` stored in a type that no parameter has -> that type's name.

    Raises:
        Error: one for everything that is missing, superfluous, of another shape or of another type, by name.
    """
    wanted = {spell(name): list(parameter.shape) for name, parameter in model.named_parameters()}
    problems = []
    if missing := sorted(wanted.keys() - found.keys()):
        problems.append(f"tensors are missing: {listed(missing)}")
    if superfluous := sorted(found.keys() - wanted.keys()):
        problems.append(f"tensors that the model does not have: {listed(superfluous)}")
    both = sorted(wanted.keys() & found.keys())
    shapes = {name: [int(size) for size in found[name]] for name in both}
    if misshapen := [
        f"{name} {shapes[name]} instead of {wanted[name]}" for name in both if shapes[name] != wanted[name]
    ]:
        problems.append(f"tensors of another shape: {listed(misshapen)}")
    if mistyped := [
        f"{name} is stored as {kind}" for name, kind in sorted((unreadable or {}).items()) if name in wanted
    ]:
        problems.append(f"tensors of a type that no weights have: {listed(mistyped)}")
    if problems:
        raise Error("; ".join(problems), where=where, fix="its description and its weights belong to different models")


def check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: object) -> None:
    """See that the model has a row for every id that text can become; padded rows are allowed.

    Control tokens without a row are too, and said: Gemma 3's text models come with the tokenizer of those that
    also see images, whose placeholder is one entry more.

    Raises:
        Error: an entry of the tokenizer that is no control token has no row.
    """
    if tokenizer.vocab_size <= config.vocab_size:
        return
    beyond = set(range(config.vocab_size, tokenizer.vocab_size))
    if len(beyond) <= SHOWN and beyond <= tokenizer.control_ids:
        names = listed([tokenizer.decode([number]) for number in sorted(beyond)])
        note(f"the tokenizer's control token {names} has no row in the model and is never used", where=where)
        return
    raise Error(
        f"the tokenizer has {tokenizer.vocab_size} entries, the model {config.vocab_size}",
        where=where,
        fix="use the tokenizer that the model was made with",
    )


def check_float16(config: ModelConfig, dtype: torch.dtype | None, where: object) -> None:
    """Refuse float16 for a network whose activations overflow it.

    Raises:
        Error: float16 for a network with query-key norm, that is Gemma 3: the residual stream of its 270M model
            reaches 1e5 by layer 10, and float16 ends at 65,504.
    """
    if dtype == torch.float16 and config.qk_norm:
        what = "Gemma 3's activations overflow float16, and whoever opens such a file computes in it"
        raise Error(what, where=where, fix="take bfloat16, which needs the same memory")


def converted(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor`, mapped from a file, in `dtype`; where that makes a copy, the pages read for it are given back."""
    if dtype is None or tensor.dtype == dtype:
        return tensor
    out = tensor.to(dtype)
    release(tensor)
    return out


def packed(tensor: Tensor, kind: str) -> Packed:
    """A matrix mapped from a file as `pack` packs it; what was read of the file is given back on the way."""

    def read(start: int, stop: int) -> Tensor:
        rows = tensor[start:stop]
        wide = rows.float()
        release(rows)
        return wide

    return pack_rows(tuple(tensor.shape), kind, read)


def release(tensor: Tensor) -> None:
    """Tell the system that the pages of a tensor mapped from a file need not stay in memory.

    Only for tensors mapped and not written to: what was written to them would be lost. Does nothing but on
    Linux, where the pages of a private mapping of a file come back from the file when they are read again.
    """
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
    if stop > start:
        libc: Any = ctypes.CDLL(None, use_errno=True)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _DONTNEED)
