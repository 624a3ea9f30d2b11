"""Training through rounding: what a block of Q4_0 can hold is what the network computes with, at every step.

Master codes are floats, rounded in every forward pass; the gradient passes through as if they had not been
(the straight-through estimator, arXiv 1308.3432). Codes and the logarithms of scales are both without a unit, so
that one learning rate serves every matrix of every model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gemstill.data.calibration import Calibration
from gemstill.distill.teachers import Teacher
from gemstill.model.transformer import Transformer
from gemstill.ops.loss import linear_cross_entropy
from gemstill.ops.rounding import HIGH, LOW, SIZE, Rounded
from gemstill.ops.target import OnlineTarget

KEPT, INSIDE = 0.6, 0.3  # of what rounding took from a weight, its master begins with so much, and no more steps


ASKED = 8  # pieces of text whose distributions tell which tokens matter


class RoundedMatrix(nn.Module):
    """A linear map's or an embedding's matrix as Q4_0 holds it, with masters that learn.

    start: how it is rounded at first, [N, K]. weight: what was rounded; a master begins on its side of the code.
    dtype: of `weight`, as products want it. rows: [R] int64 ascending, of the matrix, that learn; None for all.
    """

    def __init__(self, start: Rounded, weight: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> None:
        super().__init__()
        self.dtype, self.rows = dtype, rows
        self.start = start
        codes, scales = (part if rows is None else part[rows] for part in start)
        self.scales = scales
        exact = codes.float()
        wanted = (weight if rows is None else weight[rows]).float().view(*scales.shape, SIZE) / scales[..., None]
        off = (wanted.nan_to_num_(0, 0, 0).view(codes.shape) - exact).mul_(KEPT).clamp_(-INSIDE, INSIDE)
        self.codes = nn.Parameter(exact.add_(off))
        self.shift = nn.Parameter(torch.zeros_like(scales))
        self.base = start.weights().to(dtype) if rows is not None else torch.empty(0)

    @property
    def weight(self) -> Tensor:
        """[N, K] as rounded now; of a matrix that learns in some rows, while it trains, these alone, [R, K]."""
        learned: Tensor = _Through.apply(self.codes, self.shift, self.scales, self.dtype)  # type: ignore[no-untyped-call]
        if self.rows is None or self.training:
            return learned
        return self.base.index_copy(0, self.rows, learned)

    def forward(self, ids: Tensor) -> Tensor:
        """As an embedding: ids [B, T] int64 -> [B, T, K]."""
        if self.rows is None or not self.training:
            return F.embedding(ids, self.weight)
        place = torch.searchsorted(self.rows, ids).clamp(max=len(self.rows) - 1)
        learns = self.rows[place] == ids
        return torch.where(learns[..., None], F.embedding(place, self.weight), F.embedding(ids, self.base))

    @torch.no_grad()
    def rounded(self) -> Rounded:
        """The whole matrix as it is rounded now."""
        codes = self.codes.round().clamp_(LOW, HIGH).to(torch.int8)
        scales = _scales(self.shift, self.scales)
        if self.rows is None:
            return Rounded(codes, scales)
        whole = self.start.codes.clone(), self.start.scales.clone()
        whole[0][self.rows], whole[1][self.rows] = codes, scales
        return Rounded(*whole)


def _scales(shift: Tensor, scales: Tensor) -> Tensor:
    return (scales * shift.exp()).half().float()


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, shift: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        now = _scales(shift, scales)
        weight = codes.round().clamp_(LOW, HIGH).view(*now.shape, SIZE).mul_(now[..., None]).view(codes.shape)
        ctx.save_for_backward(codes, now)
        return weight.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, now = ctx.saved_tensors
        wide = grad.float().view(*now.shape, SIZE) * now[..., None]
        whole = codes.round().clamp_(LOW, HIGH).view(wide.shape)
        of_shift = (wide * whole).sum(-1)
        # What lies beyond the last code is not moved further out.
        beyond = (codes < LOW - 0.5) | (codes > HIGH + 0.5)
        return wide.view(codes.shape).masked_fill_(beyond, 0), of_shift, None, None


def round_model(
    reference: Transformer, start: Mapping[str, Rounded], rows: Tensor | None
) -> tuple[Transformer, dict[str, RoundedMatrix]]:
    """A network like `reference` that learns: its matrices a RoundedMatrix each, told by name, its norms float32.

    start: how each matrix is rounded at first. rows: of embedding and head, that learn; all learn in other matrices.
    """
    dtype = reference.compute_dtype or torch.float32
    with torch.device("meta"):
        model = Transformer(reference.config, compute_dtype=dtype)
    found = {}
    for name, old in list(model.named_parameters()):
        place, _, last = name.removesuffix(".weight").rpartition(".")
        weight = reference.get_parameter(name).detach()
        owner = model.get_submodule(place)
        if old.ndim < 2:
            getattr(owner, last).weight = nn.Parameter(weight.float().clone())
            continue
        outer = last in ("embed_tokens", "lm_head")
        found[name] = RoundedMatrix(start[name], weight, dtype, rows if outer else None)
        setattr(owner, last, found[name])
    return model, found


@torch.no_grad()
def likely(reference: Teacher, text: Calibration, count: int) -> Tensor:
    """The entries of the vocabulary that matter most in a text, so many, ascending: [count] int64.

    Of each, how often it is there and how often the reference expects it, its probabilities summed over the first
    pieces.
    """
    mass = text.tokens[text.real].bincount(minlength=reference.vocab_size or 0).double()
    expected = torch.zeros(len(mass))
    seen = 0
    for row, length in zip(text.tokens[:ASKED], text.lengths.tolist(), strict=False):
        target = reference.distribution(row[None, :length], torch.zeros(1, length, dtype=torch.int64))
        assert isinstance(target, OnlineTarget)
        head = target.head.to(target.hidden.dtype)
        for hidden in torch.split(target.hidden, 128):
            z = F.linear(hidden, head).float()
            z = z if target.softcap is None else target.softcap * torch.tanh(z / target.softcap)
            expected += z.softmax(1).sum(0)
        seen += length
    mass += expected * (int(text.lengths.sum()) / seen)
    return mass.argsort(descending=True, stable=True)[:count].sort().values


class Windows(NamedTuple):
    """Pieces of text, each from its beginning mark on. tokens, documents: [B, T] int64, documents -1 after the end."""

    tokens: Tensor
    documents: Tensor


class Pieces:
    """Batches of `count` pieces of a text, anew in another order each time all were seen; drawn by seed and step."""

    def __init__(self, text: Calibration, count: int, seed: int) -> None:
        self.text, self.count, self.seed = text, count, seed

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Windows:
        """The batch of `step`, counted from 0."""
        total, places = len(self.text.tokens), []
        for number in range(step * self.count, (step + 1) * self.count):
            turn, place = divmod(number, total)
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + turn))
            places.append(int(order[place]))
        tokens, real = self.text.tokens[places], self.text.real[places]
        return Windows(tokens, torch.where(real, 0, -1))


class FromReference:
    """Make the rounded network say what the unquantized one says: KL from it, over the vocabulary or a part of it.

    columns: [S] int64, the entries of the vocabulary whose rows learn (RoundedMatrix); both distributions are taken
    given that one of these comes. None takes all.
    """

    def __init__(self, reference: Teacher, columns: Tensor | None) -> None:
        self.reference, self.columns = reference, columns
        self._head: Tensor | None = None

    def prepare(self, batch: Windows, step: int) -> tuple[Windows, OnlineTarget]:
        """See Objective."""
        target = self.reference.distribution(batch.tokens, batch.documents)
        assert isinstance(target, OnlineTarget)
        if self.columns is not None:
            if self._head is None:
                self._head = target.head[self.columns].to(target.hidden.dtype)
            target = target._replace(head=self._head)
        return batch, target

    def weight(self, prepared: tuple[Windows, OnlineTarget]) -> float:
        """The tokens that count."""
        return float(prepared[1].weight.double().sum())

    def loss(self, model: nn.Module, prepared: tuple[Windows, OnlineTarget]) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed cross-entropy to the reference, nats."""
        windows, target = prepared

        def read(hidden: Tensor, head: Tensor, softcap: float | None) -> Tensor:
            loss: Tensor = linear_cross_entropy(hidden.flatten(0, 1), head, target, softcap=softcap)
            return loss

        loss: Tensor = model(windows.tokens, documents=windows.documents, readout=read)
        return loss, {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all follows from the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
