"""The Hugging Face folder of a Gemma 2 or Gemma 3 text model: what `transformers`, vLLM, llama.cpp's converter take."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from gemstill.checkpoint import sidecars
from gemstill.checkpoint.hf_config import BOTH, CONFIG, MOST_CONFIG, from_hf, read_limited, to_hf
from gemstill.checkpoint.safetensors_file import INDEX, WEIGHTS, Weights, write_weights
from gemstill.checkpoint.tensors import DTYPES, check_float16, check_names, check_vocabulary, listed, packed
from gemstill.core.errors import Error
from gemstill.core.files import write_json, writing
from gemstill.core.notices import note
from gemstill.model.config import ModelConfig
from gemstill.model.quantized import expect_plain, kind_of, put_weights
from gemstill.model.transformer import Transformer
from gemstill.ops.packed import Weight
from gemstill.text.tokenizer import Tokenizer

MARK = "gemstill_version"  # a field of config.json: who wrote the folder, so who may write over it
SHARD = 5 * 10**9  # bytes of weights in one file at most, as the hub has it
# All that `save_folder` and the tokenizer write: a folder with anything else in it holds someone's work.
OURS = frozenset({
    CONFIG, WEIGHTS, INDEX, "generation_config.json", "tokenizer_config.json", "README.md",
    "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja",
})  # fmt: skip
_SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
# How the text part is called in a checkpoint for text and images: as published, and as `transformers` has it since.
_TEXT_PARTS = (("language_model.model.", "language_model."), ("model.language_model.", ""))


def load_folder(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Transformer, Tokenizer]:
    """Open a checkpoint folder: its network, weights stored in `dtype` (default: as in the file), and its tokenizer.

    quantize: pack the matrices as `quantize_model` does, each as it is read.

    On the CPU, weights that keep their dtype are mapped from the file, not read: memory holds one copy at most.
    Of a Gemma 3 model for text and images the text part is opened, and that is said.

    Raises:
        Error: no such folder, a file missing or damaged, another architecture, tensors missing, superfluous or
            of another shape or type (each by name), a tokenizer with more entries than the model, float16 for
            a network whose activations overflow it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise Error(what, where=folder, fix="name the folder of a checkpoint")
    raw = read_limited(folder / CONFIG, MOST_CONFIG)
    config = from_hf(raw, folder / CONFIG)
    check_float16(config, dtype, folder)
    tokenizer = Tokenizer.open(folder)
    check_vocabulary(config, tokenizer, folder)
    weights = Weights(folder, device)
    with torch.device("meta"):
        model = Transformer(config)
    names = _names(weights, model, with_images=raw["model_type"] == BOTH)
    put_weights(model, {ours: _weight(weights, ours, theirs, dtype, quantize) for ours, theirs in names.items()})
    return model, tokenizer


def _weight(weights: Weights, ours: str, theirs: str, dtype: torch.dtype | None, quantize: str | None) -> Weight:
    if quantize is None or len(weights.shapes[theirs]) != 2:
        return weights.read(theirs, dtype)
    return packed(weights.read(theirs), kind_of(ours, quantize))


def _names(weights: Weights, model: Transformer, *, with_images: bool) -> dict[str, str]:
    """Our name -> the file's, of all parameters, once it is sure that the file has them and nothing else."""
    body, rest, found = "model.", "", set(weights.shapes)
    if with_images:
        parts = [part for part in _TEXT_PARTS if part[0] + _EMBEDDING in found] or [_TEXT_PARTS[0]]
        body, rest = parts[0]
        text = {name for name in found if name.startswith((body, rest + _HEAD))}
        note(
            f"only the text part of this model for text and images is opened, {len(found) - len(text)} tensors "
            "of the rest are left",
            where=weights.folder,
        )
        found = text

    def theirs(name: str) -> str:
        return rest + name if name == _HEAD else body + name

    head, embedding = theirs(_HEAD), theirs(_EMBEDDING)
    rows = list(model.embed_tokens.weight.shape)
    twice = all(weights.shapes.get(name) == rows and name not in weights.unreadable for name in (head, embedding))
    if model.lm_head is None and twice:
        # Some tools write the tied head out. The same matrix twice is one matrix; another one is not tied.
        if not _equal(weights.read(head), weights.read(embedding)):
            raise Error(f"{head} differs from {embedding}, though config.json says they are tied", where=weights.folder)
        note(f"{head} is the embedding once more and is left out", where=weights.folder)
        found.discard(head)
    shapes = {name: weights.shapes[name] for name in sorted(found)}
    check_names(shapes, model, where=weights.folder, spell=theirs, unreadable=weights.unreadable)
    return {name: theirs(name) for name, _ in model.named_parameters()}


def _equal(a: Tensor, b: Tensor, rows: int = 4096) -> bool:
    """Whether two matrices are the same, NaN included, compared a few rows at a time."""
    if a.dtype != b.dtype or a.ndim != b.ndim:
        return False
    pairs = zip(torch.split(a, rows), torch.split(b, rows), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def save_folder(
    model: Transformer,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write `model` and `tokenizer` as a Hugging Face folder, whole or not at all, in several files above 5 GB.

    dtype: of the weights in the file; by default each keeps its own. They are converted as they are written:
    no second copy of them is ever held. card: the model card (README.md), Markdown; by default one with the
    sizes alone.

    Raises:
        Error: `folder` is there and is neither empty nor a checkpoint that `save_folder` wrote; it cannot be
            written; the tokenizer has more entries than the model; a dtype that no weights have, or that does
            not hold these; the model is quantized.
    """
    expect_plain(model, "written as a folder", fix="write a GGUF file, or load it without quantize")
    folder = Path(folder).resolve()  # a link to a checkpoint stays a link
    config = model.config
    check_vocabulary(config, tokenizer, folder)
    described = to_hf(config)
    check_replaceable(folder)
    tensors = {_their_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    _check_dtype(config, tensors, dtype, folder)
    dtypes = {str(dtype or tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    described["dtype"] = described["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    described |= sidecars.special_ids(tokenizer)
    described[MARK] = sidecars.version()
    with writing(folder, folder=True) as partial:
        sidecars.write_tokenizer(partial, tokenizer)
        write_json(partial / "generation_config.json", sidecars.generation_config(tokenizer))
        write_json(partial / CONFIG, described)
        (partial / "README.md").write_text(card or sidecars.default_card(config), encoding="utf-8")
        write_weights(partial, tensors, dtype, SHARD)


def _their_name(name: str) -> str:
    return name if name == _HEAD else f"model.{name}"


def _check_dtype(config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype | None, folder: Path) -> None:
    """float16 is the one dtype that may not hold what another holds."""
    kinds = {dtype} if dtype else {tensor.dtype for tensor in tensors.values()}
    if strangers := kinds - set(DTYPES):
        raise Error(f"weights are not stored as {strangers.pop()}", where=folder, fix="take bfloat16")
    if torch.float16 not in kinds:
        return
    check_float16(config, torch.float16, folder)
    limit = torch.finfo(torch.float16).max
    large = [name for name, tensor in tensors.items() if tensor.numel() and not tensor.abs().max() <= limit]
    if large:
        raise Error(f"weights overflow float16: {listed(large)}", where=folder, fix="take bfloat16")


def check_replaceable(folder: Path) -> None:
    """Let `save_folder` replace nothing but an empty folder or a checkpoint of its own."""
    if not folder.is_dir():
        return  # `writing` refuses a file
    names = sorted(path.name for path in folder.iterdir())
    fix = "name another folder"
    if strangers := [name for name in names if name not in OURS and not _SHARD_NAME.fullmatch(name)]:
        raise Error(f"holds files that no checkpoint of ours has ({listed(strangers)})", where=folder, fix=fix)
    if not names:
        return
    try:
        marked = MARK in json.loads((folder / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        marked = False
    if not marked:
        raise Error("is a folder that gemstill did not write", where=folder, fix=fix)
