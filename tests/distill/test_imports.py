"""The loss and the store's reader import, and work, with torch, numpy and safetensors alone."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import torch

import gemstill

from .test_store import info, make

# Ours, and what torch itself imports, which is there wherever torch is.
ALLOWED = "torch torchgen functorch triton nvidia numpy numpy.libs safetensors"
TORCHS = "typing_extensions.py sympy mpmath filelock fsspec jinja2 markupsafe networkx setuptools packaging cuda"

SCRIPT = """
    import sys

    sys.path = [path for path in sys.path if "-packages" not in path] + [sys.argv[2], sys.argv[3]]
    import torch
    from gemstill.core.errors import Error
    from gemstill.distill.store import Store
    from gemstill.ops.loss import linear_cross_entropy
    from gemstill.ops.target import Target

    for name in ("tokenizers", "yaml", "rich", "pydantic", "transformers"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        raise SystemExit(f"{name} is there: this proves nothing")
    rooms = {name.split(".")[1] for name in sys.modules if name.startswith("gemstill.")}
    assert rooms <= {"core", "ops", "distill"}, rooms
    store = Store.open(sys.argv[1])
    hidden, head = torch.randn(10, 8, requires_grad=True), torch.randn(store.vocab_size, 8)
    linear_cross_entropy(hidden, head, store[10:20]).backward()
    assert bool(hidden.grad.abs().sum() > 0)
    assert len(store.target(torch.tensor([0, 16]), 16).ids) == 32
"""


def test_reading_and_loss_need_torch_numpy_and_safetensors_alone(tmp_path):
    make(tmp_path / "store", info())
    packages, few = Path(torch.__file__).parents[1], tmp_path / "packages"
    few.mkdir()
    for name in f"{ALLOWED} {TORCHS}".split():
        if (packages / name).exists():
            (few / name).symlink_to(packages / name)
    command = [
        sys.executable,
        "-S",
        "-c",
        textwrap.dedent(SCRIPT),
        tmp_path / "store",
        few,
        Path(gemstill.__file__).parents[1],
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
