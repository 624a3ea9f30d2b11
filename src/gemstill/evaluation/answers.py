"""A model's answers, kept as they come, so that a run that was cut goes on where it stopped.

answers.jsonl: the first line says which model answered, each line after it is one answer under the hash of the model,
the task, its version and the request. Lines are only ever added; half a line at the end (a process that died while it
wrote) is cut off.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.files import unwritable
from gemstill.core.progress import Progress
from gemstill.text.tokenizer import valid_text

VERSION = 2
METHODS = ("loglikelihood", "loglikelihood_rolling", "generate_until")  # what lm-eval asks of a model


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and _number(value[0]) and isinstance(value[1], bool)


_FITS: dict[str, Callable[[Any], bool]] = {
    "loglikelihood": _pair, "loglikelihood_rolling": _number, "generate_until": lambda value: isinstance(value, str),
}  # fmt: skip


class Answers:
    """The answers of one model in one file; without a path they are kept in memory alone.

    model: its fingerprint. name: what to call it in messages.

    Raises:
        Error: the file is of another model or another version, damaged, or cannot be written.
    """

    def __init__(self, path: Path | None, model: str, name: str = "") -> None:
        self.model, self.path, self._kept, self._file = model, path, dict[str, Any](), None
        if path is None:
            return
        head = {"format": "gemstill answers", "version": VERSION, "model": model, "name": name}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = self._read(path, head) if path.exists() else 0
            self._file = open(path, "ab")  # noqa: SIM115 - closed by __exit__
            self._file.truncate(whole)
            if not whole:
                self._line(head)
        except OSError as error:
            raise unwritable(path, error) from error

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def __getitem__(self, key: str) -> Any:
        return self._kept[key]

    def check(self, keys: Iterable[str], fits: Callable[[Any], bool]) -> None:
        """Raise Error where an answer that is kept under one of these keys is none to what was asked."""
        for key in keys:
            if key in self._kept and not fits(self._kept[key]):
                what = f"has {json.dumps(self._kept[key])[:60]} under key {key[:12]}…, which is no answer to that"
                fix = "delete that line (its answer is asked for again), or name another --out"
                raise Error(what, where=self.path, fix=fix)

    def key(self, task: str, version: object, method: str, arguments: Iterable[Any], repeat: int = 0) -> str:
        """The hash under which an answer is kept. repeat: which of several equal requests it is."""
        asked = json.dumps([self.model, task, str(version), method, list(arguments), repeat], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer: a text, a number, or a pair of log-probability and greedy flag."""
        self._kept[key] = answer
        if self._file is not None:
            self._line({"key": key, "answer": answer})

    def _line(self, value: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            self._file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise unwritable(self._file.name, error) from error

    def _read(self, path: Path, head: Mapping[str, Any]) -> int:
        """Read what is there; the number of bytes that are whole lines."""
        data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                value = json.loads(line)
                if number == 1:
                    self._check(value, head, path)
                else:
                    self._kept[value["key"]] = _kept(value["answer"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                fix = "delete that line (its answer is asked for again), or name another --out"
                raise Error("is no answer", where=f"{path}, line {number}", fix=fix) from error
        return whole

    def _check(self, there: Mapping[str, Any], head: Mapping[str, Any], path: Path) -> None:
        if (there["format"], there["version"]) != (head["format"], head["version"]):
            raise Error("holds answers of another version of gemstill", where=path, fix="name another --out")
        if there["model"] != head["model"]:
            called = f" ('{there['name']}', this is '{head['name']}')" if there.get("name") != head["name"] else ""
            what = f"holds the answers of another model{called}"
            raise Error(what, where=path, fix="name another --out, or delete the folder to start anew")


def _kept(answer: Any) -> Any:
    """An answer as it was written. Raises ValueError for half a surrogate pair, which cannot be written again."""
    if isinstance(answer, str) and answer != valid_text(answer):
        raise ValueError("no text")
    return answer


class Answering:
    """A model of lm-eval's that is asked only what is not answered yet; everything else of it shows through.

    model: an lm_eval.api.model.LM, which tells each answer to its `cache_hook` as it comes. versions: of each task.
    """

    def __init__(self, model: Any, answers: Answers, versions: Mapping[str, object], *, quiet: bool = False) -> None:
        self._model, self._answers, self._versions, self._quiet = model, answers, versions, quiet
        self._waiting: dict[str, deque[str]] = {}
        model.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """[(log-probability, greedy flag)] of continuations."""
        return [tuple(answer) for answer in self._ask("loglikelihood", requests)]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        """[log-probability] of whole texts."""
        return self._ask("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """[text] that the model writes."""
        return self._ask("generate_until", requests)

    def add_partial(self, method: str, arguments: Iterable[Any], answer: Any) -> None:
        """Keep an answer that has just come: lm-eval's models call this on their hook."""
        waiting = self._waiting.get(_asked(method, arguments))
        if waiting:
            self._keep(waiting.popleft(), answer)

    def _keep(self, key: str, answer: Any) -> None:
        self._answers.put(key, list(answer) if isinstance(answer, tuple) else answer)
        self._progress.advance()

    def _ask(self, method: str, requests: Sequence[Any]) -> list[Any]:
        seen: Counter[str] = Counter()
        keys, waiting = [], defaultdict[str, deque[str]](deque)
        missing = []
        for request in requests:
            task = request.task_name
            base = self._answers.key(task, self._versions.get(task), method, request.args)
            key = self._answers.key(task, self._versions.get(task), method, request.args, seen[base])
            seen[base] += 1
            keys.append(key)
            if key not in self._answers:
                missing.append((key, request))
                waiting[_asked(method, request.args)].append(key)
        self._answers.check(keys, _FITS[method])
        label = {"generate_until": "texts", "loglikelihood": "choices"}.get(method, "documents")
        done = len(keys) - len(missing)
        with Progress(len(keys), label, "eval", done=done, quiet=self._quiet) as progress:
            self._waiting, self._progress = dict(waiting), progress
            if missing:
                given = getattr(self._model, method)([request for _, request in missing])
                for (key, _), answer in zip(missing, given, strict=True):
                    if key not in self._answers:  # a model that tells its hook nothing
                        self._keep(key, answer)
        return [self._answers[key] for key in keys]


def _asked(method: str, arguments: Iterable[Any]) -> str:
    return json.dumps([method, list(arguments)], sort_keys=True)
