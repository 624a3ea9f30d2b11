"""Which documents of a data set overlap the items of benchmarks: `gemstill data contaminated`."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.core.progress import Progress
from gemstill.data.dataset import INDEX, TokenDataset, read_header, token_dtype, write_shard
from gemstill.data.sources import Source, read_source
from gemstill.evaluation.config import ContaminatedConfig
from gemstill.evaluation.ngrams import CHARACTERS, KINDS, WORDS, Index
from gemstill.text.tokenizer import Tokenizer

BATCH = 1 << 19  # bytes of text looked at together
RESULTS, DOCUMENTS = "results.json", "documents.jsonl"


@dataclass
class Items:
    """The items of benchmarks.

    texts: of each item, its fields. names: of each item, "arc_easy 17". task: of each, which of
    `tasks` it is of. left_out: lines on tasks without data.
    """

    tasks: list[str] = field(default_factory=list)
    texts: list[list[str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    task: list[int] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, task: str, name: str, texts: list[str]) -> None:
        """Take an item in."""
        if task not in self.tasks:
            self.tasks.append(task)
        self.texts.append(texts)
        self.names.append(name)
        self.task.append(self.tasks.index(task))


class Overlap(NamedTuple):
    """A document (its number) and an item (its number) with n-grams in common: kind -> the first one, normalised."""

    document: int
    item: int
    shared: dict[str, str]


def run(config: ContaminatedConfig) -> dict[str, Any]:
    """Look for the items in the data set, write `config.out`, and `config.clean` where asked for.

    Raises:
        Error: no such data set, tokenizer, suite, task or items; a data set of another tokenizer, or damaged; a place
            that cannot be written or, for the clean copy, is taken.
    """
    dataset, tokenizer = _opened(config)
    if config.clean:
        _check_free(Path(config.clean))
    items = items_of(config)
    dataset.verify()  # damaged text overlaps nothing, and the clean copy would have it with new sums
    for line in items.left_out:
        print(line)
    index = Index(items.texts, items.task)
    found = overlaps(dataset, tokenizer, index, workers=config.workers)
    result = _result(config, dataset, items, index, found)
    lines = (_line(one, items, dataset) for one in found)
    files.write(Path(config.out) / DOCUMENTS, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    files.write_json(Path(config.out) / RESULTS, result)
    told = _summary(result) | {"written": str(Path(config.out) / DOCUMENTS)}
    if config.clean:
        write_clean(dataset, tokenizer, {one.document for one in found}, Path(config.clean))
        told["clean copy"] = config.clean
    return told


def plan(config: ContaminatedConfig) -> dict[str, Any]:
    """What `run` would read."""
    dataset, _ = _opened(config)
    return {"documents": dataset.num_documents, "bytes": dataset.bytes}


def items_of(config: ContaminatedConfig) -> Items:
    """The items that `config` names. Raises Error as `run` does."""
    items = Items()
    if config.items:
        name, counts = Path(config.items).name, Counter[str]()
        for document in read_source(Source(Path(config.items)), counts):
            items.add(name, document.id, [document.text])
        if not items.texts:
            raise Error("holds no item", where=config.items, fix="name a file or a folder of texts")
        if counts["binary"]:
            items.left_out.append(f"{name}: {counts['binary']} files that are no text are left out")
    if config.suite or config.names:
        from gemstill.evaluation.suites import suite
        from gemstill.evaluation.tasks import Asked, select

        names = config.names
        if config.suite:
            names = list(dict.fromkeys(one.name for one in suite(config.suite).asked()))
        # Items alone are read: no examples before them, and no program is run.
        chosen = select([Asked(name, 0) for name in names], data_root=config.data_root, unsafe_code=True)
        for name, leaves in chosen.leaves.items():
            for leaf in leaves:
                for number, item in enumerate(chosen.tasks[leaf].task_docs):
                    items.add(name, f"{leaf} {number}", list(_texts_in(item)))
        items.left_out += chosen.absent()
    return items


def _texts_in(value: Any) -> Iterator[str]:
    """All texts in an item's fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def overlaps(dataset: TokenDataset, tokenizer: Tokenizer, index: Index, *, workers: int = 0) -> list[Overlap]:
    """The documents of a data set that share an n-gram with an item, in order. workers: threads, 0 for one a core."""
    threads = workers or _cores()
    found: list[Overlap] = []
    with Progress(dataset.bytes, "bytes", "contaminated") as progress, ThreadPoolExecutor(threads) as pool:
        pending: deque[Future[tuple[list[Overlap], int]]] = deque()

        def take() -> None:
            some, size = pending.popleft().result()
            found.extend(some)
            progress.advance(size, documents=float(len({one.document for one in found})))

        try:
            for first, rows in _batches(dataset):
                pending.append(pool.submit(_look, index, tokenizer, first, rows))
                if len(pending) > 2 * threads:
                    take()
            while pending:
                take()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _look(index: Index, tokenizer: Tokenizer, first: int, rows: list[list[int]]) -> tuple[list[Overlap], int]:
    texts = [tokenizer.decode(row) for row in rows]
    matches = sorted(index.matches(texts).items())
    size = sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    return [Overlap(first + text, item, shared) for (text, item), shared in matches], size


def _batches(dataset: TokenDataset) -> Iterator[tuple[int, list[list[int]]]]:
    """Documents without marks, some at once, with the number of the first."""
    ends = np.append(dataset.document_starts[1:], dataset.num_tokens)
    most = max(1, BATCH * dataset.num_tokens // max(1, dataset.bytes))  # tokens
    rows: list[list[int]] = []
    first = size = 0
    for number, (start, end) in enumerate(zip(dataset.document_starts.tolist(), ends.tolist(), strict=True)):
        rows.append(dataset.read(start + 1, end - 1).tolist())
        size += end - start
        if size >= most:
            yield first, rows
            first, rows, size = number + 1, [], 0
    if rows:
        yield first, rows


def write_clean(dataset: TokenDataset, tokenizer: Tokenizer, without: set[int], folder: Path) -> TokenDataset:
    """Write a data set without the documents of these numbers, whole or not at all.

    Raises:
        Error: there is something at `folder`, it cannot be written, or no document would be left.
    """
    _check_free(folder)
    if len(without) == dataset.num_documents:
        raise Error("no document would be left", where=dataset.folder)
    starts = dataset.document_starts
    ends = np.append(starts[1:], dataset.num_tokens)
    kept = np.array([number not in without for number in range(dataset.num_documents)])
    note = {"of": dataset.fingerprint, "documents_left_out": len(without)}
    shards: list[dict[str, Any]] = []
    begin = 0
    with files.writing(folder, folder=True) as temporary:
        for shard in dataset.index["shards"]:
            here = np.arange(begin, begin + shard["documents"])
            begin += shard["documents"]
            if not kept[here].any():
                continue
            stay = here[kept[here]]
            parts = [dataset.read(int(starts[n]), int(ends[n])) for n in stay]
            entry = {"tokens": sum(map(len, parts)), "documents": len(parts), "bytes": shard["bytes"]}
            own = read_header(dataset.folder / shard["file"]).metadata
            if len(stay) < len(here):
                texts = [tokenizer.decode(part[1:-1].tolist()).encode() for part in parts]
                entry["bytes"] = sum(map(len, texts))
                content = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()
                own = own | {"bytes": entry["bytes"], "content": content, "clean": note}
            path = temporary / f"shard-{len(shards):05}.safetensors"
            offsets = np.cumsum([0, *map(len, parts)], dtype=np.int64)[:-1]
            digest = write_shard(path, np.concatenate(parts).astype(token_dtype(dataset.vocab_size)), offsets, own)
            shards.append({"file": path.name, **entry, "sha256": digest})
        sums = {name: sum(int(shard[name]) for shard in shards) for name in ("tokens", "documents", "bytes")}
        files.write_json(temporary / INDEX, {**dataset.index, **sums, "clean": note, "shards": shards})
    return TokenDataset.open(folder)


def _check_free(folder: Path) -> None:
    if folder.exists():
        raise Error("is there already", where=folder, fix="name another place for the clean copy")


def _opened(config: ContaminatedConfig) -> tuple[TokenDataset, Tokenizer]:
    dataset = TokenDataset.open(config.shards)
    tokenizer = Tokenizer.open(config.tokenizer)
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        what = f"is not the tokenizer that {config.shards} was made with"
        raise Error(what, where=config.tokenizer, fix="name that one")
    return dataset, tokenizer


def _result(
    config: ContaminatedConfig, dataset: TokenDataset, items: Items, index: Index, found: Sequence[Overlap]
) -> dict[str, Any]:
    by_task: dict[str, Any] = {}
    for number, name in enumerate(items.tasks):
        of = [one for one in found if items.task[one.item] == number]
        by_task[name] = {
            "items": items.task.count(number),
            "items_found": len({one.item for one in of}),
            "documents": len({one.document for one in of}),
            **{f"documents_by_{kind}": len({one.document for one in of if kind in one.shared}) for kind in KINDS},
        }
    return {
        "data": config.shards,
        "fingerprint": dataset.fingerprint,
        "words": WORDS,
        "characters": CHARACTERS,
        "documents": dataset.num_documents,
        "contaminated_documents": len({one.document for one in found}),
        "items": len(items.texts),
        "items_found": len({one.item for one in found}),
        "items_too_short": index.short,
        "common_ngrams_left_out": index.common,
        "left_out": items.left_out,
        "by_task": by_task,
    }


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    names = ("documents", "contaminated_documents", "items", "items_found", "items_too_short")
    each: defaultdict[str, Any] = defaultdict(dict)
    for name, of in result["by_task"].items():
        if of["documents"]:
            each[name] = f"{of['items_found']:,} of {of['items']:,} items, in {of['documents']:,} documents"
    return {name: result[name] for name in names} | ({"found": dict(each)} if each else {})


def _line(one: Overlap, items: Items, dataset: TokenDataset) -> dict[str, Any]:
    start = int(dataset.document_starts[one.document])
    task = items.tasks[items.task[one.item]]
    return {"document": one.document, "start": start, "task": task, "item": items.names[one.item], **one.shared}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
