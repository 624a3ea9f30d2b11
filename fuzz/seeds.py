"""Good checkpoints, small and of every format: what the mutations start from."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

import gemstill
from fuzz import safetensors_file
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer

Files = dict[str, bytes]
VOCABULARY = 384

GEMMA2 = ModelConfig(VOCABULARY, 32, 32, 2, 2, 1, 16, query_pre_attn_scalar=16, sliding_window=4, max_position=64)
GEMMA3 = dataclasses.replace(
    GEMMA2, num_layers=3, attn_logit_softcap=None, final_logit_softcap=None, rope_theta=1e6, rope_local_theta=1e4,
    layer_pattern=3, qk_norm=True,
)  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A checkpoint as bytes."""

    name: str
    files: Files  # by name; a format that is one file has one
    source: str  # what `gemstill.load` is given, below the folder of the files: "" for the folder itself


def read(folder: Path) -> Files:
    """The files of a folder by their names."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def write(files: Files, folder: Path, *, replace: bool = False) -> None:
    """The files into a new folder, in place of what is there if `replace`."""
    if replace:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


def model_of(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """A network with weights that are the same every time."""
    return Transformer(config, seed=1).to(dtype)


def tokenizer_in(folder: Path) -> Tokenizer:
    """A small tokenizer with all that a Gemma tokenizer has."""
    words = ["".join(map(chr, (97 + n % 7, 97 + n % 5, 97 + n % 3))) for n in range(105)]
    texts = [
        " ".join(words),
        "aaaa bbbb  cc\n\n\tdd" * 9,
        "Äpfel 色は匂へど 😀 12345, " * 20,
        "Hello, world! <a|b>" * 5,
    ]
    return train_tokenizer(texts, folder, VOCABULARY)


def _sharded(files: Files) -> Files:
    """The same folder with its tensors in two files and an index of them."""
    header, body = safetensors_file.split(files["model.safetensors"])
    header.pop("__metadata__", None)
    names, out, places = sorted(header), dict(files), {}
    del out["model.safetensors"]
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file, described, content = f"model-0000{number}-of-00002.safetensors", {}, b""
        for name in part:
            begin, end = header[name]["data_offsets"]
            described[name] = header[name] | {"data_offsets": [len(content), len(content) + end - begin]}
            content += body[begin:end]
        out[file] = safetensors_file.join(described, content)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": len(body)}, "weight_map": places}
    return out | {"model.safetensors.index.json": json.dumps(index).encode()}


def make() -> list[Seed]:
    """All good checkpoints; the same bytes every time."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        tokenizer = tokenizer_in(root / "tokenizer")
        found = []
        for name, config, dtype in (("gemma2", GEMMA2, torch.float32), ("gemma3", GEMMA3, torch.bfloat16)):
            model = model_of(config, dtype)
            gemstill.save(model, tokenizer, root / name)
            files = read(root / name)
            found.append(Seed(f"{name}-folder", _sharded(files) if name == "gemma3" else files, ""))
        return found
