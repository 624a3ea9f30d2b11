"""GGUF files of Gemma 2 and Gemma 3 text models, in and out: the files that llama.cpp, Ollama and LM Studio run."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemstill.checkpoint.gguf_config import architecture, from_fields, to_fields
from gemstill.checkpoint.gguf_file import RARE, GgufFile, Out, TensorInfo, write_gguf
from gemstill.checkpoint.tensors import DTYPES, check_float16, check_names, check_vocabulary, release
from gemstill.core import machine
from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.model.config import ModelConfig
from gemstill.model.quantized import kind_of, named_weights, put_weights
from gemstill.model.transformer import Transformer
from gemstill.ops.blocks import BLOCKS, Block, dequantize, quantize
from gemstill.ops.packed import MADE, Packed, Weight, from_blocks, pack_rows
from gemstill.ops.panels import FORMATS
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.vocabulary import UNUSED, Vocabulary

# Ours -> theirs; within a layer, after "layers.N." and "blk.N.".
OUTER = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# llama.cpp's numbers for what a file holds mostly: those that can be written, and of blocks that are kept.
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
KEPT_TYPES = {"q5_0": 8, "q4_k": 15, "q5_k": 17, "q6_k": 18}
EXACT = "gemstill.exact."  # + a norm's name: weights that its gain in the file does not give back
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_EMBEDDING = "embed_tokens.weight"
_PER_LAYER = 9  # tensors at least
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_COPY = 1 << 23  # weights converted and written at once


def their_name(name: str) -> str:
    """The file's name of one of our parameters.

    >>> their_name("layers.3.mlp.up_proj.weight")
    'blk.3.ffn_up.weight'
    """
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{OUTER[stem]}.weight"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{INNER[part]}.weight"


def load_gguf(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Transformer, Tokenizer]:
    """Open a GGUF file: its network and its tokenizer, with the chat template where the file has one.

    dtype: of the stored weights. By default those in F32, F16 and BF16 keep theirs and, on the CPU, are mapped
    from the file; those in blocks become bfloat16, half of float32's memory and finer than any of the blocks.
    Norms, which files hold in float32, take the matrices' dtype where that loses nothing. Tensor by tensor:
    no second copy of the weights is ever held.

    quantize: pack the matrices as `quantize_model` does, each as it is read; "file" keeps the file's own blocks,
    not through floats, and its matrices in F32, F16 and BF16 as they are.

    Raises:
        Error: no such file, damaged, another architecture, tensors missing, superfluous or of another shape (each
            by name), blocks of a rare format without the package `gguf`, or that are to be kept, no tokenizer of
            Gemma's kind, float16 for a network whose activations overflow it.
    """
    file = GgufFile(path)
    tokenizer_fields = _check_kind(file)
    config = _config(file)
    check_float16(config, dtype, path)
    with torch.device("meta"):
        model = Transformer(config)
    check_names({name: info.shape for name, info in file.tensors.items()}, model, where=path, spell=their_name)
    tokenizer = _tokenizer(file, tokenizer_fields)
    check_vocabulary(config, tokenizer, path)
    del tokenizer_fields  # a vocabulary's texts are 25 MB that the weights may have
    file.fields = {key: value for key, value in file.fields.items() if key.startswith(EXACT)}
    names = {name: their_name(name) for name, _ in model.named_parameters()}
    state: dict[str, Weight] = {}
    for ours, theirs in names.items():
        if _is_norm(theirs):
            continue
        if quantize is None or (quantize == "file" and file.tensors[theirs].block.size == 1):
            state[ours] = _matrix(file, theirs, dtype).to(device)
        else:
            state[ours] = _packed(file, theirs, kind_of(ours, quantize) if quantize != "file" else "")
    kinds = {tensor.dtype for tensor in state.values()}
    state |= {ours: _norm(file, theirs, dtype, kinds).to(device) for ours, theirs in names.items() if _is_norm(theirs)}
    put_weights(model, state)
    if torch.float16 in kinds:  # to store in it is one thing, to compute in it another
        model.compute_dtype = machine.fast_dtype(str(device))
    return model, tokenizer


def read_gguf_config(path: str | Path) -> ModelConfig:
    """The network that a GGUF file describes, without its weights. Raises Error as `load_gguf` does."""
    return _config(GgufFile(path))


def _config(file: GgufFile) -> ModelConfig:
    embedding = file.tensors.get(EMBEDDING)
    shape = embedding.shape if embedding is not None else ()
    config = from_fields(file.fields, shape, HEAD not in file.tensors, file.path)
    if config.num_layers * _PER_LAYER > len(file.tensors):
        what = f"states {config.num_layers} layers and has {len(file.tensors)} tensors, too few for them"
        raise Error(what, where=file.path, fix="fetch the file again")
    return config


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of an open file alone. Raises Error where it has none of Gemma's kind."""
    return _tokenizer(file, _check_kind(file))


def _is_norm(name: str) -> bool:
    return name.endswith("norm.weight")


def _matrix(file: GgufFile, name: str, dtype: torch.dtype | None) -> Tensor:
    info, data = file.tensors[name], file.data(name)
    plain = info.block.size == 1
    if info.block.name in RARE:
        tensor = _rare(info, data, dtype or torch.bfloat16, file.path)
    else:
        own = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(info.block.name, torch.bfloat16)
        tensor = dequantize(data, info.block.name, dtype or own)
    if not plain or tensor.data_ptr() != data.data_ptr():
        release(data)
    return tensor


def _packed(file: GgufFile, name: str, kind: str) -> Packed:
    """A matrix packed as `kind`, or in its own blocks where that is empty; pages read are given back on the way."""
    info, data = file.tensors[name], file.data(name)
    own = info.block.name
    if own == MADE.get(kind, own):
        if own not in FORMATS:
            what, fix = f"{name} is in the format {own}, whose blocks are not kept", "take quantize='int8' or 'int4'"
            raise Error(what, where=file.path, fix=fix)
        return from_blocks(data, own, release)

    def read(start: int, stop: int) -> Tensor:
        rows = data[start:stop]
        wide = dequantize(rows, own) if own not in RARE else _rare(info, rows, torch.float32, file.path)
        release(rows)
        return wide

    return pack_rows(info.shape, kind, read)


def _rare(info: TensorInfo, data: Tensor, dtype: torch.dtype, where: object) -> Tensor:
    """Blocks that the package `gguf` unpacks, some rows at a time."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        what = f"{info.name} is in the format {info.block.name}, which the package gguf reads"
        raise Error(what, where=where, fix="pip install 'gemstill[gguf]'") from error
    kind = gguf.GGMLQuantizationType(info.block.type)
    rows = data.view(-1, data.shape[-1])
    out = torch.empty(len(rows), info.shape[-1], dtype=dtype)
    step = max(1, _COPY // info.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged file's numbers are its own affair
        for start in range(0, len(rows), step):
            part = gguf.quants.dequantize(rows[start : start + step].numpy(), kind)
            out[start : start + step] = torch.from_numpy(part)
    return out.view(*data.shape[:-1], info.shape[-1])


def _norm(file: GgufFile, name: str, dtype: torch.dtype | None, kinds: set[torch.dtype]) -> Tensor:
    """The weight w of a norm, of which the file holds the gain 1 + w."""
    info = file.tensors[name]
    data = file.copy(name)
    gain = dequantize(data, info.block.name) if info.block.name not in RARE else _rare(info, data, torch.float32, name)
    weight = gain - 1
    exact = file.fields.get(EXACT + name)
    if isinstance(exact, np.ndarray) and exact.dtype == np.float32 and exact.shape == info.shape:
        # Believed only where it gives the gain, which someone may have changed since.
        stored = torch.from_numpy(exact.astype(np.float32))
        weight = torch.where(1 + stored == gain, stored, weight)
    if dtype is None and len(kinds) == 1:
        narrow = weight.to(next(iter(kinds)))
        return narrow if torch.equal(narrow.float(), weight) else weight
    return weight.to(dtype or torch.float32)


def _check_kind(file: GgufFile) -> dict[str, Any]:
    """The file's fields of the tokenizer, their types checked; another architecture is told first."""
    kind = file.fields.get("general.architecture")
    prefix = "tokenizer.ggml."
    fields = {key.removeprefix(prefix): value for key, value in file.fields.items() if key.startswith(prefix)}
    if isinstance(kind, str) and not kind.startswith("gemma"):
        return fields  # the next check names it
    what = ""
    model = fields.get("model")
    if not isinstance(model, str) or model != "llama":  # a list of numbers compares to a list
        what = f"its tokenizer is of the kind {model!r:.40}, not SentencePiece's"
    elif fields.get("add_space_prefix") is True:
        what = "its tokenizer puts a space before a text, which Gemma's does not"
    elif not isinstance(fields.get("tokens"), list):
        what = "has no list of tokens"
    elif not all(isinstance(fields.get(name), np.ndarray) for name in ("scores", "token_type")):
        what = "has no scores or types of its tokens"
    if what:
        raise Error(what, where=file.path, fix="take a file converted with the model's tokenizer.model")
    return fields


def _tokenizer(file: GgufFile, fields: dict[str, Any]) -> Tokenizer:
    pieces, scores, types = fields["tokens"], fields["scores"].tolist(), fields["token_type"].tolist()
    # Rows of the embedding beyond the vocabulary have names in the file, so that each row has one.
    count = len(pieces)
    while count and len(types) == count and types[-1] == UNUSED and pieces[count - 1] == _padding(count - 1):
        count -= 1
        types.pop()
    ids = []
    for name, piece in (("bos", "<bos>"), ("eos", "<eos>"), ("unknown", "<unk>"), ("padding", "<pad>")):
        number = fields.get(f"{name}_token_id", pieces.index(piece) if piece in pieces else -1)
        if isinstance(number, bool) or not isinstance(number, int):
            raise Error(f"{name}_token_id is {number!r:.40}, which is no id", where=file.path)
        ids.append(number)
    template = file.fields.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise Error("its chat template is no text", where=file.path)
    try:
        vocabulary = Vocabulary(pieces[:count], scores[:count], types, *ids)
        return Tokenizer.from_vocabulary(vocabulary, chat_template=template, source=file.path)
    except (Error, TypeError, ValueError, OverflowError) as error:
        what = error.what if isinstance(error, Error) else str(error)
        raise Error(f"its vocabulary cannot be used: {what}", where=file.path) from error


def _padding(number: int) -> str:
    return f"[PAD{number}]"  # llama.cpp's converter calls them so


def save_gguf(model: Transformer, tokenizer: Tokenizer, path: str | Path, *, dtype: str | None = None) -> None:
    """Write one GGUF file with network, tokenizer and chat template, whole or not at all.

    dtype: f32, f16, bf16, q8_0 or q4_0, of all matrices; by default that of the embedding. With q4_0 the
    embedding, which is the head as well, is q8_0. A quantized model's matrices keep their blocks by default. Norms
    are float32. What `load_gguf` reads from a file in f32 (or in the weights' own dtype) is equal bit by bit: where
    1 + w is rounded, w goes into a field of its own. Matrices are converted a few rows at a time.

    Raises:
        Error: a network that llama.cpp would run wrongly, with the reason; a format that does not exist, does not
            hold the weights, or whose blocks do not divide the widths; a tokenizer that is not SentencePiece's or
            has more entries than the model; a place that cannot be written.
    """
    config = model.config
    weights = dict(named_weights(model))
    stored = weights[_EMBEDDING].dtype
    name = dtype or _kept(weights) or _NAMES.get(stored, "")
    if (name not in FILE_TYPES and dtype is not None) or name not in FILE_TYPES | KEPT_TYPES:
        fix = f"take one of {', '.join(FILE_TYPES)}"
        raise Error(f"a GGUF file's weights are not written as '{name or stored}'", where=path, fix=fix)
    fields: dict[str, Any] = {"general.architecture": architecture(config), "general.type": "model"}
    fields |= {"general.name": Path(path).stem, "general.file_type": (FILE_TYPES | KEPT_TYPES)[name]}
    if name.startswith("q"):
        fields["general.quantization_version"] = 2
    fields |= to_fields(config)
    check_vocabulary(config, tokenizer, path)
    if name == "f16" and config.qk_norm:
        note("llama.cpp rounds activations to float16 beside such weights; Gemma 3's may overflow it", where=path)
    fields |= _tokenizer_fields(tokenizer, config.vocab_size)
    tensors = []
    for ours, weight in weights.items():
        theirs = their_name(ours)
        if isinstance(weight, Packed):
            tensors.append(_out_packed(theirs, weight, dtype, path))
            continue
        weight = weight.detach()
        if weight.dtype not in DTYPES:
            raise Error(f"{ours} is stored as {weight.dtype}", where=path, fix="take bfloat16")
        if _is_norm(theirs):
            wide = weight.float().cpu()
            if not torch.equal((1 + wide) - 1, wide):
                fields[EXACT + theirs] = wide.numpy()
            tensors.append(_out(theirs, 1 + wide, "f32", path))
        else:
            own = name if dtype or not _kept(weights) else _NAMES[weight.dtype]
            tensors.append(_out(theirs, weight, _embedded(theirs, own), path))
    write_gguf(path, fields, tensors)


def _kept(weights: Mapping[str, Weight]) -> str:
    """The block format that a model's packed matrices have mostly, in lower case; empty where none is packed."""
    counts: Counter[str] = Counter()
    for weight in weights.values():
        if isinstance(weight, Packed):
            counts[weight.name.lower()] += weight.numel()
    return counts.most_common(1)[0][0] if counts else ""


def _embedded(name: str, kind: str) -> str:
    return "q8_0" if kind == "q4_0" and name in (EMBEDDING, HEAD) else kind


def _out_packed(name: str, weight: Packed, dtype: str | None, path: str | Path) -> Out:
    """A packed matrix, in its own blocks or in those of `dtype`."""
    if dtype is None or _embedded(name, dtype).upper() == weight.name:
        return Out(name, weight.shape, BLOCKS[weight.name], weight.parts)
    block = _block(name, weight.shape, _embedded(name, dtype), path)
    step = max(1, _COPY // weight.shape[-1])
    starts = range(0, len(weight), step)
    return Out(name, weight.shape, block, lambda: (quantize(weight.rows(at, at + step), block.name) for at in starts))


def _block(name: str, shape: tuple[int, ...], kind: str, path: str | Path) -> Block:
    """The block format of a matrix. Raises Error where it does not divide the matrix's rows."""
    block = BLOCKS[kind.upper()]
    if shape[-1] % block.size:
        what = f"{name} has rows of {shape[-1]} weights, which blocks of {block.size} do not divide"
        raise Error(what, where=path, fix="take f32, f16 or bf16")

    return block


def _out(name: str, weight: Tensor, kind: str, path: str | Path) -> Out:
    block = _block(name, tuple(weight.shape), kind, path)

    def parts() -> Iterator[Tensor]:
        for part in torch.split(weight, max(1, _COPY // weight.shape[-1])):
            try:
                yield quantize(part.cpu(), kind)
            except Error as error:
                raise Error(f"{name}: {error.what}", where=path, fix="take bf16") from error

    return Out(name, tuple(weight.shape), block, parts)


def _tokenizer_fields(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    vocabulary = tokenizer.vocabulary()
    extra = range(len(vocabulary.pieces), rows)
    fields: dict[str, Any] = {
        "model": "llama",
        "pre": "default",
        "tokens": [*vocabulary.for_gguf()[:rows], *map(_padding, extra)],
        "scores": np.array([*vocabulary.scores[:rows], *(-10_000.0 for _ in extra)], np.float32),
        "token_type": np.array([*vocabulary.types[:rows], *(UNUSED for _ in extra)], np.int32),
    }
    ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "unknown": tokenizer.unk_id, "padding": tokenizer.pad_id}
    fields |= {f"{name}_token_id": number for name, number in ids.items()}
    if (turn := tokenizer.token_id("<end_of_turn>")) is not None:
        fields["eot_token_id"] = turn
    fields |= {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": False}
    fields = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    return fields | ({"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {})
