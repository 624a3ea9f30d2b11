"""Curves of training runs, from their metrics.jsonl."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.report.chart import Point, Series, chart

SMOOTH = 0.02  # part of a run's steps over which its training loss is averaged


@dataclass(frozen=True)
class Curves:
    """What one run measured, against the tokens it had seen."""

    steps: list[dict[str, Any]] = field(default_factory=list)  # one for each optimizer step
    heldout: list[dict[str, Any]] = field(default_factory=list)  # one for each evaluation

    def of(self, name: str) -> list[Point]:
        """(tokens, value) of a step's or an evaluation's figure."""
        rows = self.heldout if name in ("heldout_nll", "perplexity", "bits_per_byte") else self.steps
        return [(row["tokens"], row[name]) for row in rows if name in row]

    def smooth(self, name: str) -> list[Point]:
        """(tokens, value) as a running mean with the weight of SMOOTH of all steps, started without bias."""
        points = self.of(name)
        keep = 1 - 1 / max(1.0, SMOOTH * len(points))
        total = weight = 0.0
        found = []
        for x, y in points:
            if math.isfinite(y):
                total, weight = keep * total + y, keep * weight + 1
                found.append((x, total / weight))
        return found


def read_curves(folder: Path) -> Curves:
    """Read `folder`/metrics.jsonl; a half-written last line is left out.

    Raises:
        Error: there is none, or it holds something else.
    """
    path = folder / "metrics.jsonl"
    curves, tokens = Curves(), {0: 0.0}
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise Error(
            f"cannot be read ({error.strerror})", where=path, fix="name the folder of a training run"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if "tokens" in row:
                tokens[row["step"]] = row["tokens"]
                curves.steps.append(row)
            else:  # an evaluation comes after the step it belongs to
                curves.heldout.append(row | {"tokens": tokens.get(row["step"], float("nan"))})
        except (ValueError, KeyError, TypeError) as error:
            raise Error(f"line {number} holds no figures of a step", where=path) from error
    return curves


def loss_charts(runs: Sequence[tuple[str, Curves, int]]) -> list[str]:
    """The two charts that every report has: held-out and training loss. runs: (name, curves, color)."""
    heldout = [Series(name, curves.of("heldout_nll"), color, dots=True) for name, curves, color in runs]
    train = [Series(name, curves.smooth("loss"), color) for name, curves, color in runs]
    return [
        chart("Held-out loss", heldout, "tokens seen", "nats a token"),
        chart("Training loss, running mean", train, "tokens seen", "nats a token"),
    ]
