"""The rows that an evaluation ends in, for people: scores with intervals, and published ones beside."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from gemstill.evaluation.scores import metrics, score
from gemstill.evaluation.suites import Suite, Summary

Row = dict[str, Any]


def rows(results: Mapping[str, Any], asked: Mapping[str, Sequence[str]], table: Suite | None) -> list[Row]:
    """The rows of a suite, or one for each metric of each task asked for (asked: with the tasks of each).

    A row: name, task, metric, shots, items, value, low, high, published (the suite's columns), better (where the suite
    tells it); summaries are rows too, with "over", the number of rows that were measured and of all.
    """
    found: list[Row] = []
    if table is None:
        for name, leaves in asked.items():
            for metric in metrics(results, name):
                found.append(_row(name, name, metric, results, leaves))
        return found
    for benchmark in table.benchmarks:
        label = benchmark.asked().label()
        row = _row(benchmark.name, label, benchmark.metric, results, asked.get(label, []))
        row |= {"published": list(benchmark.published) or [None] * len(table.columns), "scale": 100}
        better = results["higher_is_better"].get(label, {}).get(benchmark.metric.partition(",")[0])
        if table.directions and better is not None:
            row["better"] = "higher" if better else "lower"
        found.append(row)
    return found + [_summary(summary, found) for summary in table.summaries]


def _row(name: str, task: str, metric: str, results: Mapping[str, Any], leaves: Sequence[str]) -> Row:
    measured = score(results, task, leaves, metric)
    row: Row = {"name": name, "task": task, "metric": metric, "items": 0, "value": None, "low": None, "high": None}
    if measured is None:
        return row
    shots = {results["n-shot"].get(leaf, 0) for leaf in leaves}
    row["shots"] = "-".join(str(end) for end in sorted({min(shots), max(shots)}))
    return row | measured._asdict()


def _summary(summary: Summary, found: Sequence[Row]) -> Row:
    """A row over those that were measured; the published columns over the same rows."""
    there = [row for row in found if row["name"] in summary.rows and row["value"] is not None]
    taken = _deviation if summary.deviation else _mean
    published = summary.published
    if published is None:
        columns = zip(*(row["published"] for row in there), strict=True)
        # A column that lacks one of these rows has nothing over the same ones.
        published = tuple(None if None in column else taken(column) for column in columns)
    value = taken([row["value"] for row in there])
    over = [len(there), len(summary.rows)]
    return {"name": summary.name, "value": value, "over": over, "published": list(published), "scale": 100}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def text(made: Sequence[Row], table: Suite | None) -> str:
    """The rows as aligned lines."""
    heads = ["", "shots", "items", "score", "95 % interval", *(table.columns if table else ())]
    return aligned([heads, *(cells(row, table) for row in made)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns, the first of them to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def cells(row: Row, table: Suite | None) -> list[str]:
    """A row as texts: name, shots, items, score, interval, published figures."""
    better = f", {row['better']} is better" if "better" in row else ""
    name = f"{row['name']}{better}" if table else f"{row['name']} {row['metric'].removesuffix(',none')}"
    published = ["" if value is None else f"{value:.1f}" for value in row.get("published") or ()]
    if row["value"] is None:
        return [name, "", "", "left out", "", *published]
    if "over" in row:
        done, all_of = row["over"]
        return [name, "", "" if done == all_of else f"{done} of {all_of}", figure(row["value"], row), "", *published]
    ends = "" if row["low"] is None else f"{figure(row['low'], row)} to {figure(row['high'], row)}"
    return [name, row["shots"], str(row["items"]), figure(row["value"], row), ends, *published]


def figure(value: float, row: Row) -> str:
    """A value as the table has it: in percent in a suite, else as lm-eval prints it."""
    return f"{value * 100:.1f}" if row.get("scale") == 100 else f"{value:.4f}"
