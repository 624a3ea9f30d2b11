"""The Hugging Face folder of a Gemma 2 or Gemma 3 text model: what `transformers`, vLLM, llama.cpp's converter take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gemstill.checkpoint import sidecars
from gemstill.checkpoint.hf_config import from_hf, to_hf
from gemstill.core.errors import Error
from gemstill.core.files import read_json, write_json, writing
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MARK = "gemstill_version"  # a field of config.json: who wrote the folder, so who may write over it
# All that `save` and the tokenizer write: a folder with anything else in it holds someone's work.
OURS = frozenset({
    "config.json", WEIGHTS, "generation_config.json", "tokenizer_config.json", "README.md",
    "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "chat_template.jinja",
})  # fmt: skip


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Transformer, Tokenizer]:
    """Open a checkpoint folder: its network, weights stored in `dtype` (default: as in the file), and its tokenizer.

    On the CPU, weights that keep their dtype are mapped from the file, not read: memory holds one copy at most.

    Raises:
        Error: no such folder, a file missing or damaged, another architecture, tensors missing, superfluous or
            of another shape (each by name), a tokenizer with more entries than the model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise Error(what, where=folder, fix="name the folder of a checkpoint")
    config = from_hf(read_json(folder / "config.json"), folder / "config.json")
    tokenizer = Tokenizer.open(folder)
    _check_vocabulary(config, tokenizer, folder)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(_read_weights(folder, model, dtype, torch.device(device)), assign=True)
    return model, tokenizer


def save(model: Transformer, tokenizer: Tokenizer, folder: str | Path, *, card: str | None = None) -> None:
    """Write `model` and `tokenizer` as a Hugging Face folder, whole or not at all, weights in their storage dtype.

    card: the model card (README.md), Markdown; by default one with the sizes alone.

    Raises:
        Error: `folder` is there and is neither empty nor a checkpoint that `save` wrote; it cannot be written;
            the tokenizer has more entries than the model.
    """
    folder = Path(folder).resolve()  # a link to a checkpoint stays a link
    config = model.config
    _check_vocabulary(config, tokenizer, folder)
    described = to_hf(config)
    _check_replaceable(folder)
    tensors = {_their_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    described["dtype"] = described["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    described |= sidecars.special_ids(tokenizer)
    described[MARK] = sidecars.version()
    with writing(folder, folder=True) as partial:
        sidecars.write_tokenizer(partial, tokenizer)
        write_json(partial / "generation_config.json", sidecars.generation_config(tokenizer))
        write_json(partial / "config.json", described)
        (partial / "README.md").write_text(card or sidecars.default_card(config), encoding="utf-8")
        # One metadata key: several would be written in random order, and equal weights make equal bytes.
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})


def _their_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _check_vocabulary(config: ModelConfig, tokenizer: Tokenizer, where: object) -> None:
    """Padded rows of the embedding are allowed, ids without a row are not."""
    if tokenizer.vocab_size > config.vocab_size:
        raise Error(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model {config.vocab_size}",
            where=where,
            fix="use the tokenizer that the model was made with",
        )


def _check_replaceable(folder: Path) -> None:
    """Let `save` replace nothing but an empty folder or a checkpoint of its own."""
    if not folder.is_dir():
        return  # `writing` refuses a file
    names = sorted(path.name for path in folder.iterdir())
    fix = "name another folder"
    if strangers := [name for name in names if name not in OURS]:
        raise Error(f"holds files that no checkpoint of ours has ({_list(strangers)})", where=folder, fix=fix)
    if not names:
        return
    try:
        marked = MARK in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        marked = False
    if not marked:
        raise Error("is a folder that gemstill did not write", where=folder, fix=fix)


def _list(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files: the one, or those that an index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise Error(f"has neither {WEIGHTS} nor {INDEX}", where=folder)
    index = read_json(folder / INDEX)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise Error("has no 'weight_map' from tensors to files of this folder", where=folder / INDEX)
    return [folder / name for name in sorted(set(names))]


def _open_weights(folder: Path, device: torch.device) -> dict[str, Any]:
    """Tensor name -> the open file that has it."""
    handles: dict[str, Any] = {}
    for path in _weight_files(folder):
        try:
            handle: Any = safe_open(path, framework="pt", device=str(device))
        except (OSError, SafetensorError) as error:
            fix = "fetch or save the file again"
            raise Error(f"cannot be read as safetensors ({error})", where=path, fix=fix) from error
        handles |= dict.fromkeys(handle.keys(), handle)
    return handles


def _read_weights(
    folder: Path, model: Transformer, dtype: torch.dtype | None, device: torch.device
) -> dict[str, Tensor]:
    """All parameters of `model` from the folder, under our names; names and shapes are checked before any is read."""
    handles = _open_weights(folder, device)
    wanted = {_their_name(name): parameter for name, parameter in model.named_parameters()}
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if head not in wanted and head in handles and embedding in handles:
        # Some tools write the tied head out. The same matrix twice is one matrix; another one is not tied.
        if not torch.equal(handles[head].get_tensor(head), handles[embedding].get_tensor(embedding)):
            raise Error(f"{head} differs from {embedding}, though config.json says they are tied", where=folder)
        del handles[head]
    problems = []
    if missing := sorted(wanted.keys() - handles.keys()):
        problems.append(f"tensors are missing: {_list(missing)}")
    if superfluous := sorted(handles.keys() - wanted.keys()):
        problems.append(f"tensors that the model does not have: {_list(superfluous)}")
    misshapen = []
    for name in sorted(wanted.keys() & handles.keys()):
        shape, right = list(handles[name].get_slice(name).get_shape()), list(wanted[name].shape)
        if shape != right:
            misshapen.append(f"{name} {shape} instead of {right}")
    if misshapen:
        problems.append(f"tensors of another shape: {_list(misshapen)}")
    if problems:
        raise Error("; ".join(problems), where=folder, fix="config.json and the weights belong to different models")
    return {name: _tensor(handles[_their_name(name)], _their_name(name), dtype) for name, _ in model.named_parameters()}


def _tensor(handle: Any, name: str, dtype: torch.dtype | None) -> Tensor:
    tensor: Tensor = handle.get_tensor(name)
    if not tensor.is_floating_point():
        raise Error(f"{name} is stored as {tensor.dtype}, which is not a floating-point type", where="weights")
    return tensor if dtype is None else tensor.to(dtype)
