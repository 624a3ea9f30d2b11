"""One name for a model, wherever people have it: a folder, a GGUF file, Google's own file, a name on the hub."""

from __future__ import annotations

from pathlib import Path

import torch

from gemstill.checkpoint.hf_config import CONFIG, read_config
from gemstill.checkpoint.huggingface import load_folder, save_folder
from gemstill.checkpoint.look import expect_model, look
from gemstill.core import machine
from gemstill.core.errors import Error
from gemstill.core.notices import note
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.ops.native import why_not
from gemstill.ops.packed import MADE
from gemstill.text.tokenizer import Tokenizer

GGUF = ".gguf"
FILE = "file"  # quantized as the file is
INDEX = "pytorch_model.bin.index.json"  # of Google's own file in several
GOOGLE = (".ckpt", ".bin", ".pt", ".pth")  # suffixes of torch's own files
DTYPES = {
    "float32": torch.float32, "f32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "f16": torch.float16,
}  # fmt: skip


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Transformer, Tokenizer]:
    """Open a model and its tokenizer, ready to compute in the fastest precision of this machine.

    source: a Hugging Face folder, a GGUF file, a file of `gemma_pytorch` beside its tokenizer.model, or a name
    on the hub such as "google/gemma-2-2b-it" or "google/gemma-2-2b-it@main". dtype: of the stored weights, by
    default as in the file; asking for one wider than the machine's fast precision also computes in it.

    quantize: keep all matrices in "int8" or "int4" (blocks of 32, with int4 the embedding and the head in int8), or,
    of a GGUF, in the blocks that they have in the "file"; of the unquantized ones a few rows are held at a time. Such
    a model is for inference on the CPU alone.

    Raises:
        Error: there is no such thing, it cannot be fetched, it is damaged, or it is another kind of model; another
            `quantize`, or one that the source or the device does not have.
    """
    path = find(source)
    if quantize is not None:
        _check_quantize(quantize, path, device)
        if (reason := why_not()) is not None:  # built here: a token takes far longer without them than with floats
            note(f"a quantized model is slow without native kernels ({reason})", where=path)
    if path.is_file() and path.suffix not in GOOGLE:
        from gemstill.checkpoint.gguf import load_gguf

        model, tokenizer = load_gguf(path, dtype=dtype, quantize=quantize, device=device)
    elif path.is_file() or look(path).kind == "google":
        from gemstill.checkpoint.google import load_google

        model, tokenizer = load_google(path, dtype=dtype, quantize=quantize, device=device)
    else:
        model, tokenizer = load_folder(path, dtype=dtype, quantize=quantize, device=device)
    model.compute_dtype = compute_dtype(dtype, device)
    return model, tokenizer


def _check_quantize(quantize: str, path: Path, device: str | torch.device) -> None:
    if quantize not in (*MADE, FILE):
        fix = f"take one of {', '.join((*MADE, FILE))}"
        raise Error(f"no model is quantized to '{quantize}'", where=path, fix=fix)
    if torch.device(device).type != "cpu":
        raise Error(f"a quantized model runs on the CPU, not on {device}", where=path, fix="leave quantize out")
    if quantize == FILE and (not path.is_file() or path.suffix in GOOGLE):
        raise Error("has no blocks of its own, as a GGUF file has", where=path, fix="take quantize='int8' or 'int4'")


def compute_dtype(dtype: torch.dtype | None, device: str | torch.device = "cpu") -> torch.dtype:
    """What to compute in: the machine's fast precision, or float32 and float64 when these were asked for by name."""
    return dtype if dtype in (torch.float32, torch.float64) else machine.fast_dtype(str(device))


def find(source: str | Path) -> Path:
    """The folder or file of weights that `source` names, fetched from the hub when it is a name there.

    Raises:
        Error: there is no such thing here or on the hub, or it is no model.
    """
    found = expect_model(source)
    if found.kind == "hub":
        from gemstill.checkpoint.hub import resolve

        return resolve(str(source))
    if found.kind != "google" or not found.path.is_dir() or (found.path / INDEX).exists():
        return found.path
    inside = sorted(found.path.glob("*.ckpt"))
    if len(inside) > 1:
        raise Error("holds several models", where=source, fix=f"name one of them: {inside[0]}")
    return inside[0]


def shape_of(source: str | Path) -> ModelConfig:
    """The network that `source` holds, without its weights where that can be. Raises Error as `load` does."""
    path = find(source)
    if path.is_file() and path.suffix not in GOOGLE:
        from gemstill.checkpoint.gguf import read_gguf_config

        return read_gguf_config(path)
    return read_config(path) if (path / CONFIG).is_file() else load(path)[0].config


def name_of(source: str | Path) -> str:
    """What to call a model: its name on the hub, or that of its folder or file.

    >>> name_of("google/gemma-2-2b@main")
    'google/gemma-2-2b@main'
    """
    path = Path(source).expanduser()
    if look(source).kind == "hub":
        return str(source)
    if not path.is_dir():
        return path.stem
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name  # a run's model is called as the run


def save(
    model: Transformer,
    tokenizer: Tokenizer,
    target: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    card: str | None = None,
) -> None:
    """Write a model and its tokenizer where others open them: a GGUF file where `target` ends in .gguf, else a folder.

    dtype: of the stored weights, by default each keeps its own; float32, bfloat16 or float16 (f32, bf16, f16),
    and q8_0 or q4_0 for a GGUF. card: the model card of a folder, Markdown. A quantized model is written as a GGUF
    file alone, by default in its own blocks, bit by bit.

    Raises:
        Error: a dtype that the format does not have, a network that others would run wrongly, a folder that
            holds anything but a checkpoint of ours, a place that cannot be written.
    """
    target = Path(target)
    name = str(dtype).removeprefix("torch.").lower() if dtype else None
    if target.suffix == GGUF:
        from gemstill.checkpoint.gguf import save_gguf

        short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
        save_gguf(model, tokenizer, target, dtype=short.get(name, name) if name else None)
        return
    if name is not None and name not in DTYPES:
        fix = f"take one of {', '.join(DTYPES)}" + (f"; {name} is for {GGUF} files" if name.startswith("q") else "")
        raise Error(f"a folder's weights are not stored as '{name}'", where=target, fix=fix)
    save_folder(model, tokenizer, target, dtype=DTYPES[name] if name else None, card=card)
