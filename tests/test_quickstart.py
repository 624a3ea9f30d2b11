"""The whole recipe, shrunk to seconds, on real text: Python's own sources of one package."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import sysconfig
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import gemstill
from gemstill import quickstart
from gemstill.core.config import as_dict, parse
from gemstill.quickstart import QuickstartConfig, bootstrap

SMALL = {"VOCAB": 512, "TEACHER": "mini-1m", "TEACHER_TOKENS": 20_480, "STUDENT_TOKENS": 10_240, "HELDOUT": 0.3}
TEXT = Path(sysconfig.get_paths()["stdlib"]) / "email"
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(quickstart, name, value)
        config = QuickstartConfig(data=str(TEXT), run=str(folder))
        quickstart.run(config)
        config = QuickstartConfig(data=str(TEXT), run=str(folder), compare_compute=True)
        quickstart.run(config)  # asked for of a folder that is finished
        before = (folder / "steps.json").read_bytes()
        quickstart.run(config)  # all is done: nothing is done again
        assert (folder / "steps.json").read_bytes() == before
    return folder


def test_summary_says_what_was_measured(made: Path) -> None:
    summary = json.loads((made / "summary.json").read_text())
    for name in ("wall_seconds", "peak_rss_bytes", "disk_bytes", "store_bytes_per_token", "ratio"):
        assert summary[name] > 0, name
    assert summary["ratio_low"] <= summary["ratio"] <= summary["ratio_high"]
    for row in ("teacher", "scratch", "distilled", "scratch_longer"):
        figures = summary[row]
        assert math.isclose(figures["perplexity"], math.exp(figures["heldout_nll"]))
        assert 0 < figures["heldout_nll"] < math.log(SMALL["VOCAB"])  # better than knowing nothing
        assert figures["flops"] > 0
        assert figures["tokens_per_second"] > 0
        assert figures["bits_per_byte"] > 0
    assert summary["scratch"]["tokens_seen"] == summary["distilled"]["tokens_seen"] == SMALL["STUDENT_TOKENS"]
    ratio = math.exp(summary["distilled"]["heldout_nll"] - summary["scratch"]["heldout_nll"])
    assert math.isclose(summary["ratio"], ratio, rel_tol=1e-6)


def test_report_is_one_file_that_opens_offline(made: Path) -> None:
    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    text = (made / "report.html").read_text()
    parser = Links()
    parser.feed(text)
    assert [link for link in parser.found if not link.startswith(("#", "data:"))] == []
    assert "@import" not in text
    assert "url(http" not in text


def test_transformers_opens_the_model_with_the_same_logits(made: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(made / "model", attn_implementation="eager").eval()
    words = transformers.AutoTokenizer.from_pretrained(made / "model")
    model, tokenizer = gemstill.load(made / "model", dtype=torch.float32)
    text = "import os\n\n\ndef join(a, b):\n    return os.path.join(a, b)\n"
    ids = words(text).input_ids
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits.float(), rtol=0, atol=1e-4)


def test_another_text_in_the_same_folder_is_refused(made: Path) -> None:
    with pytest.raises(gemstill.Error, match="holds a run over"):
        quickstart.run(QuickstartConfig(run=str(made)))


def test_bootstrap_interval_covers_and_pairs() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(100, 1000, 60)
    hard = rng.normal(5, 1, 60)  # documents differ far more than models do
    ratio, low, high = bootstrap((hard - 0.1) * tokens, hard * tokens, tokens)
    assert math.isclose(ratio, math.exp(-0.1), rel_tol=1e-9)
    assert math.isclose(low, ratio, rel_tol=1e-9)
    assert math.isclose(high, ratio, rel_tol=1e-9)
    ratio, low, high = bootstrap((hard + rng.normal(0, 0.1, 60)) * tokens, hard * tokens, tokens)
    assert low < 1 < high
    assert 1.001 < high / low < 1.2


@pytest.mark.parametrize("name", ["tokenizer", "data", "teacher", "teach", "scratch", "distilled"])
def test_recipes_are_the_quickstarts_own(name: str) -> None:
    config = QuickstartConfig()
    made = {
        "tokenizer": quickstart.tokenizer(config),
        "data": quickstart.data(config, "data"),
        "teacher": quickstart.teacher(config),
        "teach": quickstart.teaching(config),
        "scratch": quickstart.student(config, "scratch"),
        "distilled": quickstart.student(config, "distilled"),
    }[name]
    raw = yaml.safe_load((ROOT / "recipes" / "quickstart" / f"{name}.yaml").read_text())
    if "source" in raw:  # where Python lies differs from machine to machine
        raw["source"]["path"] = sysconfig.get_paths()["stdlib"]
    assert as_dict(parse(type(made), raw)) == as_dict(made)


def test_plan_keeps_within_the_budget() -> None:
    assert quickstart.plan(QuickstartConfig())["flops"] <= 6e13


def test_killed_and_started_again_it_ends_with_the_same_weights(made: Path, tmp_path: Path) -> None:
    """Killed once in the teacher's training, by a process that dies with no chance to clean up."""
    program = (
        "import os, sys, gemstill.quickstart as q\n"
        f"for name, value in {SMALL!r}.items(): setattr(q, name, value)\n"
        "from gemstill.train.loop import Loop\n"
        "save, left = Loop._save, [int(sys.argv[2])]\n"
        "def dying(self, metrics):\n"
        "    save(self, metrics)\n"
        "    left[0] -= 1\n"
        "    if left[0] == 0: os._exit(9)\n"
        "Loop._save = dying\n"
        f"q.run(q.QuickstartConfig(data={str(TEXT)!r}, run=sys.argv[1]))\n"
    )
    folder = tmp_path / "run"
    for lives in ("2", "3", "0"):  # dies at a state of the teacher, of a student, and not at all
        code = subprocess.run([sys.executable, "-c", program, str(folder), lives], capture_output=True).returncode
        assert code == (0 if lives == "0" else 9)
    a, b = ((place / "model" / "model.safetensors").read_bytes() for place in (made, folder))
    assert a == b
