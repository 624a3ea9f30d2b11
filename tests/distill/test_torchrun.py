"""`teach` under torchrun: ranks share the blocks, and the bytes are those that one process writes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gemstill.checkpoint.source import save
from gemstill.data.shards import write_dataset
from gemstill.distill import teach
from gemstill.distill.estimators import Estimator
from gemstill.distill.teach import TeachConfig, run
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.training import train_tokenizer


@pytest.mark.slow
def test_two_ranks_write_the_bytes_of_one(tmp_path: Path) -> None:
    """Through the command line, as the docs have it; afterwards both ranks find the store whole."""
    texts = [Path(teach.__file__).with_name(f"{name}.py").read_text() for name in ("teach", "store", "estimators")]
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.txt").write_text(text)
    tokenizer = train_tokenizer(texts, tmp_path / "tokenizer", 400)
    write_dataset(tmp_path / "text", tokenizer, tmp_path / "data", heldout_fraction=0, workers=1)
    shape = ModelConfig(400, 32, 64, 2, 2, 1, 16, query_pre_attn_scalar=16, sliding_window=8)
    save(Transformer(shape), tokenizer, tmp_path / "teacher")
    one = TeachConfig(
        str(tmp_path / "teacher"), tmp_path / "data" / "train", tmp_path / "one", Estimator("threshold", 0.1),
        window=32, block_tokens=256, precision="float32",
    )  # fmt: skip
    run(one)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "gemstill",
        "teach", "--teacher", one.teacher, "--data", str(one.data), "--output", str(tmp_path / "two"), "--window", "32",
        "--block-tokens", "256", "--precision", "float32", "--set", "estimator.parameter=0.1",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"written: {tmp_path / 'two'}") == 2
    first, second = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
         if path.is_file() and path.name != ".lock"}
        for folder in (one.output, tmp_path / "two")
    )  # fmt: skip
    assert first == second
