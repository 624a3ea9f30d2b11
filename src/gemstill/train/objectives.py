"""Learning the next token, and learning a teacher's distribution of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemstill.core.errors import Error
from gemstill.model.readout import Loss
from gemstill.ops.target import Target
from gemstill.train.config import HardConfig

if TYPE_CHECKING:
    from gemstill.data.loader import Batch
    from gemstill.distill.store import Store


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        """Nothing: all follows from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


class Prepared(NamedTuple):
    """A micro-batch with what to learn from it. tokens and documents: [B, T] int64; target: B·T rows."""

    tokens: Tensor
    documents: Tensor
    target: Target
    hard: tuple[Tensor, float] | None


class NextToken(_Stateless):
    """Plain language modelling: the target of a position is its next token.

    compiled: fuse the loss's elementwise work by torch.compile.
    """

    def __init__(self, *, compiled: bool = False) -> None:
        self.compiled = compiled

    def prepare(self, batch: Batch, step: int) -> Prepared:
        """See Objective. batch: tokens, labels, weight, documents [B, T]."""
        return Prepared(batch.tokens, batch.documents, Target.hard(batch.labels, batch.weight), None)

    def weight(self, prepared: Prepared) -> float:
        """The sum of the positions' weights, exact in float64."""
        return float(prepared.target.weight.double().sum())

    def loss(self, model: nn.Module, prepared: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of cross-entropies, float32, nats."""
        readout = Loss(prepared.target, hard=prepared.hard, compiled=self.compiled)
        return model(prepared.tokens, documents=prepared.documents, readout=readout), {}


class FromStore(NextToken):
    """Distillation (arXiv 1503.02531) from stored teacher distributions, with hard labels mixed in by `hard`.

    stores: one for each source of the loader, in its order. steps: of the whole run, for the mixture's line.
    """

    def __init__(self, stores: Sequence[Store], hard: HardConfig, steps: int, *, compiled: bool = False) -> None:
        super().__init__(compiled=compiled)
        if not stores:
            raise Error("there is no store to distil from", where="objective")
        self.stores, self.hard, self.steps = list(stores), hard, steps

    def prepare(self, batch: Batch, step: int) -> Prepared:
        """See Objective. Reads the teacher's rows of the batch's windows; row i is the distribution of token i + 1."""
        length = batch.tokens.shape[1]
        if len(self.stores) == 1:
            ids, probs, weight = self.stores[0].target(batch.start, length)
        else:
            ids, probs, weight = self._mixed(batch, length)
        device = batch.tokens.device
        # A position counts only if both the text and the teacher have a next token there.
        weight = weight.to(device) * batch.weight.reshape(-1)
        fraction = self.hard.fraction(step, self.steps)
        hard = (batch.labels.reshape(-1), fraction) if fraction > 0 else None
        return Prepared(batch.tokens, batch.documents, Target(ids.to(device), probs.to(device), weight), hard)

    def _mixed(self, batch: Batch, length: int) -> Target:
        rows = zip(batch.source.tolist(), batch.start.tolist(), strict=True)
        parts = [self.stores[source].target([start], length) for source, start in rows]
        widest = max(part.ids.shape[1] for part in parts)
        padded = [[F.pad(x, (0, widest - x.shape[1])) for x in part[:2]] for part in parts]
        ids, probs = (torch.cat([part[i] for part in padded]) for i in (0, 1))
        return Target(ids, probs, torch.cat([part.weight for part in parts]))
