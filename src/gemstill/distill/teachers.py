"""Teachers of every kind behind one question: what is the distribution of every next token?

A gemstill model, any causal model of `transformers`, a GGUF file, or a server (gemstill.distill.server). What is
at hand answers with its last hidden states and its head, from which any estimator can be taken and which the loss
takes as it is; a server answers with the likeliest entries.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from gemstill.checkpoint import foreign, sidecars, source
from gemstill.core import machine
from gemstill.core.errors import Error
from gemstill.model.adapter import Adapter
from gemstill.model.quantized import expect_plain
from gemstill.model.transformer import Transformer
from gemstill.ops.native import loaded
from gemstill.ops.target import OnlineTarget, Target
from gemstill.text.tokenizer import Tokenizer

SERVERS = ("http://", "https://")


class Teacher(Protocol):
    """Something that knows the distribution of every next token."""

    @property
    def name(self) -> str:
        """What cards call it."""

    @property
    def licence(self) -> str:
        """An SPDX name, or "unknown"."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides its answers."""

    @property
    def precision(self) -> str:
        """The dtype of its products, as far as that is known."""

    @property
    def vocab_size(self) -> int | None:
        """Rows of its head, padding included; None where that is not known."""

    @property
    def sparse(self) -> bool:
        """Whether it gives its likeliest entries alone, a sparse target: `topk` is then all that can be kept of it."""

    def distribution(self, tokens: Tensor, documents: Tensor) -> Target | OnlineTarget:
        """The distributions of the tokens that follow, at temperature 1.

        tokens, documents: [B, T] int64 as in Transformer.forward; documents below 0 are padding. Returns B·T rows:
        row b·T + t is about what comes after token t of row b, given its document's tokens up to it in the row.
        Padding's rows say nothing; their weight is 0. No gradients.
        """


class ModelTeacher:
    """A network at hand as a teacher: gemstill's Transformer, or a `transformers` model in its Adapter.

    model: called as model(tokens, documents=…, readout=…); it is set to evaluate.

    Raises:
        Error: a quantized model, whose head is not at hand.
    """

    sparse = False

    def __init__(self, model: nn.Module, *, name: str = "unnamed", licence: str = "unknown") -> None:
        expect_plain(model, "a teacher")
        self.model, self.name, self.licence = model.eval(), name, licence

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over its configuration and its weights."""
        return fingerprint(self.model)

    @property
    def precision(self) -> str:
        """The dtype of its products."""
        dtype = getattr(self.model, "compute_dtype", None) or next(self.model.parameters()).dtype
        return str(dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int | None:
        """Rows of its head."""
        shape = getattr(self.model, "config", None)
        return None if shape is None else int(shape.vocab_size)

    @torch.no_grad()
    def distribution(self, tokens: Tensor, documents: Tensor) -> OnlineTarget:
        """See Teacher. hidden [B·T, D] in the dtype of its products, and its head [V, D] as it is stored."""
        device = next(self.model.parameters()).device
        tokens, documents = tokens.to(device), documents.to(device)

        def answer(hidden: Tensor, head: Tensor, softcap: float | None) -> OnlineTarget:
            weight = (documents >= 0).float().reshape(-1)
            return OnlineTarget(hidden.flatten(0, 1), head.detach(), softcap, 1.0, weight)

        target: OnlineTarget = self.model(tokens, documents=documents, readout=answer)
        return target


def open_teacher(
    place: str | Path,
    tokenizer_fingerprint: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    tokenizer: Tokenizer | None = None,
    entries: int = 0,
) -> Teacher:
    """Open a teacher for a data set made with a tokenizer.

    place: a folder or GGUF file of any architecture, a name on the hub, or a server's address with the name of its
    model, "http://host:8000/v1#model". tokenizer_fingerprint: of the data set. dtype: of the products, by default
    the machine's fast precision. For a server: tokenizer, the data set's own, to compare with the server's, and
    entries, how many it is to give.

    Raises:
        Error: there is no such model, or it cannot be opened; its tokenizer is another one (both are named).
    """
    if str(place).startswith(SERVERS):
        from gemstill.distill.server import ServerTeacher

        if tokenizer is None:
            fix = "name the data's tokenizer: tokenizer=FOLDER"
            raise Error("what a server's ids mean is known by comparing tokenizers", where=place, fix=fix)
        return ServerTeacher.open(str(place), tokenizer, entries)
    loaded()  # native kernels from the first block on, so that a store's bytes do not depend on when they are built
    path = foreign.place_of(place)
    wanted = machine.fast_dtype(str(torch.device(device).type)) if dtype is None else dtype
    model: Transformer | Adapter
    if foreign.is_foreign(path):
        model, own = foreign.load_foreign(path, dtype=wanted, device=device)
    else:
        model, own = source.load(path, device=device)
    model.compute_dtype = wanted
    if own.fingerprint != tokenizer_fingerprint:
        what = f"the teacher's tokenizer is {own.fingerprint[:16]}, the data set was made with "
        fix = "make the data set with the teacher's tokenizer"
        raise Error(what + tokenizer_fingerprint[:16], where=place, fix=fix)
    return ModelTeacher(model, name=source.name_of(place), licence=sidecars.licence(path))


def as_teacher(model: nn.Module | Teacher, name: str = "unnamed", licence: str = "unknown") -> Teacher:
    """A network as the teacher that it is; a teacher stays itself."""
    return ModelTeacher(model, name=name, licence=licence) if isinstance(model, nn.Module) else model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over a model's configuration, and the names, dtypes, shapes and bytes of its parameters."""
    config = getattr(model, "config", None)
    described = asdict(config) if is_dataclass(config) and not isinstance(config, type) else None
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tempered(target: Target, temperature: float) -> Target:
    """A sparse target's entries at another temperature, summing to one in each row: what `topk` is at it.

    Of softmax(z / t) restricted to some entries and renormalised, p^(1/t) of theirs at temperature 1 is all one needs.
    """
    powers = target.probs.double().pow(1 / temperature)
    total = powers.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return target._replace(probs=(powers / total).float())
