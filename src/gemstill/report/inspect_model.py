"""A model described from what its files say of their tensors; the tensors themselves stay on the disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gemstill.checkpoint import gguf, google, hf_config, safetensors_file
from gemstill.checkpoint.gguf_config import check_runs_alike, from_fields
from gemstill.checkpoint.gguf_file import RARE, GgufFile
from gemstill.checkpoint.look import Found
from gemstill.checkpoint.source import find
from gemstill.checkpoint.tensors import check_names, check_vocabulary
from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.model.config import ModelConfig
from gemstill.model.slots import SlotCache
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.turns import encode_turns

CONTEXTS = (1024, 4096, 8192, 32_768, 131_072)
# Bytes of a weight of a matrix and of the embedding, and of an entry of the cache. Norms are small and float32.
PRECISIONS = {
    "float32": (4.0, 4.0, torch.float32),
    "bfloat16": (2.0, 2.0, torch.bfloat16),
    "q8_0 (llama.cpp)": (34 / 32, 34 / 32, torch.bfloat16),
    "q4_0 (llama.cpp)": (18 / 32, 34 / 32, torch.bfloat16),
}
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_KINDS = (  # the end of a parameter's name -> what it is, and the part of the network it belongs to
    ("embed_tokens", "embedding", "embedding"),
    ("lm_head", "head", "head"),
    ("q_proj", "queries", "attention"),
    ("k_proj", "keys", "attention"),
    ("v_proj", "values", "attention"),
    ("o_proj", "attention's output", "attention"),
    ("gate_proj", "MLP gate", "MLP"),
    ("up_proj", "MLP up", "MLP"),
    ("down_proj", "MLP down", "MLP"),
    ("norm", "norms", "norms"),
)


class Stored(NamedTuple):
    """A tensor as a file has it, under our name where it is one of the network's, else under the file's."""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


class Read(NamedTuple):
    """What a reader of one format found."""

    format: str
    config: ModelConfig
    tensors: list[Stored]
    tokenizer: Tokenizer | None
    facts: dict[str, Any]  # name, licence and the like, as the file has them
    unusual: list[str]


def describe_model(found: Found) -> dict[str, Any]:
    """All that `gemstill inspect` says of a model, as plain values.

    Raises:
        Error: a file so damaged that its tensors cannot be told, or another architecture.
    """
    unusual: list[str] = []
    with _noting(unusual):
        read = _hub(str(found.path)) if found.kind == "hub" else _read(found)
    unusual += read.unusual
    config = read.config
    described: dict[str, Any] = {"format": read.format, **read.facts}
    described["architecture"] = {"family": "Gemma 3 text" if config.qk_norm else "Gemma 2", **asdict(config)}
    described["parameters"] = _parameters(read.tensors)
    described["tensors"] = _by_kind(read.tensors)
    described["bytes"] = sum(tensor.bytes for tensor in read.tensors)
    if read.tokenizer is not None:
        described["tokenizer"], described["template"], more = describe_tokenizer(read.tokenizer)
        unusual += more + _vocabulary(config, read.tokenizer)
    described["memory"] = memory(config)
    unusual += _shape(config) + _types(read.tensors)
    return described | {"unusual": list(dict.fromkeys(unusual))}


def describe_tokenizer(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """A tokenizer, its chat template, and what is unusual about them."""
    ids = {name: getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad", "unk")}
    described: dict[str, Any] = {"entries": tokenizer.vocab_size, "control_tokens": len(tokenizer.control_ids)}
    described |= {f"{name}_id": number for name, number in ids.items()}
    described |= {"fingerprint": tokenizer.fingerprint}
    notes: list[str] = []
    own, turns = tokenizer.chat_template, "as in the Gemma report"
    with _noting(notes):
        try:
            encode_turns(tokenizer, [{"role": "user", "content": "x"}])
        except Error as error:
            turns = f"none: {error.what}"
    if notes:
        turns = "its own, which differ from the Gemma report's"
    template = {"own": own is not None, "characters": len(own or ""), "turns": turns}
    return described, template, [] if own else ["there is no chat template in the file"]


def memory(config: ModelConfig) -> list[dict[str, Any]]:
    """Bytes of weights, and of weights with a full cache at each context length, at each precision."""
    contexts = [length for length in CONTEXTS if length < config.max_position] + [config.max_position]
    norms = (4 * config.hidden_size + (2 * config.head_dim if config.qk_norm else 0)) * config.num_layers
    matrices = config.body_parameters - norms - config.hidden_size
    rows = []
    for precision, (body, embedding, cached) in PRECISIONS.items():
        weights = int(matrices * body + config.embedding_parameters * embedding + 4 * (norms + config.hidden_size))
        caches = {length: SlotCache.bytes_of(config, length, cached) for length in contexts}
        rows.append({
            "precision": precision,
            "weights_bytes": weights,
            "with_context_bytes": {str(length): weights + size for length, size in caches.items()},
        })  # fmt: skip
    return rows


@contextmanager
def _noting(into: list[str]) -> Iterator[None]:
    """Collect what the readers say in passing, instead of having it printed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Notice)
        yield
    into += [str(warning.message) for warning in caught if issubclass(warning.category, Notice)]


def _is_google(path: Path) -> bool:
    return path.is_file() or ((path / google.INDEX).exists() and not any(path.glob("*.safetensors")))


def _read(found: Found) -> Read:
    path = find(found.path)
    if found.kind == "gguf":
        return _gguf(path)
    return _google(path) if _is_google(path) else _folder(path, safetensors_file.Weights(path, None).headers)


def _hub(name: str) -> Read:
    from gemstill.checkpoint.hub import describe

    return _folder(*describe(name))


def _folder(folder: Path, weights: safetensors_file.Headers) -> Read:
    path = folder / hf_config.CONFIG
    raw = hf_config.read_limited(path, hf_config.MOST_CONFIG)
    config, unusual = hf_config.from_hf(raw, path), []
    tensors = []
    for name, shape in weights.shapes.items():
        kind = weights.types[name]
        ours = re.sub(r"^(language_model\.)?(model\.)?(language_model\.)?", "", name)
        tensors.append(Stored(ours, tuple(shape), kind, prod(shape) * _BITS.get(kind, 8) // 8))
    if config.tie_embeddings and any(tensor.name == "lm_head.weight" for tensor in tensors):
        unusual.append("the head is stored though it is the embedding once more")
        tensors = [tensor for tensor in tensors if tensor.name != "lm_head.weight"]
    elif raw["model_type"] == hf_config.BOTH:
        wanted = _parameter_names(config)
        others = [tensor for tensor in tensors if tensor.name not in wanted]
        unusual.append(f"{len(others)} tensors are not of the text part, which alone is opened")
        tensors = [tensor for tensor in tensors if tensor.name in wanted]
    unusual += _differences(tensors, config, {t.name: t.type for t in tensors if t.name in weights.unreadable})
    unusual += _programs(folder, raw)
    facts = {"written_by_gemstill": raw["gemstill_version"]} if "gemstill_version" in raw else {}
    files = set(weights.files.values())
    tokenizer = _opened(unusual, lambda: Tokenizer.open(folder))
    if not (folder / "tokenizer.model").is_file():
        unusual.append("there is no tokenizer.model, which llama.cpp's converter asks for")
    what = "Hugging Face folder" + (f", weights in {len(files)} files" if len(files) > 1 else "")
    return Read(what, config, tensors, tokenizer, facts, unusual)


def _gguf(path: Path) -> Read:
    file = GgufFile(path)
    embedding = file.tensors.get(gguf.EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise Error(f"has no matrix {gguf.EMBEDDING}", where=path)
    config = from_fields(file.fields, embedding.shape, gguf.HEAD not in file.tensors, path)
    ours = {gguf.their_name(name): name for name in _parameter_names(config)}
    tensors = [
        Stored(ours.get(info.name, info.name), info.shape, info.block.name, info.nbytes)
        for info in file.tensors.values()
    ]
    unusual = _differences(tensors, config, {})
    if rare := sorted({tensor.type for tensor in tensors} & RARE.keys()):
        unusual.append(f"tensors in {', '.join(rare)}, which the package gguf has to read")
    facts = {}
    for name in ("name", "license", "organization", "finetune"):
        value = file.fields.get(f"general.{name}")
        if isinstance(value, str):
            facts[name] = value[:200]
    tokenizer = _opened(unusual, lambda: gguf.read_tokenizer(file))
    return Read(f"GGUF file, version {file.version}", config, tensors, tokenizer, facts, unusual)


def _google(path: Path) -> Read:
    model, tokenizer = google.load_google(path)
    tensors = [
        Stored(name, tuple(p.shape), _spelt(p.dtype), p.numel() * p.element_size())
        for name, p in model.named_parameters()
    ]
    return Read("PyTorch file of gemma_pytorch", model.config, tensors, tokenizer, {}, [])


def _spelt(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}.get(name, name)


def _opened(unusual: list[str], opening: Any) -> Tokenizer | None:
    """The tokenizer, or None and what is wrong with it among what is unusual."""
    try:
        found: Tokenizer = opening()
    except Error as error:
        unusual.append(f"its tokenizer cannot be used: {error}")
        return None
    return found


def _parameter_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in Transformer(config).named_parameters()]


def _differences(tensors: list[Stored], config: ModelConfig, unreadable: dict[str, str]) -> list[str]:
    """What a file has too much, too little or of another shape for the network that it describes."""
    with torch.device("meta"):
        model = Transformer(config)
    try:
        check_names({t.name: t.shape for t in tensors}, model, where="", unreadable=unreadable)
    except Error as error:
        return error.what.split("; ")
    return []


def _kind(name: str) -> tuple[str, str]:
    stem = name.removesuffix(".weight")
    return next(((kind, part) for end, kind, part in _KINDS if stem.endswith(end)), ("others", "others"))


def _parameters(tensors: list[Stored]) -> dict[str, Any]:
    parts = {part: 0 for _, _, part in _KINDS} | {"others": 0}
    for tensor in tensors:
        parts[_kind(tensor.name)[1]] += prod(tensor.shape)
    parts = {part: count for part, count in parts.items() if count}
    body = sum(count for part, count in parts.items() if part not in ("embedding", "head"))
    return {"total": sum(parts.values()), "without_embedding": body, "parts": parts}


def _by_kind(tensors: list[Stored]) -> list[dict[str, Any]]:
    order = {kind: number for number, (_, kind, _) in enumerate(_KINDS)}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for tensor in tensors:
        kind = _kind(tensor.name)[0]
        new = {"kind": kind, "type": tensor.type, "count": 0, "parameters": 0, "bytes": 0}
        row = rows.setdefault((kind, tensor.type), new)
        row["count"] += 1
        row["parameters"] += prod(tensor.shape)
        row["bytes"] += tensor.bytes
    return sorted(rows.values(), key=lambda row: (order.get(row["kind"], len(order)), row["type"]))


def _vocabulary(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    unusual: list[str] = []
    try:
        with _noting(unusual):
            check_vocabulary(config, tokenizer, "")
    except Error as error:
        return [error.what]
    if (extra := config.vocab_size - tokenizer.vocab_size) > 0:
        unusual.append(
            f"{extra:,} rows of the embedding are padding: the tokenizer has {tokenizer.vocab_size:,} entries"
        )
    return unusual


def _shape(config: ModelConfig) -> list[str]:
    unusual = []
    if config.query_pre_attn_scalar != config.head_dim:
        unusual.append(
            f"queries are scaled by {config.query_pre_attn_scalar:g}^-½, not by head_dim's {config.head_dim}"
        )
    if config.layer_pattern != (6 if config.qk_norm else 2):
        unusual.append(f"every {config.layer_pattern}th layer is global, where its family has another pattern")
    if not config.qk_norm and None in (config.attn_logit_softcap, config.final_logit_softcap):
        unusual.append("a soft cap is missing, which Gemma 2 has")
    if config.hidden_size % 32 or config.intermediate_size % 32 or config.num_heads * config.head_dim % 32:
        unusual.append("widths are no multiples of 32: GGUF's blocks cannot hold them")
    try:
        check_runs_alike(config)
    except Error as error:
        unusual.append(f"llama.cpp would run it wrongly: {error.what}")
    return unusual


def _types(tensors: list[Stored]) -> list[str]:
    unusual = []
    matrices = {tensor.type for tensor in tensors if len(tensor.shape) > 1}
    if "F16" in matrices:
        unusual.append("weights are float16: Gemma 3's activations overflow it, compute in bfloat16 or float32")
    if len(matrices & {"F64", "F32", "F16", "BF16"}) > 1:
        unusual.append(f"matrices are of several types: {', '.join(sorted(matrices))}")
    return unusual


def _programs(folder: Path, raw: dict[str, Any]) -> list[str]:
    """What a folder offers to run, which nothing here does."""
    unusual = []
    if "auto_map" in raw:
        unusual.append("config.json names Python code of its own, which is never run")
    found = sorted(item.name for item in folder.iterdir() if item.suffix in (".py", ".pkl", ".pt", ".pth", ".bin"))
    if found:
        unusual.append(f"programs or pickles, which are not opened: {', '.join(found[:8])}")
    return unusual
