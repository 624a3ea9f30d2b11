"""The paper exercise in docs/distill.md: what the report's 2B would cost, recomputed from the page's own figures."""

import re
from pathlib import Path

import pytest

from gemstill.model.config import ModelConfig
from gemstill.train.flops import forward_flops, train_flops

PAGE = (Path(__file__).parents[2] / "docs" / "distill.md").read_text()
TOKENS, WINDOW = 2e12, 8192  # section 3.1 and Table 1 of the Gemma 2 report
TIMES = {"TB": 1e12, "PB": 1e15, "EB": 1e18}


def rows(heading):
    """The cells of the tables in a section."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|") and not re.fullmatch(r"[|\s-]+", line)]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def number(text):
    return float(re.match(r"[\d.,e]+", text)[0].replace(",", ""))


def test_the_bytes_of_two_trillion_tokens():
    measured = {cells[0]: cells[1] for cells in rows("Estimators") if re.match(r"\w+\([\d.]+\)$", cells[0])}
    found = [cells for cells in rows("At the report's size") if cells[-1].split()[-1] in TIMES]
    assert len(found) >= 5
    for name, size, total in found:
        if name == "dense":
            assert number(size) == 2 * ModelConfig.preset("gemma2-2b").vocab_size  # float16
        else:
            assert size == measured[name]
        value, unit = total.split()
        assert float(value) * TIMES[unit] == pytest.approx(number(size) * TOKENS, rel=0.02)


def test_the_teachers_operations():
    found = {cells[0]: cells[1:] for cells in rows("At the report's size") if cells[0].startswith("gemma2-")}
    student = train_flops(ModelConfig.preset("gemma2-2b"), WINDOW) * TOKENS
    assert set(found) == {"gemma2-2b", "gemma2-9b", "gemma2-27b"}
    for name, (flops, share) in found.items():
        known = forward_flops(ModelConfig.preset(name), WINDOW) * TOKENS
        assert number(flops) == pytest.approx(known, rel=0.01)
        assert number(share) == pytest.approx(known / student, rel=0.02)
