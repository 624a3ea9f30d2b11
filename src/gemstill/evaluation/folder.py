"""The folder that an evaluation leaves behind, read again: its results and, task by task, its items."""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    if not isinstance(found, dict) or "gemstill" not in found:
        raise Error("is no result of gemstill eval", where=path)
    return found


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
                    if sample["filter"] == kind:
                        found.append((task, sample))
        except OSError as error:
            raise Error(f"cannot be read ({error.strerror})", where=path, fix="evaluate again") from error
        except (ValueError, KeyError, TypeError) as error:
            raise Error("is no item of an evaluation", where=f"{path}, line {number}", fix="evaluate again") from error
    return found


def split_metric(metric: str) -> tuple[str, str]:
    """lm-eval's "name,filter" as the two."""
    name, _, kind = metric.partition(",")
    return name, kind
