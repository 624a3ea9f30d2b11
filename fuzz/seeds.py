"""Good checkpoints, small and of every format: what the mutations start from."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

import gemstill
from fuzz import gguf_file, safetensors_file
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


WIDE = dataclasses.replace(GEMMA2, hidden_size=256, intermediate_size=256, head_dim=128, query_pre_attn_scalar=128)
# Number of the type, weights and bytes of a block: Q4_K, Q5_K, Q6_K, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, IQ4_NL, IQ4_XS.
BLOCKS = (
    (12, 256, 144), (13, 256, 176), (14, 256, 210), (3, 32, 20), (6, 32, 22), (7, 32, 24), (10, 256, 84),
    (11, 256, 110), (20, 32, 18), (23, 256, 136),
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


def _google(model: Transformer, tokenizer: bytes) -> Files:
    """The layout of `gemma_pytorch`: one joint projection, `model_state_dict`, a table that is no weight."""
    state = {}
    for name, parameter in model.named_parameters():
        tensor, name = parameter.detach(), name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
        if name == "embed_tokens.weight":
            state["embedder.weight"] = tensor
        elif ".q_proj." in name:
            parts = [model.get_parameter(name.replace("q_proj", f"{part}_proj")).detach() for part in "qkv"]
            state["model." + name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif not re.search(r"\.[kv]_proj\.", name):
            state["model." + name] = tensor
    state["freqs_cis"] = torch.zeros(8, 4, dtype=torch.complex64)
    out = io.BytesIO()
    torch.save({"model_state_dict": state}, out)
    return {"model.ckpt": out.getvalue(), "tokenizer.model": tokenizer}


def _of_blocks(data: bytes) -> bytes:
    """A GGUF file with its matrices in blocks of 256 weights, of all kinds in turn, with bytes that nobody chose."""
    parts, rng = gguf_file.unpack(data), Random(1)
    tensors, body = [], b""
    for number, (name, dims, kind, offset) in enumerate(parts.tensors):
        count = math.prod(dims)
        if len(dims) == 2:
            kind, block, size = BLOCKS[number % len(BLOCKS)]
            content = rng.randbytes(count // block * size)
        else:
            content = parts.body[offset : offset + 4 * count]
        tensors.append((name, dims, kind, len(body)))
        body += content + b"\0" * (-len(content) % gguf_file.ALIGNMENT)
    parts.tensors, parts.body = tensors, body
    return parts.pack()


def make() -> list[Seed]:
    """All good checkpoints; the same bytes every time."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        tokenizer = tokenizer_in(root / "tokenizer")
        sentencepiece = (root / "tokenizer" / "tokenizer.model").read_bytes()
        gemma2, gemma3 = model_of(GEMMA2, torch.float32), model_of(GEMMA3, torch.bfloat16)
        for name, model in (("gemma2", gemma2), ("gemma3", gemma3), ("wide", model_of(WIDE, torch.float32))):
            gemstill.save(model, tokenizer, root / name)
            gemstill.save(model, tokenizer, root / f"{name}.gguf")
        gemstill.save(gemma2, tokenizer, root / "q8.gguf", dtype="q8_0")
        folders = {name: read(root / name) for name in ("gemma2", "gemma3")}
        bare = {name: data for name, data in folders["gemma2"].items() if name != "tokenizer.json"}
        files = {f"{name}.gguf": (root / f"{name}.gguf").read_bytes() for name in ("gemma2", "gemma3", "q8", "wide")}
        files["wide.gguf"] = _of_blocks(files["wide.gguf"])
        return [
            Seed("folder", folders["gemma2"], ""),
            Seed("shards", _sharded(folders["gemma3"]), ""),
            Seed("sentencepiece", bare, ""),
            Seed("google", _google(gemma3, sentencepiece), "model.ckpt"),
            *(Seed(f"gguf-{name.removesuffix('.gguf')}", {name: data}, name) for name, data in files.items()),
        ]
