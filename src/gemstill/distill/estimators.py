"""Sparse estimators of a teacher's distribution: dense, topk, sample, threshold.

Each takes probabilities [N, V] and gives a few entries a row. `sample` and `threshold` are unbiased: the
mean of many draws is the teacher's distribution. The randomness is passed in, as uniform numbers, so that
a row's draw depends on nothing but its probabilities and its numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.distill.mass import ROUNDING, Mass, checked
from gemstill.ops.target import Target

CHUNK = 1 << 21  # probabilities worked on at once, so that they stay near the processor
MAX_ENTRIES = 255  # the store counts a row's entries in one byte
SLACK = 1e-9  # relative room for rounding in float64; see `_exact_set`


class Draw(NamedTuple):
    """What an estimator keeps of each of N rows: first the entries kept exactly, then the drawn ones.

    ids: [N, K] int64, no id twice in a row. probs: [N, K] float64; unused slots, at the end, are 0 and
    their id is 0. exact, drawn: [N] int64, how many entries of each kind the row has.
    """

    ids: Tensor
    probs: Tensor
    exact: Tensor
    drawn: Tensor

    def target(self) -> Target:
        """The same as a Target of weight one, for `linear_cross_entropy`."""
        return Target(self.ids, self.probs.float(), torch.ones(len(self.ids), device=self.ids.device))


@dataclass(frozen=True)
class Estimator:
    """Which estimator, with its one parameter: `threshold(0.05)`, `sample(16)`, `topk(32)` or `dense`."""

    name: str = "threshold"  # threshold, sample, topk or dense
    parameter: float = 0.05  # threshold: τ; sample: draws; topk: entries; dense: not used

    def __post_init__(self) -> None:
        if self.name not in ("threshold", "sample", "topk", "dense"):
            raise Error(f"no estimator is named '{self.name}'", fix="known: threshold, sample, topk, dense")
        low, high = (2 / MAX_ENTRIES, 1) if self.name == "threshold" else (1, MAX_ENTRIES)
        if self.name != "dense" and not low <= self.parameter <= high:
            raise Error(f"the parameter of {self} lies outside {low:.3g} to {high}", where="estimator")
        if self.name in ("sample", "topk") and self.parameter != int(self.parameter):
            raise Error(f"the parameter of {self} is no whole number", where="estimator")

    def __str__(self) -> str:
        return self.name if self.name == "dense" else f"{self.name}({self.parameter:g})"

    @staticmethod
    def parse(text: str) -> Estimator:
        """The inverse of `str`: Estimator.parse("threshold(0.05)"). Raises Error for anything else."""
        found = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([\d.eE+-]+)\s*\))?\s*", text)
        try:
            if found is None or (found[2] is None and found[1] != "dense"):
                raise ValueError
            return Estimator(found[1], float(found[2] or 0))
        except ValueError:
            raise Error(f"'{text}' is no estimator", fix="write threshold(0.05), sample(16) or topk(32)") from None

    @property
    def units(self) -> int:
        """A stored weight is a whole number of 1/units: of draws, or of steps so fine that their rounding is little
        beside the estimator's own noise."""
        if self.name == "sample":
            return int(self.parameter)
        return 256 if self.name != "threshold" else 1 << max(1, round(math.log2(1.75 / self.parameter)))

    @property
    def entries(self) -> float:
        """About how many entries a row has."""
        if self.name == "threshold":
            return 0.6 / self.parameter + 1
        return self.parameter**0.8 if self.name == "sample" else max(1.0, self.parameter)

    @property
    def uniforms(self) -> int:
        """How many uniform numbers a row's draw takes."""
        return {"sample": int(self.parameter), "threshold": 1}.get(self.name, 0)

    def __call__(self, probs: Tensor, u: Tensor) -> Draw:
        """Estimate probs [N, V] with the uniform numbers u [N, uniforms or more] float64."""
        if self.name == "threshold":
            return threshold(probs, self.parameter, u[:, 0])
        if self.name == "sample":
            return sample(probs, u[:, : self.uniforms])
        return topk(probs, int(self.parameter)) if self.name == "topk" else dense(probs)

    def of_logits(self, logits: Tensor, u: Tensor, softcap: float | None = None, temperature: float = 1.0) -> Draw:
        """The same for logits [N, V], capped and divided by the temperature first; they may be changed in place.

        Reads them twice and writes no probabilities. Raises Error for logits that are not finite.
        """
        if self.name == "dense":
            z = logits.float() if softcap is None else softcap * torch.tanh(logits.float() / softcap)
            return dense((z / temperature).softmax(1))
        mass = Mass.of_logits(logits, self._width, softcap, temperature)
        if self.name == "threshold":
            return _threshold(mass, self.parameter, u[:, 0])
        return _topk(mass, int(self.parameter)) if self.name == "topk" else _sample(mass, u[:, : self.uniforms])

    @property
    def _width(self) -> int:
        return int(1 / self.parameter) if self.name == "threshold" else int(self.parameter)


def dense(probs: Tensor) -> Draw:
    """Everything, exactly: V entries a row; the reference for the others.

    probs: [N, V] float32 or float64. Raises Error for rows that are no distributions.
    """
    total = checked(probs, probs.sum(1, keepdim=True, dtype=torch.float64))
    count = torch.full((len(probs),), probs.shape[1], device=probs.device)
    ids = torch.arange(probs.shape[1], device=probs.device).expand(probs.shape)
    return Draw(ids, probs.double() / total, count, torch.zeros_like(count))


def topk(probs: Tensor, k: int) -> Draw:
    """The k largest, renormalised: biased, the bias being the mass of the rest; no variance.

    probs: [N, V] float32 or float64. Raises Error for rows that are no distributions.
    """
    return _by_chunks(lambda p, _: _topk(Mass.of(p, k), k), probs, probs[:, :0])


def _topk(mass: Mass, k: int) -> Draw:
    # The k-th largest of the blocks' largest is no larger than the k-th largest of all.
    bound = mass.tops.topk(min(k, mass.tops.shape[1]), dim=1).values[:, -1:].double() / mass.total
    values, ids = mass.largest(bound * (1 - ROUNDING))
    values, ids = values[:, :k], ids[:, :k]
    count = (values > 0).sum(1)
    return Draw(ids, values / values.sum(1, keepdim=True), count, torch.zeros_like(count))


def sample(probs: Tensor, u: Tensor) -> Draw:
    """n independent draws, kept as distinct ids with weight count / n (arXiv 2503.16870): unbiased.

    The variance, summed over the vocabulary, is (1 − Σp²) / n. probs: [N, V] float32 or float64;
    u: [N, n] float64, uniform in [0, 1). Raises Error for rows that are no distributions.
    """
    return _by_chunks(lambda p, u: _sample(Mass.of(p, u.shape[1]), u), probs, u)


def _sample(mass: Mass, u: Tensor) -> Draw:
    n = u.shape[1]
    ids = mass.pick(_coarse(u)).sort(dim=1).values
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    slot = first.cumsum(1) - 1
    counts = torch.zeros_like(ids).scatter_add_(1, slot, torch.ones_like(ids))
    distinct = torch.zeros_like(ids).scatter_(1, slot, ids)
    drawn = first.sum(1)
    return Draw(distinct, counts.double() / n, torch.zeros_like(drawn), drawn)


def threshold(probs: Tensor, tau: float, u: Tensor) -> Draw:
    """Thresholded sampling proportional to size, of least variance among unbiased sparsifiers (arXiv 2402.14925).

    Every probability ≥ τ is kept exactly. Of the rest, with mass R, k = ⌈R/τ⌉ entries are drawn by
    systematic sampling in a fixed order, each with weight R/k. An entry with p > R/k would be drawn
    twice: it is kept exactly instead, and R and k are taken anew, until none is left. At most 1/τ + 1
    entries; they sum to one; the variance, summed over the vocabulary, is Σ_tail p·(R/k − p).

    probs: [N, V] float32 or float64; u: [N] float64, uniform in [0, 1).
    Raises Error for rows that are no distributions.
    """

    return _by_chunks(lambda p, u: _threshold(Mass.of(p, int(1 / tau)), tau, u), probs, u)


def _threshold(mass: Mass, tau: float, u: Tensor) -> Draw:
    ids, values, exact, k = _exact_set(mass, tau)
    mass.remove(ids, torch.arange(ids.shape[1], device=ids.device) < exact[:, None])
    i = torch.arange(int(k.max()), device=ids.device)
    drawn = mass.pick(torch.where(i < k[:, None], (_coarse(u)[:, None] + i) / k[:, None], 0))
    weight = (1 - values.sum(1)) / k.clamp(min=1)

    slot = torch.arange(int((exact + k).max()), device=ids.device)
    nothing = ids.shape[1] + drawn.shape[1]  # the column of zeros appended below
    source = torch.where(slot < exact[:, None], slot, ids.shape[1] + slot - exact[:, None])
    source = torch.where(slot < (exact + k)[:, None], source, nothing)
    ids = F.pad(torch.cat([ids, drawn], 1), (0, 1))
    values = F.pad(torch.cat([values, weight[:, None].expand(drawn.shape)], 1), (0, 1))
    return Draw(ids.gather(1, source), values.gather(1, source), exact, k)


def _exact_set(mass: Mass, tau: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The entries that `threshold` keeps exactly.

    Returns ids [n, M] int64 and probabilities [n, M] float64, largest first, 0 in unused slots; their
    number [n]; and the number k [n] of entries to draw.
    """
    # While k ≥ 2, R/k > τ/2, and the only entry that k = 1 could move has all of R, which drawing it keeps
    # exactly too: so no entry below τ/2 ever moves, and few are looked at.
    values, ids = mass.largest(torch.full_like(mass.total, tau / 2 * (1 - 1e-6)))
    below = F.pad(values.cumsum(1), (1, 0))
    exact = (values >= tau).sum(1)
    while True:
        rest = 1 - below.gather(1, exact[:, None])
        k = (rest / tau - SLACK).ceil().clamp(min=0)
        # An entry of R/k sharp is kept too: rounding could let two of the draws fall on it.
        limit = torch.where(k > 0, rest / k * (1 - SLACK), torch.inf)
        more = torch.maximum(exact, (values >= limit).sum(1))
        if torch.equal(more, exact):
            break
        exact = more
    kept = torch.arange(ids.shape[1], device=ids.device) < exact[:, None]
    k = k[:, 0].long()
    values = torch.where(kept, values, 0)
    # Where nothing is left to draw, what rounding left over goes to the kept entries.
    values = torch.where(k[:, None] > 0, values, values / values.sum(1, keepdim=True))
    return torch.where(kept, ids, 0), values, exact, k


def _coarse(u: Tensor) -> Tensor:
    """u in steps of 2⁻³², so that (u + i) / k with i < k stays below 1 in float64."""
    return (u * 2.0**32).floor() * 2.0**-32


def _by_chunks(some: Callable[[Tensor, Tensor], Draw], probs: Tensor, u: Tensor) -> Draw:
    """Apply `some` to a few rows at a time and join the results."""
    if len(u) != len(probs):
        raise Error(f"{len(u)} rows of uniform numbers do not fit {len(probs)} rows", where="estimator")
    rows = max(1, CHUNK // probs.shape[1])
    return join([some(p, part) for p, part in zip(torch.split(probs, rows), torch.split(u, rows), strict=True)])


def join(draws: Sequence[Draw]) -> Draw:
    """Put the rows of several draws, at least one, below each other."""
    width = max(draw.ids.shape[1] for draw in draws)
    ids = torch.cat([F.pad(draw.ids, (0, width - draw.ids.shape[1])) for draw in draws])
    probs = torch.cat([F.pad(draw.probs, (0, width - draw.probs.shape[1])) for draw in draws])
    return Draw(ids, probs, torch.cat([draw.exact for draw in draws]), torch.cat([draw.drawn for draw in draws]))
