"""An evaluation's page, and what it says of calibration."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from gemstill.core.errors import Error
from gemstill.evaluation.calibration import Choice, bins, choice, expected_error
from gemstill.evaluation.run import Setting, measure
from gemstill.evaluation.suites import suite
from gemstill.evaluation.tasks import Asked
from gemstill.report.evaluation import evaluation_report
from gemstill.report.run import ReportConfig, run
from tests.evaluation.roots import Teller, write_root

pytestmark = pytest.mark.filterwarnings("ignore::gemstill.core.notices.Notice")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"))


def test_a_suites_page_has_all_its_parts_and_no_address(root: Path, tmp_path: Path) -> None:
    table = suite("gemma2-pretrained")
    measure(Teller(), "one", table.asked(), Setting(data_root=root, limit=5), tmp_path, table, "<teller>")
    path = evaluation_report(tmp_path)
    text = path.read_text()
    for part in ("Scores", "MMLU by subject", "Calibration", "Lengths, in characters", "The worst items", "Data"):
        assert f"<h2>{part}</h2>" in text
    assert "&lt;teller&gt;" in text
    assert "<teller>" not in text
    assert "6 of 8" in text
    assert "hellaswag is left out: no hellaswag/hellaswag_val.jsonl" in text
    assert "mmlu/test/anatomy_test.csv.gz" in text
    assert "right: " in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert run(ReportConfig(tmp_path)) == {"report": str(path)}


def test_tasks_without_choices_have_no_calibration(root: Path, tmp_path: Path) -> None:
    measure(Teller(), "one", [Asked("wikitext"), Asked("gsm8k", 0)], Setting(data_root=root), tmp_path, None, "teller")
    text = evaluation_report(tmp_path).read_text()
    assert "<h2>Calibration</h2>" not in text
    assert "byte_perplexity" in text
    assert "gsm8k, item 0" in text  # the answers are all "3"


def test_the_worst_items_are_those_of_the_worst_values(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no choice is right, where a value is a share, and where lower is better."""

    ratings = iter((0.1, 0.4, 0.3, 0.2))
    monkeypatch.setattr("gemstill.evaluation.run.rater", lambda _: lambda *_: {"toxicity": next(ratings)})
    table = suite("gemma2-safety")
    setting = Setting(data_root=root, toxicity="a/classifier")
    made = measure(Teller(), "one", table.asked(), setting, tmp_path, table, "teller")
    page = evaluation_report(tmp_path).read_text()
    worst = page[page.index("The worst items") :]
    assert [f"toxicity: 0.{value}" in worst for value in (4, 3, 2, 1)] == [True, True, True, False]
    lowest = min(item["acc"] for item in made["samples"]["truthfulqa_mc2"])
    assert f"acc: {lowest:.3g}" in worst
    assert "pct_stereotype: 0" not in worst
    assert "a/classifier" in page


def test_an_unfinished_evaluation_has_no_page(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text("")
    with pytest.raises(Error, match=r"the evaluation is not finished"):
        run(ReportConfig(tmp_path))


def sample(logprobs: list[float], acc: float, target: Any = 0) -> dict[str, Any]:
    arguments = [["Q:", f" choice {n}"] for n in range(len(logprobs))]
    return {
        "filtered_resps": [[value, False] for value in logprobs],
        "acc": acc,
        "arguments": arguments,
        "target": target,
    }


def test_a_choices_confidence_is_its_share_of_the_choices() -> None:
    found = choice(sample([math.log(0.02), math.log(0.06)], 0.0))
    assert found is not None
    assert (round(found.confidence, 6), found.right) == (0.75, False)
    assert (found.chosen, found.wanted) == (" choice 1", " choice 0")
    assert choice(sample([-1.0, -2.0], 0.4)) is None  # a share of probability, no right or wrong
    assert choice({"filtered_resps": ["text"], "acc": 1}) is None
    norm = {**sample([-1.0, -2.0], 0.0, target=1), "acc_norm": 1.0}
    del norm["acc"]  # one way to ask MMLU measures no other
    assert (choice(norm) or norm)[1] is False
    del norm["acc_norm"]
    assert choice(norm) is None  # of CrowS-Pairs neither choice is right
    far = choice(sample([-5000.0, -5001.0], 1.0))
    assert far is not None
    assert far.confidence == pytest.approx(1 / (1 + math.exp(-1)))


def test_a_calibrated_model_has_no_error_and_a_boaster_has() -> None:
    rng = random.Random(0)
    honest = [Choice(p := rng.uniform(0.3, 1.0), rng.random() < p, "", "", "") for _ in range(40_000)]
    assert expected_error(honest) < 0.015
    assert expected_error([one._replace(right=rng.random() < 0.5 * one.confidence) for one in honest]) == pytest.approx(
        0.5 * sum(one.confidence for one in honest) / len(honest), abs=0.015
    )
    assert sum(bar.items for bar in bins(honest)) == len(honest)
    assert bins([Choice(1.0, True, "", "", "")])[0].right == 1.0
