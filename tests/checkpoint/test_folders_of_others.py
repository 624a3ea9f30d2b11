"""Folders that others wrote: every spelling of config.json, shards, models for text and images, hostile files."""

import json
import struct
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from gemstill.checkpoint import huggingface
from gemstill.checkpoint.hf_config import from_hf, to_hf
from gemstill.checkpoint.huggingface import load_folder, save_folder
from gemstill.checkpoint.tensors import check_names
from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.model.config import PRESETS
from gemstill.model.transformer import Transformer
from tests.model.reference import BASE, GEMMA3, copy_of, network, text
from tests.model.tokenizers import small_tokenizer

SMALL = replace(BASE, vocab_size=384)
SMALL3 = replace(GEMMA3, vocab_size=384)


@pytest.fixture
def folder(tmp_path):
    save_folder(network(SMALL), small_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("config", [SMALL, SMALL3, replace(SMALL, tie_embeddings=False)], ids=["2", "3", "untied"])
def test_what_transformers_saves_opens_with_its_logits(config, tmp_path):
    theirs = copy_of(network(config), config)
    theirs.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    small_tokenizer().save(tmp_path / "model")
    model, _ = load_folder(tmp_path / "model")
    assert model.config == config
    tokens = text(config)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)


def both_kinds(config):
    """A tiny Gemma 3 for text and images, as `transformers` makes it, with these weights in its text part."""
    fields = to_hf(config) | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        vision_use_head=False,
    )  # fmt: skip
    whole = Gemma3Config(text_config=Gemma3TextConfig(**fields), vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(whole)
    state = network(config).state_dict()
    model.model.language_model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("spelling", ["as saved", "published", "newer"])
def test_the_text_part_of_a_model_for_text_and_images(spelling, tmp_path):
    both_kinds(SMALL3).save_pretrained(tmp_path / "model")
    small_tokenizer().save(tmp_path / "model")
    if spelling != "as saved":
        path = tmp_path / "model" / "model.safetensors"
        tensors = {}
        for name, tensor in load_file(path).items():
            part = name.replace("language_model.model.", "language_model.").replace(
                "model.language_model.", "language_model."
            )
            part = part.removeprefix("model.")
            published = part.replace("language_model.", "language_model.model.", 1)
            tensors[published if spelling == "published" else f"model.{part}"] = tensor
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.warns(Notice, match="only the text part"):
        model, _ = load_folder(tmp_path / "model")
    assert model.config == SMALL3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network(SMALL3).parameters(), strict=True))


def test_scaled_positions_are_refused(tmp_path):
    """Gemma 3's models of 4B and more: global layers divide positions by 8."""
    published = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                        "sliding_window": 1024},
    }  # fmt: skip
    with pytest.raises(Error, match=r"positions are scaled .*factor': 8\.0"):
        from_hf(published, "config.json")
    published["text_config"]["rope_scaling"] = None
    config = from_hf(published, "config.json")
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (8, 4, 256, 262_208)
    del published["text_config"]
    with pytest.raises(Error, match="has no 'text_config'"):
        from_hf(published, "config.json")


SPELLINGS = [
    {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": None},
    {"hidden_act": "gelu", "hidden_activation": None},
    {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
    {"hidden_activation": None},
    {"rope_parameters": None},
    {"rope_theta": None, "rope_scaling": {"rope_type": "default"}},
    {"layer_types": None},
    {"layer_types": None, "sliding_window_pattern": 2},
]


@pytest.mark.parametrize("change", SPELLINGS, ids=str)
def test_every_spelling_means_the_same(change):
    raw = to_hf(PRESETS["gemma2-2b"])
    for name, value in change.items():
        if value is None:
            raw.pop(name, None)
        else:
            raw[name] = value
    assert from_hf(raw, "here") == PRESETS["gemma2-2b"]


@pytest.mark.parametrize("name", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_the_pattern_of_gemma_3_may_stand_for_its_layers(name):
    raw = to_hf(replace(PRESETS["gemma3-270m"], layer_pattern=3))
    del raw["layer_types"]
    assert from_hf(raw | {name: 3}, "here").layer_pattern == 3
    assert from_hf(raw, "here").layer_pattern == 6


@pytest.mark.parametrize("vocab_size", [256_000, 256_128])
def test_both_sizes_of_the_vocabulary(vocab_size):
    config = PRESETS["gemma2-9b"].with_vocab(vocab_size)
    assert from_hf(to_hf(config), "here") == config


HOSTILE = {
    "model_type": [["gemma2"], {}, None, 3],
    "num_hidden_layers": [10**9, 2**63, -1, 0, 10**400],
    "hidden_size": [2**31, 2**63 - 1, True, 0],
    "num_attention_heads": [2**24, 10**30],
    "head_dim": [2**25, 15],
    "rms_norm_eps": [float("nan"), float("inf"), 10**400, -1.0],
    "query_pre_attn_scalar": [0, float("nan"), 1e308],
    "attn_logit_softcapping": [float("nan"), 0, "50"],
    "rope_theta": ["10000", [1], 0],
    "rope_parameters": [[], "x", 3, {"rope_type": ["x"]}, {"rope_theta": {}}],
    "rope_scaling": [[1], "linear", {"type": "linear", "factor": 2}],
    "layer_types": [3, "sliding_attention", [], [["x"]] * 3],
    "hidden_activation": ["relu", [], {}],
    "hidden_act": ["silu"],
    "sliding_window": [-1, 2**70],
    "max_position_embeddings": [0, 2**70],
    "tie_word_embeddings": [1, "yes"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in HOSTILE.items() for value in values])
def test_nonsense_is_an_error(name, value):
    raw = to_hf(SMALL) | {name: value}
    if name == "hidden_act":
        del raw["hidden_activation"]
    if name in ("rope_theta",):
        del raw["rope_parameters"]
    with pytest.raises(Error) as caught:
        from_hf(raw, "here")
    assert len(str(caught.value)) < 400


def test_shards_above_the_limit_are_written_and_opened_by_others(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD", 50_000)
    model = network(SMALL)
    save_folder(model, small_tokenizer(), tmp_path / "shards", dtype=torch.bfloat16)
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    sizes = {file: sum(t.nbytes for t in load_file(tmp_path / "shards" / file).values()) for file in files}
    assert all(size <= 50_000 for size in sizes.values())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    again, _ = load_folder(tmp_path / "shards")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert theirs.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.bfloat16())
        assert torch.equal(theirs.get_parameter(f"model.{name}"), parameter.bfloat16())
    save_folder(again, small_tokenizer(), tmp_path / "shards", dtype=torch.float32)  # itself, mapped as it is
    assert torch.equal(load_folder(tmp_path / "shards")[0].norm.weight, again.norm.weight.float())
    monkeypatch.undo()
    save_folder(model, small_tokenizer(), tmp_path / "shards")
    assert [path.name for path in (tmp_path / "shards").glob("*.safetensors*")] == ["model.safetensors"]


def write_index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink(missing_ok=True)


ESCAPES = [
    "../model.safetensors", "/etc/passwd", "..", ".", "", "a/b.safetensors", "x.bin", "-rf.safetensors",
    "a\nb.safetensors", "\ud800.safetensors", "a\0.safetensors", 3, None, ["model.safetensors"],
]  # fmt: skip


@pytest.mark.parametrize("file", ESCAPES, ids=ascii)
def test_an_index_names_files_of_its_folder_alone(file, folder):
    (folder / "whole.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    names = load_file(folder / "whole.safetensors")
    places = dict.fromkeys(names, "whole.safetensors")
    write_index(folder, places)
    load_folder(folder)
    write_index(folder, places | {"model.norm.weight": file})
    with pytest.raises(Error, match=r"weight_map puts 'model\.norm\.weight' into"):
        load_folder(folder)


def test_an_index_that_is_not_true(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:9]}, folder / "a.safetensors")
    save_file({name: tensors[name] for name in names[8:]}, folder / "b.safetensors")
    places = {name: "a.safetensors" if name in names[:9] else "b.safetensors" for name in names}
    write_index(folder, places)
    with pytest.raises(Error, match="another file holds too: " + names[8].replace(".", r"\.")):
        load_folder(folder)
    save_file({name: tensors[name] for name in names[9:]}, folder / "b.safetensors")
    load_folder(folder)
    write_index(folder, places | {names[0]: "b.safetensors"})
    with pytest.raises(Error, match=r"not in the files it names: " + names[0].replace(".", r"\.")):
        load_folder(folder)
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(Error, match="not valid JSON"):
        load_folder(folder)
    (folder / "model.safetensors.index.json").write_text(" " * (5 << 20))
    with pytest.raises(Error, match="far more than such a file needs"):
        load_folder(folder)


@pytest.mark.parametrize("length", [0, 2**31, 2**63 - 1, 2**64 - 1, 90 << 20])
def test_a_header_of_any_length_is_bounded_first(length, folder):
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(Error, match="cannot be read as safetensors"):
        load_folder(folder)


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn, torch.bool, torch.int64], ids=str)
def test_other_types_are_named(kind, folder):
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        name: torch.zeros(48).to(kind) for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        Error, match=r"type that no weights have: model\.layers\.1\..* is stored as .*model\.norm\.weight is"
    ):
        load_folder(folder)


def test_a_gguf_or_pickles_in_a_folder_are_pointed_at(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(Error, match="pickled weights are not opened here"):
        load_folder(folder)
    (folder / "small.gguf").write_bytes(b"")
    with pytest.raises(Error, match=r"name the file: .*small\.gguf"):
        load_folder(folder)


def test_float16_where_it_overflows(tmp_path):
    model = network(SMALL3)
    with pytest.raises(Error, match=r"activations overflow float16.*bfloat16"):
        save_folder(model, small_tokenizer(), tmp_path / "model", dtype=torch.float16)
    save_folder(model, small_tokenizer(), tmp_path / "model")
    with pytest.raises(Error, match="activations overflow float16"):
        load_folder(tmp_path / "model", dtype=torch.float16)
    model = network(SMALL)
    save_folder(model, small_tokenizer(), tmp_path / "half", dtype=torch.float16)
    assert load_folder(tmp_path / "half")[0].norm.weight.dtype == torch.float16
    with torch.no_grad():
        model.norm.weight[3] = 1e5
    with pytest.raises(Error, match=r"weights overflow float16: model\.norm\.weight"):
        save_folder(model, small_tokenizer(), tmp_path / "half", dtype=torch.float16)
    with pytest.raises(Error, match=r"not stored as torch\.int8"):
        save_folder(model, small_tokenizer(), tmp_path / "half", dtype=torch.int8)


def test_a_control_token_without_a_row_is_said(tmp_path):
    """Gemma 3's text models have 262,144 rows and a tokenizer with an image's placeholder as entry 262,144."""
    words = json.loads(small_tokenizer().data)
    entry = {"id": 320, "content": "<image_soft_token>", "special": True, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False}  # fmt: skip
    save_folder(network(replace(SMALL, vocab_size=320)), small_tokenizer(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer.model").unlink()
    words["added_tokens"].append(entry)
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.warns(Notice, match="control token <image_soft_token> has no row"):
        load_folder(tmp_path / "model")


def test_all_that_is_wrong_is_in_one_line():
    model = Transformer(replace(BASE, num_layers=1))
    found = {name: parameter.shape for name, parameter in model.named_parameters()}
    check_names(found, model, where="x")
    bad = found | {"norm.weight": (3,), "what": (1,)}
    del bad["embed_tokens.weight"]
    with pytest.raises(Error) as caught:
        check_names(bad, model, where="x", unreadable={"norm.weight": "I8", "what": "I8"})
    assert str(caught.value).startswith(
        "x: tensors are missing: embed_tokens.weight; tensors that the model does not have: what; tensors of another "
        "shape: norm.weight [3] instead of [48]; tensors of a type that no weights have: norm.weight is stored as I8;"
    )


def test_a_strangers_names_do_nothing_to_a_terminal(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"\x1b[2Jgone\n" * 50: torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Error) as caught:
        load_folder(folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("shape", [[], [384], [384, 48, 1], [1, 48]], ids=str)
def test_a_head_of_another_shape_is_superfluous(shape, folder):
    tensors = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.zeros(shape)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Error, match=r"does not have: lm_head\.weight"):
        load_folder(folder)
