"""ModelConfig as the fields of a GGUF file, and back: the architectures gemma2 and gemma3, as llama.cpp runs them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemstill.core.errors import Error
from gemstill.model.config import ModelConfig

ARCHITECTURES = ("gemma2", "gemma3")
# Our name -> theirs, for whole numbers; the key begins with the architecture.
WHOLE = {
    "num_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position": "context_length",
}
EPS, WINDOW, PATTERN = (
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
)
ATTENTION_CAP, FINAL_CAP = "attn_logit_softcapping", "final_logit_softcapping"
BASE, LOCAL_BASE = "rope.freq_base", "rope.freq_base_swa"
# What llama.cpp takes where a file says nothing.
USUAL: dict[str, dict[str, Any]] = {
    "gemma2": {"pattern": 2, "window": 4096, "attention_cap": 50.0, "final_cap": 30.0, "whole": 46},
    "gemma3": {"pattern": 6, "window": None, "attention_cap": None, "final_cap": None, "whole": 62},
}
MOST_LAYERS = 512  # of llama.cpp


def architecture(config: ModelConfig) -> str:
    """The name that GGUF files give a network like this."""
    return "gemma3" if config.qk_norm else "gemma2"


def derived_scalar(sizes: Mapping[str, Any], kind: str) -> int:
    """The query_pre_attn_scalar that llama.cpp takes: of the 27B models, known by their layers, hidden/heads."""
    if sizes["num_layers"] == USUAL[kind]["whole"]:
        return int(sizes["hidden_size"]) // int(sizes["num_heads"])
    return int(sizes["head_dim"])


def to_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields that describe the network.

    Raises:
        Error: a network that llama.cpp would run otherwise than it is meant, with the reason.
    """
    check_runs_alike(config)
    kind = architecture(config)
    fields: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in WHOLE.items()}
    fields["attention.value_length"] = config.head_dim
    fields[EPS] = float(config.rms_norm_eps)
    fields[BASE] = float(config.rope_theta)
    if config.qk_norm:
        fields[LOCAL_BASE] = float(config.rope_local_theta or config.rope_theta)
    else:
        fields[ATTENTION_CAP] = config.attn_logit_softcap
    if config.final_logit_softcap is not None:
        fields[FINAL_CAP] = config.final_logit_softcap
    if not (config.qk_norm and config.layer_pattern == 1):  # without a window all layers are global
        fields[WINDOW], fields[PATTERN] = config.sliding_window, config.layer_pattern
    return {f"{kind}.{name}": value for name, value in fields.items()}


def check_runs_alike(config: ModelConfig) -> None:
    """Refuse a network that llama.cpp would run otherwise than it is meant.

    Raises:
        Error: one, with all the reasons.
    """
    kind = architecture(config)
    name = "Gemma 3" if config.qk_norm else "Gemma 2"
    reasons = []
    scalar = derived_scalar(vars(config), kind)
    if config.query_pre_attn_scalar != scalar:
        reasons.append(
            f"it scales queries by {scalar}^-1/2, which it derives from {config.num_layers} layers, "
            f"not by query_pre_attn_scalar {config.query_pre_attn_scalar:g}"
        )
    if config.qk_norm and config.attn_logit_softcap is not None:
        reasons.append("it does not cap attention logits of Gemma 3")
    if not config.qk_norm:
        if config.attn_logit_softcap is None or config.final_logit_softcap is None:
            reasons.append("it always caps attention logits and final logits of Gemma 2")
        if not config.tie_embeddings:
            reasons.append("its head of Gemma 2 is always the embedding")
        if config.rope_local_theta not in (None, config.rope_theta):
            reasons.append("its Gemma 2 has one rotary base")
    if config.num_layers > MOST_LAYERS:
        reasons.append(f"it has room for {MOST_LAYERS} layers")
    if reasons:
        what = f"llama.cpp would run this {name} model wrongly: {'; '.join(reasons)}"
        raise Error(what, where="gguf", fix="save it as a folder")


def from_fields(fields: Mapping[str, Any], embedding: tuple[int, ...], tied: bool, where: object) -> ModelConfig:
    """The network that a file's fields describe. embedding: the shape of its embedding matrix, () if it has none.

    Raises:
        Error: another architecture, a variant that the network does not have, a field missing or of a wrong type.
    """
    kind = fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        fix = f"only {' and '.join(ARCHITECTURES)} can be opened"
        raise Error(f"holds a model of architecture {kind!r:.60}", where=where, fix=fix)
    if len(embedding) != 2:
        raise Error("has no matrix token_embd.weight", where=where)
    usual = USUAL[kind]
    own = {key.removeprefix(f"{kind}."): value for key, value in fields.items() if key.startswith(f"{kind}.")}
    scaling, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 1.0)
    if not (isinstance(scaling, str) and scaling == "none") and not (isinstance(factor, int | float) and factor == 1):
        raise Error(f"positions are scaled by {factor!r:.40}, which this network does not do", where=where)
    sizes = {ours: _whole(own, theirs, where) for ours, theirs in WHOLE.items() if ours != "head_dim"}
    hidden, heads = sizes["hidden_size"], max(1, sizes["num_heads"])
    sizes["head_dim"] = _whole(own, WHOLE["head_dim"], where, hidden // heads)
    if _whole(own, "attention.value_length", where, sizes["head_dim"]) != sizes["head_dim"]:
        raise Error("its values are not as wide as its keys, which this network does not have", where=where)
    window = _whole(own, WINDOW, where, usual["window"] or 0)
    values: dict[str, Any] = {
        **sizes,
        "vocab_size": embedding[0],
        "query_pre_attn_scalar": float(derived_scalar(sizes | {"num_heads": heads}, kind)),
        "sliding_window": window or 4096,
        "layer_pattern": _pattern(own, sizes["num_layers"], usual["pattern"], where) if window else 1,
        "attn_logit_softcap": _cap(own, ATTENTION_CAP, where, usual["attention_cap"]) if kind == "gemma2" else None,
        "final_logit_softcap": _cap(own, FINAL_CAP, where, usual["final_cap"]),
        "rope_theta": _number(own, BASE, where, 10_000.0),
        "rope_local_theta": _number(own, LOCAL_BASE, where, 10_000.0) if kind == "gemma3" else None,
        "qk_norm": kind == "gemma3",
        "rms_norm_eps": _shortest(_number(own, EPS, where)),
        "tie_embeddings": tied,
    }
    try:
        return ModelConfig(**values)
    except Error as error:
        raise Error(error.what, where=where, fix=error.fix) from error


def _whole(own: Mapping[str, Any], name: str, where: object, default: int | None = None) -> int:
    value = own.get(name, default)
    if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
        value = value[0].item()  # one number for each layer, all alike
    if value is None:
        raise Error(f"has no field '{name}'", where=where)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise Error(f"{name} is {value!r:.60}, which is not a whole number", where=where)
    return value


def _number(own: Mapping[str, Any], name: str, where: object, default: float | None = None) -> float:
    value = own.get(name, default)
    if value is None:
        raise Error(f"has no field '{name}'", where=where)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Error(f"{name} is {value!r:.60}, which is not a number", where=where)
    return float(value)


def _cap(own: Mapping[str, Any], name: str, where: object, default: float | None) -> float | None:
    """A cap; 0 is none, as to llama.cpp."""
    return _number(own, name, where, default or 0.0) or None


def _shortest(number: float) -> float:
    """The decimal number that was written as this float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(number)))


def _pattern(own: Mapping[str, Any], layers: int, usual: int, where: object) -> int:
    """layer_pattern, stated as a number or as true for each local layer."""
    value = own.get(PATTERN, usual)
    if not isinstance(value, np.ndarray):
        return _whole(own, PATTERN, where, usual)
    local = [bool(flag) for flag in value[:layers]]
    pattern: int
    for pattern in (usual, *range(1, min(layers, MOST_LAYERS) + 2)):
        if local == [(layer + 1) % pattern != 0 for layer in range(min(layers, 2 * MOST_LAYERS))]:
            return pattern
    raise Error(f"{PATTERN} does not make every n-th layer global and the others local", where=where)
