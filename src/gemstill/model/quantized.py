"""The weights of a network by name, whether parameters or packed in integers, and how they come to be the latter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemstill.core.errors import Error
from gemstill.ops.packed import Packed, Weight, pack

MORE = ("embed_tokens.weight", "lm_head.weight")  # in eight bits where the rest has four, as GGUF files have them


def named_weights(model: nn.Module) -> Iterator[tuple[str, Weight]]:
    """All weights with their names, in the order of `named_parameters`, packed ones among them."""
    for place, module in model.named_modules():
        yield from module.named_parameters(place, recurse=False)
        if isinstance(packed := module.__dict__.get("weight"), Packed):
            yield f"{place}.weight", packed


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight is packed."""
    return any(isinstance(weight, Packed) for _, weight in named_weights(model))


def weight_bytes(model: nn.Module) -> int:
    """The memory of all weights."""
    return sum(weight.nbytes for _, weight in named_weights(model))


def count_weights(model: nn.Module) -> int:
    """The number of all weights."""
    return sum(weight.numel() for _, weight in named_weights(model))


def put_weights(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Have the model use `weights`, name -> tensor or packed matrix, in place of its own, without copies.

    With a packed one among them it is a quantized model from now on: in evaluation mode, without gradients.
    """
    model.load_state_dict(
        {name: weight for name, weight in weights.items() if isinstance(weight, Tensor)}, strict=False, assign=True
    )
    for name, weight in weights.items():
        if isinstance(weight, Packed):
            module: Any = model.get_submodule(name.removesuffix(".weight"))
            module._parameters.pop("weight", None)
            module.weight = weight
    if is_quantized(model):
        model.requires_grad_(False)
        model.eval()


def kind_of(name: str, kind: str) -> str:
    """How the matrix of this name is packed in a model that is packed as `kind`."""
    return "int8" if name in MORE else kind


@torch.no_grad()
def quantize_model(model: nn.Module, kind: str) -> None:
    """Pack all matrices of a model in place, one after the other: "int8", or "int4" with the embedding in int8.

    Raises:
        Error: another kind; a matrix whose rows are no multiple of 32 weights, or with weights that are not finite;
            a model that is quantized already.
    """
    expect_plain(model, "quantized again")
    for name, weight in list(named_weights(model)):
        if weight.ndim == 2 and isinstance(weight, Tensor):
            put_weights(model, {name: pack(weight, kind_of(name, kind))})


def expect_plain(model: nn.Module, what: str, fix: str = "load it without quantize") -> None:
    """See that a model is not quantized.

    Raises:
        Error: it is, and cannot be `what`.
    """
    if is_quantized(model):
        raise Error(f"a quantized model cannot be {what}", where="model", fix=fix)
