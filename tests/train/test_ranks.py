"""The same run on one process and on two, and from two back to one."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_recipe

from gemstill.core.config import dump, parse
from gemstill.train.config import OptimizerConfig, TrainConfig
from gemstill.train.metrics import read
from gemstill.train.run import train

RUN = """
import sys
from gemstill.core.config import parse
from gemstill.train.config import TrainConfig
from gemstill.train import loop, run

config, stop = parse(TrainConfig, sys.argv[1]), int(sys.argv[2])
step = loop.Loop._train_step

def cut(self):
    if self.step == stop:
        raise KeyboardInterrupt
    return step(self)

loop.Loop._train_step = cut
try:
    run.train(config)
except KeyboardInterrupt:
    pass
"""


def torchrun(config: TrainConfig, tmp_path: Path, stop: int = -1, ranks: int = 2) -> None:
    """Train under torchrun, left off after `stop` steps."""
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "recipe.yaml").write_text(dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    command = [sys.executable, *launch, str(tmp_path / "run.py"), str(tmp_path / "recipe.yaml"), str(stop)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GEMSTILL_PRECISION": "float32"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def figures(config: TrainConfig, name: str) -> list[float]:
    return [line[name] for line in read(Path(config.run) / "metrics.jsonl") if name in line]


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_two_ranks_compute_what_one_does(corpus: Path, tmp_path: Path, name: Any) -> None:
    """Fifty steps within 1e-5; then the same begun on two ranks and ended on one (torchtitan#816 refused that)."""
    options: dict[str, Any] = {
        "steps": 50,
        "save_every": 20,
        "evaluate_every": 0,
        "micro_windows": 1,
        "optimizer": OptimizerConfig(name=name, learning_rate=0.005, embedding_rate=0.005),
    }
    one = make_recipe(corpus, tmp_path / "one", **options)
    train(one)
    two = make_recipe(corpus, tmp_path / "two", **options)
    torchrun(two, tmp_path, stop=30)
    begun = figures(two, "loss")
    assert len(begun) == 30
    train(two)
    assert figures(two, "loss")[:20] == begun[:20]
    np.testing.assert_allclose(begun, figures(one, "loss")[:30], rtol=1e-5)
    np.testing.assert_allclose(figures(two, "loss"), figures(one, "loss"), rtol=1e-5)
    np.testing.assert_allclose(figures(two, "grad_norm"), figures(one, "grad_norm"), rtol=1e-4)


@pytest.mark.slow
def test_two_ranks_to_the_end(corpus: Path, tmp_path: Path) -> None:
    """Sharded to the last step: same losses, same held-out figures, and a whole model is written."""
    one = make_recipe(corpus, tmp_path / "one", steps=50, evaluate_every=25)
    train(one)
    two = dataclasses.replace(one, run=str(tmp_path / "two"))
    torchrun(two, tmp_path)
    np.testing.assert_allclose(figures(two, "loss"), figures(one, "loss"), rtol=1e-5)
    np.testing.assert_allclose(figures(two, "heldout_nll"), figures(one, "heldout_nll"), rtol=1e-5)
    assert (Path(two.run) / "model" / "model.safetensors").exists()
    assert parse(TrainConfig, Path(two.run) / "config.yaml").precision == "float32"
    ours, theirs = ((Path(run.run) / "model" / "model.safetensors").stat().st_size for run in (one, two))
    assert ours == theirs


@pytest.mark.slow
def test_one_rank_to_two_and_bfloat16(corpus: Path, tmp_path: Path) -> None:
    one = make_recipe(corpus, tmp_path / "one", precision="bfloat16")
    train(one)
    two = dataclasses.replace(one, run=str(tmp_path / "two"))
    torchrun(two, tmp_path, stop=6, ranks=1)
    torchrun(two, tmp_path)
    np.testing.assert_allclose(figures(two, "loss"), figures(one, "loss"), rtol=0.02)
