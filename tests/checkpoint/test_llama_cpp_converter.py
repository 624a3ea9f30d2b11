"""llama.cpp's own converter takes the folders that `save` writes: what it makes runs with the same logits and ids.

The converter is not in any package's wheel. It comes with the source of llama-cpp-python:

    pip download --no-binary llama-cpp-python --no-deps llama-cpp-python
    tar xzf llama_cpp_python-*.tar.gz
    export GEMSTILL_LLAMA_CPP_CONVERTER=$PWD/llama_cpp_python-…/vendor/llama.cpp/convert_hf_to_gguf.py
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemstill.checkpoint.source import load, save
from gemstill.model.transformer import Transformer
from tests.model.reference import BASE, GEMMA3, roughen
from tests.model.tokenizers import TEXT, small_tokenizer

VARIABLE = "GEMSTILL_LLAMA_CPP_CONVERTER"
CONVERTER = os.environ.get(VARIABLE, "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CONVERTER, reason=f"{VARIABLE} does not name llama.cpp's convert_hf_to_gguf.py"),
]
SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
}
CONFIGS = {"gemma2": replace(BASE, num_layers=4, **SIZES), "gemma3": replace(GEMMA3, **SIZES)}


def their_logits(file: Path, ids: list[int]) -> torch.Tensor:
    """llama.cpp's logits [T, V] of `ids`, keys and values kept in float32."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(
        str(file), n_ctx=256, n_batch=256, n_threads=1, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_the_converter_makes_of_our_folder_gives_the_same_logits(name, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    model = Transformer(CONFIGS[name])
    roughen(model)
    save(model, small_tokenizer(), tmp_path / "model")
    file = tmp_path / "theirs.gguf"
    words = [sys.executable, CONVERTER, str(tmp_path / "model"), "--outtype", "f32", "--outfile", str(file)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    tokenizer = small_tokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode("".join(TEXT[:4]))][:200]
    assert len(ids) > 2 * CONFIGS[name].sliding_window
    vocabulary = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    for text in TEXT[:10]:
        assert vocabulary.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    with torch.inference_mode():
        ours = model(torch.tensor([ids]))[0]
    theirs = their_logits(file, ids)
    kl = (ours.log_softmax(1) - theirs.log_softmax(1)).mul(ours.softmax(1)).sum(1)
    print(f"{name}: largest difference {float((ours - theirs).abs().max()):.2e}, mean KL {float(kl.mean()):.2e}")
    # llama.cpp looks gelu up in a table of float16, and these weights are rough: that is the difference.
    torch.testing.assert_close(theirs, ours, atol=0.05, rtol=0)
    assert float(kl.mean()) < 1e-5
    again, _ = load(file, dtype=torch.float32)  # and comes back as it was: F32 keeps every bit, but for norms' 1 + w
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(again.get_parameter(key), parameter, rtol=0, atol=3e-7)
