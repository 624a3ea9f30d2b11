"""Google's own files: the layout of gemma_pytorch gives the same network, and a pickle gives nothing but tensors."""

import json
import os
import pickle
import zipfile
from dataclasses import replace

import pytest
import torch

from gemstill.checkpoint.google import load_google
from gemstill.checkpoint.hf_config import to_hf
from gemstill.checkpoint.source import load
from gemstill.core.errors import Error
from gemstill.model.config import PRESETS
from gemstill.model.transformer import Transformer
from tests.model.reference import BASE, GEMMA3, network, text
from tests.model.tokenizers import small_tokenizer

SMALL = replace(BASE, vocab_size=384, query_pre_attn_scalar=24)
SMALL3 = replace(GEMMA3, vocab_size=384)


def their_layout(model):
    """The state dictionary of gemma_pytorch's GemmaForCausalLM with these weights, its tables included."""
    out = {
        "embedder.weight": model.embed_tokens.weight.detach().clone(),
        "model.norm.weight": model.norm.weight.detach(),
    }
    for number, layer in enumerate(model.layers):
        own = dict(layer.named_parameters())
        joint = [own.pop(f"self_attn.{part}_proj.weight").detach() for part in "qkv"]
        out[f"model.layers.{number}.self_attn.qkv_proj.weight"] = torch.cat(joint)
        for name, parameter in own.items():
            theirs = name.replace("q_norm", "query_norm").replace("k_norm", "key_norm")
            out[f"model.layers.{number}.{theirs}"] = parameter.detach()
    angles = torch.outer(torch.arange(32), torch.ones(model.config.head_dim // 2))
    tables = ("local_freqs_cis", "global_freqs_cis") if model.config.qk_norm else ("freqs_cis",)
    return out | {name: torch.polar(torch.ones_like(angles), angles) for name in tables}


def put(folder, state, config=SMALL):
    """A folder as Google gives it: weights and SentencePiece model; miniatures need their sizes written beside."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes((small_tokenizer().source.parent / "tokenizer.model").read_bytes())
    if config:
        (folder / "config.json").write_text(json.dumps(to_hf(config)))
    if state is not None:
        torch.save({"model_state_dict": state}, folder / "model.ckpt")
    return folder / "model.ckpt"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [SMALL, SMALL3], ids=["gemma2", "gemma3"])
def test_the_same_weights_and_logits(config, dtype, tmp_path):
    model = network(config, dtype)
    path = put(tmp_path / "g", their_layout(model), config)
    again, tokenizer = load_google(path)
    assert again.config == config
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name
        assert again.get_parameter(name).dtype == dtype
    assert tokenizer.encode("def area") == small_tokenizer().encode("def area")
    torch.testing.assert_close(again(text(config)), model(text(config)), rtol=0, atol=0)
    wide, _ = load(path, dtype=torch.float64)  # the one way for all, and in another dtype
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    from_folder, _ = load(path.parent)
    assert torch.equal(from_folder.norm.weight, model.norm.weight)
    (path.parent / "other.ckpt").write_bytes(path.read_bytes())
    with pytest.raises(Error, match=r"holds several models; name one of them: .*model\.ckpt"):
        load(path.parent)


def test_a_checkpoint_in_several_files(tmp_path):
    model = network(SMALL)
    put(tmp_path / "g", None, None)
    (tmp_path / "g" / "config.json").write_text(json.dumps(to_hf(SMALL)))
    state = their_layout(model)
    places = {name: f"pytorch_model-{number % 2 + 1}.bin" for number, name in enumerate(state)}
    for file in set(places.values()):
        torch.save({name: tensor for name, tensor in state.items() if places[name] == file}, tmp_path / "g" / file)
    index = tmp_path / "g" / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    again, _ = load(tmp_path / "g")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    index.write_text(json.dumps({"weight_map": places | {"embedder.weight": "../pytorch_model-1.bin"}}))
    with pytest.raises(Error, match="to files of this folder"):
        load(tmp_path / "g")
    index.write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": "pytorch_model-1.bin"}}))
    with pytest.raises(Error, match=r"pickled weights that are not gemma_pytorch's.*safetensors"):
        load(tmp_path / "g")


@pytest.mark.parametrize("name", ["gemma2-2b", "gemma2-9b", "gemma2-27b", "gemma3-270m"])
def test_published_sizes_are_known_by_their_shapes(name, tmp_path):
    from gemstill.checkpoint.google import _config

    config = PRESETS[name].with_vocab(256_000)
    with torch.device("meta"):
        state = their_layout(Transformer(config))
    assert _config(state, tmp_path, tmp_path) == config


def test_gemma_3_1b_is_known_by_its_norms(tmp_path):
    from gemstill.checkpoint.google import _config

    config = replace(PRESETS["gemma3-270m"], hidden_size=1152, intermediate_size=6912, num_layers=26)
    with torch.device("meta"):
        state = their_layout(Transformer(config))
    assert _config(state, tmp_path, tmp_path) == config


class Evil:
    """What a hostile pickle does when it is opened by pickle."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["model_state_dict", "beside", "old format", "plain"])
def test_a_hostile_pickle_runs_nothing(where, tmp_path):
    path = put(tmp_path / "g", None)
    evil = Evil(f"touch {tmp_path / 'ran'}")
    state = their_layout(network(SMALL))
    if where == "plain":
        path.write_bytes(pickle.dumps(evil))
    elif where == "beside":
        torch.save({"model_state_dict": state, "config": evil}, path)
    else:
        old = {"_use_new_zipfile_serialization": False} if where == "old format" else {}
        torch.save({"model_state_dict": state | {"model.norm.weight": evil}}, path, **old)
    with pytest.raises(Error, match=r"refused|not a file that torch saved"):
        load_google(path)
    assert not (tmp_path / "ran").exists()
    torch.load(path, weights_only=False) if where == "beside" else pickle.loads(pickle.dumps(evil))
    assert (tmp_path / "ran").exists()  # it would have


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "long pickle"])
def test_a_small_archive_does_not_unfold_to_a_large_pickle(packed, tmp_path):
    path = put(tmp_path / "g", their_layout(network(SMALL)))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data + bytes(1 << 21) if name.endswith("data.pkl") else data)
    with pytest.raises(Error, match=r"packed, as torch saves nothing" if packed else r"data\.pkl' of 2\d* bytes"):
        load_google(path)


def test_strides_do_not_make_a_small_file_a_large_tensor(tmp_path):
    state = their_layout(network(SMALL))
    path = put(tmp_path / "g", state | {"embedder.weight": torch.zeros(1, 48).expand(1 << 40, 48)})
    with pytest.raises(Error, match="lies in the file as a whole"):
        load_google(path)


def broken(change):
    state = their_layout(network(SMALL))
    change(state)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), r"missing: layers\.1\.mlp\.up_proj\.weight"),
        (lambda s: s.update({"model.layers.9.x": torch.zeros(2)}), r"does not have: layers\.9\.x"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(5)}), r"norm\.weight \[5\] instead of \[48\]"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}), "stored as int8"),
        (lambda s: s.update({"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(7, 48)}), "qkv_proj"),
        (lambda s: s.pop("embedder.weight"), r"is not a model of gemma_pytorch.*embedder\.weight"),
        (lambda s: s.update({"embedder.weight_scaler": torch.zeros(384)}), "quantized to 8 bits"),
        (lambda s: s.update({"siglip_vision_model.x": torch.zeros(2)}), "text and images"),
        (lambda s: [s.pop(n) for n in list(s) if "pre_feedforward" in n], "Gemma 1"),
        (lambda s: s.update({3: torch.zeros(2)}), "no dictionary of tensors by name"),
        (lambda s: s.update({"model.x": 3}), "'model.x' is no tensor"),
    ],
)
def test_what_is_wrong_is_named(change, message, tmp_path):
    with pytest.raises(Error, match=message):
        load_google(put(tmp_path / "g", broken(change)))


def test_damaged_files_and_missing_ones(tmp_path):
    path = put(tmp_path / "g", their_layout(network(SMALL)))
    (tmp_path / "g" / "config.json").unlink()
    with pytest.raises(Error, match=r"no model of this shape is known \(width 48, 3 layers\).*config.json beside it"):
        load_google(path)
    put(tmp_path / "g", None)
    data = path.read_bytes()
    for keep in (0, 3, 10, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(Error):
            load_google(path)
    torch.save({"weights": {}}, path)
    with pytest.raises(Error, match="no 'model_state_dict'"):
        load_google(path)
    path.write_bytes(data)
    (tmp_path / "g" / "tokenizer.model").unlink()
    with pytest.raises(Error, match=r"no tokenizer\.model beside it"):
        load_google(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    with pytest.raises(Error):
        load_google(path)


def test_a_config_of_other_sizes_is_an_error(tmp_path):
    other = replace(SMALL, num_heads=2, head_dim=32)
    with pytest.raises(Error, match=r"missing: .*q_proj.*does not have: .*qkv_proj"):
        load_google(put(tmp_path / "g", their_layout(network(SMALL)), other))
