"""The full 2B shape with random weights, in and out: every stage in a process of its own, one after another."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.full_size import BYTES

ROOT = Path(__file__).parents[2]
DISK, MEMORY = 20 * 10**9, 16 * 2**30


@pytest.mark.slow
def test_two_billion_parameters_through_every_format(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    free = shutil.disk_usage(tmp_path).free
    if free < DISK:
        pytest.skip(f"needs {DISK / 1e9:.0f} GB of free disk where pytest keeps its files, there are {free / 1e9:.0f}")
    try:
        created = stage("create", tmp_path)
        shards = [name for name in created["files"] if name.endswith(".safetensors")]
        assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        assert "model.safetensors.index.json" in created["files"]
        ours = stage("ours", tmp_path)
        assert ours["dtype"] == "torch.bfloat16"
        theirs = stage("transformers", tmp_path)
        assert theirs["largest"] > 10  # distributions sharp enough to tell
        assert theirs["difference"] < 1e-3 * theirs["largest"]
        for name, bits, most in (("q8_0", 8.5, 5e-3), ("f16", 16, 1e-4), ("bf16", 16, 1e-3)):
            written = stage(name, tmp_path)
            assert written["bytes"] == pytest.approx(BYTES * bits / 16, rel=0.01)
            assert written["kl"] < most
    finally:
        shutil.rmtree(tmp_path)


def stage(name: str, folder: Path) -> dict[str, Any]:
    """Run one stage and give back what it found, once its memory is checked."""
    words = [sys.executable, "-m", "tests.checkpoint.full_size", name, str(folder)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    line = done.stdout.strip().splitlines()[-1]
    print(line)
    result: dict[str, Any] = json.loads(line)
    assert result["peak_bytes"] < MEMORY
    return result
