"""ModelConfig as the `config.json` of a Hugging Face folder, and back: Gemma 2, and Gemma 3's text models."""

from __future__ import annotations

from typing import Any

from gemstill.core.errors import Error
from gemstill.model.config import ModelConfig

# Our name -> theirs, where the value is the same.
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "query_pre_attn_scalar": "query_pre_attn_scalar",
    "sliding_window": "sliding_window",
    "max_position": "max_position_embeddings",
    "attn_logit_softcap": "attn_logit_softcapping",
    "final_logit_softcap": "final_logit_softcapping",
    "rms_norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
# What `transformers` takes for a field that a config.json leaves out, for the fields that published ones do leave out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {
        "max_position_embeddings": 131_072,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}
COMMON_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
FLOATS = {"query_pre_attn_scalar", "attn_logit_softcap", "final_logit_softcap", "rms_norm_eps"}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The fields of `config.json` that describe the network.

    Raises:
        Error: a network that neither Gemma 2 nor Gemma 3 describes, so that nobody else could run it.
    """
    if not config.qk_norm and config.rope_local_theta not in (None, config.rope_theta):
        raise Error("Gemma 2 has one rotary base; rope_local_theta differs and qk_norm is off", where="config.json")
    if config.qk_norm and config.attn_logit_softcap is not None:
        raise Error("Gemma 3 has no cap on attention logits; here it and qk_norm are both on", where="config.json")
    kind = "gemma3_text" if config.qk_norm else "gemma2"
    out: dict[str, Any] = {
        "architectures": ["Gemma3ForCausalLM" if config.qk_norm else "Gemma2ForCausalLM"],
        "model_type": kind,
    }
    out |= {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    scalar = config.query_pre_attn_scalar  # an integer to `transformers`
    out["query_pre_attn_scalar"] = int(scalar) if int(scalar) == scalar else scalar
    out |= {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attention_dropout": 0.0}
    out["layer_types"] = [LOCAL if config.is_local(layer) else GLOBAL for layer in range(config.num_layers)]
    out["rope_theta"] = config.rope_theta  # read by vLLM and llama.cpp; `transformers` 5 reads rope_parameters
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.qk_norm:
        out["rope_local_base_freq"] = local = config.rope_local_theta or config.rope_theta
        out["rope_parameters"] = {GLOBAL: rope, LOCAL: {"rope_type": "default", "rope_theta": local}}
    else:
        out["rope_parameters"] = rope
    return out


def from_hf(raw: Any, where: object) -> ModelConfig:
    """The ModelConfig of a parsed `config.json`; `where` names it in errors.

    Raises:
        Error: another architecture, a variant that the network does not have, a field missing or of a wrong type.
    """
    if not isinstance(raw, dict):
        raise Error("is not a JSON object", where=where)
    kind = raw.get("model_type")
    if kind not in DEFAULTS:
        raise Error(f"holds a model of type {kind!r}", where=where, fix=f"only {' and '.join(DEFAULTS)} can be opened")
    _refuse_variants(raw, where)
    known = COMMON_DEFAULTS | DEFAULTS[kind] | raw
    values: dict[str, Any] = {}
    for ours, theirs in FIELDS.items():
        if theirs not in known:
            raise Error(f"has no field '{theirs}'", where=where)
        values[ours] = _checked(ours, theirs, known[theirs], where)
    values |= _rotary(raw, kind, where)
    values["qk_norm"] = kind == "gemma3_text"
    values["layer_pattern"] = _pattern(raw, values["num_layers"], 6 if values["qk_norm"] else 2, where)
    return ModelConfig(**values)


def _refuse_variants(raw: dict[str, Any], where: object) -> None:
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False, None),
        "use_bidirectional_attention": (False, None),
        "rope_scaling": (None,),
        "quantization_config": (None,),
    }
    for name, allowed in wanted.items():
        if raw.get(name) not in allowed:
            raise Error(f"{name} is {raw[name]!r}, which this network does not have", where=where)


def _checked(ours: str, theirs: str, value: Any, where: object) -> Any:
    if value is None and ours.endswith("softcap"):
        return None
    kind = "true or false" if ours == "tie_embeddings" else "a number" if ours in FLOATS else "a whole number"
    number = isinstance(value, int | float if ours in FLOATS else int)
    if not number or isinstance(value, bool) != (ours == "tie_embeddings"):
        raise Error(f"{theirs} is {value!r}, which is not {kind}", where=where)
    return float(value) if ours in FLOATS else value


def _rotary(raw: dict[str, Any], kind: str, where: object) -> dict[str, float | None]:
    """Rotary bases, from `rope_parameters` (transformers 5) or the plain fields before it."""
    parameters = raw.get("rope_parameters") or {}
    nested = {name: parameters.get(name) or {} for name in (GLOBAL, LOCAL)}
    parts = [*nested.values(), parameters] if kind == "gemma3_text" else [parameters]
    for part in parts:
        if not isinstance(part, dict) or part.get("rope_type", "default") != "default":
            raise Error(f"rope_parameters {part!r} are not the plain rotary embedding this network has", where=where)
    if kind == "gemma2":
        theta = {"rope_theta": parameters.get("rope_theta", raw.get("rope_theta", 10_000.0)), "rope_local_theta": None}
    else:
        theta = {
            "rope_theta": nested[GLOBAL].get("rope_theta", raw.get("rope_theta", 1_000_000.0)),
            "rope_local_theta": nested[LOCAL].get("rope_theta", raw.get("rope_local_base_freq", 10_000.0)),
        }
    for value in theta.values():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
            raise Error(f"the rotary base is {value!r}, which is not a number above 0", where=where)
    return {name: None if value is None else float(value) for name, value in theta.items()}


def _pattern(raw: dict[str, Any], layers: int, usual: int, where: object) -> int:
    """The layer_pattern that gives the file's `layer_types`; of several that do, the architecture's own."""
    types = raw.get("layer_types")
    stated = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern"))
    if types is None:
        return stated if isinstance(stated, int) else usual
    pattern: int
    for pattern in (usual, *range(1, layers + 2)):
        if types == [LOCAL if (layer + 1) % pattern else GLOBAL for layer in range(layers)]:
            return pattern
    raise Error("its layer_types do not make every n-th of its layers global and the others local", where=where)
