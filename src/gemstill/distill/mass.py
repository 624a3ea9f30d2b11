"""A row's probabilities as blocks of a few entries, so that most steps look at the blocks' sums and few at entries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.ops.native import kernels

LANES = 32  # blocks beside each other: block l of each LANES has every LANES-th entry (ops/native/estimate.cpp)
ROUNDING = 1e-5  # how far an exponential in `tops` and the one of the same entry in `inside` may differ, relatively


class Mass:
    """n rows of V entries whose probabilities are e / total, e being given by logits or by probabilities.

    sums: [n, B] float64, of e over each block: float32 would miss the smallest entries of a large vocabulary.
    tops: [n, B], the largest e of each. total: [n, 1] float64. Use `of` or `of_logits`.
    """

    def __init__(self, raw: Tensor, sums: Tensor, tops: Tensor, logits: tuple[Tensor, float | None, float] | None):
        self.raw = raw  # [n, V] probabilities or logits; entries that are taken out are changed in place
        self.sums, self.tops, self.logits = sums, tops, logits
        self.total = sums.sum(1, keepdim=True)
        self.size = raw.shape[1] // sums.shape[1]
        self.view = raw.view(len(raw), -1, self.size, LANES)

    @staticmethod
    def of(probs: Tensor, width: int) -> Mass:
        """Of probabilities [n, V], for looking at about `width` blocks. Raises Error unless rows are distributions."""
        raw = _padded(probs, _size(probs.shape[1], width), 0.0)
        raw = raw.clone() if raw is probs else raw
        view = raw.view(len(raw), -1, _size(probs.shape[1], width), LANES)
        mass = Mass(raw, view.sum(2, dtype=torch.float64).flatten(1), view.amax(2).flatten(1), None)
        checked(probs, mass.total)
        return mass

    @staticmethod
    def of_logits(logits: Tensor, width: int, softcap: float | None = None, temperature: float = 1.0) -> Mass:
        """Of logits [n, V], which are capped and divided by the temperature first. They may be changed in place.

        Raises:
            Error: logits that are not finite.
        """
        size = _size(logits.shape[1], width)
        raw = _padded(logits, size, -torch.inf)
        native = kernels(raw)
        if native is None:
            z = raw.float()
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            return Mass.of((z / temperature).softmax(1), width)
        sums = raw.new_empty(len(raw), raw.shape[1] // size, dtype=torch.float64)
        tops, top = torch.empty_like(sums, dtype=torch.float32), sums.new_empty(len(raw), dtype=torch.float32)
        native.block_mass(raw, sums, tops, top, softcap or 0.0, temperature)
        mass = Mass(raw, sums, tops, (top, softcap, temperature))
        if not bool(torch.isfinite(mass.total).all()):
            raise not_finite()
        return mass

    def inside(self, row: Tensor, block: Tensor) -> Tensor:
        """e of the entries of these blocks: [..., size] float32 or float64."""
        entries = self.view[row, block // LANES, :, block % LANES]
        if self.logits is None:
            return entries
        top, softcap, temperature = self.logits
        z = entries.float()
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        e = (z / temperature - top[row].unsqueeze(-1)).exp()
        return e.masked_fill_(entries == -torch.inf, 0.0)  # padding and what was taken out: a cap would give it some

    def ids(self, block: Tensor, offset: Tensor) -> Tensor:
        """The ids of the entries at these offsets in these blocks."""
        tile, lane = block // LANES, block % LANES
        return (tile * self.size + offset) * LANES + lane

    def largest(self, bound: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and ids of all entries whose probability is at least `bound` [n, 1], the largest first.

        Returns both as [n, M], float64 and int64; unused slots are 0.
        """
        n, limit = len(self.raw), bound * self.total
        row, block = (self.tops >= limit.to(self.tops.dtype) * (1 - ROUNDING)).nonzero(as_tuple=True)
        inside = self.inside(row, block).double()
        which, offset = ((inside >= limit[row]) & (inside > 0)).nonzero(as_tuple=True)
        row, values, ids = row[which], inside[which, offset], self.ids(block[which], offset)
        count = torch.bincount(row, minlength=n)
        slot = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
        out = values.new_zeros(n, int(count.max()) + 1)
        places = torch.zeros(out.shape, dtype=torch.int64, device=row.device)
        out[row, slot], places[row, slot] = values, ids
        out, order = (out / self.total).sort(dim=1, descending=True, stable=True)
        return out, places.gather(1, order)

    def remove(self, ids: Tensor, kept: Tensor) -> None:
        """Take the entries ids [n, M] where kept [n, M] out."""
        row, slot = kept.nonzero(as_tuple=True)
        column = ids[row, slot]
        self.raw[row, column] = 0.0 if self.logits is None else -torch.inf
        block = column // (self.size * LANES) * LANES + column % LANES
        self.sums[row, block] = self.inside(row, block).sum(1, dtype=torch.float64)

    def pick(self, share: Tensor) -> Tensor:
        """The id where the cumulative mass, block after block, passes each share [n, K] in [0, 1): [n, K] int64.

        Never an id of probability 0, unless all are.
        """
        sums = self.sums.cumsum(1)
        t = share * sums[:, -1:]
        block = torch.searchsorted(sums, t, right=True).clamp_(max=sums.shape[1] - 1)
        t = t - F.pad(sums, (1, 0)).gather(1, block)
        row = torch.arange(len(t), device=t.device)[:, None].expand(block.shape)
        inside = self.inside(row, block).double().cumsum(2)
        last = (inside < inside[..., -1:]).sum(2)  # of the block's entries above 0; rounding may push t past it
        return self.ids(block, torch.minimum((inside <= t[..., None]).sum(2), last))


def _size(vocab: int, width: int) -> int:
    # Sums cost V / size, looking inside costs width · size: a power of two near the best of both.
    return 1 << max(1, (vocab // (4 * width)).bit_length() // 2)


def _padded(rows: Tensor, size: int, value: float) -> Tensor:
    missing = -rows.shape[1] % (size * LANES)
    return F.pad(rows, (0, missing), value=value) if missing else rows.contiguous()


def not_finite() -> Error:
    """The Error for a distribution of which some entry is not finite."""
    return Error("probabilities are not finite", where="estimator", fix="look at the teacher's weights")


def checked(probs: Tensor, total: Tensor) -> Tensor:
    """`total`, the sum of each row, [N, 1] float64. Raises Error unless all rows are distributions up to rounding."""
    if not bool(torch.isfinite(total).all()):
        raise not_finite()
    if len(probs) and (float(probs.min()) < 0 or float((total - 1).abs().max()) > 1e-3):
        raise Error("rows are no distributions (negative, or sum is not 1)", where="estimator", fix="pass a softmax")
    return total
