"""GGUF files in and out: round trips bit by bit, the package `gguf` agrees, what cannot work is refused, and why."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemstill.checkpoint import gguf as ours
from gemstill.checkpoint.gguf import EXACT, load_gguf, read_gguf_config, read_tokenizer, save_gguf, their_name
from gemstill.checkpoint.gguf_file import GgufFile, Out, write_gguf
from gemstill.checkpoint.huggingface import load_folder, save_folder
from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.model.transformer import Transformer
from gemstill.ops.blocks import BLOCKS, dequantize, quantize
from tests.checkpoint.gguf_models import BOTH, GEMMA2, GEMMA3, network
from tests.model.reference import text
from tests.model.tokenizers import TEXT, small_tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture(params=BOTH)
def config(request):
    return BOTH[request.param]


def rewrite(path, target, *, fields=None, drop=(), tensors=None):
    """The file `path` again as `target`, with other fields, or with other bytes (block format, data) of tensors."""
    file = GgufFile(path)
    kept = {key: value for key, value in (file.fields | (fields or {})).items() if key not in drop}
    outs = []
    for name, info in file.tensors.items():
        if name in drop:
            continue
        block, data = (tensors or {}).get(name, (info.block, file.data(name)))
        shape = (*info.shape[:-1], data.shape[-1] // block.bytes * block.size)
        outs.append(Out(name, shape, block, lambda data=data: [data.contiguous()]))
    write_gguf(target, kept, outs)
    return target


def test_round_trip_through_f32_is_exact(config, tmp_path):
    """Folder to GGUF to folder: the same bytes of weights, though the file holds 1 + w, which float32 rounds."""
    model = network(config)
    with torch.no_grad():
        model.norm.weight[:4] = torch.tensor([1e-9, -3e-8, 0.3, 7.0])
    save_folder(model, small_tokenizer(), tmp_path / "first")
    loaded, tokenizer = load_folder(tmp_path / "first")
    save_gguf(loaded, tokenizer, tmp_path / "model.gguf")
    back, again = load_gguf(tmp_path / "model.gguf")
    save_folder(back, again, tmp_path / "second")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))
    text = "".join(TEXT)
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template
    assert read_tokenizer(GgufFile(tmp_path / "model.gguf")).encode(text) == again.encode(text)
    assert again.vocab_size == tokenizer.vocab_size, "rows of padding are no entries"


def test_a_gain_that_was_changed_is_believed(tmp_path):
    """The exact weights beside the gains are for the gains they were written with."""
    model = network(GEMMA2)
    save_gguf(model, small_tokenizer(), tmp_path / "model.gguf")
    exact = GgufFile(tmp_path / "model.gguf").fields[EXACT + "output_norm.weight"]
    assert np.array_equal(exact, model.norm.weight.detach().numpy())
    gain = torch.full((GEMMA2.hidden_size,), 1.5)
    changed = {"output_norm.weight": (BLOCKS["F32"], quantize(gain, "f32"))}
    rewrite(tmp_path / "model.gguf", tmp_path / "changed.gguf", tensors=changed)
    assert torch.equal(load_gguf(tmp_path / "changed.gguf")[0].norm.weight, torch.full_like(gain, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_keep_their_dtype(dtype, tmp_path):
    model = network(GEMMA2, dtype=dtype)
    save_gguf(model, small_tokenizer(), tmp_path / "model.gguf")
    back, _ = load_gguf(tmp_path / "model.gguf")
    for a, b in zip(model.parameters(), back.parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert back.compute_dtype != torch.float16
    save_gguf(model, small_tokenizer(), tmp_path / "wide.gguf", dtype="f32")
    again, _ = load_gguf(tmp_path / "wide.gguf", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_the_gguf_package_reads_what_is_written(kind, tmp_path):
    model, tokenizer = network(GEMMA2), small_tokenizer()
    save_gguf(model, tokenizer, tmp_path / "model.gguf", dtype=kind)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        tensor = tensors[their_name(name)]
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape)))
        if parameter.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            assert np.array_equal(theirs, 1 + parameter.detach().numpy())
            continue
        wanted = "q8_0" if kind == "q4_0" and name == "embed_tokens.weight" else kind
        assert tensor.tensor_type.name == wanted.upper()
        assert np.array_equal(theirs, dequantize(quantize(parameter.detach(), wanted), wanted).numpy())
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "gemma2"
    assert fields["general.file_type"] == gguf.LlamaFileType[f"{'ALL' if kind == 'f32' else 'MOSTLY'}_{kind.upper()}"]
    assert fields["gemma2.attention.sliding_window"] == GEMMA2.sliding_window
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.scores"]) == GEMMA2.vocab_size
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


def test_every_key_is_one_that_llama_cpp_knows(config, tmp_path):
    save_gguf(network(config), small_tokenizer(), tmp_path / "model.gguf")
    keys = gguf.Keys
    known = {
        value.replace("{arch}", kind)
        for group in vars(keys).values() if isinstance(group, type)
        for value in vars(group).values() if isinstance(value, str)
        for kind in BOTH
    }  # fmt: skip
    strange = {key for key in GgufFile(tmp_path / "model.gguf").fields if not key.startswith(EXACT)} - known
    assert not strange


def test_blocks_become_bfloat16_or_what_is_asked_for(tmp_path):
    model = network(GEMMA2)
    save_gguf(model, small_tokenizer(), tmp_path / "model.gguf", dtype="q8_0")
    exact, _ = load_gguf(tmp_path / "model.gguf", dtype=torch.float32)
    usual, _ = load_gguf(tmp_path / "model.gguf")
    weight = dequantize(quantize(model.layers[1].mlp.up_proj.weight.detach(), "q8_0"), "q8_0")
    assert torch.equal(exact.layers[1].mlp.up_proj.weight, weight)
    assert torch.equal(usual.layers[1].mlp.up_proj.weight, weight.bfloat16())
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}


def test_weights_in_their_own_dtype_are_mapped_and_the_file_is_safe(tmp_path):
    save_gguf(network(GEMMA2), small_tokenizer(), tmp_path / "model.gguf")
    before = (tmp_path / "model.gguf").read_bytes()
    model, _ = load_gguf(tmp_path / "model.gguf")
    with torch.no_grad():
        model.embed_tokens.weight.zero_()
    assert (tmp_path / "model.gguf").read_bytes() == before
    assert load_gguf(tmp_path / "model.gguf")[0].embed_tokens.weight.any()


RARE = ["Q4_1", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS"]


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q5_0", *RARE])
def test_all_formats_that_people_publish(kind, tmp_path, monkeypatch):
    wide = replace(GEMMA2, hidden_size=256, num_layers=1)
    save_gguf(network(wide), small_tokenizer(), tmp_path / "f32.gguf")
    block = (BLOCKS | ours.RARE)[kind]
    data = np.zeros((96, 256 // block.size * block.bytes), np.uint8)
    data[:] = np.random.default_rng(0).integers(0, 64, data.shape)  # small bytes: no scale is NaN
    path = rewrite(
        tmp_path / "f32.gguf", tmp_path / "model.gguf", tensors={"blk.0.ffn_up.weight": (block, torch.from_numpy(data))}
    )
    model, _ = load_gguf(path, dtype=torch.float32)
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(model.layers[0].mlp.up_proj.weight.detach().numpy(), theirs)
    monkeypatch.setitem(sys.modules, "gguf", None)
    if kind in RARE:
        with pytest.raises(Error, match=rf"ffn_up.weight is in the format {kind}.*pip install 'gemstill\[gguf\]'"):
            load_gguf(path)
    else:
        load_gguf(path)


def test_a_head_of_its_own_and_layers_that_are_all_global(tmp_path):
    for config in (
        replace(GEMMA3, tie_embeddings=False),
        replace(GEMMA3, layer_pattern=1, sliding_window=4096),
        replace(GEMMA3, layer_pattern=3, final_logit_softcap=20.0),
        replace(GEMMA2, layer_pattern=3, rope_theta=5000.0),
        replace(GEMMA3, num_layers=62, query_pre_attn_scalar=16),
    ):
        model = network(config)
        save_gguf(model, small_tokenizer(), tmp_path / "model.gguf")
        back, _ = load_gguf(tmp_path / "model.gguf")
        assert back.config == config == read_gguf_config(tmp_path / "model.gguf")
        with torch.no_grad():
            assert torch.equal(back(text(config)), model(text(config)))


def test_what_published_files_leave_out(tmp_path):
    """Files of Gemma 2 have no rotary base and no pattern, some of Gemma 3 no local base."""
    save_gguf(network(GEMMA3), small_tokenizer(), tmp_path / "model.gguf")
    drop = ("gemma3.rope.freq_base_swa", "gemma3.attention.sliding_window_pattern")
    assert load_gguf(rewrite(tmp_path / "model.gguf", tmp_path / "b.gguf", drop=drop))[0].config == GEMMA3
    local = np.array([layer % 6 != 5 for layer in range(7)])
    file = rewrite(tmp_path / "model.gguf", tmp_path / "c.gguf", fields={drop[1]: local.astype(np.int32)})
    assert load_gguf(file)[0].config == GEMMA3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query_pre_attn_scalar": 24}, r"scales queries by 32\^-1/2.*not by query_pre_attn_scalar 24"),
        ({"num_layers": 46}, r"scales queries by 16\^-1/2, which it derives from 46 layers"),
        ({"attn_logit_softcap": None}, "always caps"),
        ({"tie_embeddings": False}, "head of Gemma 2 is always the embedding"),
        ({"rope_local_theta": 5.0}, "one rotary base"),
        ({"qk_norm": True}, "does not cap attention logits of Gemma 3"),
    ],
)
def test_networks_that_llama_cpp_would_run_wrongly(changes, reason, tmp_path):
    with pytest.raises(Error, match=f"llama.cpp would run this .* wrongly.*{reason}"):
        save_gguf(Transformer(replace(GEMMA2, **changes)), small_tokenizer(), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_widths_weights_and_names_that_do_not_fit(tmp_path):
    path = tmp_path / "model.gguf"
    narrow = network(replace(GEMMA2, hidden_size=48))
    with pytest.raises(Error, match=r"token_embd.weight has rows of 48 weights, which blocks of 32 do not divide"):
        save_gguf(narrow, small_tokenizer(), path, dtype="q8_0")
    save_gguf(narrow, small_tokenizer(), path, dtype="bf16")
    path.unlink()
    with pytest.raises(Error, match="not written as 'q4_k'; take one of f32"):
        save_gguf(narrow, small_tokenizer(), path, dtype="q4_k")
    large = network(GEMMA2)
    with torch.no_grad():
        large.layers[2].mlp.up_proj.weight[3, 3] = 1e6
    with pytest.raises(Error, match=r"blk.2.ffn_up.weight: weights are not finite, or are too large for F16"):
        save_gguf(large, small_tokenizer(), path, dtype="f16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(Error, match="320 entries, the model 300"):
        save_gguf(Transformer(replace(GEMMA2, vocab_size=300)), small_tokenizer(), path)


def test_float16_and_gemma_3(tmp_path):
    with pytest.warns(Notice, match="rounds activations to float16"):
        save_gguf(network(GEMMA3), small_tokenizer(), tmp_path / "model.gguf", dtype="f16")
    with pytest.raises(Error, match="overflow float16"):
        load_gguf(tmp_path / "model.gguf", dtype=torch.float16)
    model, _ = load_gguf(tmp_path / "model.gguf")
    assert model.embed_tokens.weight.dtype == torch.float16
    assert model.compute_dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("fields", "drop", "message"),
    [
        ({"general.architecture": "llama"}, (), "architecture 'llama'; only gemma2 and gemma3"),
        ({"general.architecture": "gemma3n"}, (), "architecture 'gemma3n'"),
        ({}, ("general.architecture",), "architecture None"),
        ({}, ("gemma2.block_count",), "has no field 'block_count'"),
        ({"gemma2.block_count": 9}, (), "states 9 layers"),
        ({"gemma2.block_count": 3}, (), "tensors that the model does not have: blk.3.attn_k.weight"),
        ({"gemma2.embedding_length": 128}, (), "tensors of another shape: .*instead of"),
        ({"gemma2.attention.head_count": 0}, (), "num_heads is 0"),
        ({"gemma2.attention.key_length": 31}, (), "wide as its keys"),
        ({"gemma2.attention.layer_norm_rms_epsilon": float("nan")}, (), "not a number"),
        ({"gemma2.attention.layer_norm_rms_epsilon": "small"}, (), "not a number"),
        ({"gemma2.rope.scaling.type": "linear", "gemma2.rope.scaling.factor": 8.0}, (), "positions are scaled by 8.0"),
        ({"gemma2.context_length": "long"}, (), "not a whole number"),
        ({"gemma2.attention.sliding_window_pattern": np.array([1, 1, 0, 0], np.int32)}, (), "every n-th layer"),
        ({}, ("blk.1.ffn_up.weight",), "tensors are missing: blk.1.ffn_up.weight"),
        ({}, ("token_embd.weight",), "has no matrix token_embd.weight"),
        ({"tokenizer.ggml.model": "gpt2"}, (), "of the kind 'gpt2'"),
        ({"tokenizer.ggml.model": np.zeros(2, np.int32)}, (), "of the kind array"),
        ({"gemma2.rope.scaling.type": np.zeros(2, np.int32), "gemma2.rope.scaling.factor": 2.0}, (), "scaled by 2.0"),
        ({"gemma2.rope.scaling.type": "x", "gemma2.rope.scaling.factor": np.ones(2, np.int32)}, (), "scaled by array"),
        ({"tokenizer.ggml.add_space_prefix": True}, (), "a space before"),
        ({}, ("tokenizer.ggml.tokens",), "no list of tokens"),
        ({}, ("tokenizer.ggml.scores",), "no scores"),
        ({"tokenizer.ggml.scores": np.zeros(7, np.float32)}, (), "vocabulary cannot be used"),
        ({"tokenizer.ggml.bos_token_id": 1 << 31}, (), "vocabulary cannot be used"),
        ({"tokenizer.ggml.bos_token_id": "<bos>"}, (), "is no id"),
        ({"tokenizer.chat_template": 7}, (), "no text"),
    ],
)
def test_files_that_are_no_model(fields, drop, message, tmp_path):
    save_gguf(network(GEMMA2), small_tokenizer(), tmp_path / "good.gguf")
    path = rewrite(tmp_path / "good.gguf", tmp_path / "bad.gguf", fields=fields, drop=drop)
    with pytest.raises(Error, match=message) as caught:
        load_gguf(path)
    assert str(path) in str(caught.value)
