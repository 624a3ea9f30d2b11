"""lm-eval's tasks by name: found, given their data, cut to a number of items. None is written again."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemstill.core.config import nearest
from gemstill.core.errors import Error
from gemstill.evaluation.code import jailed_code
from gemstill.evaluation.jail import why_not
from gemstill.evaluation.sources import Found, Missing, locate

OFFLINE = {"ConnectionError", "OfflineModeIsEnabled", "ConnectError", "LocalEntryNotFoundError", "TimeoutException"}
SEED = 1234  # of few-shot examples, as lm-eval's own command has it
# These run programs that a model wrote.
CODE = ("openai/openai_humaneval", "google-research-datasets/mbpp")
FILES = "files/"  # before a data set of our own tasks, which the hub does not have in this form
# These have what a model wrote rated, for which lm-eval would ask a service; here it is a classifier of the user's.
TOXICITY = ("allenai/real-toxicity-prompts", "files/toxigen")
RATED = {"metric": "toxicity", "aggregation": "mean", "higher_is_better": False}
OWN = Path(__file__).parent / "own"  # tasks that lm-eval does not have, in its YAML


@dataclass(frozen=True)
class Asked:
    """A task, a group or a tag of lm-eval. shots: few-shot examples; None: as the task itself says.

    variant: a name for a way of asking that differs from the task's own by `overrides` of its configuration. metrics:
    what a group of this variant is aggregated over.
    """

    name: str
    shots: int | None = None
    variant: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    metrics: tuple[str, ...] = ()

    def label(self, name: str = "") -> str:
        """What it, or a task of it, is called in the results."""
        return f"{name or self.name}.{self.variant}" if self.variant else name or self.name


@dataclass
class Selected:
    """Tasks ready to run. members: all tasks of each name asked for; leaves: those that are run.

    left_out, notes, files: by name of a task. samples: the items of each task, where they are not all.
    """

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    leaves: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    samples: dict[str, list[int]] = field(default_factory=dict)

    def absent(self) -> list[str]:
        """What is left out and why, in one line for each name asked for."""
        lines = []
        for name, members in self.members.items():
            gone = [task for task in members if task in self.left_out]
            if gone == [name]:
                lines.append(f"{name}: left out: {self.left_out[name]}")
            elif gone:
                what = "left out" if len(gone) == len(members) else f"{len(gone)} of its {len(members)} tasks left out"
                lines.append(f"{name}: {what} ({gone[0]}: {self.left_out[gone[0]]})")
        return lines

    def items(self, name: str) -> int:
        """How many items of a name asked for are run."""
        return sum(
            len(self.samples[leaf]) if leaf in self.samples else len(self.tasks[leaf].task_docs)
            for leaf in self.leaves[name]
        )


@dataclass(frozen=True)
class How:
    """How tasks are loaded. data_root: a folder with their items; None: the hub.

    unsafe_code: run a model's programs without a jail where there is none; else such tasks are left out and named.
    rated: rates what a model wrote (lm-eval's process_results); without it tasks that need it are left out.
    """

    data_root: Path | None = None
    unsafe_code: bool = False
    rated: Callable[[dict[str, Any], list[str]], dict[str, float]] | None = None


def require() -> None:
    """Say in one line that lm-eval is not there.

    Raises:
        Error: lm-eval cannot be imported.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise Error(f"needs lm-eval ({error})", where="evaluation", fix="pip install 'gemstill[eval]'") from error


@functools.cache
def manager() -> Any:
    """lm-eval's index of its tasks: seconds to build, so once for a process."""
    require()
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=str(OWN))


def select(asked: Sequence[Asked], **how: Any) -> Selected:
    """Load the tasks asked for, with their data from the hub or from a folder. how: the fields of `How`.

    Raises:
        Error: there is no such task, it needs a package or a licence that is not there, the hub cannot be reached, or a
            data file is wrong. A task whose data are not under `data_root` is left out and named, unless all are.
    """
    loader = _Loader(How(**how))
    index = manager().task_index
    for one in asked:
        if one.name not in index:
            raise Error(f"there is no task '{one.name}'", where="lm-eval", fix=nearest(one.name, index))
    for one in asked:
        with quiet(), _without_scripts(), jailed_code(unsafe=loader.how.unsafe_code):
            loader.take(one)
    chosen = loader.chosen
    if not chosen.tasks:
        name, reason = next(iter(chosen.left_out.items()))
        fix = "docs/evaluation.md says what each task needs"
        raise Error(f"no task has data ({name}: {reason})", where=loader.how.data_root or "the hub", fix=fix)
    return chosen


def cut(chosen: Selected, limit: int | None, seed: int = 0) -> None:
    """Keep at most `limit` items of each name asked for, drawn by `seed`; a group's are spread evenly over its tasks.

    Tasks of a group that get no item (a limit below their number) leave it.
    """
    if not limit:
        return
    for name, leaves in chosen.leaves.items():
        sizes = {leaf: len(chosen.tasks[leaf].task_docs) for leaf in leaves}
        # All variants of a task get the same items.
        counts = spread(sizes, limit, random.Random(f"{seed}/{_plain(name)}"))
        for leaf, count in counts.items():
            if not count:
                _drop(leaf, chosen)
            elif count < sizes[leaf]:
                drawn = random.Random(f"{seed}/{_plain(leaf)}").sample(range(sizes[leaf]), count)
                chosen.samples[leaf] = sorted(drawn)
        chosen.leaves[name] = [leaf for leaf in leaves if counts[leaf]]


def _plain(label: str) -> str:
    return label.partition(".")[0]


def _drop(leaf: str, chosen: Selected) -> None:
    """Take a task out, and the groups that are empty then."""
    del chosen.tasks[leaf]
    gone = [leaf]
    for name in gone:
        for group in chosen.groups.values():
            if group.pop(name) is not None and not len(group):
                gone.append(group.name)
    for name in gone:
        chosen.groups.pop(name, None)


def spread(sizes: Mapping[str, int], limit: int, rng: random.Random) -> dict[str, int]:
    """How many items of each part are taken, `limit` in all: equally many, as far as the parts have them."""
    counts = dict.fromkeys(sizes, 0)
    while (left := limit - sum(counts.values())) > 0:
        open_parts = [name for name, size in sizes.items() if counts[name] < size]
        if not open_parts:
            break
        share = left // len(open_parts)
        # What does not divide goes to some of the parts, one each.
        lucky = open_parts if share else rng.sample(open_parts, left)
        for name in lucky:
            counts[name] += min(max(share, 1), sizes[name] - counts[name])
    return counts


def _take(
    name: str, overrides: dict[str, Any], index: Mapping[str, Any]
) -> tuple[list[tuple[str, dict[str, Any]]], list[tuple[str, list[str]]]]:
    """The tasks under a name, with what its groups override of them, and its groups (innermost first) with members."""
    from lm_eval.tasks.manager import Kind

    entry = index[name]
    if entry.kind == Kind.TAG:
        return [(task, overrides) for task in sorted(entry.tags)], []
    if entry.kind != Kind.GROUP:
        return [(name, overrides)], []
    leaves: list[tuple[str, dict[str, Any]]] = []
    groups: list[tuple[str, list[str]]] = []
    members: list[str] = []
    for item in entry.cfg["task"]:
        member = item if isinstance(item, str) else item.get("task") or item.get("group")
        if not isinstance(member, str) or member not in index:
            raise Error("is put together in a way that is not supported", where=f"lm-eval's group {name}")
        more = {} if isinstance(item, str) else {key: value for key, value in item.items() if key != "group"}
        inner, nested = _take(member, {**overrides, **more}, index)
        leaves += inner
        groups += nested
        members += [leaf for leaf, _ in inner] if index[member].kind == Kind.TAG else [member]
    return leaves, [*groups, (name, members)]


class _Loader:
    """Loads what is asked for into `chosen`; the data of a task are read once for all its variants."""

    def __init__(self, how: How) -> None:
        self.how, self.chosen = how, Selected()
        self._located: dict[str, Found | Missing] = {}
        if how.data_root is not None and not how.data_root.is_dir():
            fix = "name the folder that holds the benchmarks' files"
            raise Error("there is no such folder", where=how.data_root, fix=fix)

    def take(self, asked: Asked) -> None:
        """Load all of what one name stands for."""
        names, groups = _take(asked.name, {}, manager().task_index)
        labels = [(asked.label(name), name, overrides) for name, overrides in names]
        self.chosen.members[asked.label()] = [label for label, _, _ in labels]
        self.chosen.leaves[asked.label()] = [
            label for label, name, overrides in labels if self._load(name, overrides, asked)
        ]
        for group, members in groups:
            self._gather(group, members, asked)

    def _load(self, name: str, overrides: Mapping[str, Any], asked: Asked) -> bool:
        """Load one task; False where it is left out."""
        label, chosen = asked.label(name), self.chosen
        if label in chosen.tasks:
            what = f"is asked for twice, the second time by {asked.name}"
            raise Error(what, where=f"task {label}", fix="name it once")
        config = {**(manager().task_index[name].cfg or {}), **overrides}
        reason, found = self._why_not(config), None
        if not reason and self.how.data_root is not None:
            located = self._locate(name, config)
            found, reason = (None, located.reason) if isinstance(located, Missing) else (located, "")
        if reason:
            chosen.left_out[label] = reason
            return False
        more: dict[str, Any] = found.override.copy() if found else {}
        if "trust_remote_code" in (kwargs := config.get("dataset_kwargs") or {}):
            more["dataset_kwargs"] = {key: value for key, value in kwargs.items() if key != "trust_remote_code"}
        if config.get("dataset_path") in TOXICITY and self.how.rated is not None:
            more |= {"process_results": self.how.rated, "metric_list": [dict(RATED)]}
        # A group is the way that lm-eval has to override parts of a task.
        task = _loaded({"group": f"of {name}", "task": [{**overrides, **more, **asked.overrides, "task": name}]}, name)
        task.set_config(key="task", value=label)
        if asked.shots is not None:
            task.set_config(key="num_fewshot", value=asked.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SEED)
        _check_shots(task, label)
        chosen.tasks[label] = task
        if found:
            chosen.files[label] = found.files
            notes = [found.note] if found.note else []
            if found.borrows and task.get_config("num_fewshot"):
                notes.append("few-shot examples come from the evaluated split, the item itself left out")
            if notes:
                chosen.notes[label] = notes
        return True

    def _why_not(self, config: Mapping[str, Any]) -> str:
        """Why a task cannot be run here, whatever its data."""
        path = str(config.get("dataset_path"))
        if path in CODE and not self.how.unsafe_code and (reason := why_not()):
            return f"it runs programs that the model wrote, and {reason}; --unsafe-code true does without"
        if path in TOXICITY and self.how.rated is None:
            return "what the model writes is rated by a classifier, which --toxicity names"
        if path.startswith(FILES) and self.how.data_root is None:
            return "its items come from files alone, under --data-root"
        if path == "google/IFEval" and not _punkt():
            return "it splits sentences by NLTK's data, which are not there: python -m nltk.downloader punkt_tab"
        return ""

    def _locate(self, name: str, config: Mapping[str, Any]) -> Found | Missing:
        assert self.how.data_root is not None
        if name not in self._located:
            self._located[name] = locate(dict(config), self.how.data_root)
        return self._located[name]

    def _gather(self, name: str, members: Sequence[str], asked: Asked) -> None:
        """Put a group together from its members that are there."""
        from lm_eval.api.group import Group, GroupConfig

        known = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")
        config = {key: value for key, value in manager().task_index[name].cfg.items() if key in known}
        config["group"] = asked.label(name)
        if asked.metrics:
            config["aggregate_metric_list"] = [{"metric": metric, "weight_by_size": True} for metric in asked.metrics]
        group, chosen = Group.from_config(GroupConfig(**config)), self.chosen
        for member in map(asked.label, members):
            if (item := chosen.tasks.get(member) or chosen.groups.get(member)) is not None:
                group.add(item)
        if len(group):
            chosen.groups[group.name] = group


@contextlib.contextmanager
def _without_scripts() -> Iterator[None]:
    """While tasks are loaded: no metric is taken from the hub, where it is a script that would run here.

    Raises:
        Error: a task asks for one.
    """
    import evaluate

    refused: list[Error] = []

    def refuse(path: str, *_: Any, **__: Any) -> Any:
        what = f"a metric, '{path}', is a script on the hub, and what is downloaded is not run"
        refused.append(Error(what, where="lm-eval", fix="leave its task out"))
        raise refused[0]

    load, evaluate.load = evaluate.load, refuse
    try:
        yield
    finally:
        evaluate.load = load
        if refused:  # lm-eval itself only logs that it has no such metric
            raise refused[0]


def _check_shots(task: Any, label: str) -> None:
    """See that there are as many few-shot examples as are asked for, the item itself left out where it is one of them.

    Raises:
        Error: there are fewer; lm-eval would fail in the middle of its prompts.
    """
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if not shots:
        return
    itself = task.fewshot_cfg.split == task.get_config("test_split")
    there = max(0, len(sampler.fewshot_docs()) - itself) if sampler is not None else 0
    if shots > there:
        what = f"asks for {shots} few-shot examples, and there are {there}"
        raise Error(what, where=f"task {label}", fix="give fewer --shots, or more data")


def _punkt() -> bool:
    """Whether NLTK's sentence data are there: lm-eval would fetch them when IFEval is loaded, and fail at its end."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _loaded(spec: dict[str, Any], name: str) -> Any:
    """One task, built by lm-eval; what goes wrong there as one line."""
    where = f"task {name}"
    try:
        tasks = manager().load([spec])["tasks"]
    except Error:
        raise
    except ImportError as error:
        fix = f"pip install {error.name.partition('.')[0]}" if error.name else "pip install 'gemstill[eval]'"
        raise Error(f"needs a package that is not there ({error})", where=where, fix=fix) from error
    except Exception as error:  # lm-eval and datasets raise whatever their parts do
        raise _fault(error, where) from error
    return tasks[name]


def _fault(error: Exception, where: str) -> Error:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = " ".join(str(error).split())
    if kinds & {"GatedRepoError", "DatasetNotFoundError"} or "gated" in text:
        fix = "accept its licence on huggingface.co and log in (hf auth login), or give the files with --data-root"
        return Error(f"cannot have its data ({text:.120})", where=where, fix=fix)
    if kinds & OFFLINE:
        fix = "go online, or name the files with --data-root"
        return Error("cannot have its data: the hub cannot be reached", where=where, fix=fix)
    return Error(f"cannot be loaded by lm-eval ({type(error).__name__}: {text:.200})", where=where, fix="leave it out")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' own talk and bars: the command has a progress line of its own."""
    import datasets
    import lm_eval.api.task as task_module

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    before = [logger.level for logger in loggers]
    bar, bars = task_module.tqdm, datasets.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    task_module.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
        task_module.tqdm = bar
        if bars:
            datasets.enable_progress_bars()
