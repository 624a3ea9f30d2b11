"""`gemstill eval`: from the words of a command to a table, results, and one line for what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import gemstill
from gemstill import cli
from gemstill.core.errors import Error
from gemstill.evaluation.command import EvalConfig
from gemstill.evaluation.folder import ANSWERS, RESULTS
from gemstill.evaluation.run import fingerprint
from gemstill.model.quantized import quantize_model
from tests.evaluation.roots import write_root
from tests.infer.networks import SMALL, network
from tests.model.tokenizers import small_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::gemstill.core.notices.Notice")
LONG = replace(SMALL, max_position=2048)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("command") / "little"
    gemstill.save(network(LONG), small_tokenizer(), place)
    return place


Capture = pytest.CaptureFixture[str]


def answered(capsys: Capture, *words: object, status: int = 0) -> str:
    assert cli.main(["eval", *map(str, words)]) == status
    out, err = capsys.readouterr()
    return out if not status else err.strip().splitlines()[-1]


def test_tasks_from_a_folder(folder: Path, root: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    words = [folder, "--tasks", "piqa, mmlu,wikitext", "--data-root", root, "--out", out, "--shots", 1]
    printed = answered(capsys, *words, "--limit", 4)
    saved = json.loads((out / RESULTS).read_text())
    value = saved["results"]["mmlu"]["acc,none"]
    line = next(line.split() for line in printed.splitlines() if line.startswith("mmlu acc"))
    assert line[2:5] == ["1", "4", f"{value:.4f}"]
    assert f"written: {out / RESULTS}" in printed
    assert saved["config"]["model"] == "little"
    again = (out / ANSWERS).read_bytes()
    assert answered(capsys, *words, "--limit", 4) == printed
    assert (out / ANSWERS).read_bytes() == again
    more = answered(capsys, *words)
    assert (out / ANSWERS).read_bytes().startswith(again)
    assert more != printed


def test_a_dry_run_counts_and_asks_nothing(folder: Path, root: Path, tmp_path: Path, capsys: Capture) -> None:
    words = ["--suite", "gemma2-open-llm", "--data-root", root, "--out", tmp_path / "out", "--limit", 5, "--dry-run"]
    printed = answered(capsys, folder, *words)
    assert "suite                       Table 12 of the Gemma 2 report" in printed
    assert "requests                    55" in printed  # 5 × 4 choices twice, 5 × 2, 5 texts
    assert "items                       mmlu 5, gsm8k 5, arc_challenge 5, winogrande 5" in printed
    assert "hellaswag: left out: no hellaswag/hellaswag_val.jsonl" in printed
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused_and_the_quantized_is_another(
    folder: Path, root: Path, tmp_path: Path, capsys: Capture
) -> None:
    words = ["--tasks", "piqa", "--data-root", root, "--out", tmp_path]
    answered(capsys, folder, *words)
    gemstill.save(network(LONG, seed=1), small_tokenizer(), tmp_path / "other")
    refused = answered(capsys, tmp_path / "other", *words, status=2)
    assert f"{tmp_path / ANSWERS}: holds the answers of another model ('little', this is 'other')" in refused
    model, wide = network(LONG), network(replace(LONG, hidden_size=64, intermediate_size=96))
    first, packed = fingerprint(model, small_tokenizer()), fingerprint(wide, small_tokenizer())
    quantize_model(wide, "int8")
    assert len({first, packed, fingerprint(wide, small_tokenizer())}) == 3
    assert first == fingerprint(network(LONG), small_tokenizer())


WRONG = {
    ("--tasks", "arc_esy"): "lm-eval: there is no task 'arc_esy'; did you mean 'arc_easy'?",
    ("--suite", "gemma2"): "--suite: there is no suite 'gemma2'; did you mean 'gemma2-",
    (): "eval: needs a suite or tasks, and not both; give --suite gemma2-pretrained, or --tasks",
    ("--tasks", "piqa", "--suite", "gemma2-open-llm"): "eval: needs a suite or tasks, and not both",
    ("--suite", "gemma2-open-llm", "--shots", "2"): "eval: a suite has its own shots; leave --shots out",
    ("--tasks", "piqa", "--limit=-1"): "eval: limit and shots must not be below 0",
    ("--tasks", "hellaswag"): "no task has data (hellaswag: no hellaswag/hellaswag_val.jsonl",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_words(words: tuple[str, ...], folder: Path, root: Path, tmp_path: Path, capsys: Capture) -> None:
    refused = answered(capsys, folder, *words, "--data-root", root, "--out", tmp_path / "out", status=2)
    assert WRONG[words] in refused
    assert not (tmp_path / "out" / RESULTS).exists()


def test_no_such_model(root: Path, capsys: Capture) -> None:
    assert "there is no such file or folder" in answered(capsys, "no/model.gguf", "--tasks", "piqa", status=2)
    with pytest.raises(Error, match=r"no model is quantized to 'int3'"):
        EvalConfig(source="x", tasks="piqa", quantize="int3")


def test_a_model_without_turns_is_not_asked_in_turns(root: Path, tmp_path: Path) -> None:
    small_tokenizer().save(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "tokenizer.json":  # of its template, too, nothing is left
            path.unlink()
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"<start_of_turn>", b"<start_of_talk>"))
    bare = gemstill.Tokenizer.open(tmp_path)
    with pytest.raises(Error, match=r"the vocabulary has no <start_of_turn>, so there are no turns"):
        gemstill.evaluate(network(LONG), bare, ["piqa"], data_root=root, turns=True)
    turned = gemstill.evaluate(network(LONG), small_tokenizer(), ["piqa"], data_root=root, turns=True, shots=1)
    context = turned["samples"]["piqa"][0]["arguments"][0][0]
    assert context.count("<start_of_turn>user\n") == 2
    assert context.endswith("<start_of_turn>model\n")


def test_items_longer_than_the_context_are_cut_counted_and_told(root: Path) -> None:
    model = network(replace(SMALL, max_position=40))
    with pytest.warns(gemstill.core.notices.Notice, match=r"12 requests were longer than the context"):
        results = gemstill.evaluate(model, small_tokenizer(), ["piqa"], shots=4, data_root=root)
    assert results["gemstill"]["truncated"] == 12
