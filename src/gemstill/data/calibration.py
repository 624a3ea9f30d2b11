"""A little text to measure a network on: pieces of documents, spread evenly over a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.data.dataset import INDEX, TokenDataset
from gemstill.data.sources import Document, Source, read_source

MOST_TEXT = 1 << 28  # characters of a source that are looked at
LONGEST_TOKEN = 8  # characters that are encoded for each token wanted: more than a token of prose has
OWN = "Python's language reference"  # what is read where nobody names a text: it comes with Python itself


@dataclass(frozen=True)
class Calibration:
    """Pieces of text. tokens: [R, T] int64, a row is a piece from its beginning mark on, 0 after its end.

    lengths: [R] int64, tokens of each row. source: what the text is called.
    """

    tokens: Tensor
    lengths: Tensor
    source: str

    @property
    def real(self) -> Tensor:
        """[R, T] bool: which tokens are text."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def batches(self, most: int) -> Iterator[Calibration]:
        """Rows of about equal length, at most `most` tokens at once (one row at least)."""
        order = self.lengths.argsort(descending=True, stable=True)
        start = 0
        while start < len(order):
            longest = int(self.lengths[order[start]])
            rows = order[start : start + max(1, most // longest)]
            yield Calibration(self.tokens[rows, :longest], self.lengths[rows], self.source)
            start += len(rows)


def calibration(
    encode: Callable[[str], list[int]],
    bos_id: int | None,
    text: str,
    *,
    tokens: int,
    window: int,
    seed: int = 0,
    fingerprint: str = "",
) -> Calibration:
    """About `tokens` tokens of `text` in pieces of at most `window`, each from within one document.

    encode: text -> ids, without marks. bos_id: what begins every piece, None for nothing. text: a folder or file
    of text, a data set's folder of shards, or "" for Python's language reference. fingerprint: of the tokenizer,
    which a data set must have been made with.

    Raises:
        Error: no such text, too little of it, or a data set of another tokenizer.
    """
    count = -(-tokens // window)
    rng = np.random.default_rng(seed)
    folder = Path(text)
    if text and (folder / INDEX).is_file():
        pieces, name = _from_dataset(folder, count, window, rng, fingerprint), folder.parent.name
    else:
        documents = list(_documents(text))
        pieces, name = _from_text(documents, encode, count, window, rng), folder.resolve().name if text else OWN
    head = [] if bos_id is None else [bos_id]
    rows = [row for piece in pieces if len(row := [*head, *piece][:window]) > 1]
    if not rows:
        raise Error("holds too little text to measure anything on", where=text or OWN, fix="name more: --text FOLDER")
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return Calibration(padded, lengths, name)


def _documents(text: str) -> Iterator[Document]:
    if not text:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise Error(f"{OWN} is not here", where="calibration", fix="name a text: --text FOLDER") from error
        yield from (Document(name, topics[name]) for name in sorted(topics))
        return
    read = 0
    for document in read_source(Source(Path(text))):
        yield document
        read += len(document.text)
        if read > MOST_TEXT:
            return


def _from_text(
    documents: list[Document], encode: Callable[[str], list[int]], count: int, window: int, rng: np.random.Generator
) -> Iterator[list[int]]:
    """Pieces that begin at words, in even steps over the documents in a row, each a little aside at random."""
    ends = np.cumsum([len(document.text) for document in documents])
    total = int(ends[-1]) if len(ends) else 0
    count = min(count, -(-total // window))
    for place in _places(total, count, rng):
        number = int(np.searchsorted(ends, place, side="right"))
        text = documents[number].text
        start = int(place) - int(ends[number]) + len(text)
        if start > 0:
            space = text.find(" ", start)
            start = space + 1 if space >= 0 else start
        yield encode(text[start : start + LONGEST_TOKEN * window])


def _from_dataset(
    folder: Path, count: int, window: int, rng: np.random.Generator, fingerprint: str
) -> Iterator[list[int]]:
    dataset = TokenDataset.open(folder)
    if dataset.tokenizer_fingerprint != fingerprint:
        theirs, ours = dataset.tokenizer_fingerprint[:16], fingerprint[:16]
        raise Error(f"was made with tokenizer {theirs}, the model's is {ours}", where=folder, fix="name a text instead")
    starts = np.append(dataset.document_starts, dataset.num_tokens)
    for place in _places(dataset.num_tokens, min(count, -(-dataset.num_tokens // window)), rng):
        end = int(starts[np.searchsorted(starts, place, side="right")]) - 1  # without the end mark
        ids = dataset.read(int(place), min(int(place) + window, end)).tolist() if end > place else []
        yield [token for token in ids if token != dataset.bos_id]


def _places(total: int, count: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`count` places within `total`, one in each of as many equal parts."""
    return ((np.arange(count) + rng.random(count)) * total / max(1, count)).astype(np.int64)
