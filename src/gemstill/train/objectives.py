"""Learning the next token, and learning a teacher's distribution of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gemstill.core.errors import Error
from gemstill.model.readout import Divergence, Loss
from gemstill.ops.loss import Backward
from gemstill.ops.target import OnlineTarget, Target
from gemstill.train.config import HardConfig

if TYPE_CHECKING:
    from gemstill.data.loader import Batch
    from gemstill.distill.store import Store
    from gemstill.distill.teachers import Teacher


class _Stateless:
    def state_dict(self) -> dict[str, Any]:
        """Nothing: all follows from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


@dataclass(frozen=True)
class Fused:
    """How the loss over the vocabulary is computed (gemstill.ops.loss). seed: of the run."""

    compiled: bool = False
    backward: Backward = "exact"
    seed: int = 0

    def draw(self, batch: Batch, step: int) -> int:
        """The seed of what a micro-batch's loss draws: the same whenever the step is done."""
        place = f"{self.seed} {step} {batch.source[0].item()} {batch.start[0].item()}"
        return int.from_bytes(hashlib.sha256(place.encode()).digest()[:6]) if self.backward == "sampled" else 0


class Prepared(NamedTuple):
    """A micro-batch with what to learn from it. tokens and documents: [B, T] int64; target: B·T rows."""

    tokens: Tensor
    documents: Tensor
    target: Target | OnlineTarget
    hard: tuple[Tensor, float] | None
    seed: int  # of what the loss draws


class NextToken(_Stateless):
    """Plain language modelling: the target of a position is its next token."""

    temperature = 1.0  # of the student's logits
    divergence: Divergence = "forward"
    beta = 0.5  # of the Jensen-Shannon divergence

    def __init__(self, fused: Fused | None = None) -> None:
        self.fused = fused or Fused()

    def prepare(self, batch: Batch, step: int) -> Prepared:
        """See Objective. batch: tokens, labels, weight, documents [B, T]."""
        return Prepared(
            batch.tokens, batch.documents, Target.hard(batch.labels, batch.weight), None, self.fused.draw(batch, step)
        )

    def weight(self, prepared: Prepared) -> float:
        """The sum of the positions' weights, exact in float64."""
        return float(prepared.target.weight.double().sum())

    def loss(self, model: nn.Module, prepared: Prepared) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the losses, float32, nats."""
        how = self.fused
        readout = Loss(
            prepared.target, prepared.hard, self.temperature, how.backward, prepared.seed, self.divergence, self.beta,
            how.compiled,
        )  # fmt: skip
        return model(prepared.tokens, documents=prepared.documents, readout=readout), {}


class FromStore(NextToken):
    """Distillation (arXiv 1503.02531) from stored teacher distributions, with hard labels mixed in by `hard`.

    stores: one for each source of the loader, in its order. steps: of the whole run, for the mixture's line.
    """

    def __init__(self, stores: Sequence[Store], hard: HardConfig, steps: int, fused: Fused | None = None) -> None:
        super().__init__(fused)
        if not stores:
            raise Error("there is no store to distil from", where="objective")
        self.stores, self.hard, self.steps = list(stores), hard, steps
        self.temperature = self.stores[0].info.temperature
        if any(store.info.temperature != self.temperature for store in self.stores):
            raise Error("the stores are of different temperatures", where="objective", fix="teach them at the same one")

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
        target = Target(ids.to(device), probs.to(device), weight)
        return Prepared(batch.tokens, batch.documents, target, hard, self.fused.draw(batch, step))

    def _mixed(self, batch: Batch, length: int) -> Target:
        rows = zip(batch.source.tolist(), batch.start.tolist(), strict=True)
        parts = [self.stores[source].target([start], length) for source, start in rows]
        widest = max(part.ids.shape[1] for part in parts)
        padded = [[F.pad(x, (0, widest - x.shape[1])) for x in part[:2]] for part in parts]
        ids, probs = (torch.cat([part[i] for part in padded]) for i in (0, 1))
        return Target(ids, probs, torch.cat([part.weight for part in parts]))


class FromTeacher(NextToken):
    """Distillation from a teacher at hand, its whole distribution, with hard labels mixed in by `hard`.

    The teacher reads the same windows, told apart by the same documents, without gradients; neither side's logits
    are kept. vocab_size: entries of the tokenizer. rows: of the student's head. temperature: of both sides' logits.
    divergence, beta: what is made small (gemstill.model.readout.Loss). steps: of the whole run, for the mixture's line.
    """

    def __init__(
        self,
        teacher: Teacher,
        hard: HardConfig,
        steps: int,
        *,
        vocab_size: int,
        rows: int,
        temperature: float = 1.0,
        divergence: Divergence = "forward",
        beta: float = 0.5,
        fused: Fused | None = None,
    ) -> None:
        super().__init__(fused)
        self.teacher, self.hard, self.steps = teacher, hard, steps
        self.vocab_size, self.rows, self.temperature = vocab_size, rows, temperature
        self.divergence, self.beta = divergence, beta

    def prepare(self, batch: Batch, step: int) -> Prepared:
        """See Objective. Runs the teacher over the batch's windows."""
        target = self.teacher.distribution(batch.tokens, batch.documents)
        target = target._replace(weight=target.weight * batch.weight.reshape(-1))
        if isinstance(target, OnlineTarget):
            # Padding rows of a head of another height than the student's have no counterpart.
            head = target.head if len(target.head) == self.rows else target.head[: self.vocab_size]
            target = target._replace(head=head, temperature=self.temperature)
        else:
            from gemstill.distill.teachers import tempered

            target = tempered(target, self.temperature)
        fraction = self.hard.fraction(step, self.steps)
        hard = (batch.labels.reshape(-1), fraction) if fraction > 0 else None
        return Prepared(batch.tokens, batch.documents, target, hard, self.fused.draw(batch, step))
