"""Networks of other architectures: opened and saved by `transformers`, refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gemstill.checkpoint.foreign import is_foreign, load_foreign, make_foreign, open_any, save_foreign, shape_of
from gemstill.checkpoint.source import save
from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.model.adapter import Adapter
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.text.tokenizer import Tokenizer
from gemstill.text.training import train_tokenizer

VOCAB = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer([Path(__file__).read_text()], tmp_path_factory.mktemp("tokenizer"), VOCAB)


@pytest.fixture
def llama(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A random Llama in its folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    tokenizer.save(tmp_path / "llama")
    return tmp_path / "llama"


def test_a_folder_is_opened_and_saved_as_others_open_it(llama: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokens = torch.arange(24).reshape(2, 12)
    model, opened = open_any(llama, dtype=torch.float32)
    assert isinstance(model, Adapter)
    assert not model.training
    assert (model.head.dtype, opened.fingerprint) == (torch.float32, tokenizer.fingerprint)
    known = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(model(tokens), known)
    assert shape_of(llama) == model.config
    with torch.no_grad():
        model.head.add_(1)
    save_foreign(model, dict(model.named_parameters()), opened, tmp_path / "out", card="---\nlicense: mit\n---\n")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again(tokens).logits, model(tokens))
    text = "def test(a, b):\n    return 12"
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False).input_ids
    assert ids == tokenizer.encode(text)
    assert not list(tmp_path.glob("*.partial"))
    save_foreign(model, dict(model.named_parameters()), opened, tmp_path / "out", card="x")  # over our own
    with pytest.raises(Error, match="did not write"):
        save_foreign(model, dict(model.named_parameters()), opened, llama, card="x")


def test_a_random_start_depends_on_the_seed_alone(llama: Path, tokenizer: Tokenizer) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (make_foreign(llama, tokenizer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(one.head, same.head)
    assert not torch.equal(one.head, other.head)
    assert (one.config.vocab_size, one.head.dtype, one.training) == (VOCAB, torch.float32, True)


def test_ours_stays_ours(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = ModelConfig(VOCAB, 32, 64, 2, 2, 1, 16, query_pre_attn_scalar=16, sliding_window=8)
    save(Transformer(config), tokenizer, tmp_path / "gemma")
    assert not is_foreign(tmp_path / "gemma")
    assert isinstance(open_any(tmp_path / "gemma")[0], Transformer)
    assert shape_of(tmp_path / "gemma") == config


def test_dropout_is_taken_out_and_said(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2")
    with pytest.warns(Notice, match="dropout is taken out .*attn_pdrop"):
        load_foreign(tmp_path / "gpt2")[0].train()


def change(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_what_cannot_be_opened_is_refused_with_the_reason(llama: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    original = (llama / "config.json").read_text()
    cases = {
        "brings code of its own": {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model"}},
        "is quantized": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "cannot be opened by transformers": {"model_type": "never heard of"},
        "has no weights for .*layers.2": {"num_hidden_layers": 3},
        "cannot be opened by transformers .*ismatch": {"intermediate_size": 64},
    }
    for reason, fields in cases.items():
        change(llama, **fields)
        with pytest.raises(Error, match=reason):
            load_foreign(llama)
        (llama / "config.json").write_text(original)
    change(llama, model_type="t5")
    with pytest.raises(Error, match="transformers"):
        load_foreign(llama)
    (llama / "config.json").write_text(original)
    large = train_tokenizer([Path(__file__).read_text() * 2], tmp_path / "large", VOCAB + 20)
    large.save(llama)
    with pytest.raises(Error, match="tokenizer has 420 entries, its head 400"):
        load_foreign(llama)


def test_pickled_weights_are_never_read(llama: Path) -> None:
    weights = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    (llama / "model.safetensors").unlink()
    torch.save(weights, llama / "pytorch_model.bin")
    with pytest.raises(Error, match="cannot be opened by transformers"):
        load_foreign(llama)
