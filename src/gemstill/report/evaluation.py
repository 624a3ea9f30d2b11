"""`gemstill eval` to its end: the evaluation, and its page: scores, calibration, lengths, the worst items to read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from gemstill import __version__
from gemstill.core import files
from gemstill.evaluation import command
from gemstill.evaluation.calibration import BINS, Choice, bins, choice, expected_error, likeliest
from gemstill.evaluation.command import EvalConfig
from gemstill.evaluation.folder import Sample, read_results, read_samples, split_metric
from gemstill.evaluation.scores import interval
from gemstill.evaluation.suites import SUITES, Suite
from gemstill.evaluation.table import cells
from gemstill.report.chart import Series, chart
from gemstill.report.page import page, pairs, sample, table, tiles

WORST = 3  # items of each row
_END = 700  # characters of a prompt's end, which are the item itself

plan = command.plan


def run(config: EvalConfig) -> None:
    """Measure, print the table, write the page. Raises Error as `gemstill.evaluate` does."""
    command.run(config)
    print(f"report: {evaluation_report(config.out)}")


def evaluation_report(folder: str | Path) -> Path:
    """Write `folder`/report.html over a finished evaluation, and give its path.

    Raises:
        Error: the folder holds none, it is not finished, or it cannot be written.
    """
    folder = Path(folder)
    name, parts = _contents(folder, read_results(folder))
    path = folder / "report.html"
    files.write(path, page(f"{name} · gemstill eval", parts))
    return path


def _contents(folder: Path, results: dict[str, Any]) -> tuple[str, list[str]]:
    """The page's title and parts."""
    ours = results["gemstill"]
    suite = SUITES.get(ours["suite"])
    name = str(results["config"]["model"])
    rows = [_Row(row, ours["asked"][row["task"]], folder) for row in ours["rows"] if "metric" in row]
    measured = [row for row in rows if row.row["value"] is not None]
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="soft">{escape(suite.about if suite else "Tasks of lm-eval")}, measured by gemstill {__version__} '
        "with lm-eval's prompts and metrics.</p>",
        tiles(_first_figures(ours["rows"], measured)),
        "<h2>Scores</h2>",
        _scores(ours["rows"], suite),
        f"<p><small>{_INTERVALS}</small></p>",
        *_notes(ours),
        *_subjects(measured),
        *_calibration(measured),
        "<h2>Lengths, in characters</h2>",
        table(_LENGTHS, [row.lengths() for row in _once(measured)]),
        *_worst(measured, results["higher_is_better"]),
        "<h2>Settings</h2>",
        pairs(_settings(results)),
        *_data(ours["files"]),
    ]
    return name, parts


_INTERVALS = (
    "95 % intervals: Wilson's where an item is right or wrong, else the normal one; they say what other items of the "
    "same kind could give, not what another prompt would."
)
_ORDER = (
    "Wrong with the most confidence; where texts are written, or rated, or none is right, those with the worst values, "
    "the first of equal ones."
)
_LENGTHS = ("task", "items", "prompt, median", "prompt, longest", "answer, median", "answer, longest")


class _Row:
    """A row of the table with its items, read once. choices: of each item that chooses among continuations."""

    def __init__(self, row: dict[str, Any], leaves: Sequence[str], folder: Path) -> None:
        self.row, self.leaves = row, leaves
        self.value = split_metric(row["metric"])[0]
        there = row["value"] is not None
        self.items: list[tuple[str, Sample]] = read_samples(folder, leaves, row["metric"]) if there else []
        self.choices = [found for _, item in self.items if (found := choice(item)) is not None]

    def values(self, leaf: str) -> list[float]:
        """The values of one task's items, where they are numbers."""
        found = [item.get(self.value) for task, item in self.items if task == leaf]
        return [float(value) for value in found if isinstance(value, int | float)]

    def lengths(self) -> list[str]:
        """Characters of prompts and of what was written."""
        prompts = [max(len(_prompt(arguments)) for arguments in item["arguments"]) for _, item in self.items]
        texts = [
            len(text) for _, item in self.items for resps in item["resps"] for text in resps if isinstance(text, str)
        ]
        ends = [f"{statistics.median(texts):,.0f}", f"{max(texts):,}"] if texts else ["", ""]
        shown = [f"{statistics.median(prompts):,.0f}", f"{max(prompts):,}"]
        return [self.row["name"], f"{len(self.items):,}", *shown, *ends]


def _prompt(arguments: Sequence[Any]) -> str:
    return str(arguments[0])


def _once(rows: Sequence[_Row]) -> list[_Row]:
    """The rows, one for each task."""
    return list({row.row["task"]: row for row in rows}.values())


def _first_figures(rows: Sequence[dict[str, Any]], measured: Sequence[_Row]) -> list[tuple[str, str]]:
    found = []
    for row in rows:
        if "over" in row and row["value"] is not None:
            done, all_of = row["over"]
            found.append((f"{100 * row['value']:.1f}", f"{row['name']}, {done} of {all_of} measured"))
    items = sum(len(row.items) for row in _once(measured))
    return [*found, (f"{items:,}", "items"), (str(len(_once(measured))), "benchmarks measured")]


def _scores(rows: Sequence[dict[str, Any]], suite: Suite | None) -> str:
    heads = ["", "shots", "items", "score", "95 % interval", *(suite.columns if suite else ())]
    return table(heads, [cells(row, suite) for row in rows])


def _notes(ours: dict[str, Any]) -> list[str]:
    lines = [f"{task}: {'; '.join(said)}" for task, said in ours["notes"].items()]
    if ours["truncated"]:
        lines.append(f"{ours['truncated']} requests were longer than the context and lost their beginning.")
    lines += [f"{task} is left out: {reason}" for task, reason in ours["left_out"].items()]
    return ["<h2>To know beside them</h2>", *(f"<p>{escape(line)}</p>" for line in lines)] if lines else []


def _subjects(rows: Sequence[_Row]) -> Iterator[str]:
    """The tasks of each group, where they have more than an item each."""
    for row in rows:
        if len(row.leaves) < 2 or len(row.items) <= len(row.leaves):
            continue
        found = []
        for leaf in row.leaves:
            values = row.values(leaf)
            if values:
                low, high = (100 * end for end in interval(values))
                mean = 100 * sum(values) / len(values)
                ends = f"{low:.1f} to {high:.1f}" if math.isfinite(low) else ""
                found.append((mean, [leaf, str(len(values)), f"{mean:.1f}", ends]))
        found.sort(key=lambda pair: -pair[0])
        yield f"<h2>{escape(row.row['name'])} by subject</h2>"
        yield table(("task", "items", "score", "95 % interval"), [cells for _, cells in found])


def _calibration(rows: Sequence[_Row]) -> list[str]:
    """How often the likeliest choice is right, by how likely the model takes it to be."""
    chosen: list[Choice] = [one for row in _once(rows) for one in row.choices]
    if not chosen:
        return []
    points = bins(chosen)
    lines = [
        Series("this model", [(bar.confidence, bar.right) for bar in points], 2, dots=True),
        Series("perfect", [(0.0, 0.0), (1.0, 1.0)], 5),
    ]
    counted = [[f"{bar.confidence:.2f}", f"{bar.right:.2f}", f"{bar.items:,}"] for bar in points]
    text = (
        f"Over {len(chosen):,} items with choices. A choice's probability is that of its text among the item's "
        f"choices; {BINS} bins of equal width. Expected calibration error: {expected_error(chosen):.3f}."
    )
    return [
        "<h2>Calibration</h2>",
        chart("Right answers by confidence", lines, "probability of the chosen answer", "share right"),
        f"<p><small>{escape(text)}</small></p>",
        table(("mean probability", "share right", "items"), counted),
    ]


def _worst(rows: Sequence[_Row], better: dict[str, dict[str, bool]]) -> Iterator[str]:
    """Of each benchmark the items that are wrong with the most confidence, or have the worst values.

    better: of each task's metrics whether higher is better.
    """
    yield "<h2>The worst items</h2>"
    yield f"<p><small>{_ORDER}</small></p>"
    for row in _once(rows):
        higher = better.get(row.row["task"], {}).get(row.value) is not False
        wrong: list[tuple[float, str, str, str]] = []
        for task, item in row.items:
            where, found, value = f"{task}, item {item['doc_id']}", choice(item), item.get(row.value)
            if found is not None:
                if not found.right:
                    right = f"\nright: {found.wanted.strip()}" if found.wanted else ""
                    said = f"{found.chosen.strip()} ({found.confidence:.0%}){right}"
                    wrong.append((-found.confidence, where, found.prompt, said))
            elif isinstance(value, bool | int | float) and value != int(higher):
                wrong.append((value if higher else -value, where, *_answered(item, row.value)))
        wrong.sort(key=lambda one: one[0])
        for _, where, prompt, said in wrong[:WORST]:
            yield sample(where, f"{_shown(prompt)}\n", f"→ {said}", 1)


def _answered(item: Sample, metric: str) -> tuple[str, str]:
    """The prompt of an item without a right choice, and what the model said, with its value."""
    found = likeliest(item)
    if found is not None:
        prompt, text = item["arguments"][found[0]]
        return str(prompt), f"{text.strip()} ({found[1]:.0%})\n{metric}: {item[metric]:.3g}"
    raw = next((text for resps in item["resps"] for text in resps if isinstance(text, str)), "")
    right = f"\nright: {str(item['target'])[:_END]}" if item["target"] != "" else ""
    return _prompt(item["arguments"][0]), f"{raw.strip()[:_END]}{right}\n{metric}: {item[metric]:.3g}"


def _shown(prompt: str) -> str:
    return prompt if len(prompt) <= _END else f"… {prompt[-_END:]}"


def _settings(results: dict[str, Any]) -> list[tuple[str, str]]:
    config, ours = results["config"], results["gemstill"]
    return [
        ("model", str(config["model"])),
        ("its fingerprint", ours["fingerprint"]),
        ("items of a task at most", str(config["limit"] or "all")),
        ("seed of the items", str(ours["seed"])),
        ("seed of few-shot examples", str(config["fewshot_seed"])),
        ("asked in turns", "yes" if ours["turns"] else "no"),
        ("classifier of toxicity", ours["toxicity"]),
    ]


def _data(hashes: dict[str, dict[str, str]]) -> list[str]:
    """The files under the data root, each once."""
    each = {name: digest for found in hashes.values() for name, digest in found.items()}
    return ["<h2>Data</h2>", table(("file", "SHA-256"), [[name, each[name]] for name in sorted(each)])] if each else []
