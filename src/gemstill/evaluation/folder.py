"""The folder that an evaluation leaves behind, read again: its results and, task by task, its items."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.files import read_json

RESULTS, SAMPLES, ANSWERS = "results.json", "samples", "answers.jsonl"

Sample = dict[str, Any]  # as lm-eval logs it: doc_id, doc, target, arguments, resps, filter, the metrics by name


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a finished evaluation.

    Raises:
        Error: there is none, or it was written by something else.
    """
    path = folder / RESULTS
    if not path.exists() and (folder / ANSWERS).exists():
        raise Error("the evaluation is not finished", where=folder, fix="give its command again: it goes on")
    found = read_json(path)
    if not isinstance(found, dict) or not _is_ours(found.get("gemstill")):
        raise Error("is no result of gemstill eval", where=path, fix="evaluate again")
    return found


def _is_ours(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        return False
    asked = value.get("asked")
    if not isinstance(asked, dict) or not all(isinstance(leaves, list) for leaves in asked.values()):
        return False
    named = all(isinstance(leaf, str) and "/" not in leaf for leaves in asked.values() for leaf in leaves)
    return named and all(_is_row(row, asked) for row in value["rows"])


def _is_row(row: Any, asked: dict[str, Any]) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("value"), int | float | None):
        return False
    task = row.get("task")
    return "metric" not in row or (isinstance(row["metric"], str) and isinstance(task, str) and task in asked)


@contextmanager
def whole(folders: str) -> Iterator[None]:
    """Say in one line that what was read in the block is not what `gemstill eval` wrote, whatever it is."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        what = f"holds something that gemstill eval did not write ({type(error).__name__}: {error})"
        raise Error(what, where=folders, fix="evaluate again") from error


def read_samples(folder: Path, tasks: Sequence[str], kind: str) -> list[tuple[str, Sample]]:
    """(task, item) of these tasks in order, of one filter's answers.

    Raises:
        Error: a file is missing or damaged.
    """
    found = []
    for task in tasks:
        path, number = folder / SAMPLES / f"{task}.jsonl", 0
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    number += 1
                    sample = json.loads(line)
                    if not isinstance(sample["doc_id"], int) or not isinstance(sample["doc_hash"], str):
                        raise TypeError("no item's number and hash")
                    if sample["filter"] == kind:
                        found.append((task, sample))
        except OSError as error:
            raise Error(f"cannot be read ({error.strerror})", where=path, fix="evaluate again") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Error("is no item of an evaluation", where=f"{path}, line {number}", fix="evaluate again") from error
        if not number:
            raise Error("holds no item", where=path, fix="evaluate again")
    return found


def split_metric(metric: str) -> tuple[str, str]:
    """lm-eval's "name,filter" as the two."""
    name, _, kind = metric.partition(",")
    return name, kind
