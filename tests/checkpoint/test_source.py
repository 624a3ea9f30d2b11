"""One name for a model wherever it lies, one call to write it, and `gemstill export`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gemstill
from gemstill import cli
from gemstill.checkpoint.export import ExportConfig, plan, run
from gemstill.checkpoint.huggingface import load_folder
from gemstill.checkpoint.source import compute_dtype, load, name_of, save, shape_of
from gemstill.core.errors import Error
from gemstill.core.machine import OVERRIDE
from gemstill.model.transformer import Transformer
from tests.checkpoint.test_google import put, their_layout
from tests.model.reference import BASE, roughen, text
from tests.model.tokenizers import small_tokenizer

# Widths that blocks of 32 divide, and the query scale that llama.cpp computes.
SMALL = replace(BASE, vocab_size=320, hidden_size=64, intermediate_size=96, query_pre_attn_scalar=16)

CARD = "---\nlicense: gemma\n---\n# A model of somebody's\n"


@pytest.fixture(scope="module")
def model():
    model = Transformer(SMALL)
    roughen(model)
    return model


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    root = tmp_path_factory.mktemp("source") / "model"
    save(model, small_tokenizer(), root, card=CARD)
    return root


@pytest.fixture(scope="module")
def places(model, folder):
    """The same model in every form."""
    save(model, small_tokenizer(), folder.parent / "small.gguf", dtype="f32")
    return [folder, folder.parent / "small.gguf", put(folder.parent / "google", their_layout(model), SMALL)]


def test_one_model_from_every_place(places, model):
    for place in places:
        again, tokenizer = gemstill.load(str(place), dtype=torch.float32)
        assert again.config == SMALL
        assert tokenizer.encode("def area(width)") == small_tokenizer().encode("def area(width)")
        torch.testing.assert_close(again(text(SMALL)), model(text(SMALL)), atol=1e-4, rtol=0)
        assert shape_of(place) == SMALL


def test_it_computes_in_the_fast_precision_unless_a_wide_dtype_is_asked_for(folder, monkeypatch):
    for fast in ("float32", "bfloat16"):
        monkeypatch.setenv(OVERRIDE, fast)
        model, _ = load(folder)
        assert (model.compute_dtype, model.norm.weight.dtype) == (getattr(torch, fast), torch.float32)
        model, _ = load(folder, dtype=torch.bfloat16)
        assert (model.compute_dtype, model.norm.weight.dtype) == (getattr(torch, fast), torch.bfloat16)
        assert compute_dtype(torch.float32) == torch.float32
        assert compute_dtype(torch.float64) == torch.float64


def test_names(places):
    folder = places[0]
    assert [name_of(place) for place in places[1:]] == ["small", "model"]
    assert name_of(folder) == folder.parent.name  # a run's model is called as the run
    assert name_of("some-owner/a-model@v1") == "some-owner/a-model@v1"


def test_what_is_no_model_is_answered(folder, tmp_path):
    for name in ("nothing.gguf", tmp_path / "nothing", "/nowhere/at/all"):
        with pytest.raises(Error, match="no such file or folder"):
            load(name)
    with pytest.raises(Error, match=f"name its folder: {folder}"):
        load(folder / "model.safetensors")
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(Error, match="is no model"):
        load(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Error, match="is empty"):
        load(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bfloat16", torch.bfloat16), ("bf16", torch.bfloat16), (torch.float16, torch.float16), ("F32", torch.float32)],
    ids=str,
)
def test_dtypes_of_a_folder(name, dtype, model, tmp_path):
    save(model, small_tokenizer(), tmp_path / "model", dtype=name)
    again, _ = load_folder(tmp_path / "model")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_dtypes_that_are_none(model, tmp_path):
    with pytest.raises(Error, match=r"not stored as 'q8_0'; take one of float32, .*q8_0 is for \.gguf files"):
        save(model, small_tokenizer(), tmp_path / "model", dtype="q8_0")
    with pytest.raises(Error, match="not stored as 'int8'"):
        save(model, small_tokenizer(), tmp_path / "model", dtype=torch.int8)
    with pytest.raises(Error):
        save(model, small_tokenizer(), tmp_path / "model.gguf", dtype="q9")
    with pytest.raises(Error, match="there is no dtype 'q9'; take one of"):
        ExportConfig("a", Path("b"), "q9")
    assert list(tmp_path.iterdir()) == []


def test_export_there_and_back_keeps_every_bit(folder, tmp_path, model):
    """Folder to GGUF F32 to folder."""
    assert cli.main(["export", str(folder), str(tmp_path / "x.gguf"), "--dtype", "f32"]) == 0
    assert cli.main(["export", str(tmp_path / "x.gguf"), str(tmp_path / "back")]) == 0
    again, tokenizer = load_folder(tmp_path / "back")
    assert tokenizer.encode("x = 3  # 東京") == small_tokenizer().encode("x = 3  # 東京")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_export_says_what_it_wrote_and_keeps_the_card(folder, tmp_path, capsys):
    found = run(ExportConfig(str(folder), tmp_path / "half", "bf16"))
    assert found["bytes"] == sum(path.stat().st_size for path in (tmp_path / "half").iterdir())
    assert (tmp_path / "half" / "README.md").read_text() == CARD
    assert plan(ExportConfig(str(folder), tmp_path / "x", "bf16"))["weight_bytes"] == 2 * found["parameters"]
    assert plan(ExportConfig(str(folder), tmp_path / "x"))["weight_bytes"] == 4 * found["parameters"]
    assert not (tmp_path / "x").exists()
    (tmp_path / "card.md").write_text("# Mine\n")
    words = ["export", str(folder), str(tmp_path / "half"), "--card", str(tmp_path / "card.md")]
    assert cli.main(words) == 0
    assert (tmp_path / "half" / "README.md").read_text() == "# Mine\n"
    shown = capsys.readouterr()
    assert f"parameters  {found['parameters']:,}\n" in shown.out
    assert shown.err == ""


def test_export_overwrites_nothing_of_others(folder, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    assert cli.main(["export", str(folder), str(theirs)]) == 2
    assert capsys.readouterr().err == (
        f"gemstill: {theirs}: holds files that no checkpoint of ours has (thesis.txt); name another folder\n"
    )
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]
    assert cli.main(["export", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_notice_is_one_line_of_a_command(model, tmp_path, capsys, monkeypatch):
    import warnings

    from safetensors.torch import load_file, save_file

    save(model, small_tokenizer(), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert cli.main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 0
    place = tmp_path / "model"
    assert capsys.readouterr().err == f"gemstill: {place}: lm_head.weight is the embedding once more and is left out\n"
    assert load_folder(tmp_path / "out")[0].lm_head is None
