"""A whole evaluation: as lm-eval's own command measures, resumable, with intervals and nothing counted as zero."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest

from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.evaluation.answers import Answers
from gemstill.evaluation.folder import ANSWERS, RESULTS
from gemstill.evaluation.run import Setting, measure
from gemstill.evaluation.scores import interval, score
from gemstill.evaluation.suites import SUITES, suite
from gemstill.evaluation.table import text
from gemstill.evaluation.tasks import Asked, manager, quiet
from tests.evaluation.roots import Teller, write_root

# Most of what a suite asks for is left out of so small a root, and told each time.
pytestmark = pytest.mark.filterwarnings("ignore::gemstill.core.notices.Notice")
TASKS = [Asked("mmlu", 2), Asked("gsm8k", 3), Asked("wikitext"), Asked("arc_easy", 1)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"))


def run(
    root: Path, out: Path | None = None, lm: Teller | None = None, model: str = "one", **more: Any
) -> dict[str, Any]:
    return measure(lm or Teller(), model, TASKS, Setting(data_root=root, **more), out, None, "teller")


def test_scores_are_those_of_lm_evals_own_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows handed to `lm_eval` as the hub would: same prompts, same few-shot draws, same figures."""
    answer = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(6)]
    hub = datasets.DatasetDict(train=datasets.Dataset.from_list(answer * 2), test=datasets.Dataset.from_list(answer))
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: hub)
    with quiet():
        theirs = lm_eval.simple_evaluate(
            model=Teller(), tasks=["gsm8k"], num_fewshot=3, bootstrap_iters=1000, task_manager=manager()
        )
    ours = run(root)
    assert theirs is not None
    assert ours["results"]["gsm8k"] == theirs["results"]["gsm8k"]
    for mine, other in zip(ours["samples"]["gsm8k"], theirs["samples"]["gsm8k"], strict=True):
        assert [mine[key] for key in ("arguments", "resps", "prompt_hash")] == [
            other[key] for key in ("arguments", "resps", "prompt_hash")
        ]


def test_a_run_that_was_cut_asks_only_what_is_missing(root: Path, tmp_path: Path) -> None:
    whole, lm = run(root, tmp_path / "whole"), Teller()
    run(root, None, lm)
    for lives in (5, 60):
        with pytest.raises(KeyboardInterrupt):
            run(root, tmp_path / "cut", Teller(lives))
    with open(tmp_path / "cut" / ANSWERS, "ab") as file:
        file.write(b'{"key": "half a li')
    second = Teller()
    again = run(root, tmp_path / "cut", second)
    assert second.asked == lm.asked - 65
    assert again["results"] == whole["results"]
    assert again["samples"] == whole["samples"]
    assert (tmp_path / "cut" / ANSWERS).read_bytes().count(b"\n") == lm.asked + 1
    third = Teller()
    run(root, tmp_path / "cut", third)
    assert third.asked == 0


def test_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path)
    before = (tmp_path / RESULTS).read_bytes()
    with pytest.raises(Error, match=r"answers.jsonl: holds the answers of another model; name another --out"):
        run(root, tmp_path, model="two")
    assert (tmp_path / RESULTS).read_bytes() == before


def test_damaged_answers_are_named(tmp_path: Path) -> None:
    path = tmp_path / ANSWERS
    with Answers(path, "one", "first") as answers:
        answers.put(answers.key("task", 1, "generate_until", ["a", {"until": []}]), "text\nwith a line")
        answers.put(answers.key("task", 1, "loglikelihood", ["a", "b"]), [-1.25, True])
    with Answers(path, "one") as answers:
        assert len(answers) == 2
        assert answers[answers.key("task", 1, "loglikelihood", ["a", "b"])] == [-1.25, True]
        assert answers.key("task", 2, "loglikelihood", ["a", "b"]) not in answers
    with pytest.raises(Error, match=r"another model \('first', this is 'second'\)"):
        Answers(path, "two", "second")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(Error, match=r"answers.jsonl, line 2: is no answer; delete that line"):
        Answers(path, "one")
    path.write_bytes(lines[0].replace(b'"version": 2', b'"version": 9'))
    with pytest.raises(Error, match=r"holds answers of another version of gemstill"):
        Answers(path, "one")


@pytest.mark.parametrize("answer", [None, "a", 3, [1.0], [1.0, True, 2], ["a", "b"], [math.nan, True], True])
def test_answers_of_another_kind_are_refused(root: Path, tmp_path: Path, answer: object) -> None:
    run(root, tmp_path)
    lines = (tmp_path / ANSWERS).read_bytes().splitlines(keepends=True)
    for place in (1, len(lines) - 1):
        changed = json.dumps(json.loads(lines[place]) | {"answer": answer}).encode() + b"\n"
        if place > 1 and answer == 3:
            continue  # of a document the log-likelihood, a number
        (tmp_path / ANSWERS).write_bytes(b"".join([*lines[:place], changed, *lines[place + 1 :]]))
        with pytest.raises(Error, match=r"answers.jsonl: has .* which is no answer to that; delete that line"):
            run(root, tmp_path)


def test_the_folder_holds_results_items_and_where_the_data_came_from(root: Path, tmp_path: Path) -> None:
    results = run(root, tmp_path, limit=4)
    saved = json.loads((tmp_path / RESULTS).read_text())
    assert saved["results"] == json.loads(json.dumps(results["results"]))
    assert "samples" not in saved
    ours = saved["gemstill"]
    assert ours["fingerprint"] == "one"
    assert ours["suite"] == ""
    assert ours["asked"]["arc_easy"] == ["arc_easy"]
    assert len(ours["files"]["arc_easy"]["arc_easy/test.json.gz"]) == 64
    assert saved["config"]["limit"] == 4
    assert saved["n-samples"]["arc_easy"] == {"original": 6, "effective": 4}
    items = [json.loads(line) for line in (tmp_path / "samples" / "arc_easy.jsonl").read_text().splitlines()]
    assert [item["doc_id"] for item in items] == sorted({item["doc_id"] for item in items})
    assert len(items) == 4
    assert items == json.loads(json.dumps(results["samples"]["arc_easy"]))


def test_what_is_left_out_is_told_in_one_line_for_each_name(root: Path) -> None:
    with pytest.warns(Notice) as told:
        measure(Teller(), "one", [*TASKS, Asked("hellaswag")], Setting(data_root=root), None, None, "teller")
    assert [str(one.message) for one in told] == [
        "mmlu: 54 of its 57 tasks left out (mmlu_abstract_algebra: no mmlu/dev/abstract_algebra_dev.csv (or .gz))",
        "hellaswag: left out: no hellaswag/hellaswag_val.jsonl (or .gz)",
    ]


def test_a_suite_has_its_rows_and_averages_over_what_was_measured(root: Path) -> None:
    table = suite("gemma2-pretrained")
    results = measure(Teller(), "one", table.asked(), Setting(data_root=root, limit=3), None, table, "teller")
    made = {row["name"]: row for row in results["gemstill"]["rows"]}
    assert [row.name for row in table.benchmarks] + ["Average (8)", "Average (all)"] == list(made)
    assert made["DROP"]["value"] is None
    assert made["DROP"]["published"][1] == 51.2
    there = [made[name] for name in ("MMLU", "ARC-C", "GSM8K", "AGIEval", "BBH", "Winogrande")]
    assert made["Average (8)"]["over"] == [6, 8]
    assert math.isclose(made["Average (8)"]["value"], sum(row["value"] for row in there) / 6)
    assert math.isclose(made["Average (8)"]["published"][1], (52.2 + 55.7 + 24.3 + 31.5 + 41.9 + 71.3) / 6)
    assert made["Average (all)"]["published"][3] is None  # no figure of that model for every one of these rows
    assert made["ARC-C"]["shots"] == "25"
    assert made["MMLU"]["items"] == 3
    shown = text(results["gemstill"]["rows"], table)
    assert "left out" in shown.splitlines()[5]
    assert "6 of 8" in shown
    assert "Gemma 2 27B" in shown


def test_the_published_averages_are_the_reports() -> None:
    """A slip in a copied figure would show: the report prints both averages of each column."""
    table, printed = SUITES["gemma2-pretrained"], {"Average (8)": (44.0, 50.0, 61.0, 61.9, 62.4, 70.2, 74.4)}
    printed["Average (all)"] = (44.2, 48.7, 55.6, None, 57.9, 64.9, 69.4)
    for summary in table.summaries:
        rows = [row for row in table.benchmarks if row.name in summary.rows]
        for column, value in enumerate(printed[summary.name]):
            figures = [row.published[column] for row in rows]
            if value is not None:
                assert statistics.fmean(figures) == pytest.approx(value, abs=0.35)
    with pytest.raises(Error, match=r"there is no suite 'gemma2-pretraind'; did you mean 'gemma2-pretrained'"):
        suite("gemma2-pretraind")


def test_more_shots_than_examples_are_refused(root: Path) -> None:
    with pytest.raises(Error, match=r"task gsm8k: asks for 13 few-shot examples, and there are 12; give fewer --shots"):
        measure(Teller(), "one", [Asked("gsm8k", 13)], Setting(data_root=root), None, None, "teller")
    measure(Teller(), "one", [Asked("gsm8k", 12), Asked("winogrande", 5)], Setting(data_root=root), None, None, "t")
    with pytest.raises(Error, match=r"task winogrande: asks for 6 few-shot examples, and there are 5"):
        measure(Teller(), "one", [Asked("winogrande", 6)], Setting(data_root=root), None, None, "teller")


def test_intervals() -> None:
    low, high = interval([1.0] * 30 + [0.0] * 70)
    assert (round(low, 4), round(high, 4)) == (0.2189, 0.3958)  # Wilson's, as R's prop.test(correct=FALSE) gives it
    values = [0.1, 0.4, 0.35, 0.8]
    mean = sum(values) / 4
    half = 1.959964 * math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4)
    assert interval(values) == pytest.approx((mean - half, mean + half))


def test_a_groups_interval_is_that_of_its_items(root: Path) -> None:
    results = run(root)
    group = score(results, "mmlu", results["gemstill"]["asked"]["mmlu"], "acc,none")
    assert group is not None
    assert group.items == 18
    assert (group.low, group.high) == interval([1.0] * round(group.value * 18) + [0.0] * round((1 - group.value) * 18))
    assert score(results, "arc_easy", ["arc_easy"], "nothing,none") is None
