"""Two evaluations of the same items: paired differences, and refusals of what cannot be paired."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemstill import cli
from gemstill.core.errors import Error
from gemstill.evaluation.compare import compare, paired_interval
from gemstill.evaluation.folder import ANSWERS, RESULTS
from gemstill.evaluation.run import Setting, measure
from gemstill.evaluation.suites import suite
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


def _row(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda results: results["gemstill"]["rows"][0].update(fields)


def _ours(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda results: results["gemstill"].update(fields)


FIRST = "results.json, gemstill, row 1: has "
# From what is done to the results to how they are refused.
RESULTS_OF_ANOTHER: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda results: results.update(gemstill=None), "results.json: is no result of gemstill eval"),
    (lambda results: results.pop("config"), "results.json: has no field 'config'"),
    (lambda results: results["config"].pop("limit"), "results.json, config: has no field 'limit'"),
    (lambda results: results.update(higher_is_better={"mmlu": 1}), "higher_is_better: has 1 in field 'mmlu', which"),
    (lambda results: results["config"].update(model="\ud800"), "results.json: has half a surrogate pair in a text"),
    (lambda results: results["gemstill"].pop("rows"), "results.json, gemstill: has no field 'rows'"),
    (_ours(rows=[1]), "results.json, gemstill, row 1: is no group of fields"),
    (_ours(asked=[]), "has [] in field 'asked', which should be a group of fields"),
    (_ours(asked={"mmlu": ["../x"]}), "gemstill, asked: has ['../x'] in field 'mmlu', which should be a list of tasks"),
    (_ours(suite="gemma9"), "has 'gemma9' in field 'suite', which should be empty or one of gemma2-pretrained"),
    (_ours(files={"piqa": {"piqa/valid.jsonl": 3}}), "files, piqa: has 3 in field 'piqa/valid.jsonl', which should be"),
    (_row(name=None), f"{FIRST}None in field 'name', which should be a text"),
    (_row(task="piq"), f"{FIRST}'piq' in field 'task', which should be one of those asked"),
    (_row(task=[]), f"{FIRST}[] in field 'task', which should be a text"),
    (_row(metric=3), f"{FIRST}3 in field 'metric', which should be a text"),
    (_row(metric="acc,other"), "samples: holds no item of 'acc,other'"),
    (_row(value="x"), f"{FIRST}'x' in field 'value', which should be a number or null"),
    (_row(low=10**400), f"{FIRST}1000"),
    (lambda results: results["gemstill"]["rows"][0].pop("shots"), f"{FIRST}no field 'shots'"),
]


@pytest.mark.parametrize("case", range(len(RESULTS_OF_ANOTHER)))
def test_results_that_gemstill_did_not_write_are_refused(folders: tuple[Path, Path], tmp_path: Path, case: int) -> None:
    damage, said = RESULTS_OF_ANOTHER[case]
    shutil.copytree(folders[0], tmp_path / "a")
    results = json.loads((tmp_path / "a" / RESULTS).read_text())
    damage(results)
    (tmp_path / "a" / RESULTS).write_text(json.dumps(results))
    reads = [lambda: evaluation_report(tmp_path / "a")]
    if "acc,other" not in said:  # a metric that only one of two has is not compared
        reads.append(lambda: compare(folders[0], tmp_path / "a"))
    for read in reads:
        with pytest.raises(Error, match=f"{re.escape(said)}.*; evaluate again"):
            read()
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_suites_results_have_their_own_columns(folders: tuple[Path, Path], tmp_path: Path) -> None:
    table, place = suite("gemma2-safety"), tmp_path / "a"
    measure(Teller(), "a", table.asked(), Setting(data_root=write_root(tmp_path / "root"), limit=2), place, table, "a")
    written = (place / RESULTS).read_text()
    for at, fields, said in (
        (0, {"published": [1.0]}, "row 1: has [1.0] in field 'published', which should be 5 figures"),
        (0, {"better": None}, "row 1: has None in field 'better', which should be a text"),
    ):
        results = json.loads(written)
        results["gemstill"]["rows"][at] |= fields
        (place / RESULTS).write_text(json.dumps(results))
        with pytest.raises(Error, match=re.escape(said)):
            evaluation_report(place)


# From what is done to the first item of PIQA (or the text in its place) to how it is refused.
ITEMS_OF_ANOTHER: list[tuple[str | dict[str, Any], str]] = [
    ("", ": holds no item"),
    ("nonsense", ", line 1: is no item of an evaluation (Expecting value"),
    ("[" * 100_000, ", line 1: is no item of an evaluation (maximum recursion depth"),
    ("[]", ", line 1: is no item of an evaluation"),
    ('{"doc_hash": "a"}', ", line 1: has no field 'doc_id'"),
    ({"doc_id": [1]}, ", line 1: has [1] in field 'doc_id', which should be a whole number"),
    ({"doc_hash": {}}, ", line 1: has {} in field 'doc_hash', which should be a text"),
    ({"filter": None}, ", line 1: has None in field 'filter', which should be a text"),
    ({"arguments": []}, ", line 1: has [] in field 'arguments', which should be the arguments of each request"),
    ({"arguments": [[1, 2]]}, ", line 1: has [[1, 2]] in field 'arguments'"),
    ({"resps": [[]]}, ", line 1: has [[]] in field 'resps', which should be a list of answers for each request"),
    ({"filtered_resps": []}, ", line 1: has [] in field 'filtered_resps', which should be an answer for each request"),
    ({"acc": 10**400}, ", line 1: has 1000"),
    ({"target": "\ud800"}, ", line 1: has half a surrogate pair in a text"),
]


@pytest.mark.parametrize("case", range(len(ITEMS_OF_ANOTHER)))
def test_items_that_gemstill_did_not_write_are_refused(folders: tuple[Path, Path], tmp_path: Path, case: int) -> None:
    change, said = ITEMS_OF_ANOTHER[case]
    shutil.copytree(folders[0], tmp_path / "a")
    path = tmp_path / "a" / "samples" / "piqa.jsonl"
    first, *others = path.read_text().splitlines(keepends=True)
    damaged = change if isinstance(change, str) else json.dumps(json.loads(first) | change)
    path.write_text("".join([f"{damaged}\n", *others]) if change else "")
    for read in (lambda: compare(folders[0], tmp_path / "a"), lambda: evaluation_report(tmp_path / "a")):
        with pytest.raises(Error, match=f"{re.escape(f'piqa.jsonl{said}')}.*; evaluate again"):
            read()
    assert not (tmp_path / "a" / "report.html").exists()


def test_a_fault_of_ours_is_no_bad_input(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was told as something in the folder that gemstill eval did not write."""
    shutil.copytree(folders[0], tmp_path / "a")
    monkeypatch.setattr("gemstill.report.evaluation.interval", lambda values: {}["low"])
    with pytest.raises(KeyError):
        evaluation_report(tmp_path / "a")


def test_items_whose_choices_are_all_impossible_have_a_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Minus infinity less minus infinity is no confidence."""
    shutil.copytree(folders[0], tmp_path / "a")
    path = tmp_path / "a" / "samples" / "piqa.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()]
    items[0]["filtered_resps"] = [[-math.inf, False], [-math.inf, False]]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert "piqa" in evaluation_report(tmp_path / "a").read_text()


def test_folders_that_are_no_evaluation(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"results.json: cannot be read \(No such file .*; name the folder"):
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
    items = (folders[0] / "samples" / "mmlu_anatomy.jsonl").read_bytes()
    (tmp_path / "samples" / "mmlu_anatomy.jsonl").write_bytes(items.splitlines(keepends=True)[0] + b"nonsense\n")
    with pytest.raises(Error, match=r"mmlu_anatomy.jsonl, line 2: is no item of an evaluation"):
        compare(tmp_path, folders[0])
