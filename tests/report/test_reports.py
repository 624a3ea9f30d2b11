"""Reports: what they say follows from the measurements, and the page needs nothing from outside."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gemstill.core.errors import Error
from gemstill.report.chart import Series, chart, ticks
from gemstill.report.curves import read_curves
from gemstill.report.quickstart import comparison, in_words, quickstart_report, show
from gemstill.report.run import ReportConfig, plan, run, run_report


def make_run(folder: Path, start: float = 8.3, steps: int = 400) -> None:
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        loss = start * (step + 1) ** -0.1
        row = {
            "step": step,
            "loss": loss,
            "lr": 0.01,
            "grad_norm": 1.0,
            "tokens": 1024 * step,
            "tokens_per_second": 9e3,
        }
        lines.append(json.dumps(row | {"seconds": 0.1 * step}))
        if step % 100 == 0:
            heldout = {"heldout_nll": loss + 0.1, "perplexity": math.exp(loss + 0.1), "bits_per_byte": 1.5}
            lines.append(json.dumps({"step": step, **heldout}))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4')  # a last line cut off by a crash
    (folder / "config.yaml").write_text("run: x\nsteps: 400 # </script><script>alert(1)</script>\n")


def make_summary(ratio: float = 0.7, low: float = 0.66, high: float = 0.74) -> dict[str, Any]:
    def model(nll: float, flops: float) -> dict[str, Any]:
        return {
            "parameters": 1_300_000, "parameters_without_embedding": 800_000, "tokens_seen": 400_384, "flops": flops,
            "heldout_nll": nll, "perplexity": math.exp(nll), "bits_per_byte": nll / 3, "tokens_per_second": 9000.0,
            "precision": "bfloat16", "prompt": "def f(<x>):", "sample": "\n    return '</pre>' & 1\n",
        }  # fmt: skip

    return {
        "wall_seconds": 500.0, "peak_rss_bytes": 2**30, "disk_bytes": 2**28, "store_bytes_per_token": 20.5,
        "ratio": ratio, "ratio_low": low, "ratio_high": high, "text": "/usr/lib/python3.11",
        "data": {"train_tokens": 5_000_000, "student_tokens": 400_384, "heldout_tokens": 9000, "heldout_documents": 40},
        "teach": {"tokens": 400_384, "flops": 2e12, "estimator": "threshold(0.05)"},
        "seconds": {"tokenizer": 10.0, "teacher": 300.0, "teach": 20.0, "scratch": 60.0, "distilled": 60.0},
        "rows": ["teacher", "scratch", "distilled"],
        "teacher": model(4.0, 3e13), "scratch": model(4.7, 2e12), "distilled": model(4.7 + math.log(ratio), 2e12),
    }  # fmt: skip


def check_page(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href|url)\s*[=(]|https?://", text), "the page asks for something outside it"
    assert "default-src 'none'" in text
    for svg in re.findall(r'<div class="plot">(<svg.*?</svg>)<div class="tip"', text, re.S):
        ElementTree.fromstring(svg)  # well formed
    for data in re.findall(r'<script type="application/json">(.*?)</script>', text, re.S):
        for series in json.loads(data)["series"]:
            assert all(math.isfinite(value) for point in series["points"] for value in point)
    assert "<script>alert" not in text
    assert re.findall(r"<script>", text) == ["<script>"]
    return text


def test_report_of_a_training_run(tmp_path: Path) -> None:
    folder = tmp_path / "first"
    make_run(folder)
    assert "not finished: 400 steps" in check_page(run_report(folder))
    summary = {"parameters": 10, "steps": 400, "tokens_seen": 409_600, "flops": 1e12, "heldout_nll": 4.0,
               "perplexity": 54.6, "bits_per_byte": 1.5, "seconds": 40.0, "precision": "float32"}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "samples.json").write_text(json.dumps([{"prompt": "def ", "text": "main():<b>"}]))
    text = check_page(run_report(folder))
    for piece in ("54.6", "409,600", "Held-out loss", "Gradient norm", "gemstill train", "main():&lt;b&gt;", "float32"):
        assert piece in text
    assert "not finished" not in text
    assert run(ReportConfig(folder)) == {"report": str(folder / "report.html")}
    assert plan(ReportConfig(folder))["metrics"] == "metrics.jsonl"


def test_report_of_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"metrics.jsonl: cannot be read"):
        run_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    with pytest.raises(Error, match="line 1 holds no figures of a step"):
        read_curves(tmp_path)


def test_an_evaluation_stands_at_the_tokens_of_its_step(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    curves = read_curves(tmp_path / "run")
    assert [x for x, _ in curves.of("heldout_nll")] == [1024 * step for step in (100, 200, 300, 400)]
    assert len(curves.of("loss")) == 400


def test_the_running_mean_starts_without_bias_and_skips_what_is_not_finite(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    curves = read_curves(tmp_path / "run")
    curves.steps[5]["loss"] = math.nan
    for row in curves.steps:
        row["loss"] = row["loss"] if math.isnan(row["loss"]) else 3.0
    smooth = curves.smooth("loss")
    assert len(smooth) == 399
    assert all(y == pytest.approx(3.0) for _, y in smooth)


def test_quickstart_page_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = make_summary()
    for name in ("teacher", "scratch", "distilled"):
        make_run(tmp_path / name)
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert run(ReportConfig(tmp_path)) == {"report": str(tmp_path / "report.html")}
    text = check_page(quickstart_report(tmp_path))
    for piece in ("109.9 → 77.0", "0.700", "20.5", "8:20", "def f(&lt;x&gt;):", "threshold(0.05)", "its store"):
        assert piece in text
    assert f"gemstill quickstart --data /usr/lib/python3.11 --run {tmp_path}" in text
    show(summary)
    shown = capsys.readouterr().out
    for piece in ("perplexity", "109.95", "76.96", "distilled, all in all", "3.40e+13", "Distillation lowered"):
        assert piece in shown


def test_the_table_counts_teacher_and_store_for_the_distilled_student() -> None:
    rows = {row[0]: row for row in comparison(make_summary())}
    assert list(rows) == ["teacher", "  its store", "from scratch", "distilled", "distilled, all in all"]
    assert rows["distilled, all in all"][2:4] == ["800,768", "3.40e+13"]
    assert rows["distilled, all in all"][-1] == "6:20"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "said"),
    [
        (0.7, 0.66, 0.74, "Distillation lowered"),
        (1.1, 1.05, 1.2, "held back by its teacher"),
        (0.99, 0.9, 1.1, "made no difference that these documents can show"),
    ],
)
def test_the_sentence_says_whichever_way_it_came_out(ratio: float, low: float, high: float, said: str) -> None:
    (sentence,) = in_words(make_summary(ratio, low, high))
    assert said in sentence
    assert "17.0 times the FLOPs of the student alone" in sentence


def test_the_longer_scratch_student_is_judged_too() -> None:
    summary = make_summary()
    summary["rows"].append("scratch_longer")
    summary["scratch_longer"] = summary["scratch"] | {"heldout_nll": 3.9, "perplexity": 49.4, "tokens_seen": 6_000_000}
    assert "6,000,000 tokens) end at a perplexity of 49.4, better than" in in_words(summary)[1]
    assert comparison(summary)[-1][0] == "from scratch, longer"


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 400_000) == [0, 100_000, 200_000, 300_000, 400_000]
    assert ticks(3.42, 8.3) == [3, 4, 5, 6, 7, 8, 9]
    for constant in (2.0, 0.0, -3.0):
        assert ticks(constant, constant)[0] < constant < ticks(constant, constant + 1e-12)[-1]


def test_a_chart_of_nothing_of_one_point_and_of_many(tmp_path: Path) -> None:
    assert chart("t", [Series("a", [(0, math.nan)], 0)], "x", "y") == ""
    one = chart("<t>", [Series("<a>", [(5.0, 1.0)], 0)], "x", "y")
    assert "<circle" in one
    assert "<a>" not in one
    many = chart("t", [Series("a", [(float(i), float(i)) for i in range(10_000)], 1)], "x", "y")
    corners = re.search(r'points="([^"]+)"', many)
    assert corners is not None
    assert len(corners.group(1).split()) <= 300
