"""Turn sources into data sets: `gemstill data`."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.core.progress import Progress
from gemstill.data.copies import NearCopies
from gemstill.data.dataset import (
    FORMAT,
    INDEX,
    VERSION,
    Ints,
    ShardHeader,
    TokenDataset,
    Tokens,
    gemstill_version,
    read_header,
    token_dtype,
    write_shard,
)
from gemstill.data.sources import Source, read_source, source_files
from gemstill.data.workers import Encoders
from gemstill.text.tokenizer import Tokenizer

__all__ = ["DataConfig", "TokenDataset", "Written", "plan", "run", "write_dataset"]

SPLITS = ("train", "heldout")
HELDOUT = 0.02  # part of the documents that is held out when nothing is said
TYPICAL_BYTES_PER_TOKEN = 3.5  # of a small vocabulary, for the estimates of `plan`


@dataclass(frozen=True)
class DataConfig:
    """`gemstill data`: encode a source into token shards."""

    source: Source  # where the documents come from
    tokenizer: Path  # a tokenizer.json, or a folder with one
    out: Path  # gets train/ and heldout/
    heldout_fraction: float = HELDOUT  # part of the documents kept for measuring, chosen by hash of their content
    fraction: float = 1.0  # part of the other documents that is taken, chosen by hash too: a sample of a corpus
    drop_near_copies: bool = False  # leave out of train what is nearly a copy of a held-out document
    shard_bytes: int = 64 << 20  # bytes of text in a shard; documents are never cut
    workers: int = 0  # processes; 0 for one a core

    def __post_init__(self) -> None:
        _check_options(self.heldout_fraction, self.fraction, self.shard_bytes, self.workers)


class Written(NamedTuple):
    """What `write_dataset` made. counts: files, and documents skipped by reason, as in `read_source`."""

    train: TokenDataset
    heldout: TokenDataset | None
    counts: dict[str, int]


def run(config: DataConfig) -> Written:
    """Make the data set that `config` asks for. Raises Error as `write_dataset` does."""
    return write_dataset(
        config.source,
        Tokenizer.open(config.tokenizer),
        config.out,
        heldout_fraction=config.heldout_fraction,
        fraction=config.fraction,
        drop_near_copies=config.drop_near_copies,
        shard_bytes=config.shard_bytes,
        workers=config.workers,
    )


def plan(config: DataConfig) -> dict[str, object]:
    """What `run` would do, estimated from the sizes of the files alone."""
    tokenizer = Tokenizer.open(config.tokenizer)
    found = source_files(config.source)
    size = sum(path.stat().st_size for path in found)
    tokens = size * config.fraction / TYPICAL_BYTES_PER_TOKEN
    return {
        "files": len(found),
        "bytes": size,
        "tokens": round(tokens),
        "disk_bytes": round(tokens) * token_dtype(tokenizer.vocab_size).itemsize,
        "shards": -(-size // config.shard_bytes),
        "workers": _workers(config.workers),
    }


def write_dataset(
    sources: Source | str | Path | Sequence[Source | str | Path],
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    heldout_fraction: float = HELDOUT,
    fraction: float = 1.0,
    drop_near_copies: bool = False,
    shard_bytes: int = 64 << 20,
    workers: int = 0,
) -> Written:
    """Encode sources into `folder`/train and `folder`/heldout, each a data set of its own.

    A document goes to one or the other by the SHA-256 of its text, so equal documents stay together;
    `drop_near_copies` leaves out of train what shares half its words' order with a held-out document
    (`gemstill.data.copies`; the sources are then read twice). Shards are cut by bytes of text, so they
    are the same bytes for any number of workers. A run that was interrupted goes on after the shards
    that are whole; the indexes are written last.

    Args:
        heldout_fraction: 0 makes no held-out set.
        fraction: of the documents that are not held out, the part that is taken, by their hashes too; a
            smaller part is among a larger one's.
        workers: processes that encode, 0 for one a core.

    Raises:
        Error: a source cannot be read or holds no text; a split remains empty; `folder` cannot be
            written, is in use, or holds shards of other documents or of another tokenizer.
    """
    _check_options(heldout_fraction, fraction, shard_bytes, workers)
    several = [sources] if isinstance(sources, Source | str | Path) else list(sources)
    listed = [source if isinstance(source, Source) else Source(Path(source)) for source in several]
    total = sum(path.stat().st_size for source in listed for path in source_files(source))
    with files.locked(folder):
        for left in Path(folder).glob(f"*/*{files.TEMPORARY}"):  # by a run that was killed
            left.unlink()
        writer = _Writer(listed, tokenizer, Path(folder), heldout_fraction, fraction, shard_bytes, drop_near_copies)
        with Encoders(tokenizer, _workers(workers)) as encoders, Progress(total, "bytes", "data") as progress:
            pending: deque[Future[dict[str, Any]]] = deque()
            for job in writer.jobs(progress):
                pending.append(writer.start(job, encoders))
                if len(pending) > _workers(workers):  # bounds the texts that are in memory
                    writer.done(pending.popleft().result())
            while pending:
                writer.done(pending.popleft().result())
        return writer.finish()


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Whether a document is held out, by the SHA-256 of its text; a larger fraction takes these and more."""
    return int.from_bytes(digest[:8], "big") < math.floor(fraction * 2.0**64)


class _Job(NamedTuple):
    """The documents of one shard."""

    split: str
    number: int
    texts: list[str]
    bytes: int
    content: str  # SHA-256 of the documents' own


@dataclass
class _Open:
    """The shard of a split that is being gathered."""

    texts: list[str] = field(default_factory=list)
    bytes: int = 0
    content: Any = field(default_factory=hashlib.sha256)
    number: int = 0


class _Writer:
    """One run of `write_dataset`: gathers documents into jobs, turns results into indexes."""

    def __init__(
        self,
        sources: list[Source],
        tokenizer: Tokenizer,
        folder: Path,
        heldout: float,
        fraction: float,
        shard_bytes: int,
        near: bool,
    ) -> None:
        self.sources, self.tokenizer, self.folder = sources, tokenizer, folder
        self.heldout, self.fraction, self.shard_bytes, self.near = heldout, fraction, shard_bytes, near
        self.splits = SPLITS if heldout > 0 else SPLITS[:1]
        self.counts: Counter[str] = Counter()
        self.corpus = hashlib.sha256()
        self.entries: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
        self.common = {
            "format": FORMAT,
            "version": VERSION,
            "gemstill": gemstill_version(),
            "tokenizer": tokenizer.fingerprint,
            "source": [source.describe() for source in sources],
        }

    def jobs(self, progress: Progress) -> Iterator[_Job]:
        """All shards' documents, in order."""
        copies = self._heldout_documents() if self.near and "heldout" in self.splits else None
        gathered = {split: _Open() for split in SPLITS}
        for source in self.sources:
            for document in read_source(source, self.counts):
                progress.advance(document.read)
                data = document.text.encode()
                digest = hashlib.sha256(data).digest()
                self.corpus.update(digest)
                split = SPLITS[is_heldout(digest, self.heldout)]
                # Other bytes of the digest than is_heldout's, so that the two choices are independent.
                if split == "train" and not is_heldout(digest[8:], self.fraction):
                    continue
                if split == "train" and copies is not None and copies.has(document.text):
                    self.counts["near copies"] += 1
                    continue
                shard = gathered[split]
                shard.texts.append(document.text)
                shard.bytes += len(data)
                shard.content.update(digest)
                if shard.bytes >= self.shard_bytes:
                    yield _Job(split, shard.number, shard.texts, shard.bytes, shard.content.hexdigest())
                    gathered[split] = _Open(number=shard.number + 1)
        for split, shard in gathered.items():
            if shard.texts:
                yield _Job(split, shard.number, shard.texts, shard.bytes, shard.content.hexdigest())

    def start(self, job: _Job, encoders: Encoders) -> Future[dict[str, Any]]:
        """Begin a job, or take over the shard that an earlier run has written."""
        path = self.folder / job.split / f"shard-{job.number:05}.safetensors"
        entry = {"file": path.name, "split": job.split, "documents": len(job.texts), "bytes": job.bytes}
        if path.exists() and (header := self._whole(path)) is not None:
            for key, due in {"tokenizer": self.tokenizer.fingerprint, "content": job.content}.items():
                if header.metadata.get(key) != due:
                    what = "with another tokenizer" if key == "tokenizer" else "from other documents or settings"
                    fix = f"name another folder, or remove {self.folder} to make it anew"
                    raise Error(f"was written {what}", where=path, fix=fix)
            ready: Future[dict[str, Any]] = Future()
            ready.set_result({**entry, "tokens": header.tokens[2], "sha256": files.sha256(path)})
            return ready
        return encoders.submit(self._write, job.texts, path, entry, job.content)

    def done(self, entry: dict[str, Any]) -> None:
        """Take the result of a job, in the order of `jobs`."""
        self.entries[entry.pop("split")].append(entry)

    def finish(self) -> Written:
        """Write the indexes, when both splits have documents."""
        if not any(self.entries.values()):
            skipped = ", ".join(f"{count} {what}" for what, count in self.counts.items() if what != "files")
            fix = "name a source of text"
            raise Error(f"no text in it (skipped: {skipped or 'nothing'})", where=self.sources[0].path, fix=fix)
        for split in self.splits:
            if not self.entries[split]:
                fix = "give more documents or change heldout_fraction"
                raise Error(f"no document fell into the {split} part", where=self.sources[0].path, fix=fix)
        opened = {split: self._index(split) for split in self.splits}
        return Written(opened["train"], opened.get("heldout"), dict(self.counts))

    def _index(self, split: str) -> TokenDataset:
        shards = self.entries[split]
        known = {shard["file"] for shard in shards} | {INDEX}
        for path in (self.folder / split).iterdir():
            if path.name not in known:
                fix = f"remove it, or remove {self.folder} to make it anew"
                raise Error("does not belong to this data set", where=path, fix=fix)
        names = ("file", "tokens", "documents", "bytes", "sha256")
        index = {
            **self.common,
            "split": split,
            "corpus": self.corpus.hexdigest(),
            "vocab_size": self.tokenizer.vocab_size,
            "bos_id": self.tokenizer.bos_id,
            "eos_id": self.tokenizer.eos_id,
            **{name: sum(shard[name] for shard in shards) for name in ("tokens", "documents", "bytes")},
            "skipped": dict(sorted(self.counts.items())),
            "shards": [{name: shard[name] for name in names} for shard in shards],
        }
        files.write_json(self.folder / split / INDEX, index)
        return TokenDataset.open(self.folder / split)

    def _write(self, tokens: Tokens, starts: Ints, path: Path, entry: dict[str, Any], content: str) -> dict[str, Any]:
        metadata = {**self.common, "split": entry["split"], "content": content, "bytes": entry["bytes"]}
        digest = write_shard(path, tokens, starts, metadata)
        return {**entry, "tokens": len(tokens), "sha256": digest}

    def _whole(self, path: Path) -> ShardHeader | None:
        """The header of a shard that is whole; one that was damaged since is written again."""
        try:
            return read_header(path)
        except Error:
            return None

    def _heldout_documents(self) -> NearCopies:
        copies = NearCopies()
        for source in self.sources:
            for document in read_source(source):
                if is_heldout(hashlib.sha256(document.text.encode()).digest(), self.heldout):
                    copies.add(document.text)
        return copies


def _workers(asked: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return asked or cores


def _check_options(heldout_fraction: float, fraction: float, shard_bytes: int, workers: int) -> None:
    if not 0 < fraction <= 1:
        raise Error(f"fraction is {fraction}", fix="choose a number above 0, up to 1")
    if not 0 <= heldout_fraction < 1:
        raise Error(f"heldout_fraction is {heldout_fraction}", fix="choose a number from 0 up to 1, 1 left out")
    if shard_bytes < 1:
        raise Error(f"shard_bytes is {shard_bytes}", fix="choose a positive number")
    if workers < 0:
        raise Error(f"workers is {workers}", fix="choose a positive number, or 0 for one a core")
