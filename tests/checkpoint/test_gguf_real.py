"""The published Gemma 3 270M: its GGUF file read as the package `gguf` and llama.cpp read it."""

from __future__ import annotations

import importlib
from math import prod
from pathlib import Path

import numpy as np
import pytest

from gemstill.checkpoint.gguf import their_name
from gemstill.checkpoint.gguf_file import GgufFile
from gemstill.model.config import ModelConfig
from tests.checkpoint.gguf_models import library

pytestmark = pytest.mark.real_weights


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


def test_same_ids_as_llama_cpp_from_the_same_file(published: Path, opened) -> None:
    llama_cpp = importlib.import_module("tests.checkpoint.test_gguf_llama")
    _, tokenizer = opened
    llama = llama_cpp.open_llama(published, vocab_only=True)
    for text in [*library("argparse.py", "html/entities.py"), *llama_cpp.NASTY]:
        if llama_cpp.SPACE not in text:
            assert llama.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
