"""Scores with their 95 % intervals, from lm-eval's results and the values of single items."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Z = 1.959964  # of a normal distribution's middle 95 %
_LARGEST = 1e100  # squares and sums of such stay finite


class Score(NamedTuple):
    """A metric of a task or group over `items`. low, high: its 95 % interval; None where there is none."""

    value: float
    low: float | None
    high: float | None
    items: int


def is_figure(value: Any) -> bool:
    """Whether this is a number, also an infinite one or NaN, that one can count with."""
    return isinstance(value, int | float) and not _LARGEST < abs(value) < math.inf


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean: Wilson's (1927) for rights and wrongs, else the normal one.

    >>> tuple(round(end, 2) for end in interval([1.0] * 10))
    (0.72, 1.0)
    """
    n = len(values)
    mean = sum(values) / n
    if all(value in (0, 1) for value in values):
        centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
        return (centre - half if mean > 0 else 0.0), (centre + half if mean < 1 else 1.0)
    if n < 2:
        return -math.inf, math.inf
    half = Z * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean - half, mean + half


def metrics(results: Mapping[str, Any], name: str) -> list[str]:
    """The metrics of a task or group as lm-eval names them, "name,filter", those without a value left out."""
    found = results["results"].get(name, {})
    return [
        key
        for key, value in found.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float) and not math.isnan(value)
    ]


def items(results: Mapping[str, Any], leaves: Sequence[str], metric: str) -> list[float]:
    """The values of single items, of all tasks of a group in order; empty where they are no plain numbers."""
    name, _, kind = metric.partition(",")
    values: list[float] = []
    for leaf in leaves:
        for sample in results["samples"].get(leaf, []):
            if sample["filter"] == kind:
                value = sample.get(name)
                if not isinstance(value, bool | int | float):
                    return []
                values.append(float(value))
    return values


def score(results: Mapping[str, Any], name: str, leaves: Sequence[str], metric: str) -> Score | None:
    """A metric of a task or group with its interval; None where it was not measured."""
    value = results["results"].get(name, {}).get(metric)
    if not isinstance(value, int | float) or math.isnan(value):
        return None
    values = items(results, leaves, metric)
    count = sum(results["n-samples"][leaf]["effective"] for leaf in leaves)
    if values and math.isclose(sum(values) / len(values), value, abs_tol=1e-9):
        return Score(float(value), *interval(values), count)
    kind = metric.split(",")
    error = results["results"][name].get(f"{kind[0]}_stderr,{kind[1]}")
    if isinstance(error, int | float) and not math.isnan(error):
        return Score(float(value), value - Z * error, value + Z * error, count)
    return Score(float(value), None, None, count)
