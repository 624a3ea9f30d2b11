"""Loading and saving never hold a second copy of the weights, whatever dtype they are converted to."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gemstill.checkpoint.huggingface import save_folder
from gemstill.model.transformer import Transformer
from tests.model.reference import BASE
from tests.model.tokenizers import small_tokenizer

CODE = """
import sys, torch, gemstill, gemstill.checkpoint.source
def peak():
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) << 10 for line in handle if line.startswith("VmHWM"))
before = peak()
model, tokenizer = gemstill.load(sys.argv[1], dtype=torch.float32)
size = sum(p.numel() * p.element_size() for p in model.parameters())
loaded = peak() - before
gemstill.save(model, tokenizer, sys.argv[1] + "-again", dtype="bfloat16")
print(size, loaded, peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux' own account of memory")
def test_one_copy_at_most(tmp_path):
    big = replace(BASE, vocab_size=320, hidden_size=512, intermediate_size=2048, num_layers=10)
    with torch.device("meta"):
        model = Transformer(big)
    model.load_state_dict(
        {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}, assign=True
    )
    save_folder(model, small_tokenizer(), tmp_path / "model")
    environment = os.environ | {"GEMSTILL_PRECISION": "float32"}  # without measuring, which takes memory too
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / "model")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    size, loaded, saved = map(int, done.stdout.split())
    print(f"{size >> 20} MiB of weights, {loaded >> 20} at most when loaded, {saved >> 20} when saved")
    assert size > 120 << 20
    # Both dtypes at once would be half as much again.
    assert loaded < 1.1 * size + (24 << 20)
    assert saved < 1.1 * size + (32 << 20)  # 16 MiB are converted at a time
    files = [tmp_path / name / "model.safetensors" for name in ("model", "model-again")]
    assert files[0].read_bytes() == files[1].read_bytes()
