"""ModelConfig as the `config.json` of a Hugging Face folder, and back: Gemma 2, and Gemma 3's text models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.files import read_json
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
# The same for the text part of Gemma 3's models for text and images, whose published files leave out most.
BOTH, TEXT_PART = "gemma3", "text_config"
TEXT_DEFAULTS: dict[str, Any] = {
    "model_type": "gemma3_text", "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4,
    "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096,
}  # fmt: skip
FLOATS = {"query_pre_attn_scalar", "attn_logit_softcap", "final_logit_softcap", "rms_norm_eps"}
# A file may say anything: sizes beyond these no machine could hold, and a network of so many layers takes for ever.
LARGEST, MOST_LAYERS, LONGEST = 1 << 24, 1000, 1 << 40
GELU = ("gelu_pytorch_tanh", "gelu_new", None)  # two names of the tanh form
CONFIG = "config.json"
MOST_CONFIG = 1 << 20  # bytes; published ones have a thousand
AGAIN = "fetch or save the file again"
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def read_config(folder: Path) -> ModelConfig:
    """The network that a folder's config.json describes. Raises Error as `from_hf` does, or when it cannot be read."""
    return from_hf(read_limited(folder / CONFIG, MOST_CONFIG), folder / CONFIG)


def read_limited(path: Path, most: int) -> Any:
    """A small JSON file of a stranger's. Raises Error for more than `most` bytes, as `read_json` does besides."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path) from error
    if size > most:
        raise Error(f"has {size:,} bytes, far more than such a file needs", where=path, fix=AGAIN)
    if not path.is_file():
        raise Error("is no file", where=path)
    return read_json(path)


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
    if kind == BOTH:
        part = raw.get(TEXT_PART)
        if not isinstance(part, dict):
            raise Error(f"has no '{TEXT_PART}', the part that this package opens of a {BOTH} model", where=where)
        tied = {"tie_word_embeddings": raw["tie_word_embeddings"]} if "tie_word_embeddings" in raw else {}
        raw = TEXT_DEFAULTS | tied | part
        kind = raw["model_type"]
    if not isinstance(kind, str) or kind not in DEFAULTS:
        known = f"only {', '.join(DEFAULTS)} and the text part of {BOTH} can be opened"
        raise Error(f"holds a model of type {kind!r:.60}", where=where, fix=known)
    _refuse_variants(raw, where)
    fields = COMMON_DEFAULTS | DEFAULTS[kind] | raw
    values: dict[str, Any] = {}
    for ours, theirs in FIELDS.items():
        if theirs not in fields:
            raise Error(f"has no field '{theirs}'", where=where)
        values[ours] = _checked(ours, theirs, fields[theirs], where)
    if (width := values["num_heads"] * values["head_dim"]) > LARGEST:
        raise Error(f"all heads together are {width:,} wide, more than {LARGEST:,}", where=where)
    values |= _rotary(raw, kind, where)
    values["qk_norm"] = kind == "gemma3_text"
    values["layer_pattern"] = _pattern(raw, values["num_layers"], 6 if values["qk_norm"] else 2, where)
    return ModelConfig(**values)


def _refuse_variants(raw: dict[str, Any], where: object) -> None:
    # The newer spelling counts where both are there. The older one says gelu in Gemma's first files and means tanh's.
    newer = raw.get("hidden_activation") is not None
    wanted: dict[str, tuple[Any, ...]] = {
        "hidden_activation" if newer else "hidden_act": GELU if newer else (*GELU, "gelu"),
        "attention_bias": (False, None),
        "use_bidirectional_attention": (False, None),
        "quantization_config": (None,),
    }
    for name, allowed in wanted.items():
        if raw.get(name) not in allowed:
            raise Error(f"{name} is {raw[name]!r:.100}, which this network does not have", where=where)


def _checked(ours: str, theirs: str, value: Any, where: object) -> Any:
    if value is None and ours.endswith("softcap"):
        return None
    kind = "true or false" if ours == "tie_embeddings" else "a number" if ours in FLOATS else "a whole number"
    number = isinstance(value, int | float if ours in FLOATS else int)
    if not number or isinstance(value, bool) != (ours == "tie_embeddings"):
        raise Error(f"{theirs} is {value!r:.100}, which is not {kind}", where=where)
    if isinstance(value, bool):
        return value
    if ours in FLOATS:
        return _number(theirs, value, where)
    limit = {"num_layers": MOST_LAYERS, "max_position": LONGEST, "sliding_window": LONGEST}.get(ours, LARGEST)
    if not 0 < value <= limit:
        raise Error(f"{theirs} is {value!r:.40}, which is not within 1 and {limit:,}", where=where)
    return value


def _number(name: str, value: Any, where: object) -> float:
    """A number above 0 as a float that computes: huge integers, NaN and infinity are JSON to Python too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-30 < value < 1e30:
        raise Error(f"{name} is {value!r:.100}, which is not a number above 0", where=where)
    return float(value)


def _rotary(raw: dict[str, Any], kind: str, where: object) -> dict[str, float | None]:
    """Rotary bases, from `rope_parameters` (transformers 5) or the plain fields before it."""
    parameters = _rope(raw, "rope_parameters", where)
    scaling = _rope(raw, "rope_scaling", where)
    nested = {name: _rope(parameters, name, where) for name in (GLOBAL, LOCAL)}
    for part in (scaling, parameters, *nested.values()):
        shape = part.get("rope_type", part.get("type", "default"))
        if shape != "default" and not (shape == "linear" and part.get("factor") == 1):
            what = f"positions are scaled (rope_scaling {part!r:.100}), which this network does not do"
            raise Error(what, where=where)
    if kind == "gemma2":
        theta = parameters.get("rope_theta", raw.get("rope_theta", 10_000.0))
        return {"rope_theta": _number("rope_theta", theta, where), "rope_local_theta": None}
    theta = nested[GLOBAL].get("rope_theta", raw.get("rope_theta", 1_000_000.0))
    local = nested[LOCAL].get("rope_theta", raw.get("rope_local_base_freq", 10_000.0))
    return {
        "rope_theta": _number("rope_theta", theta, where),
        "rope_local_theta": _number("rope_local_base_freq", local, where),
    }


def _rope(raw: dict[str, Any], name: str, where: object) -> dict[str, Any]:
    part = raw.get(name)
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise Error(f"{name} is {part!r:.100}, which is not an object", where=where)
    return part


def _pattern(raw: dict[str, Any], layers: int, usual: int, where: object) -> int:
    """The layer_pattern that gives the file's `layer_types`; of several that do, the architecture's own."""
    types = raw.get("layer_types")
    stated = raw.get("sliding_window_pattern", raw.get("_sliding_window_pattern"))
    if types is None:
        if stated is None:
            return usual
        if isinstance(stated, bool) or not isinstance(stated, int) or stated < 1:
            raise Error(f"sliding_window_pattern is {stated!r:.100}, which is not a whole number above 0", where=where)
        return min(stated, layers + 1)
    pattern: int
    for pattern in (usual, *range(1, layers + 2)):
        if types == [LOCAL if (layer + 1) % pattern else GLOBAL for layer in range(layers)]:
            return pattern
    raise Error("its layer_types do not make every n-th of its layers global and the others local", where=where)
