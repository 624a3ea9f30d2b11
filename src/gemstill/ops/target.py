"""What a student learns from at each position: a few entries of a distribution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Target(NamedTuple):
    """A (sparse) target distribution for each of N positions.

    ids: [N, K] int64, entries of the vocabulary. probs: [N, K] float32, their probability; an
    unused slot has probability 0 (and any valid id). weight: [N] float32, how much the position
    counts; 0 leaves it out. Next-token training is K = 1 with probability 1: a hard label is the
    smallest teacher.
    """

    ids: Tensor
    probs: Tensor
    weight: Tensor

    @staticmethod
    def hard(labels: Tensor, weight: Tensor | None = None) -> Target:
        """The target that puts all probability on `labels` [N] int64."""
        ids = labels.reshape(-1, 1)
        weight = torch.ones(len(ids), device=ids.device) if weight is None else weight.reshape(-1).float()
        return Target(ids, torch.ones(ids.shape, device=ids.device), weight)
