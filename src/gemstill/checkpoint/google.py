"""Google's own PyTorch files: the layout of github.com/google/gemma_pytorch, a pickle opened as data alone.

A file holds {"model_state_dict": {name: tensor}}; a folder with `pytorch_model.bin.index.json` holds several, each
the plain dictionary of some of the tensors. Names are those of a Hugging Face folder but for the embedding, the
norms of queries and keys, and queries, keys and values, which are one matrix. Norms hold the weight without the one
that is added to it, as everywhere but in GGUF. The tokenizer is the SentencePiece model beside it.
"""

from __future__ import annotations

import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemstill.checkpoint.hf_config import CONFIG, read_config, read_limited
from gemstill.checkpoint.tensors import DTYPES, check_float16, check_names, check_vocabulary, converted, packed
from gemstill.core.errors import Error
from gemstill.model.config import PRESETS, ModelConfig
from gemstill.model.quantized import kind_of, put_weights
from gemstill.model.transformer import Transformer
from gemstill.ops.packed import Weight
from gemstill.text.tokenizer import Tokenizer

INDEX = "pytorch_model.bin.index.json"
TOKENIZER = "tokenizer.model"
_SHARD = re.compile(r"[\w][\w.\-]*\.(bin|ckpt|pt|pth)", re.ASCII)
_MOST_INDEX = 4 << 20  # bytes
_MOST_PICKLE = 1 << 20  # bytes; that of a 27B model has 80,000, and each byte can ask for an object of a hundred
_EMBEDDING = "embedder.weight"
_TABLES = ("freqs_cis", "local_freqs_cis", "global_freqs_cis")  # rotary angles, which are computed here
_LAYER = re.compile(r"model\.layers\.(\d{1,3})\.")
# The context and window of Gemma 3's text models, whose file does not say them: 270M and 1B have the same.
_GEMMA3 = PRESETS["gemma3-270m"]


def load_google(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Transformer, Tokenizer]:
    """Open a file of `gemma_pytorch`, or the folder of one in several files, beside its `tokenizer.model`.

    On the CPU, weights that keep their dtype are mapped from the file. Nothing in the pickle is run: a file with
    anything but tensors in it is refused. What the file does not say (heads, window) is that of the published
    model of these sizes, or stands in a `config.json` beside it, as a Hugging Face folder has it. quantize: pack the
    matrices as `quantize_model` does, each as it is read.

    Raises:
        Error: no such file, one that is no such checkpoint or holds anything but tensors, a model whose shape is
            not known, another architecture, tensors missing, superfluous or of another shape or type (by name).
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    tensors = _read(path)
    config = _config(tensors, folder, path)
    check_float16(config, dtype, path)
    words = folder / TOKENIZER
    if not words.is_file():
        raise Error(f"has no {TOKENIZER} beside it", where=path, fix="put the model's SentencePiece file there")
    tokenizer = Tokenizer.open(words)
    check_vocabulary(config, tokenizer, path)
    with torch.device("meta"):
        model = Transformer(config)
    found = _unfused(tensors, config)
    unreadable = {name: str(t.dtype).removeprefix("torch.") for name, t in found.items() if t.dtype not in DTYPES}
    check_names({name: t.shape for name, t in found.items()}, model, where=path, unreadable=unreadable)
    state: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        if quantize is not None and parameter.ndim == 2:
            state[name] = packed(found[name], kind_of(name, quantize))
        else:
            state[name] = converted(found[name], dtype).to(device)
    put_weights(model, state)
    return model, tokenizer


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, or of those that a folder's index names, under the file's names, none of them read."""
    if not path.is_dir():
        whole = _unpickle(path)
        state = whole.get("model_state_dict") if isinstance(whole, dict) else None
        if state is None:
            raise Error("has no 'model_state_dict', so gemma_pytorch did not write it", where=path)
        return _tensors(state, path)
    index = read_limited(path / INDEX, _MOST_INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        places = {}
    files = list(places.values())
    if not files or not all(isinstance(file, str) and _SHARD.fullmatch(file) for file in files):
        raise Error("has no 'weight_map' from tensors to files of this folder", where=path / INDEX)
    if _EMBEDDING not in places:
        fix = "convert it to safetensors"
        raise Error(f"holds pickled weights that are not gemma_pytorch's (no {_EMBEDDING})", where=path, fix=fix)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files)):
        part = _tensors(_unpickle(path / file), path / file)
        if twice := tensors.keys() & part.keys():
            raise Error(f"holds {sorted(twice)[0]!r:.100}, which another file holds too", where=path / file)
        tensors |= part
    return tensors


def _unpickle(path: Path) -> Any:
    """What torch saved in a file, mapped; of all that a pickle may do, only the making of tensors is allowed."""
    try:
        with path.open("rb") as handle:
            if handle.read(4) != b"PK\x03\x04":
                raise Error("is not a file that torch saved", where=path, fix="fetch it again")
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise Error(f"cannot be read ({error.strerror})", where=path) from error
    except Error:
        raise
    except Exception as error:  # a stranger's pickle fails in whatever way it likes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        what = f"is refused: it holds more than tensors, or is damaged ({reason[:200]})"
        raise Error(what, where=path, fix="fetch it again, from someone you trust") from error


def _check_archive(path: Path) -> None:
    """See that the archive's members are stored as they are, as torch saves them: packed ones could be any size."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise Error(f"holds {member.filename!r:.100} packed, as torch saves nothing", where=path)
            if "/data/" not in member.filename and member.file_size > _MOST_PICKLE:
                what = f"holds {member.filename!r:.100} of {member.file_size} bytes beside its tensors"
                raise Error(what, where=path, fix="fetch it again")


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a state dictionary, without the tables; each must lie in the file from end to end."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise Error("holds no dictionary of tensors by name", where=path)
    size = path.stat().st_size
    for name, tensor in state.items():
        # Strides can make a small file a tensor of any size.
        whole = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.is_contiguous()
        if not whole or tensor.numel() * tensor.element_size() > size or tensor.is_meta:
            raise Error(f"{name!r:.100} is no tensor that lies in the file as a whole", where=path)
    return {name: tensor.detach() for name, tensor in state.items() if name not in _TABLES}


def _config(tensors: dict[str, Tensor], folder: Path, path: Path) -> ModelConfig:
    """The network that these tensors belong to."""
    _refuse_others(tensors, path)
    layers = {int(match[1]) for name in tensors if (match := _LAYER.match(name))}
    first = "model.layers.0."
    try:
        vocab_size, hidden = tensors[_EMBEDDING].shape
        joint, _ = tensors[first + "self_attn.qkv_proj.weight"].shape
        _, queries = tensors[first + "self_attn.o_proj.weight"].shape
        intermediate, _ = tensors[first + "mlp.gate_proj.weight"].shape
    except (KeyError, ValueError) as error:
        raise Error(f"is not a model of gemma_pytorch: no matrix {error}", where=path) from error
    norm = tensors.get(first + "self_attn.query_norm.weight")
    sizes: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": intermediate, "num_layers": max(layers) + 1}
    for preset in PRESETS.values():
        same = all(getattr(preset, name) == value for name, value in sizes.items())
        if same and preset.qk_norm == (norm is not None) and preset.num_heads * preset.head_dim == queries:
            return preset.with_vocab(vocab_size)
    if (folder / CONFIG).is_file():
        return read_config(folder)
    if norm is None or not norm.numel() or queries % norm.numel() or (joint - queries) % (2 * norm.numel()):
        shape = f"width {hidden}, {max(layers) + 1} layers"
        raise Error(f"no model of this shape is known ({shape})", where=path, fix=f"put its {CONFIG} beside it")
    head = norm.numel()
    return replace(
        _GEMMA3, **sizes, vocab_size=vocab_size, head_dim=head, query_pre_attn_scalar=head,
        num_heads=queries // head, num_kv_heads=(joint - queries) // (2 * head),
    )  # fmt: skip


def _refuse_others(tensors: dict[str, Tensor], path: Path) -> None:
    if any(name.startswith(("siglip_vision_model.", "mm_soft_embedding", "text_token_embedder.")) for name in tensors):
        fix = "take the Hugging Face folder, or a text model"
        raise Error("is a model for text and images, of which this layout is not opened", where=path, fix=fix)
    if any(name.endswith(".weight_scaler") for name in tensors):
        raise Error(
            "its weights are quantized to 8 bits, which is not opened", where=path, fix="take the bfloat16 file"
        )
    if not any(name.endswith(".pre_feedforward_layernorm.weight") for name in tensors) and _EMBEDDING in tensors:
        raise Error("is a Gemma 1 model", where=path, fix="only Gemma 2 and Gemma 3's text models can be opened")


def _unfused(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same tensors under our names, where they have one; a joint matrix of the right size cut into its three."""
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        ours = "embed_tokens.weight" if name == _EMBEDDING else name.removeprefix("model.")
        ours = ours.replace(".query_norm.", ".q_norm.").replace(".key_norm.", ".k_norm.")
        if ours.endswith(".qkv_proj.weight") and tensor.ndim == 2 and len(tensor) == queries + 2 * keys:
            for part, rows in zip("qkv", torch.split(tensor, [queries, keys, keys]), strict=True):
                out[ours.replace("qkv_proj", f"{part}_proj")] = rows
        else:
            out[ours] = tensor
    return out
