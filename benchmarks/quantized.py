"""How near to the unquantized model are its eight- and four-bit files?

The reference is the model in float32, run by gemstill. Against it stand our roundings and llama.cpp's own, made by its
quantizer from the same float32 weights, and any --file beside, over pieces of held-out text: mean KL from the
reference, top-1 agreement, perplexity. Files are read and run by llama.cpp, which rounds activations to eight bits;
rows named "float32" by gemstill, from the dequantized weights; among them eight bits with one scale for each row of a
matrix instead of each block, which gemstill does not offer. llama.cpp's Q4_0 has the embedding in Q6_K, or in
Q8_0 where 256 does not divide its width; "pure" is Q4_0 throughout.

    python benchmarks/quantized.py --model M.gguf --text runs/shrink/text/heldout.jsonl --file shrunk.gguf
"""

from __future__ import annotations

import ctypes
import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import torch

import gemstill
from common import Row, arguments, compare, finish
from gemstill.checkpoint.gguf_file import GgufFile
from gemstill.data.calibration import calibration
from gemstill.model.quantized import named_weights, put_weights
from gemstill.ops.packed import pack
from gemstill.train.divergence import divergence, logits_in_llama_cpp, logits_of

WINDOW = 512
FLOAT32 = ("Q8_0", "Q4_0 pure")  # that we read too
Q4_0, Q8_0 = 2, 7  # llama.cpp's numbers for a file's format


def quantized(source: Path, target: Path, kind: int, pure: bool) -> Path:
    """llama.cpp's own file of a float32 one."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.pure, how.nthread = kind, pure, torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(how)):
        raise SystemExit(f"llama.cpp did not quantize {source}")
    return target


def pure(source: str, target: Path) -> Path:
    """Our plain rounding, Q4_0 throughout."""
    model, tokenizer = gemstill.load(source, dtype=torch.float32)
    put_weights(model, {name: pack(w, "int4") for name, w in list(named_weights(model)) if w.ndim == 2})
    gemstill.save(model, tokenizer, target)
    return target


def files(source: str, folder: Path) -> dict[str, Path]:
    """All files but those of --file, by the names of their rows."""
    model, tokenizer = gemstill.load(source, dtype=torch.float32)
    whole = folder / "f32.gguf"
    gemstill.save(model, tokenizer, whole)
    found = {}
    for name, kind in (("Q8_0", "q8_0"), ("Q4_0", "q4_0")):
        found[name] = folder / f"{kind}.gguf"
        gemstill.save(model, tokenizer, found[name], dtype=kind)
    found["Q4_0 pure"] = pure(source, folder / "pure.gguf")
    found["llama.cpp Q8_0"] = quantized(whole, folder / "their-q8_0.gguf", Q8_0, False)
    found["llama.cpp Q4_0"] = quantized(whole, folder / "their-q4_0.gguf", Q4_0, False)
    found["llama.cpp Q4_0 pure"] = quantized(whole, folder / "their-pure.gguf", Q4_0, True)
    return found


def by_row(source: str) -> torch.nn.Module:
    """The model whose matrices went through eight bits with one scale a row."""
    model, _ = gemstill.load(source, dtype=torch.float32)
    with torch.no_grad():
        for _, weight in list(named_weights(model)):
            if weight.ndim == 2:
                scale = weight.abs().amax(1, keepdim=True) / 127
                weight.copy_((weight / scale).round() * scale)
    return model


def weights_of(path: Path) -> str:
    """SHA-256 over a file's tensors."""
    file = GgufFile(path)
    digest = hashlib.sha256()
    for name in sorted(file.tensors):
        digest.update(f"{name} {file.tensors[name].block.name}".encode())
        digest.update(file.data(name).numpy().data)
    return digest.hexdigest()


def rows(found: dict[str, dict[str, Any]], given: list[str]) -> list[Row]:
    """The bars: eight bits within 0.1 % of the perplexity, four no worse than llama.cpp's, files at half the loss."""
    q8 = found["Q8_0, float32"]
    off = abs(q8["perplexity"] / q8["reference_perplexity"] - 1)
    made = [replace(compare("Q8_0, float32: perplexity off by", [off], None, ""), bar=0.001, met=off <= 0.001)]
    for name in ("Q8_0", "Q4_0", "Q4_0 pure"):
        peer = found[f"llama.cpp {name}"]
        bar = None if name == "Q8_0" else 1.0
        made.append(compare(f"{name}: KL", [found[name]["kl"]], [peer["kl"]], "nats", bar=bar, small=True))
    peer = found["llama.cpp Q4_0 pure"]
    for name in given:
        made.append(compare(f"{name}: KL", [found[name]["kl"]], [peer["kl"]], "nats", bar=0.5, small=True))
        made.append(compare(f"{name}: size", [found[name]["bytes"]], [peer["bytes"]], "bytes", bar=1.0, small=True))
    return made


def show(name: str, figures: dict[str, Any]) -> None:
    print(f"{name:26}", *(f"{key} {value:.7g}" for key, value in figures.items()), flush=True)


def main() -> None:
    options = arguments(__doc__, model="", text="", file="", tokens=4608, seed=1)
    reference, tokenizer = gemstill.load(options.model, dtype=torch.float32)
    text = calibration(
        tokenizer.encode, tokenizer.bos_id, options.text, tokens=options.tokens, window=WINDOW, seed=options.seed
    )
    given = [word for word in options.file.split(",") if word]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        scored: dict[tuple[str, bool], dict[str, float]] = {}
        for name, path in (files(options.model, Path(folder)) | {word: Path(word) for word in given}).items():
            for row, ours in ((name, False), (f"{name}, float32", True)) if name in FLOAT32 else ((name, False),):
                key = (weights_of(path), ours)
                if key not in scored:  # of the same weights the same figures
                    model = logits_of(gemstill.load(path, dtype=torch.float32)[0]) if ours else None
                    other: Any = model or logits_in_llama_cpp(path, WINDOW)
                    scored[key] = divergence(logits_of(reference), other, text).figures()
                found[row] = {"bytes": path.stat().st_size, **scored[key]}
                show(row, found[row])
    row = "eight bits by row, float32"
    found[row] = divergence(logits_of(reference), logits_of(by_row(options.model)), text).figures()
    show(row, found[row])
    finish(rows(found, given), figures=found)


if __name__ == "__main__":
    main()
