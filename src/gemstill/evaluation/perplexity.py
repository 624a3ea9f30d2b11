"""Held-out perplexity and bits per byte of any text: `gemstill eval perplexity`.

A document is read as <bos> and its tokens, and every token of it is scored once, the first one too; an end mark is
not, since text has none. What does not fit a window is scored in several: each goes on half a window behind the one
before it, begins with <bos> too, and scores its second half, so that beyond a document's first window every token
has between half a window and a whole one before it. Parts of several short documents share a row, and do not see
each other.

Bits per byte, Σ −log₂ p over the UTF-8 bytes of the text, is what coding the text with the model would take: it
compares models of different tokenizers, which perplexity, a figure per token, does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.core.progress import Progress
from gemstill.data.dataset import INDEX, TokenDataset
from gemstill.data.sources import Source, read_source, source_files
from gemstill.evaluation.config import CONTEXT, PerplexityConfig, check_context
from gemstill.ops.loss import log_probs
from gemstill.ops.packed import Weight
from gemstill.text.tokenizer import Tokenizer
from gemstill.train.heldout import Evaluation

BATCH = 8192  # tokens computed at once

Ids = npt.NDArray[np.int32]


class Text(NamedTuple):
    """A document to score. ids: [T] int32, without marks. bytes: of its text in UTF-8. read: bytes read for it."""

    id: str
    ids: Ids
    bytes: int
    read: int = 0


@dataclass(frozen=True)
class Perplexity(Evaluation):
    """How well a model predicts documents. names: of the documents; sizes: [documents] int64, their bytes."""

    names: list[str] = field(default_factory=list)
    sizes: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def figures(self) -> dict[str, Any]:
        """The figures of all documents together."""
        return {
            "documents": len(self.names),
            "tokens": int(self.tokens.sum()),
            "bytes": int(self.bytes),
            "nll_per_token": self.nll_per_token,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
        }


def run(config: PerplexityConfig) -> dict[str, Any]:
    """Score what `config` names, and write `config.out` where asked for. Raises Error as `open_any`, `texts_of` do."""
    from gemstill.checkpoint.foreign import open_any

    total = _size(config)
    model, tokenizer = open_any(config.source, quantize=config.quantize or None)
    found = score(model, tokenizer, texts_of(config, tokenizer), context=config.context, total=total)
    result = {"source": config.source, "texts": config.texts, "context": config.context, **found.figures()}
    if config.out:
        rows = zip(found.names, found.tokens.tolist(), found.sizes.tolist(), found.nll.tolist(), strict=True)
        each = [{"id": id, "tokens": tokens, "bytes": size, "nll": nll} for id, tokens, size, nll in rows]
        files.write_json(config.out, {**result, "each": each})
    return result


def plan(config: PerplexityConfig) -> dict[str, Any]:
    """What `run` would read; the model is not opened."""
    from gemstill.checkpoint.look import expect_model

    expect_model(config.source, any_architecture=True)
    return {"source": config.source, "texts": config.texts, "bytes": _size(config)}


def score(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    *,
    context: int = CONTEXT,
    batch_tokens: int = BATCH,
    total: int = 0,
) -> Perplexity:
    """Score every token of every document in windows of at most `context` tokens; the module says how.

    model: ours, or one of `transformers` behind `gemstill.model.adapter.Adapter`. batch_tokens: computed at once,
    one window at least. total: the bytes that `texts` read in all, for the progress.

    Raises:
        Error: no text, logits that are no numbers, or an id that the model has no row for.
    """
    check_context(context)
    longest = int(getattr(getattr(model, "config", None), "max_position", 0) or context)
    names: list[str] = []
    sizes: list[int] = []
    was_training = model.training
    model.eval()
    try:
        with Progress(total, "bytes", "perplexity", quiet=not total) as progress:
            rows = _Rows(model, tokenizer.bos_id, min(context, longest), batch_tokens, progress)
            for text in texts:
                rows.add(text)
                names.append(text.id)
                sizes.append(text.bytes)
            rows.flush()
    finally:
        if was_training:
            model.train()
    if not names:
        raise Error("there is no text to score", where="perplexity", fix="name a folder or file of text")
    nll, tokens = np.array(rows.nll), np.array(rows.tokens, np.int64)
    return Perplexity(nll, tokens, float(sum(sizes)), names, np.array(sizes, np.int64))


def windows(count: int, context: int) -> Iterator[tuple[int, int, int]]:
    """The windows of a document of `count` tokens: where each begins, ends, and what it scores from on.

    Before each stands <bos>, so that the `context` tokens of a window predict the token behind the last of them.

    >>> list(windows(10, 4))
    [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    """
    stop = min(count, context)
    yield 0, stop, 0
    while stop < count:
        scored, stop = stop, min(count, stop + max(1, context // 2))
        yield stop - context, stop, scored


def texts_of(config: PerplexityConfig, tokenizer: Tokenizer) -> Iterator[Text]:
    """The documents that `config` names, in order. Raises Error as `read_source` and `dataset_texts` do."""
    if _is_dataset(config.texts):
        yield from dataset_texts(TokenDataset.open(config.texts), tokenizer)
        return
    for document in read_source(_source(config)):
        ids = np.array(tokenizer.encode(document.text), np.int32)
        yield Text(document.id, ids, len(document.text.encode()), document.read)


def dataset_texts(dataset: TokenDataset, tokenizer: Tokenizer) -> Iterator[Text]:
    """The documents of a data set, without their marks. Raises Error when it is of another tokenizer."""
    check_tokenizer(dataset, tokenizer)
    ends = np.append(dataset.document_starts[1:], dataset.num_tokens)
    for number, (start, end) in enumerate(zip(dataset.document_starts.tolist(), ends.tolist(), strict=True)):
        ids = dataset.read(start + 1, end - 1).astype(np.int32)
        size = len(tokenizer.decode(ids.tolist()).encode())
        yield Text(f"document {number}", ids, size, size)


def check_tokenizer(dataset: TokenDataset, tokenizer: Tokenizer) -> None:
    """Raise Error for a data set that was not encoded with the model's tokenizer."""
    if dataset.tokenizer_fingerprint != tokenizer.fingerprint:
        theirs, ours = dataset.tokenizer_fingerprint[:12], tokenizer.fingerprint[:12]
        what = f"was encoded with tokenizer {theirs}…, the model's is {ours}…"
        raise Error(what, where=dataset.folder, fix="name the text itself, or a data set of the model's tokenizer")


def _is_dataset(texts: str) -> bool:
    return (Path(texts) / INDEX).is_file()


def _source(config: PerplexityConfig) -> Source:
    return Source(Path(config.texts), pattern=config.pattern, field=config.field)


def _size(config: PerplexityConfig) -> int:
    if _is_dataset(config.texts):
        return TokenDataset.open(config.texts).bytes
    return sum(path.stat().st_size for path in source_files(_source(config)))


@dataclass(frozen=True)
class _Chosen:
    """Log-probabilities [N] float32 of `ids` [N] at the places `at` [N] of all B·T: the head reads those alone."""

    at: Tensor
    ids: Tensor

    def __call__(self, hidden: Tensor, head: Weight, softcap: float | None) -> Tensor:
        return log_probs(hidden.flatten(0, 1)[self.at], head, self.ids, softcap=softcap)


class _Rows:
    """Windows gathered into rows of `context` tokens and scored, a batch at a time, in the order in which they come."""

    def __init__(self, model: nn.Module, bos: int, context: int, batch_tokens: int, progress: Progress) -> None:
        self.model, self.bos, self.context, self.progress = model, bos, context, progress
        self.most = max(1, batch_tokens // context)  # rows at once
        self.device = next(model.parameters()).device
        self.rows: list[list[_Part]] = [[]]
        self.filled = 0  # tokens in the last row
        self.nll: list[float] = []
        self.tokens: list[int] = []
        self.summed, self.scored = 0.0, 0

    def add(self, text: Text) -> None:
        """Take a document's windows in; what is enough for a batch is scored."""
        ids, owner = text.ids, len(self.nll)
        self.nll.append(0.0)
        self.tokens.append(len(ids))
        read = text.read / max(1, len(ids))
        for start, stop, scored in windows(len(ids), self.context):
            if stop == start:
                continue  # a text of nothing
            if self.filled + stop - start > self.context:
                if len(self.rows) == self.most:
                    self.flush()
                else:
                    self.rows.append([])
                    self.filled = 0
            self.rows[-1].append(_Part(ids[start:stop], scored - start, owner, read * (stop - scored)))
            self.filled += stop - start

    @torch.no_grad()
    def flush(self) -> None:
        """Score what is gathered."""
        rows, self.rows, self.filled = self.rows, [[]], 0
        if not rows[0]:
            return
        width = max(sum(len(part.ids) for part in row) for row in rows)
        inputs = np.zeros((len(rows), width), np.int64)
        documents = np.full((len(rows), width), -1, np.int64)
        at, labels, parts = [], [], []
        for number, row in enumerate(rows):
            place = 0
            for which, part in enumerate(row):
                end = place + len(part.ids)
                inputs[number, place] = self.bos
                inputs[number, place + 1 : end] = part.ids[:-1]
                documents[number, place:end] = which
                at.append(np.arange(place + part.scored, end) + number * width)
                labels.append(part.ids[part.scored :])
                parts.append(part)
                place = end
        readout = _Chosen(*(torch.from_numpy(np.concatenate(x).astype(np.int64)).to(self.device) for x in (at, labels)))
        tokens, places = (torch.from_numpy(x).to(self.device) for x in (inputs, documents))
        found = self.model(tokens, documents=places, readout=readout).double().cpu().numpy()
        if not np.isfinite(found).all():
            fix = "compute in float32 or bfloat16: float16 overflows in some models"
            raise Error("the model's logits are no numbers", where="perplexity", fix=fix)
        self.summed -= float(found.sum())
        self.scored += len(found)
        for part, some in zip(parts, np.split(found, np.cumsum([len(each) for each in labels[:-1]])), strict=True):
            self.nll[part.owner] -= float(some.sum())
        self.progress.advance(sum(part.read for part in parts), loss=self.summed / self.scored)


class _Part(NamedTuple):
    """A window of a document: its tokens, of which those before `scored` are context alone."""

    ids: Ids
    scored: int
    owner: int
    read: float  # bytes that were read for what it scores
