"""What a model says to held-out text, token by token: to compare models with each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from gemstill.data.dataset import TokenDataset

ROWS = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Answers:
    """Of each scored token, in the data set's order."""

    nll: npt.NDArray[np.float64]  # [N], nats
    best: npt.NDArray[np.int64]  # [N], the token that the model holds likeliest there
    documents: npt.NDArray[np.int64]  # [N], the number of the token's document

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(min(700.0, float(self.nll.mean())))

    def agreement(self, other: Answers) -> float:
        """The part of the tokens where both hold the same one likeliest."""
        return float((self.best == other.best).mean())

    def by_document(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Of each document with scored tokens: their summed nll, and how many they are."""
        _, place, count = np.unique(self.documents, return_inverse=True, return_counts=True)
        return np.bincount(place, self.nll).astype(np.float64), count.astype(np.int64)


@torch.no_grad()
def answers(model: nn.Module, dataset: TokenDataset, window: int, *, windows: int = 0, batch: int = 4) -> Answers:
    """Ask `model` for every token of the first `windows` windows (0: all), `batch` windows at once.

    A token is predicted from its document's tokens within the window. Neither a document's first token nor its
    end mark is scored: where a text was cut is nothing to predict.

    Raises:
        Error: the data set has less than a window of tokens.
    """
    from gemstill.data.loader import heldout_batches

    nll, best, documents = [], [], []
    was_training, left = model.training, windows or -(-dataset.num_tokens // window)
    model.eval()
    for item in heldout_batches(dataset, window, batch):
        rows = min(len(item.tokens), left)
        if rows <= 0:
            break
        left -= rows
        labels = item.labels[:rows].long()
        wanted = (item.weight[:rows] > 0) & (labels != dataset.eos_id)
        read = _Read(wanted, labels[wanted])
        scores, likeliest = model(item.tokens[:rows].long(), documents=item.documents[:rows], readout=read)
        places = item.start[:rows].numpy()[:, None] + np.arange(window)
        nll.append(-scores.double().numpy())
        best.append(likeliest.numpy())
        documents.append(dataset.document_at(places[wanted.numpy()]))
    model.train(was_training)
    return Answers(np.concatenate(nll), np.concatenate(best), np.concatenate(documents))


@dataclass(frozen=True)
class _Read:
    """A readout: log-probabilities [N] of `ids` [N] and the likeliest tokens [N], where `wanted` [B, T] says."""

    wanted: Tensor
    ids: Tensor

    def __call__(self, hidden: Tensor, head: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
        cast = head.to(hidden.dtype)
        scores, likeliest = [], []
        for x, ids in zip(torch.split(hidden[self.wanted], ROWS), torch.split(self.ids, ROWS), strict=True):
            z = F.linear(x, cast)
            likeliest.append(z.argmax(1))  # a cap keeps the order
            z = z.float() if softcap is None else softcap * torch.tanh(z.float() / softcap)
            scores.append(z.gather(1, ids[:, None])[:, 0] - z.logsumexp(1))
        return torch.cat(scores), torch.cat(likeliest)
