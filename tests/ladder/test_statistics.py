"""The ladder's statistics on numbers worked out by hand, and words that follow from them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gemstill.core.errors import Error
from gemstill.ladder.statistics import Interval, break_even, crossing, paired_interval, t_quantile
from gemstill.ladder.words import in_words


@pytest.mark.parametrize(
    ("freedom", "value"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)],
)
def test_t_quantiles_are_the_tables(freedom: int, value: float) -> None:
    assert t_quantile(0.975, freedom) == pytest.approx(value, abs=5e-5)


def test_paired_interval_by_hand() -> None:
    """Differences −1, −2, −3: mean −2, s 1, half width 4.3027 · 1/√3."""
    found = paired_interval([9.0, 4.0, 2.0], [10.0, 6.0, 5.0])
    assert found.mean == pytest.approx(-2)
    assert found.high == pytest.approx(-2 + 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.low == pytest.approx(-2 - 4.30265 / math.sqrt(3), abs=1e-4)
    assert found.verdict == "undecided"
    assert Interval(1, 0.5, 1.5).verdict == "higher"
    assert Interval(-1, -1.5, -0.5).verdict == "lower"


def test_pairs_that_differ_alike_have_no_width_however_far_apart_seeds_are() -> None:
    found = paired_interval([1.0, 50.0], [2.0, 51.0])
    assert (found.mean, found.low, found.high) == (-1, -1, -1)


def test_the_interval_covers_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(0.3, 1, (2000, 5))
    hits = sum((i := paired_interval(row.tolist(), [0.0] * 5)).low <= 0.3 <= i.high for row in draws)
    assert 0.935 < hits / 2000 < 0.965


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_what_makes_no_pairs_is_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(Error, match="no pairs"):
        paired_interval(a, b)


def test_crossing_is_straight_in_the_logarithm() -> None:
    assert crossing([1, 4], [5, 3], 4) == pytest.approx(2)  # half of the way from 1 to 4 by factors
    assert crossing([1, 2, 8], [5, 4, 2], 3) == pytest.approx(4)
    assert crossing([1, 2, 8], [5, 4, 2], 5) == 1  # there from the start
    assert crossing([1, 2, 8], [5, 6, 2], 4) == pytest.approx(2 * 4**0.5)  # a bump is passed over
    assert crossing([1, 2], [5, 4], 3.9) == math.inf


def test_break_even_counts_whole_students() -> None:
    assert break_even(100, 30, 10) == 5  # 100 + 5·10 = 5·30
    assert break_even(101, 30, 10) == 6
    assert break_even(0, 30, 10) == 1
    assert break_even(100, 10, 10) == math.inf
    assert break_even(100, 5, 10) == math.inf


def row(size: str, scratch: float, distilled: float, verdict: str) -> dict[str, Any]:
    return {"size": size, "parameters_without_embedding": 1000, "seeds": 5, "scratch_mean": scratch, "verdict": verdict,
            "distilled_mean": distilled, "difference": distilled - scratch, "low": -1.0, "high": 1.0}  # fmt: skip


def summary(**changes: Any) -> dict[str, Any]:
    rows = [row("small", 5.0, 4.5, "lower"), row("large", 4.8, 4.4, "lower")]
    return {
        "main": rows,
        "more_tokens": None,
        "long": None,
        "break_even": None,
        "shrink": None,
        "missing": [],
    } | changes


def test_what_does_not_pay_is_said_first() -> None:
    assert in_words(summary())[0] == "Distillation paid in every comparison that is done."
    unsure = summary(main=[row("small", 5.0, 4.5, "lower"), row("large", 4.8, 4.79, "undecided")])
    assert in_words(unsure)[0] == "Where distillation does not pay: at equal tokens it is not shown to pay for: large."
    rows = [{"flops": 1.0, "heldout_nll": 4.8}, {"flops": 6.0, "heldout_nll": 3.2}, {"flops": 99.0, "heldout_nll": 3.0}]
    more = {"size": "large", "rows": rows, "distilled_mean": 4.4, "all_in_all_flops": 10.0, "times_to_meet": 3.0}
    assert "it ends at 3.200 nats for 6.0e+00 FLOP, distilled at 4.400" in in_words(summary(more_tokens=more))[0]
    beaten = more | {"all_in_all_flops": 5.0}
    assert in_words(summary(more_tokens=beaten))[0] == "Distillation paid in every comparison that is done."
    long = {"size": "small", "tokens": 10, "tokens_per_parameter": 20.0, "seeds": 1, "difference": 0.1,
            "scratch_mean": 3.0, "distilled_mean": 3.1}  # fmt: skip
    assert "at 20 tokens a parameter the distilled student is no better" in in_words(summary(long=long))[0]
    assert in_words(summary(main=[]))[0].startswith("Nothing can be said yet")
