"""How well a model predicts held-out text, document by document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional as F

from gemstill.model.readout import LogProbs

if TYPE_CHECKING:
    from gemstill.data.dataset import TokenDataset


@dataclass(frozen=True)
class Evaluation:
    """Negative log-likelihoods of the documents of a data set, in its order."""

    nll: npt.NDArray[np.float64]  # [documents], nats, summed over the document's scored tokens
    tokens: npt.NDArray[np.int64]  # [documents], tokens that were scored
    bytes: float  # UTF-8 bytes of the scored text

    @property
    def nll_per_token(self) -> float:
        """Mean negative log-likelihood, nats a token."""
        return float(self.nll.sum() / max(1, self.tokens.sum()))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(min(700.0, self.nll_per_token))

    @property
    def bits_per_byte(self) -> float:
        """Bits that coding the text would take with this model, a byte of text; independent of the tokenizer."""
        return float(self.nll.sum() / math.log(2) / max(1.0, self.bytes))

    @staticmethod
    def join(parts: Sequence[Evaluation]) -> Evaluation:
        """Several data sets as one."""
        nll, tokens = (np.concatenate([getattr(part, name) for part in parts]) for name in ("nll", "tokens"))
        return Evaluation(nll, tokens, sum(part.bytes for part in parts))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: TokenDataset,
    window: int,
    *,
    batch: int = 16,
    windows: int = 0,
    device: str | torch.device = "cpu",
) -> Evaluation:
    """Score `dataset` in its order, in windows of `window` tokens, `batch` at once; the first `windows`, or all for 0.

    A token is predicted from its document's tokens within the window; the first token of a document is
    not scored, its end mark is. Text after the last full window is left out, and the bytes are taken in
    proportion to the scored tokens.
    """
    from gemstill.data.loader import heldout_batches

    nll = np.zeros(dataset.num_documents)
    tokens = np.zeros(dataset.num_documents, dtype=np.int64)
    was_training = model.training
    model.eval()
    done = 0
    for item in heldout_batches(dataset, window, batch):
        rows = len(item.tokens) if not windows else min(len(item.tokens), windows - done)
        if rows <= 0:
            break
        # A short last batch is filled up with padding: a compiled model would be compiled anew for its shape.
        extra = (0, 0, 0, batch - rows)
        inputs, labels, documents = (
            F.pad(x[:rows].long(), extra, value=fill).to(device)
            for x, fill in ((item.tokens, 0), (item.labels, 0), (item.documents, -1))
        )
        scores = model(inputs, documents=documents, readout=LogProbs(labels))[:rows].double().cpu().numpy()
        counts = item.weight[:rows].numpy() > 0
        places = item.start[:rows].numpy()[:, None] + np.arange(window)
        owners = dataset.document_at(places[counts])
        nll += np.bincount(owners, -scores[counts], len(nll))
        tokens += np.bincount(owners, minlength=len(tokens))
        done += rows
    model.train(was_training)
    scorable = max(1, dataset.num_tokens - dataset.num_documents)
    return Evaluation(nll, tokens, dataset.bytes * float(tokens.sum()) / scorable)
