"""`gemstill eval compare A B`: two evaluations of the same items, as paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gemstill.core.errors import Error
from gemstill.evaluation.folder import read_results, read_samples, split_metric
from gemstill.evaluation.scores import Z
from gemstill.evaluation.table import aligned


@dataclass(frozen=True)
class CompareConfig:
    """`gemstill eval compare`."""

    first: Path  # the folder of an evaluation
    second: Path  # and that of another, of the same items


class Difference(NamedTuple):
    """The second's mean less the first's over the same items, with its 95 % interval.

    gained, lost: items that only the second, only the first has right; None where values are no rights and wrongs.
    """

    name: str
    metric: str
    items: int
    first: float
    second: float
    low: float
    high: float
    gained: int | None
    lost: int | None

    @property
    def value(self) -> float:
        """The difference."""
        return self.second - self.first


def run(config: CompareConfig) -> None:
    """Print the differences.

    Raises:
        Error: a folder holds no finished evaluation; they share no task, or not its items.
    """
    found, alone = compare(config.first, config.second)
    heads = ["", "items", "first", "second", "difference", "95 % interval", "only first right", "only second right"]
    rows = [heads]
    for one in found:
        label = f"{one.name} {one.metric.removesuffix(',none')}"
        figures = [f"{one.first:.4f}", f"{one.second:.4f}", f"{one.value:+.4f}", f"{one.low:+.4f} to {one.high:+.4f}"]
        counts = ["" if one.lost is None else str(one.lost), "" if one.gained is None else str(one.gained)]
        rows.append([label, str(one.items), *figures, *counts])
    print(aligned(rows))
    for name in alone:
        print(f"{name}: only in one of the two")


def plan(config: CompareConfig) -> dict[str, Any]:
    """What would be compared."""
    first, second = (read_results(folder)["gemstill"]["asked"] for folder in (config.first, config.second))
    return {"tasks": ", ".join(name for name in first if name in second)}


def compare(first: Path, second: Path) -> tuple[list[Difference], list[str]]:
    """The differences, task by task, and the tasks that only one of the two has.

    Raises:
        Error: as `run` does.
    """
    results = [read_results(folder) for folder in (first, second)]
    wanted = [_metrics(result) for result in results]
    found, alone = [], sorted({name for name, _ in wanted[0].keys() ^ wanted[1].keys()})
    for (name, metric), leaves in wanted[0].items():
        if (name, metric) not in wanted[1]:
            continue
        items = [
            _items(folder, tasks, metric) for folder, tasks in ((first, leaves), (second, wanted[1][name, metric]))
        ]
        _same(items, name, (first, second))
        pairs = [(items[0][key], items[1][key]) for key in items[0]]
        if all(isinstance(one, int | float) and math.isfinite(one) for pair in pairs for one in pair):
            found.append(_difference(name, metric, pairs))
    if not found:
        raise Error("share no task with single items' values", where=f"{first} and {second}")
    return found, alone


def _metrics(results: Mapping[str, Any]) -> dict[tuple[str, str], list[str]]:
    """The rows that were measured, by name of the task and metric, with the tasks they are taken over."""
    ours = results["gemstill"]
    rows = [row for row in ours["rows"] if "metric" in row and row["value"] is not None]
    return {(row["task"], row["metric"]): ours["asked"][row["task"]] for row in rows}


def _items(folder: Path, leaves: Sequence[str], metric: str) -> dict[tuple[str, int, str], Any]:
    value = split_metric(metric)[0]
    return {
        (task, sample["doc_id"], sample["doc_hash"]): sample.get(value)
        for task, sample in read_samples(folder, leaves, metric)
    }


def _same(items: Sequence[Mapping[tuple[str, int, str], Any]], name: str, folders: tuple[Path, Path]) -> None:
    if items[0].keys() != items[1].keys():
        shared = len(items[0].keys() & items[1].keys())
        what = f"the two were asked other items ({len(items[0])} and {len(items[1])}, {shared} of them the same)"
        fix = "evaluate both with the same --limit, --seed and data"
        raise Error(f"{name}: {what}", where=f"{folders[0]} and {folders[1]}", fix=fix)


def _difference(name: str, metric: str, pairs: Sequence[tuple[float, float]]) -> Difference:
    n = len(pairs)
    first, second = (math.fsum(pair[side] for pair in pairs) / n for side in (0, 1))
    if all(value in (0, 1) for pair in pairs for value in pair):
        gained, lost = (sum(pair == changed for pair in pairs) for changed in ((0, 1), (1, 0)))
        low, high = paired_interval(gained, lost, n)
        return Difference(name, metric, n, first, second, low, high, gained, lost)
    differences = [b - a for a, b in pairs]
    mean = math.fsum(differences) / n
    spread = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n) if n > 1 else math.inf
    return Difference(name, metric, n, first, second, mean - Z * spread, mean + Z * spread, None, None)


def paired_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a difference of two proportions over the same n items: Wald's with a half more in each cell.

    (Agresti and Min 2005, Statistics in Medicine 24.) It has a width even where no item changed.
    """
    plus, minus, whole = gained + 0.5, lost + 0.5, n + 2
    mean = (plus - minus) / whole
    half = Z * math.sqrt(plus + minus - (plus - minus) ** 2 / whole) / whole
    return mean - half, mean + half
