"""The rows that an evaluation ends in, for people: scores with intervals, and published ones beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gemstill.evaluation.scores import metrics, score
from gemstill.evaluation.suites import Suite, average

Row = dict[str, Any]


def rows(results: Mapping[str, Any], asked: Mapping[str, Sequence[str]], table: Suite | None) -> list[Row]:
    """The rows of a suite, or one for each metric of each task asked for (asked: with the tasks of each).

    A row: name, task, metric, shots, items, value, low, high, published (the suite's columns); averages are rows of a
    suite too, with "over", the number of rows that were measured and of all.
    """
    found: list[Row] = []
    if table is None:
        for name, leaves in asked.items():
            for metric in metrics(results, name):
                found.append(_row(name, name, metric, results, leaves))
        return found
    for benchmark in table.benchmarks:
        row = _row(benchmark.name, benchmark.task, benchmark.metric, results, asked.get(benchmark.task, []))
        found.append({**row, "published": benchmark.published, "scale": 100})
    return found + [_average(name, members, found) for name, members in table.averages]


def _row(name: str, task: str, metric: str, results: Mapping[str, Any], leaves: Sequence[str]) -> Row:
    measured = score(results, task, leaves, metric)
    row: Row = {"name": name, "task": task, "metric": metric, "items": 0, "value": None, "low": None, "high": None}
    if measured is None:
        return row
    shots = {results["n-shot"].get(leaf, 0) for leaf in leaves}
    row["shots"] = "-".join(str(end) for end in sorted({min(shots), max(shots)}))
    return row | measured._asdict()


def _average(name: str, members: Sequence[str], found: Sequence[Row]) -> Row:
    """A mean over the rows that were measured; the published columns over the same rows."""
    there = [row for row in found if row["name"] in members and row["value"] is not None]
    columns = zip(*(row["published"] for row in there), strict=True)
    # A column that lacks a row of these has no mean over the same ones.
    published = [None if None in column else average(column) for column in columns]
    value = average([row["value"] for row in there])
    return {"name": name, "value": value, "over": [len(there), len(members)], "published": published, "scale": 100}


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
    name = row["name"] if table else f"{row['name']} {row['metric'].removesuffix(',none')}"
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
