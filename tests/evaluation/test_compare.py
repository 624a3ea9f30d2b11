"""Two evaluations of the same items: paired differences, and refusals of what cannot be paired."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from gemstill import cli
from gemstill.core.errors import Error
from gemstill.evaluation.compare import compare, paired_interval
from gemstill.evaluation.folder import ANSWERS, RESULTS
from gemstill.evaluation.run import Setting, measure
from gemstill.evaluation.tasks import Asked
from gemstill.report.evaluation import evaluation_report
from tests.evaluation.roots import Teller, write_root

pytestmark = pytest.mark.filterwarnings("ignore::gemstill.core.notices.Notice")
TASKS = [Asked("mmlu"), Asked("piqa"), Asked("truthfulqa_mc2"), Asked("wikitext")]


class Other(Teller):
    """Prefers the longer choice."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return [(float(len(request.args[1])), False) for request in requests]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root, place = write_root(tmp_path_factory.mktemp("root")), tmp_path_factory.mktemp("runs")
    for name, lm in (("a", Teller()), ("b", Other())):
        measure(lm, name, TASKS, Setting(data_root=root), place / name, None, name)
    return place / "a", place / "b"


def test_differences_are_taken_item_by_item(folders: tuple[Path, Path]) -> None:
    found, alone = compare(*folders)
    by_name = {(one.name, one.metric): one for one in found}
    assert set(by_name) == {
        ("mmlu", "acc,none"),
        ("piqa", "acc,none"),
        ("piqa", "acc_norm,none"),
        ("truthfulqa_mc2", "acc,none"),
    }
    assert alone == []
    values = []
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "samples" / "piqa.jsonl").read_text().splitlines()]
        values.append([line["acc"] for line in lines])
    one = by_name["piqa", "acc,none"]
    gained = sum(b > a for a, b in zip(*values, strict=True))
    lost = sum(a > b for a, b in zip(*values, strict=True))
    assert (one.items, one.gained, one.lost) == (6, gained, lost)
    assert one.value == pytest.approx((gained - lost) / 6)
    assert (one.low, one.high) == paired_interval(gained, lost, 6)
    results = json.loads((folders[1] / RESULTS).read_text())["results"]
    assert by_name["mmlu", "acc,none"].second == pytest.approx(results["mmlu"]["acc,none"])
    soft = by_name["truthfulqa_mc2", "acc,none"]
    assert soft.gained is None
    assert soft.value == pytest.approx((soft.low + soft.high) / 2)


def test_an_evaluation_does_not_differ_from_itself(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "compare", str(folders[0]), str(folders[0])]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("piqa acc "))
    low, high = paired_interval(0, 0, 6)
    assert line.split()[5:] == ["+0.0000", f"{low:+.4f}", "to", f"{high:+.4f}", "0", "0"]


def test_the_paired_interval_covers_as_it_says() -> None:
    """Exactly, over all outcomes of 30 items of which each changes with the probabilities given."""
    for up, down in ((0.1, 0.1), (0.3, 0.1), (0.02, 0.02)):
        covered = 0.0
        for gained in range(31):
            for lost in range(31 - gained):
                rest = 30 - gained - lost
                ways = math.comb(30, gained) * math.comb(30 - gained, lost)
                low, high = paired_interval(gained, lost, 30)
                covered += ways * up**gained * down**lost * (1 - up - down) ** rest * (low <= up - down <= high)
        assert 0.935 < covered <= 1.0


def test_other_items_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    root = write_root(tmp_path / "root")
    measure(Teller(), "c", TASKS, Setting(data_root=root, limit=3), tmp_path / "c", None, "c")
    with pytest.raises(
        Error, match=r"mmlu: the two were asked other items \(18 and 3, 3 of them the same\); evaluate both"
    ):
        compare(folders[0], tmp_path / "c")
    measure(Teller(), "d", [Asked("winogrande")], Setting(data_root=root), tmp_path / "d", None, "d")
    with pytest.raises(Error, match=r"share no task with single items' values"):
        compare(folders[0], tmp_path / "d")


def _rows(results: dict[str, Any], **fields: Any) -> None:
    for row in results["gemstill"]["rows"]:
        row |= fields


RESULTS_OF_ANOTHER = {
    "nothing": lambda results: results.update(gemstill=None),
    "no rows": lambda results: results["gemstill"].pop("rows"),
    "rows of numbers": lambda results: results["gemstill"].update(rows=[1]),
    "no tasks": lambda results: results["gemstill"].pop("asked"),
    "a list of tasks": lambda results: results["gemstill"].update(asked=[]),
    "a path as a task": lambda results: results["gemstill"].update(asked={"mmlu": ["../x"]}),
    "rows of no task": lambda results: _rows(results, task=None),
    "a number for a metric": lambda results: _rows(results, metric=3),
    "a text for a value": lambda results: _rows(results, value="x"),
}
ITEM = {"doc_id": 0, "doc_hash": "a", "filter": "none"}
SAMPLES_OF_ANOTHER = {
    "": "piqa.jsonl: holds no item",
    "[" * 100_000: "piqa.jsonl, line 1: is no item of an evaluation",
    json.dumps(ITEM | {"doc_id": [1]}): "piqa.jsonl, line 1: is no item of an evaluation",
    json.dumps({"doc_hash": "a", "filter": "none"}): "piqa.jsonl, line 1: is no item of an evaluation",
}


@pytest.mark.parametrize("case", RESULTS_OF_ANOTHER)
def test_results_that_gemstill_did_not_write_are_refused(folders: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    shutil.copytree(folders[0], tmp_path / "a")
    results = json.loads((tmp_path / "a" / RESULTS).read_text())
    RESULTS_OF_ANOTHER[case](results)
    (tmp_path / "a" / RESULTS).write_text(json.dumps(results))
    for read in (lambda: compare(folders[0], tmp_path / "a"), lambda: evaluation_report(tmp_path / "a")):
        with pytest.raises(Error, match=r"results.json: is no result of gemstill eval; evaluate again"):
            read()


@pytest.mark.parametrize("case", SAMPLES_OF_ANOTHER, ids=range(len(SAMPLES_OF_ANOTHER)))
def test_items_that_gemstill_did_not_write_are_refused(folders: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    shutil.copytree(folders[0], tmp_path / "a")
    (tmp_path / "a" / "samples" / "piqa.jsonl").write_text(case)
    for read in (lambda: compare(folders[0], tmp_path / "a"), lambda: evaluation_report(tmp_path / "a")):
        with pytest.raises(Error, match=SAMPLES_OF_ANOTHER[case]):
            read()


def test_items_without_what_a_page_shows_are_told_in_one_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[0], tmp_path / "a")
    (tmp_path / "a" / "samples" / "piqa.jsonl").write_text(json.dumps(ITEM))
    with pytest.raises(Error, match=r"holds something that gemstill eval did not write \(KeyError: .*; evaluate again"):
        evaluation_report(tmp_path / "a")
    assert not (tmp_path / "a" / "report.html").exists()


def test_folders_that_are_no_evaluation(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"results.json: cannot be read"):
        compare(folders[0], tmp_path)
    (tmp_path / ANSWERS).write_text("")
    with pytest.raises(Error, match=r"the evaluation is not finished; give its command again: it goes on"):
        compare(folders[0], tmp_path)
    (tmp_path / RESULTS).write_text("{}")
    with pytest.raises(Error, match=r"results.json: is no result of gemstill eval"):
        compare(tmp_path, folders[0])
    results = (folders[0] / RESULTS).read_text()
    (tmp_path / RESULTS).write_text(results)
    with pytest.raises(Error, match=r"mmlu_anatomy.jsonl: cannot be read \(No such file or directory\)"):
        compare(tmp_path, folders[0])
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "mmlu_anatomy.jsonl").write_text(json.dumps(ITEM) + "\nnonsense\n")
    with pytest.raises(Error, match=r"mmlu_anatomy.jsonl, line 2: is no item of an evaluation"):
        compare(tmp_path, folders[0])
