"""How far one model's answers to a text are from another's: KL divergence, top-1 agreement, perplexity."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemstill.core.progress import Progress
from gemstill.data.calibration import Calibration

ROWS = 128  # positions whose logits are held at once

Logits = Callable[[Tensor], Iterator[Tensor]]  # tokens [T] -> logits [ROWS or what is left, V] of the next, in order


@dataclass
class Divergence:
    """Sums over positions of a text; of those whose next token is known, `nll` too."""

    positions: int = 0
    kl: float = 0.0  # Σ KL(reference ‖ other), nats
    agree: int = 0  # positions where both hold the same token likeliest
    labels: int = 0
    nll: float = 0.0  # of the other model, nats
    reference_nll: float = 0.0

    def add(self, reference: Tensor, other: Tensor, labels: Tensor) -> None:
        """Logits [n, V] of both, capped already, and the next tokens [n] int64, -1 where there is none."""
        p, q = reference.float().log_softmax(1), other.float().log_softmax(1)
        known = labels >= 0
        place = labels.clamp(min=0)[:, None]
        self.positions += len(p)
        self.agree += int((p.argmax(1) == q.argmax(1)).sum())
        self.labels += int(known.sum())
        self.nll -= float(q.gather(1, place)[known].double().sum())
        self.reference_nll -= float(p.gather(1, place)[known].double().sum())
        q.sub_(p).mul_(p.exp_())
        self.kl -= float(q.sum(1).double().sum())

    def figures(self) -> dict[str, float]:
        """Mean KL in nats a token, the part of agreement, and both perplexities."""
        count = max(1, self.labels)
        nll, own = (torch.tensor(x / count, dtype=torch.float64).exp() for x in (self.nll, self.reference_nll))
        positions = max(1, self.positions)
        return {
            "kl": self.kl / positions, "agreement": self.agree / positions, "perplexity": float(nll),
            "reference_perplexity": float(own), "tokens": self.positions,
        }  # fmt: skip


def logits_of(model: nn.Module) -> Logits:
    """A network's logits, in its own compute dtype."""

    def run(tokens: Tensor) -> Iterator[Tensor]:
        hidden, head, cap = model(tokens[None], readout=lambda *seen: seen)
        head = head.to(hidden.dtype)
        for part in torch.split(hidden[0], ROWS):
            z = F.linear(part, head).float()
            yield z if cap is None else cap * torch.tanh(z / cap)

    return run


def logits_in_llama_cpp(path: Path, window: int) -> Logits | None:
    """The logits of a GGUF file as llama.cpp reads and runs it; None where llama-cpp-python is not installed."""
    try:
        llama_cpp: Any = importlib.import_module("llama_cpp")
    except ImportError:
        return None
    threads = torch.get_num_threads()
    llama = llama_cpp.Llama(
        str(path), n_ctx=window, n_batch=window, logits_all=True, verbose=False, n_threads=threads,
        n_threads_batch=threads,
    )  # fmt: skip

    def run(tokens: Tensor) -> Iterator[Tensor]:
        llama.reset()
        llama.eval(tokens.tolist())
        yield from torch.split(torch.from_numpy(llama.scores[: len(tokens)]), ROWS)

    return run


@torch.no_grad()
def divergence(reference: Logits, other: Logits, text: Calibration, label: str = "") -> Divergence:
    """Compare two models on all positions of a text; the last of each piece counts for KL and agreement alone.

    label: of the progress that is shown; none without.
    """
    found = Divergence()
    with Progress(int(text.lengths.sum()), "tokens", label, quiet=not label) as progress:
        for row, length in zip(text.tokens, text.lengths.tolist(), strict=True):
            tokens = row[:length]
            labels = torch.split(F.pad(tokens[1:], (0, 1), value=-1), ROWS)
            for mine, theirs, next_ in zip(reference(tokens), other(tokens), labels, strict=True):
                found.add(mine, theirs, next_)
            progress.advance(length)
    return found
