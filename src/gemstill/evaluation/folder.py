"""The folder that an evaluation leaves behind, read again: its results and, task by task, its items."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.files import read_json
from gemstill.evaluation.records import Record
from gemstill.evaluation.scores import is_figure
from gemstill.evaluation.suites import SUITES

RESULTS, SAMPLES, ANSWERS = "results.json", "samples", "answers.jsonl"
AGAIN = "evaluate again"

Sample = dict[str, Any]  # as lm-eval logs it: doc_id, doc, target, arguments, resps, filter, the metrics by name


def read_results(folder: Path) -> dict[str, Any]:
    """The results.json of a finished evaluation; all of it that is read is there and of its kind.

    Raises:
        Error: there is none, or it was written by something else (the field is named).
    """
    path = folder / RESULTS
    if not path.exists() and (folder / ANSWERS).exists():
        raise Error("the evaluation is not finished", where=folder, fix="give its command again: it goes on")
    try:
        found = read_json(path)
    except Error as error:
        raise Error(error.what, where=path, fix="name the folder of an evaluation, or evaluate again") from error
    if not isinstance(found, dict) or not isinstance(found.get("gemstill"), dict):
        raise Error("is no result of gemstill eval", where=path, fix=AGAIN)
    _expect_text(found, str(path))
    whole = Record(found, str(path), AGAIN)
    _nested(whole, "higher_is_better", dict)
    config = Record(whole.get("config", dict), f"{path}, config", AGAIN)
    config.text("model")
    for name in ("limit", "fewshot_seed"):
        config.get(name, object)
    _check(Record(found["gemstill"], f"{path}, gemstill", AGAIN))
    return found


def _check(ours: Record) -> None:
    for name in ("fingerprint", "toxicity"):
        ours.text(name)
    for name in ("turns", "seed", "truncated"):
        ours.get(name, object)
    suite = ours.text("suite")
    if suite and suite not in SUITES:
        raise ours.wrong("suite", f"empty or one of {', '.join(SUITES)}")
    _nested(ours, "left_out", str)
    for what, kind in (("asked", list), ("notes", list), ("files", dict)):
        for group, place in _nested(ours, what, kind):
            texts = place.texts(group) if kind is list else [name for name, _ in _nested(place, group, str)]
            if what == "asked" and any("/" in leaf or "\0" in leaf for leaf in texts):
                raise place.wrong(group, "a list of tasks, which are no paths")
    columns = len(SUITES[suite].columns) if suite else 0
    for number, row in enumerate(ours.get("rows", list), 1):
        if not isinstance(row, dict):
            raise Error("is no group of fields", where=f"{ours.where}, row {number}", fix=AGAIN)
        _check_row(Record(row, f"{ours.where}, row {number}", AGAIN), ours.fields["asked"], columns, bool(suite))


def _check_row(row: Record, asked: dict[str, Any], columns: int, suite: bool) -> None:
    row.text("name")
    measured = _figure(row, "value") is not None
    if "better" in row.fields:
        row.text("better")
    published = row.get("published", list) if suite else []
    if len(published) != columns or not all(value is None or is_figure(value) for value in published):
        raise row.wrong("published", f"{columns} figures")
    if "metric" in row.fields or not suite:
        row.text("metric")
        if row.text("task") not in asked:
            raise row.wrong("task", "one of those asked")
        row.get("items", int)
        _figure(row, "low"), _figure(row, "high")
        if measured:
            row.text("shots")
    else:
        over = row.get("over", list)
        if len(over) != 2 or not all(isinstance(count, int) for count in over):
            raise row.wrong("over", "two numbers of rows")


def _nested(record: Record, name: str, kind: type) -> list[tuple[str, Record]]:
    """The fields of the group `name`, all of this kind, each with the record that it stands in."""
    place = Record(record.get(name, dict), f"{record.where}, {name}", record.fix)
    for field in place.fields:
        place.text(field) if kind is str else place.get(field, kind)
    return [(field, place) for field in place.fields]


def _figure(row: Record, name: str) -> Any:
    value = row.get(name, object)
    if value is not None and not is_figure(value):
        raise row.wrong(name, "a number or null")
    return value


def read_samples(folder: Path, tasks: Sequence[str], metric: str) -> list[tuple[str, Sample]]:
    """(task, item) of these tasks in order, of the filter of `metric` ("name,filter", as lm-eval has it).

    Raises:
        Error: a file is missing or damaged; line and field are named.
    """
    found: list[tuple[str, Sample]] = []
    value, kind = split_metric(metric)
    for task in tasks:
        path, number = folder / SAMPLES / f"{task}.jsonl", 0
        try:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    number += 1
                    sample = _sample(line, f"{path}, line {number}", value)
                    if sample["filter"] == kind:
                        found.append((task, sample))
        except OSError as error:
            raise Error(f"cannot be read ({error.strerror})", where=path, fix=AGAIN) from error
        except UnicodeDecodeError as error:
            raise Error("is no UTF-8 text", where=f"{path}, line {number + 1}", fix=AGAIN) from error
        if not number:
            raise Error("holds no item", where=path, fix=AGAIN)
    if not found:
        raise Error(f"holds no item of '{metric}'", where=folder / SAMPLES, fix=AGAIN)
    return found


def _sample(line: str, where: str, metric: str) -> Sample:
    """One logged item: a request has its arguments, the answers to it, and the answer that the filter leaves."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Error(f"is no item of an evaluation ({error})", where=where, fix=AGAIN) from error
    if not isinstance(fields, dict):
        raise Error("is no item of an evaluation", where=where, fix=AGAIN)
    if "\\u" in line:
        _expect_text(fields, where)
    item = Record(fields, where, AGAIN)
    item.get("doc_id", int), item.get("doc_hash", str), item.get("filter", str), item.get("target", object)
    requests, answers = item.get("arguments", list), item.get("resps", list)
    if not requests or not all(isinstance(one, list) and one and isinstance(one[0], str) for one in requests):
        raise item.wrong("arguments", "the arguments of each request, the first of them a text")
    if len(answers) != len(requests) or not all(isinstance(one, list) for one in answers):
        raise item.wrong("resps", "a list of answers for each request")
    if len(item.get("filtered_resps", list)) != len(requests):
        raise item.wrong("filtered_resps", "an answer for each request")
    if isinstance(fields.get(metric), int | float) and not is_figure(fields[metric]):
        raise item.wrong(metric, "a number that can be counted with")
    return fields


def _expect_text(value: Any, where: str) -> None:
    """Refuse half a surrogate pair, which cannot be written to a page."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Error("has half a surrogate pair in a text", where=where, fix=AGAIN) from error


def split_metric(metric: str) -> tuple[str, str]:
    """lm-eval's "name,filter" as the two."""
    name, _, kind = metric.partition(",")
    return name, kind
