"""A four-bit file from end to end in miniature: the real steps, killed and resumed, read by llama.cpp."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gemstill import cli, shrink
from gemstill.checkpoint.gguf_file import GgufFile
from gemstill.checkpoint.source import load, save
from gemstill.core.errors import Error
from gemstill.data.sources import Source
from gemstill.model.transformer import Transformer
from gemstill.shrink import ShrinkConfig
from tests.checkpoint.gguf_models import GEMMA3
from tests.model.tokenizers import small_tokenizer
from tests.taught import taught, write_books

SHAPE = replace(GEMMA3, num_layers=3, layer_pattern=2, hidden_size=64, head_dim=32, intermediate_size=96)


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_books(tmp_path_factory.mktemp("shrink") / "books")


@pytest.fixture(scope="module")
def source(books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Gemma 3 that rounding can spoil."""
    return taught(SHAPE, books, tmp_path_factory.mktemp("source"))


def recipe(source: Path, books: Path, run: Path, **changes: Any) -> ShrinkConfig:
    settings: dict[str, Any] = {
        "source": str(source), "target": run / "small.gguf", "data": Source(books), "run": str(run), "tokens": 4096,
        "window": 64, "calibration_tokens": 1024, "heldout_tokens": 512, "heldout_fraction": 0.3, "rows": 200,
    }  # fmt: skip
    return ShrinkConfig(**(settings | changes))


@pytest.fixture(scope="module")
def made(source: Path, books: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "shrink"
    shrink.run(recipe(source, books, run))
    return run


def test_more_than_half_of_the_loss_is_recovered(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    plain, gptq, trained = (summary[name] for name in ("plain", "gptq", "trained"))
    assert plain["kl"] > 0.002
    assert plain["recovered"] == 0
    assert gptq["kl"] < plain["kl"]
    assert trained["kl"] < gptq["kl"]
    assert trained["recovered"] == pytest.approx(1 - trained["kl"] / plain["kl"])
    assert trained["recovered"] > 0.5
    assert summary["rounding"] == "trained"
    assert plain["bytes"] == trained["bytes"] == (made / "small.gguf").stat().st_size


def test_the_file_is_plain_q4_0(made: Path, source: Path) -> None:
    file = GgufFile(made / "small.gguf")
    kinds = {name: info.block.name for name, info in file.tensors.items()}
    assert all(kind == ("F32" if name.endswith("norm.weight") else "Q4_0") for name, kind in kinds.items())
    assert kinds["token_embd.weight"] == "Q4_0"
    assert not [key for key in file.fields if key.startswith("gemstill.")]
    assert load(made / "small.gguf")[0].config == load(source)[0].config


def test_llama_cpp_reads_it_as_we_do(made: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    assert json.loads((made / "summary.json").read_text())["trained"]["reader"] == "llama.cpp"
    ids = [2, *range(10, 40)]
    theirs = llama_cpp.Llama(str(made / "small.gguf"), n_ctx=64, logits_all=True, verbose=False)
    theirs.eval(ids)
    scores = torch.from_numpy(theirs.scores[: len(ids)]).log_softmax(1)
    with torch.no_grad():
        ours = load(made / "small.gguf", dtype=torch.float32)[0](torch.tensor([ids]))[0].log_softmax(1)
    assert float((ours.exp() * (ours - scores)).sum(1).mean()) < 2e-3  # it rounds activations to eight bits


def test_killed_anywhere_it_ends_with_the_same_bytes(made: Path, source: Path, books: Path, tmp_path: Path) -> None:
    """Kills a child at growing times; what a later one goes on from is what an earlier one left."""
    config, kills = recipe(source, books, tmp_path / "run"), 0
    for after in (0.3, 0.6, 0.9, 1.2, 1.5, None):
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
                torch.set_num_threads(1)
                shrink.run(config)
                os._exit(0)
            except BaseException:
                os._exit(1)
        if after is not None:
            time.sleep(after)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        kills += os.WIFSIGNALED(status)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    assert kills
    assert (tmp_path / "run" / "small.gguf").read_bytes() == (made / "small.gguf").read_bytes()


def test_done_it_does_nothing_again(made: Path, source: Path, books: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.glob("*.gguf") if path.name != "small.gguf"}
    shrink.run(recipe(source, books, made))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_without_training_it_is_the_better_rounding(source: Path, books: Path, made: Path, tmp_path: Path) -> None:
    summary = shrink.run(recipe(source, books, tmp_path / "run", tokens=0))
    assert summary["rounding"] == "gptq"
    assert "trained" not in summary
    assert not (tmp_path / "run" / "train").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokens": -1}, "tokens is -1"),
        ({"window": 1}, "window is 1"),
        ({"rows": 0}, "rows is 0"),
        ({"code_rate": 0.0}, "code_rate is 0"),
        ({"target": Path("small.bin")}, r"small\.bin: is no name of a GGUF file"),
        ({"tokens": 10**7}, "characters of train text in passages"),
        ({"heldout_fraction": 0.0}, r"characters of heldout text .* raise heldout_fraction"),
        ({"data": Source(Path("nowhere"))}, "nowhere"),
        ({"source": "nowhere/at/all"}, "nowhere"),
    ],
)
def test_bad_input(source: Path, books: Path, tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Error, match=sentence):
        shrink.run(replace(recipe(source, books, tmp_path / "run"), **changes))


def test_what_is_at_the_target_stays(source: Path, books: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_text("a poem")
    with pytest.raises(Error, match=r"other\.gguf: is there already and is no GGUF file"):
        shrink.run(recipe(source, books, tmp_path / "run", target=other))
    assert other.read_text() == "a poem"
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(Error, match=r"folder\.gguf: is a folder"):
        shrink.run(recipe(source, books, tmp_path / "run", target=tmp_path / "folder.gguf"))


def test_widths_that_blocks_do_not_divide(books: Path, tmp_path: Path) -> None:
    save(Transformer(replace(SHAPE, intermediate_size=72)), small_tokenizer(), tmp_path / "odd")
    with pytest.raises(Error, match="intermediate_size is 72, which Q4_0's blocks of 32 do not divide"):
        shrink.run(recipe(tmp_path / "odd", books, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_recipe_in_the_same_folder_is_refused(made: Path, source: Path, books: Path) -> None:
    with pytest.raises(Error, match=r"holds a run over recipe\.tokens 4096, not 8192"):
        shrink.run(recipe(source, books, made, tokens=8192))


def test_it_says_what_it_would_take(capsys: pytest.CaptureFixture[str], source: Path, books: Path) -> None:
    words = [str(source), "small.gguf", "--data.path", str(books), "--dry-run"]
    assert cli.main(["shrink", *words]) == 0
    assert "flops of train" in capsys.readouterr().out
    assert not Path("small.gguf").exists()
    assert cli.main(["shrink", str(source), "small.bin", "--data.path", str(books)]) == 2
    assert "let it end in .gguf" in capsys.readouterr().err
