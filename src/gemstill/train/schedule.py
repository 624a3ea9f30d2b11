"""The learning rate over a run, as a factor of its full height."""

from __future__ import annotations

import math

from gemstill.train.config import ScheduleConfig


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """The factor of the learning rate at `step` of `steps`, counted from 0; a function of these alone.

    Warm-up rises in a line and reaches 1 with its last step. Cosine (arXiv 1608.03983) then falls to
    `final`; WSD (warmup-stable-decay, arXiv 2404.06395) stays at 1 and falls in a line over its last part.
    """
    warmup = round(config.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.name == "cosine":
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    left = (steps - 1 - step) / max(1, round(config.decay * steps))
    return config.final + (1 - config.final) * min(1.0, left)
