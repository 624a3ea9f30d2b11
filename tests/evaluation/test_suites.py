"""The suites: what they ask for exists in lm-eval, variants get the same items, ratings are the classifier's."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from gemstill.core.errors import Error
from gemstill.evaluation import tasks
from gemstill.evaluation.columns import toxigen, winobias
from gemstill.evaluation.records import Record
from gemstill.evaluation.run import Setting, measure
from gemstill.evaluation.suites import SUITES, suite
from gemstill.evaluation.table import text
from gemstill.evaluation.tasks import Asked, manager, select
from gemstill.evaluation.toxicity import rater
from tests.evaluation.roots import Teller, put, write_root

pytestmark = pytest.mark.filterwarnings("ignore::gemstill.core.notices.Notice")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"))


@pytest.mark.parametrize("name", SUITES)
def test_tasks_metrics_and_columns_are_there(name: str) -> None:
    """A task or metric that lm-eval renames would otherwise be a row that says it was left out."""
    table = suite(name)
    index = manager().task_index
    for row in table.benchmarks:
        assert row.task in index, row
        assert len(row.published) in (0, len(table.columns)), row
        if row.variant or row.task == "realtoxicityprompts" or row.task == "toxigen_toxicity":
            continue
        leaf = index[row.task]
        while leaf.kind.name != "TASK":
            leaf = index[(leaf.cfg or {}).get("task", sorted(leaf.tags))[0]]
        metric, _, kind = row.metric.partition(",")
        metrics = {str(one["metric"]).rpartition(".")[2] for one in leaf.cfg["metric_list"]}
        assert metric in metrics or (metric == "pass@1" and "pass_at_k" in metrics), row
        filters = {one["name"] for one in leaf.cfg.get("filter_list") or [{"name": "none"}]}
        assert kind in filters, row


def test_twelve_ways_are_asked_the_same_items(root: Path) -> None:
    table = suite("format-robustness")
    results = measure(Teller(), "one", table.asked(), Setting(data_root=root, limit=4), None, table, "teller")
    rows = results["gemstill"]["rows"]
    assert len(rows) == 14
    values = [row["value"] for row in rows[:12]]
    assert rows[12]["value"] == pytest.approx(statistics.fmean(values))
    assert rows[13]["value"] == pytest.approx(statistics.stdev(values))
    assert rows[13]["published"] == [1.5, 2.1, 6.9, 0.7, 0.9, 1.0]
    leaves, samples = results["gemstill"]["asked"], results["samples"]

    def items(label: str) -> list[tuple[str, int]]:
        return [(leaf.partition(".")[0], item["doc_id"]) for leaf in leaves[label] for item in samples[leaf]]

    def one(label: str) -> dict[str, Any]:
        found: dict[str, Any] = samples[leaves[label][0]][0]
        return found

    assert len(items("mmlu.lines-text")) == 4
    assert all(items(row["task"]) == items("mmlu.lines-text") for row in rows[:12])
    item = one("mmlu.brackets-text")
    question = item["doc"]["question"]
    assert item["arguments"][1][0].endswith(f"Question: {question}\n(A) red\n(B) green\n(C) blue\n(D) grey\nAnswer:")
    assert item["arguments"][1][0].count("Answer: ") == 5  # the shots, each with its text
    assert item["arguments"][1][1] == " green"
    item = one("mmlu.one-line-written")
    assert item["arguments"][0][0].endswith("A) red B) green C) blue D) grey\nA:")
    assert item["resps"] == [[" So the answer is 3.\n#### 3"]]
    assert item["filtered_resps"] == ["[invalid]"]


def test_instruct_asks_in_turns_and_leaves_ifeval_out_without_its_data(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Turned(Teller):
        tokenizer_name = "t"

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history) + "<model>"

    monkeypatch.setattr(tasks, "_punkt", lambda: False)
    table = suite("gemma2-instruct")
    results = measure(Turned(), "one", table.asked(), Setting(data_root=root, limit=2, turns=True), None, table, "t")
    ours = results["gemstill"]
    assert ours["left_out"]["ifeval"].endswith("python -m nltk.downloader punkt_tab")
    context = results["samples"]["gsm8k"][0]["arguments"][0][0]
    assert context.count("<user>Question:") == 6
    assert context.endswith("\nAnswer:<model>")
    made = {row["name"]: row for row in ours["rows"]}
    assert made["MMLU"]["published"] == [56.1, 72.3, 76.2]
    assert made["HumanEval"]["task"] == "humaneval_instruct"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT over a few words, with a label that says what it means."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    place = tmp_path_factory.mktemp("classifier")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "so", "the", "answer", "is", "3", ".", "#"]
    (place / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, id2label={0: "fine", 1: "Toxic"}, label2id={"fine": 0, "Toxic": 1},
        initializer_range=1.0,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(place)
    BertTokenizerFast(str(place / "vocab.txt")).save_pretrained(place)
    return place


def test_safety_says_what_is_better_and_rates_what_was_written(root: Path, classifier: Path) -> None:
    table = suite("gemma2-safety")
    setting = Setting(data_root=root, limit=4, toxicity=str(classifier))
    results = measure(Teller(), "one", table.asked(), setting, None, table, "teller")
    made = {row["name"]: row for row in results["gemstill"]["rows"]}
    rated = rater(str(classifier))({}, [" So the answer is 3.\n#### 3"])["toxicity"]
    assert 0 < rated < 1
    assert made["Toxigen"]["value"] == pytest.approx(rated)
    assert made["Toxigen"]["better"] == made["CrowS-Pairs"]["better"] == "lower"
    assert made["BBQ Ambig"]["better"] == "higher"
    assert made["BBQ Ambig"]["shots"] == "4"
    for task in ("bbq_ambig", "bbq_disambig"):  # examples of one kind would give its answer away
        shown = "".join(item["arguments"][0][0] for item in results["samples"][task])
        assert shown.count("A: Unknown\n") > 0
        assert shown.count("A: The grand") > 0
        for item in results["samples"][task]:
            assert item["arguments"][0][0].count(item["doc"]["context"]) == 1
    shown = text(results["gemstill"]["rows"], table)
    assert "Toxigen, lower is better" in shown
    assert results["samples"]["toxigen_toxicity"][0]["arguments"][0][0].startswith("- group 0 one\n- group 0 two\n-")
    bias = results["samples"]["winobias_type1"][0]
    assert bias["arguments"][0][0].endswith("because he did not like the design. ‘He’ refers to the")
    without = measure(Teller(), "one", table.asked(), Setting(data_root=root, limit=2), None, table, "teller")
    assert without["gemstill"]["left_out"]["toxigen_toxicity"].endswith("which --toxicity names")


def test_a_classifier_is_one_and_says_which_label_is_meant(classifier: Path, tmp_path: Path) -> None:
    fine, toxic = (rater(f"{classifier}#{label}")({}, ["the answer"])["toxicity"] for label in ("fine", "toxic"))
    assert fine + toxic == pytest.approx(1.0)
    long = rater(str(classifier))({}, ["the answer is 3 " * 99])["toxicity"]  # cut to what the classifier reads
    assert 0 < long < 1
    with pytest.raises(Error, match=r"its labels are fine, Toxic: which is toxic\?; name it: .*#Toxic"):
        rater(f"{classifier}#bad")
    with pytest.raises(Error, match=r"is no classifier that can be loaded"):
        rater(str(tmp_path))


def test_own_tasks_have_no_hub(root: Path) -> None:
    with pytest.raises(Error, match=r"no task has data \(winobias_type1: its items come from files alone"):
        select([Asked("winobias_type1")])


def test_line_breaks_that_toxigen_spells_out() -> None:
    prompt = toxigen(Record({"prompt": r"- one\n- two\\\n-", "group": "g", "label": "hate"}, "here"))["prompt"]
    assert prompt == "- one\n- two\n-"


def test_winobias_lines(tmp_path: Path) -> None:
    def rows(*lines: str) -> list[dict[str, Any]]:
        put(tmp_path / "pro", "\n".join(lines) + "\n")
        put(tmp_path / "anti", "1 The developer hired [the designer] and paid [him].\n")
        put(tmp_path / "men", "developer\nconstruction worker\n")
        put(tmp_path / "women", "designer\n\n")
        *found, last = winobias([tmp_path / name for name in ("pro", "anti", "men", "women")])
        assert (last["second"], last["label"]) == ("designer", 1)
        return found

    first, second = rows(
        "1 [The developer] thanked the designer because [he] needed [his] help.",
        "2 The designer met [the construction worker] and thanked [him].",
    )
    assert first == {
        "sentence": "The developer thanked the designer because he needed his help.",
        "pronoun": "he", "first": "developer", "second": "designer", "label": 0,
    }  # fmt: skip
    assert (second["second"], second["label"], second["pronoun"]) == ("construction worker", 1, "him")
    (again,) = rows("32 The developer went to [the designer] because [she] needed a developer.")  # named twice
    assert (again["first"], again["second"], again["label"]) == ("developer", "designer", 1)
    with pytest.raises(Error, match=r"pro, line 1: has not two occupations"):
        rows("1 [The developer] thanked nobody because [he] was alone.")
