"""Real prose for the published weights, and how two models' answers to it are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pydoc_data.topics import topics

import torch
from torch import Tensor

from gemstill.text.tokenizer import Tokenizer

# The chapters of Python's language reference that are mostly prose, from Python's own library.
CHAPTERS = ("objects", "execmodel", "exceptions", "import", "function", "class", "customization", "types")
WINDOW, WINDOWS = 1024, 10  # tokens; the local layers look back 512
ROWS = 128  # positions whose distributions are compared at once: 262,144 entries each


@dataclass(frozen=True)
class Answers:
    """What a model says to each window. logprobs: [windows, WINDOW − 1], of the tokens that come."""

    logprobs: Tensor

    @property
    def perplexity(self) -> float:
        return float(self.logprobs.double().mean().neg().exp())

    def above(self, other: Answers) -> float:
        """How much larger this perplexity is, as a part of the other's."""
        return self.perplexity / other.perplexity - 1

    def correlation(self, other: Answers) -> float:
        return float(torch.corrcoef(torch.stack([self.logprobs.flatten(), other.logprobs.flatten()]).double())[0, 1])


def prose(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("\n\n".join(topics[name] for name in CHAPTERS))


def windows(tokenizer: Tokenizer) -> list[list[int]]:
    """WINDOWS rows of WINDOW tokens, <bos> the first of each."""
    ids, width = prose(tokenizer), WINDOW - 1
    rows = [[tokenizer.bos_id, *ids[n * width : (n + 1) * width]] for n in range(WINDOWS)]
    assert len(rows[-1]) == WINDOW
    return rows


def logprobs(logits: Tensor, row: list[int]) -> Tensor:
    """Log-probabilities [T − 1] float32 of the tokens after the first, from logits [T, V]."""
    targets = torch.tensor(row[1:])
    return logits[:-1].gather(1, targets[:, None])[:, 0] - logits[:-1].logsumexp(1)


def divergence(mine: Tensor, theirs: Tensor) -> float:
    """The mean over positions of KL(mine ‖ theirs) of two tensors of logits [T, V]."""
    total = 0.0
    for a, b in zip(mine.split(ROWS), theirs.split(ROWS), strict=True):
        p, q = a.log_softmax(1), b.log_softmax(1)
        total += float((p.exp() * (p - q)).double().sum())
    return total / len(mine)


def distance(mine: Tensor, theirs: Tensor) -> float:
    """The largest difference of two logits, as a part of the largest logit at that position."""
    pairs = zip(mine.split(ROWS), theirs.split(ROWS), strict=True)
    return max(float(((a - b).abs().amax(1) / b.abs().amax(1)).max()) for a, b in pairs)
