"""One stage of the test of the full 2B shape, a process of its own: python -m tests.checkpoint.full_size STAGE FOLDER.

The last line of the output is a JSON object: seconds and peak memory of the stage, and what it found.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOKENS = 64
POOL = 8_388_593  # random numbers, a prime: no two rows of a matrix begin at the same one
BYTES = 5_228_730_880  # of the published 2B shape with padded vocabulary in bfloat16, to within a thousandth


def ids() -> list[int]:
    return torch.randint(4, 320, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()


def create(folder: Path) -> dict[str, Any]:
    """Random weights of the full shape, all cut out of one tensor, saved in bfloat16."""
    from gemstill.checkpoint.source import save
    from gemstill.model.config import ModelConfig
    from gemstill.model.transformer import Transformer
    from tests.model.tokenizers import small_tokenizer

    with torch.device("meta"):
        model = Transformer(ModelConfig.preset("gemma2-2b"))
    largest = model.embed_tokens.weight.numel()
    some = torch.randn(POOL, generator=torch.Generator().manual_seed(1)).mul_(2304**-0.5).bfloat16()
    pool = some.repeat(2 + largest // POOL)
    state = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.ndim == 1:
            # The last norm's gain makes the distributions sharp.
            state[name] = torch.full(parameter.shape, 4.0 if name == "norm.weight" else 0.0, dtype=torch.bfloat16)
        else:
            start = number * 104_729 % POOL
            state[name] = pool[start : start + parameter.numel()].view(parameter.shape)
    model.load_state_dict(state, assign=True)
    save(model, small_tokenizer(), folder / "model")
    return {"files": sorted(path.name for path in (folder / "model").iterdir())}


def ours(folder: Path) -> dict[str, Any]:
    """Our logits, in float32 from the weights as they lie in the file."""
    import gemstill

    begin = time.perf_counter()
    model, _ = gemstill.load(folder / "model")
    loaded = time.perf_counter() - begin
    model.compute_dtype = torch.float32
    with torch.inference_mode():
        found = model(torch.tensor([ids()]))[0]
    np.save(folder / "ours.npy", found.numpy())
    return {"load_seconds": loaded, "dtype": str(model.norm.weight.dtype)}


def transformers(folder: Path) -> dict[str, Any]:
    """The logits of `transformers` on the same folder, in float32; how far ours are from them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        theirs = model(torch.tensor([ids()]), use_cache=False).logits[0].numpy()
    found = np.load(folder / "ours.npy")
    return {"largest": float(np.abs(theirs).max()), "difference": float(np.abs(found - theirs).max())}


def gguf(folder: Path, dtype: str) -> dict[str, Any]:
    """Export to GGUF, run it in llama.cpp, and delete it; the mean KL from our distributions."""
    import llama_cpp

    from gemstill.checkpoint.export import ExportConfig, run

    file = folder / f"{dtype}.gguf"
    begin = time.perf_counter()
    written = run(ExportConfig(str(folder / "model"), file, dtype))
    seconds = time.perf_counter() - begin
    try:
        float32 = llama_cpp.GGML_TYPE_F32
        model = llama_cpp.Llama(
            str(file), n_ctx=TOKENS, n_batch=TOKENS, n_threads=torch.get_num_threads(), logits_all=True, verbose=False,
            type_k=float32, type_v=float32,
        )  # fmt: skip
        model.eval(ids())
        theirs = torch.from_numpy(np.array(model.scores[:TOKENS])).log_softmax(1)
    finally:
        file.unlink()
    found = torch.from_numpy(np.load(folder / "ours.npy")).log_softmax(1)
    kl = ((found - theirs) * found.exp()).sum(1)
    return {"bytes": written["bytes"], "export_seconds": seconds, "kl": float(kl.mean())}


STAGES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "create": create,
    "ours": ours,
    "transformers": transformers,
    "q8_0": lambda folder: gguf(folder, "q8_0"),
    "f16": lambda folder: gguf(folder, "f16"),
    "bf16": lambda folder: gguf(folder, "bf16"),
}


if __name__ == "__main__":
    begin = time.perf_counter()
    result = STAGES[sys.argv[1]](Path(sys.argv[2]))
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"stage": sys.argv[1], "seconds": time.perf_counter() - begin, "peak_bytes": peak, **result}))
