"""Pruning and healing from end to end in miniature: the real steps, resumed, with figures that can be checked."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from gemstill import cli, heal
from gemstill.checkpoint.source import load
from gemstill.core.config import as_dict, parse
from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.data.passages import CHARACTERS, cut, write_passages
from gemstill.data.sources import Source
from gemstill.heal import HealConfig
from gemstill.train.answers import answers
from tests.checkpoint.gguf_models import GEMMA3
from tests.model.tokenizers import small_tokenizer
from tests.taught import taught, write_books

ROOT = Path(__file__).parents[1]
SHAPE = replace(GEMMA3, num_layers=4, layer_pattern=2, hidden_size=32, head_dim=16, query_pre_attn_scalar=16.0)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_books(tmp_path_factory.mktemp("heal") / "books")


@pytest.fixture(scope="module")
def teacher(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Gemma 3 with something to lose and to give back."""
    return taught(SHAPE, books, tmp_path_factory.mktemp("teacher"))


def recipe(teacher: Path, books: Path, run: Path, **changes: Any) -> HealConfig:
    settings: dict[str, Any] = {
        "teacher": str(teacher), "data": Source(books), "run": str(run), "layers": 2, "intermediate_size": 32,
        "tokens": 4096, "window": 64, "trial_tokens": 512, "rates": [1.0, 3.0], "calibration_tokens": 512,
        "heldout_tokens": 1024, "heldout_fraction": 0.2,
    }  # fmt: skip
    return HealConfig(**(settings | changes))


@pytest.fixture(scope="module")
def made(teacher: Path, books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "heal"
    heal.run(recipe(teacher, books, run))
    return run


def test_summary_has_every_figure_and_they_agree(made: Path, teacher: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    assert summary["teacher"]["agreement"] == 1
    for name in ("teacher", "pruned", "next_token", "distilled"):
        row = summary[name]
        assert math.isclose(row["perplexity"], math.exp(row["heldout_nll"]))
        assert row["gguf_bytes"] > 0
    assert summary["teacher"]["heldout_nll"] < summary["distilled"]["heldout_nll"] < summary["pruned"]["heldout_nll"]
    assert summary["distilled"]["agreement"] > summary["pruned"]["agreement"]
    assert summary["next_token"]["tokens_seen"] == summary["distilled"]["tokens_seen"] == 4096
    assert len(summary["trials"]) == 4
    rates = [3e-4 * factor for factor in (1.0, 3.0)]
    for name in ("next_token", "distilled"):
        losses = [summary["trials"][f"{name} {factor:g}"]["heldout_nll"] for factor in (1, 3)]
        assert summary[name]["learning_rate"] == pytest.approx(rates[losses.index(min(losses))])
    ratio = math.exp(summary["distilled"]["heldout_nll"] - summary["next_token"]["heldout_nll"])
    assert summary["ratio"] == pytest.approx(ratio)
    assert summary["ratio_low"] <= ratio * (1 + 1e-9)
    assert ratio * (1 - 1e-9) <= summary["ratio_high"]
    heldout = TokenDataset.open(made / "heldout" / "train")
    model = load(made / "distilled" / "model")[0]
    found = answers(model, heldout, 64, windows=16)
    assert summary["distilled"]["heldout_nll"] == pytest.approx(float(found.nll.mean()), rel=1e-6)


def test_students_start_from_the_same_pruned_model(made: Path) -> None:
    shape = load(made / "pruned")[0].config
    assert (shape.num_layers, shape.intermediate_size) == (2, 32)
    assert load(made / "next_token" / "model")[0].config == load(made / "distilled" / "model")[0].config == shape


def test_llama_cpp_runs_the_file(made: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    there = json.loads((made / "summary.json").read_text())["llama_cpp"]
    assert there["version"] == llama_cpp.__version__
    assert there["perplexity"] == pytest.approx(there["ours"], rel=0.02)
    assert there["same_best"] > 0.9


def test_it_goes_on_and_does_nothing_twice(made: Path, teacher: Path, books: Path, tmp_path: Path) -> None:
    """Stopped after each step in turn, it ends with the same bytes; done, it changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*") if path.suffix in (".safetensors", ".gguf")}
    heal.run(recipe(teacher, books, made))
    assert {path: path.stat().st_mtime_ns for path in before} == before

    class Stopped(BaseException):
        pass

    run, done = tmp_path / "heal", heal.Steps.do

    def once(self: Any, name: str, work: Any) -> None:
        new = name not in self.done
        done(self, name, work)
        if new:
            raise Stopped

    stops = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heal.Steps, "do", once)
        while True:
            try:
                heal.run(recipe(teacher, books, run))
                break
            except Stopped:
                stops += 1
    assert stops == 4 + 4 + 2 + 2
    for name in ("distilled/model/model.safetensors", "next_token/model/model.safetensors", "distilled.gguf"):
        assert (run / name).read_bytes() == (made / name).read_bytes()


def test_another_recipe_in_the_same_folder_is_refused(made: Path, teacher: Path, books: Path) -> None:
    with pytest.raises(Error, match=r"holds a run over recipe\.tokens 4096, not 8192"):
        heal.run(recipe(teacher, books, made, tokens=8192))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"rates": []}, "rates are"),
        ({"heldout_tokens": 64}, "give two windows or more"),
        ({"tokens": 10**6}, "characters of train text in passages"),
        ({"heldout_fraction": 0.0}, "characters of heldout text .* raise heldout_fraction"),
        ({"layers": 5}, "layers is 5, the model has 4"),
        ({"layers": None, "intermediate_size": None}, "nothing says how much is kept"),
    ],
)
def test_bad_input(teacher: Path, books: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Error, match=sentence):
        heal.run(recipe(teacher, books, tmp_path / "run", **changes))


def test_the_recipe_says_what_it_would_take(capsys: pytest.CaptureFixture[str], teacher: Path, books: Path) -> None:
    raw = yaml.safe_load((ROOT / "recipes" / "heal-gemma3-270m.yaml").read_text())
    assert as_dict(parse(HealConfig, raw))["layers"] == raw["layers"]
    words = ["--teacher", str(teacher), "--set", f"data.path={books}", "--layers", "2", "--dry-run"]
    assert cli.main(["heal", str(ROOT / "recipes" / "heal-gemma3-270m.yaml"), *words, "--intermediate-size", "32"]) == 0
    assert "flops of students" in capsys.readouterr().out


def test_passages(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("\n\n".join(f"{number} {'x' * 90}" for _ in range(25)))
    options = {"window": 22, "train": 1_957, "heldout": 435, "heldout_fraction": 0.3}
    counts = write_passages(Source(tmp_path, pattern="*.txt"), tmp_path / "out", **options)
    texts = {}
    for split in ("train", "heldout"):
        lines = (tmp_path / "out" / f"{split}.jsonl").read_text().splitlines()
        assert len(lines) == counts[split]
        texts[split] = [json.loads(line)["text"] for line in lines]
        assert sum(map(len, texts[split])) == pytest.approx(CHARACTERS * options[split], rel=0.15)
    owners = {split: {text.split()[0] for text in found} for split, found in texts.items()}
    assert not owners["train"] & owners["heldout"]  # documents are held out whole
    assert len(owners["train"]) > 12  # and the sample is of nearly all
    assert list(cut("a\n\nb\n\n\n\n" + "c" * 500, 4)) == ["a\n\nb", "c" * 500]


def test_answers_leave_out_beginnings_and_ends(made: Path) -> None:
    heldout = TokenDataset.open(made / "heldout" / "train")
    model, _ = load(made / "pruned", dtype=torch.float32)
    found = answers(model, heldout, 64, windows=3, batch=2)
    tokens = torch.from_numpy(heldout.read(0, 193).astype(np.int64))
    nll, best = [], []
    for begin in (0, 64, 128):
        row, labels = tokens[begin : begin + 64].clone(), tokens[begin + 1 : begin + 65]
        lent = int(row[0]) != heldout.bos_id
        row[0] = heldout.bos_id
        documents = (row == heldout.bos_id).cumsum(0)
        with torch.no_grad():
            logits = model(row[None], documents=documents[None])[0]
        wanted = (labels != heldout.bos_id) & (labels != heldout.eos_id)
        wanted[0] &= not lent
        nll += (logits.logsumexp(1) - logits.gather(1, labels[:, None])[:, 0])[wanted].tolist()
        best += logits.argmax(1)[wanted].tolist()
    np.testing.assert_allclose(found.nll, nll, rtol=1e-4)
    assert found.best.tolist() == best
    sums, counts = found.by_document()
    assert sums.sum() == pytest.approx(found.nll.sum())
    assert counts.sum() == len(nll)
    assert found.agreement(found) == 1


def test_a_llama_is_healed_too(books: Path, tmp_path: Path) -> None:
    import transformers

    from gemstill.checkpoint.foreign import open_any, save_foreign
    from gemstill.model.adapter import Adapter

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "head_dim": 8,
             "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
    model = Adapter(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval())
    save_foreign(model, dict(model.named_parameters()), small_tokenizer(), tmp_path / "llama", card="# A Llama\n")
    config = recipe(tmp_path / "llama", books, tmp_path / "run", tokens=512, trial_tokens=0)
    assert heal.plan(config)["layers"] == "2 of 3"
    heal.run(config)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["distilled"]["tokens_seen"] == 512
    assert summary["distilled"]["gguf_bytes"] is None
    assert open_any(tmp_path / "run" / "distilled" / "model")[0].config.num_layers == 2
