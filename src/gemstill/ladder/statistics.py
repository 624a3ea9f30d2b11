"""The ladder's statistics: paired intervals, where one curve meets another's level, from when on a store pays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gemstill.core.errors import Error


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """'lower' or 'higher' where the whole interval lies on one side of 0, else 'undecided'."""
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "undecided"


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of a − b with its t interval over pairs (Student 1908): d̄ ± t·s/√n with n − 1 degrees of freedom.

    a, b: the same n ≥ 2 seeds in the same order.

    Raises:
        Error: fewer than two pairs, or rows of different lengths.
    """
    if len(a) != len(b) or len(a) < 2:
        raise Error(f"{len(a)} and {len(b)} values are no pairs", where="interval", fix="give at least two of each")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    half = t_quantile(0.5 + confidence / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile of Student's t with `freedom` ≥ 1 degrees of freedom, for probabilities above one half.

    Bisection on the finite sums for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    inside = 2 * probability - 1  # mass between −t and t
    low, high = 0.0, 1.0
    while _between(high, freedom) < inside:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _between(middle, freedom) < inside else (low, middle)
    return (low + high) / 2


def _between(t: float, freedom: int) -> float:
    """P(|T| < t)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float:
    """The smallest x at which the curve through the points reaches down to `level`, straight between them in log x.

    x: rising, above 0. Below the first point's x where the curve begins at or under the level: x[0]; inf where
    it never comes down to the level.
    """
    if y[0] <= level:
        return x[0]
    for (x0, y0), (x1, y1) in zip(zip(x, y, strict=True), list(zip(x, y, strict=True))[1:], strict=False):
        if y1 <= level:
            share = (y0 - level) / (y0 - y1)
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    return math.inf


def break_even(fixed: float, alone: float, distilled: float) -> float:
    """From how many students on a teacher and its store pay.

    fixed: what teacher and store cost. alone: what one student from scratch costs until it is as good as a
    distilled one. distilled: what the distilled one costs. n students pay when fixed + n·distilled ≤ n·alone;
    inf where a student from scratch is no dearer.
    """
    return math.inf if alone <= distilled else max(1.0, math.ceil(fixed / (alone - distilled)))
