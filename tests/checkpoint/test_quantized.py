"""`load(…, quantize=…)` from every place, and a quantized model written again in its own blocks."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from gemstill.checkpoint.gguf import save_gguf, their_name
from gemstill.checkpoint.gguf_file import GgufFile
from gemstill.checkpoint.source import load, save
from gemstill.core.errors import Error
from gemstill.model.quantized import named_weights, quantize_model, weight_bytes
from gemstill.model.transformer import Transformer
from gemstill.ops.packed import Packed
from tests.checkpoint.gguf_models import GEMMA2, network
from tests.checkpoint.test_google import put, their_layout
from tests.model.reference import BASE, text
from tests.model.tokenizers import small_tokenizer

SMALL = replace(GEMMA2, vocab_size=320)


def same(a, b):
    """Whether two models have the same weights in the same form."""
    pairs = list(zip(named_weights(a), named_weights(b), strict=True))
    for (name, one), (other, two) in pairs:
        assert name == other
        if isinstance(one, Packed):
            assert isinstance(two, Packed)
            assert one.name == two.name
            assert torch.equal(one.unpack()[0], two.unpack()[0])
        else:
            torch.testing.assert_close(one.float(), two.float(), rtol=0, atol=0)
    return True


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_same_from_every_place(kind, tmp_path):
    model = network(SMALL)
    save(model, small_tokenizer(), tmp_path / "folder")
    save(model, small_tokenizer(), tmp_path / "whole.gguf")
    google = put(tmp_path / "google", their_layout(model), SMALL)
    quantize_model(model, kind)
    for place in (tmp_path / "folder", tmp_path / "whole.gguf", google):
        again, _ = load(place, quantize=kind, dtype=torch.float32)
        assert not again.training
        assert same(model, again)
    # Written again and read as it is, it is the same, and so are the file's bytes.
    save(model, small_tokenizer(), tmp_path / "small.gguf")
    again, tokenizer = load(tmp_path / "small.gguf", quantize="file")
    assert same(model, again)
    (tmp_path / "again").mkdir()
    save(again, tokenizer, tmp_path / "again" / "small.gguf")
    assert (tmp_path / "again" / "small.gguf").read_bytes() == (tmp_path / "small.gguf").read_bytes()
    direct, _ = load(tmp_path / "small.gguf", quantize=kind)
    assert same(model, direct)
    save(again, tokenizer, tmp_path / "other.gguf", dtype="f32")
    floats, _ = load(tmp_path / "other.gguf", dtype=torch.float32)
    quantized, _ = load(tmp_path / "small.gguf", dtype=torch.float32)
    assert (floats(text(SMALL)) - quantized(text(SMALL))).abs().max() < 1e-3


def test_a_file_of_plain_weights_keeps_them(tmp_path):
    save_gguf(network(SMALL), small_tokenizer(), tmp_path / "plain.gguf", dtype="bf16")
    model, _ = load(tmp_path / "plain.gguf", quantize="file")
    assert {p.dtype for name, p in model.named_parameters() if p.ndim == 2} == {torch.bfloat16}


def test_bad_input_is_told(tmp_path):
    folder = tmp_path / "folder"
    save(network(SMALL), small_tokenizer(), folder)
    for how, words in (
        ({"quantize": "int3"}, "quantized to 'int3'"),
        ({"quantize": "file"}, "has no blocks of its own"),
        ({"quantize": "int8", "device": "cuda"}, "runs on the CPU"),
    ):
        with pytest.raises(Error, match=words):
            load(folder, **how)
    model, tokenizer = load(folder, quantize="int8")
    with pytest.raises(Error, match="cannot be written as a folder"):
        save(model, tokenizer, tmp_path / "other")
    assert not (tmp_path / "other").exists()


CODE = """
import sys, torch, gemstill, gemstill.checkpoint.source, gemstill.checkpoint.gguf
def peak():
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) << 10 for line in handle if line.startswith("VmHWM"))
before = peak()
model, tokenizer = gemstill.load(sys.argv[1], quantize="int8")
print(sum(w.nbytes for w in (module.__dict__.get("weight") for module in model.modules()) if w is not None))
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux' own account of memory")
@pytest.mark.parametrize("place", ["model", "model.gguf"])
def test_the_unquantized_weights_are_never_in_memory(place, tmp_path):
    big = replace(BASE, vocab_size=320, hidden_size=512, intermediate_size=2048, num_layers=10, head_dim=16)
    big = replace(big, query_pre_attn_scalar=16)
    with torch.device("meta"):
        model = Transformer(big)
    model.load_state_dict(
        {name: torch.zeros(p.shape, dtype=torch.bfloat16) for name, p in model.named_parameters()}, assign=True
    )
    save(model, small_tokenizer(), tmp_path / place)
    environment = os.environ | {"GEMSTILL_PRECISION": "float32"}  # without measuring, which takes memory too
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path / place)], env=environment, capture_output=True, text=True, check=True
    )
    size, loaded = map(int, done.stdout.split())
    print(f"{size >> 20} MiB of weights, {loaded >> 20} at most when loaded")
    assert size > 30 << 20
    assert loaded < 1.05 * size + (64 << 20)
    assert loaded < 2 * size  # they were twice as much


@pytest.mark.real_weights
def test_published_blocks_are_kept_bit_by_bit(published, opened, tmp_path):
    model, tokenizer = load(published, quantize="file", dtype=torch.float32)
    assert weight_bytes(model) < 1.15 * sum(info.nbytes for info in GgufFile(published).tensors.values())
    save(model, tokenizer, tmp_path / "again.gguf")
    old, new = GgufFile(published), GgufFile(tmp_path / "again.gguf")
    for name, _ in named_weights(model):
        info = old.tensors[their_name(name)]
        assert new.tensors[info.name].block == info.block
        assert torch.equal(new.data(info.name), old.data(info.name))
    whole, _ = opened
    for count in (12, 80):
        tokens = torch.tensor([[tokenizer.bos_id, *tokenizer.encode("def area(width, height):\n" * 9)][:count]])
        logits = whole(tokens)
        assert (model(tokens) - logits).abs().max() < 2e-2 * logits.abs().max()
