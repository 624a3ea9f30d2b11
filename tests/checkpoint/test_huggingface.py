"""Hugging Face folders: `transformers` opens what `save` writes, same logits; `load` gives it back or refuses."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemstill.checkpoint import hf_config
from gemstill.checkpoint.hf_config import from_hf, to_hf
from gemstill.checkpoint.huggingface import load_folder, save_folder
from gemstill.core.errors import Error
from gemstill.model.config import PRESETS
from gemstill.text.tokenizer import Tokenizer
from tests.model.reference import BASE, GEMMA3, grid, name_of, network, text
from tests.model.tokenizers import TEXT, small_tokenizer

TOKENIZER_SIZE = 320
SMALL = replace(BASE, vocab_size=384, query_pre_attn_scalar=24)  # padded rows
SMALL3 = replace(GEMMA3, vocab_size=TOKENIZER_SIZE)


@pytest.fixture
def folder(tmp_path):
    save_folder(network(SMALL), small_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("config", [SMALL, SMALL3, replace(SMALL, tie_embeddings=False)], ids=name_of)
def test_transformers_opens_the_folder_with_the_same_logits(config, tmp_path):
    model, tokenizer = network(config), small_tokenizer()
    save_folder(model, tokenizer, tmp_path / "model", card="# A card\n")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    assert theirs.dtype == torch.float32
    names = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = names(TEXT[7], return_tensors="pt").input_ids
    assert ids[0].tolist() == [tokenizer.bos_id, *tokenizer.encode(TEXT[7])]
    assert (names.bos_token_id, names.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert names.pad_token_id == tokenizer.pad_id
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    assert (tmp_path / "model" / "README.md").read_text() == "# A card\n"
    turns = [{"role": "user", "content": "Hi"}]
    templated = names.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert templated == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [SMALL, SMALL3, replace(SMALL, tie_embeddings=False)], ids=name_of)
def test_loading_gives_back_what_was_saved(config, dtype, tmp_path):
    model, tokenizer = network(config, dtype), small_tokenizer()
    save_folder(model, tokenizer, tmp_path / "model")
    again, same = load_folder(tmp_path / "model")
    assert again.config == config
    assert same.fingerprint == tokenizer.fingerprint
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter)
        assert again.get_parameter(name).dtype == dtype
        assert again.get_parameter(name).requires_grad
    other, _ = load_folder(tmp_path / "model", dtype=torch.float64)
    assert {p.dtype for p in other.parameters()} == {torch.float64}


def test_a_loaded_model_can_be_trained_without_touching_the_file(folder):
    before = (folder / "model.safetensors").read_bytes()
    model, _ = load_folder(folder)
    model(text(SMALL)).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (folder / "model.safetensors").read_bytes() == before


def test_equal_models_make_equal_bytes(folder, tmp_path):
    save_folder(network(SMALL), small_tokenizer(), tmp_path / "other")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux' own account of memory")
def test_loading_maps_the_weights_instead_of_copying_them(tmp_path):
    """64 MiB of weights opened: the process' own memory grows by much less."""
    big = replace(SMALL, hidden_size=512, intermediate_size=2048, num_layers=4)
    save_folder(network(big), small_tokenizer(), tmp_path / "model")
    size = (tmp_path / "model" / "model.safetensors").stat().st_size
    before = private_bytes()
    model, _ = load_folder(tmp_path / "model")
    assert size > 50 << 20
    assert private_bytes() - before < size // 4
    assert not any(p.is_meta for p in model.parameters())


def private_bytes():
    with open("/proc/self/status") as handle:
        return next(int(line.split()[1]) << 10 for line in handle if line.startswith("RssAnon"))


def test_shards_of_others_are_opened(folder):
    tensors = load_file(folder / "model.safetensors")
    parts = {"model-1.safetensors": {}, "model-2.safetensors": {}}
    for number, (name, tensor) in enumerate(tensors.items()):
        parts[f"model-{number % 2 + 1}.safetensors"][name] = tensor
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    expected, _ = load_folder(folder)
    (folder / "model.safetensors").unlink()
    model, _ = load_folder(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(Error, match=r"model-2\.safetensors.*cannot be read"):
        load_folder(folder)
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(Error, match="weight_map"):
        load_folder(folder)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_superfluous_and_misshapen_tensors_are_all_named(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.norm.weight"] = torch.zeros(5)

    change_weights(folder, change)
    with pytest.raises(Error) as caught:
        load_folder(folder)
    message = str(caught.value)
    assert "missing: model.layers.1.mlp.up_proj.weight" in message
    assert "does not have: model.layers.9.mlp.up_proj.weight" in message
    assert "model.norm.weight [5] instead of [48]" in message


def test_a_tied_head_written_out_is_taken_when_it_is_the_embedding(folder):
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model, _ = load_folder(folder)
    assert model.lm_head is None
    change_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(Error, match=r"lm_head\.weight differs"):
        load_folder(folder)


def test_integer_weights_are_refused(folder):
    change_weights(folder, lambda t: t.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))
    with pytest.raises(Error, match=r"model\.norm\.weight is stored as I8"):
        load_folder(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(Error, match=r"model\.safetensors.*cannot be read"):
        load_folder(folder)


def test_what_is_not_there_is_named(tmp_path, folder):
    with pytest.raises(Error, match="no such folder"):
        load_folder(tmp_path / "nothing")
    with pytest.raises(Error, match="is no folder"):
        load_folder(folder / "config.json")
    (folder / "tokenizer.model").unlink()  # either file of the tokenizer is enough
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        (folder / name).unlink()
        with pytest.raises(Error, match=name):
            load_folder(folder)


CHANGES = {
    "model_type": ("llama", "type 'llama'"),
    "hidden_size": (None, "hidden_size is None"),
    "num_hidden_layers": ("3", "num_hidden_layers is '3'"),
    "head_dim": (True, "head_dim is True"),
    "rms_norm_eps": ("small", "rms_norm_eps"),
    "tie_word_embeddings": ("no", "tie_word_embeddings"),
    "hidden_activation": ("relu", "hidden_activation is 'relu'"),
    "attention_bias": (True, "attention_bias is True"),
    "rope_parameters": ({"rope_type": "yarn", "factor": 2}, "yarn"),
    "rope_scaling": ({"type": "linear"}, "rope_scaling"),
    "quantization_config": ({"bits": 4}, "quantization_config"),
    "layer_types": (["full_attention", "sliding_attention", "sliding_attention"], "layer_types"),
    "num_attention_heads": (3, "no multiple"),
    "vocab_size": (300, "tokenizer has 320 entries, the model 300"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_config_of_something_else_is_refused(folder, name):
    raw = json.loads((folder / "config.json").read_text())
    raw[name], message = CHANGES[name]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(Error, match=message):
        load_folder(folder)


def test_a_config_without_a_size_or_no_config_at_all_is_refused(folder):
    raw = json.loads((folder / "config.json").read_text())
    del raw["intermediate_size"]
    with pytest.raises(Error, match="no field 'intermediate_size'"):
        from_hf(raw, "config.json")
    with pytest.raises(Error, match="not a JSON object"):
        from_hf([], "config.json")


def test_models_that_nobody_else_could_run_are_refused(tmp_path):
    for config in (replace(BASE, rope_local_theta=5.0), replace(GEMMA3, attn_logit_softcap=50.0)):
        with pytest.raises(Error):
            to_hf(config)


def test_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path):
    with pytest.raises(Error, match="tokenizer has 320 entries, the model 319"):
        save_folder(network(replace(SMALL, vocab_size=319)), small_tokenizer(), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("config", [*grid(12, seed=3), GEMMA3, *PRESETS.values()], ids=name_of)
def test_configuration_there_and_back(config):
    described = json.loads(json.dumps(to_hf(config)))
    again = from_hf(described, "here")
    assert again == config or replace(again, layer_pattern=config.layer_pattern) == config
    assert all(again.is_local(layer) == config.is_local(layer) for layer in range(config.num_layers))


def test_published_configs_of_older_transformers_are_read():
    """Field names and gaps as in the config.json files of google/gemma-2-2b (2024) and google/gemma-3-270m (2025)."""
    gemma2 = {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "head_dim": 256,
        "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "vocab_size": 256000, "rope_theta": 10000.0, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "max_position_embeddings": 8192,
        "attention_bias": False,
    }  # fmt: skip
    assert from_hf(gemma2, "here") == replace(PRESETS["gemma2-2b"], vocab_size=256000)
    gemma3 = {
        "model_type": "gemma3_text", "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18,
        "head_dim": 256,
        "num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "sliding_window": 512,
        "vocab_size": 262144, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rope_scaling": None,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "attention_bias": False, "_sliding_window_pattern": 6,
        "use_bidirectional_attention": False,
    }  # fmt: skip
    assert from_hf(gemma3, "here") == PRESETS["gemma3-270m"]


def test_our_own_checkpoint_is_replaced_and_nothing_else(folder, tmp_path):
    save_folder(network(replace(SMALL, num_layers=1)), small_tokenizer(), folder)
    assert load_folder(folder)[0].config.num_layers == 1
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(Error, match=r"notes\.txt"):
        save_folder(network(SMALL), small_tokenizer(), folder)
    (folder / "notes.txt").unlink()
    raw = json.loads((folder / "config.json").read_text())
    del raw["gemstill_version"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(Error, match="did not write"):
        save_folder(network(SMALL), small_tokenizer(), folder)
    assert load_folder(folder)[0].config.num_layers == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    save_folder(network(SMALL), small_tokenizer(), empty)
    load_folder(empty)
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(Error, match="file where a folder"):
        save_folder(network(SMALL), small_tokenizer(), file)
    assert file.read_text() == "text"


def test_a_link_to_a_checkpoint_stays_a_link(folder, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(folder)
    save_folder(network(replace(SMALL, num_layers=1)), small_tokenizer(), link)
    assert link.is_symlink()
    assert load_folder(folder)[0].config.num_layers == 1


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemstill.checkpoint.huggingface.write_weights", full)
    with pytest.raises(Error, match="No space left"):
        save_folder(network(replace(SMALL, num_layers=1)), small_tokenizer(), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_an_error(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Error, match="cannot be written"):
        save_folder(network(SMALL), small_tokenizer(), tmp_path / "model")


def test_a_tokenizer_json_alone_gets_settings(tmp_path):
    """A tokenizer.json from elsewhere may lack its tokenizer_config.json: AutoTokenizer opens the folder still."""
    shutil.copy(small_tokenizer().source, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.json")
    save_folder(network(SMALL), tokenizer, tmp_path / "model")
    names = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert names(TEXT[0]).input_ids == [tokenizer.bos_id, *tokenizer.encode(TEXT[0])]
    assert (names.bos_token, names.eos_token) == ("<bos>", "<eos>")


def test_every_field_of_ours_has_a_name_of_theirs():
    ours = set(hf_config.FIELDS) | {"rope_theta", "rope_local_theta", "layer_pattern", "qk_norm"}
    assert ours == set(BASE.__dataclass_fields__)
