"""What a student learns from at each position: a few entries of a distribution, or a teacher that is at hand."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100  # the label of a position that does not count, as torch and transformers have it


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
        """The target that puts all probability on `labels` (N of them) int64; a label of -100 has weight 0."""
        ids = labels.reshape(-1, 1)
        weight = torch.ones(len(ids), device=ids.device) if weight is None else weight.reshape(-1).float()
        ignored = ids == IGNORED
        return Target(ids.masked_fill(ignored, 0), (~ignored).float(), weight * ~ignored[:, 0])


class OnlineTarget(NamedTuple):
    """A dense target for each of N positions, given by the teacher's own last hidden states and head.

    The distribution is softmax(cap(hidden·headᵀ) / temperature), made where it is needed and never kept.
    hidden: [N, Dt] in the dtype of the teacher's products. head: [V, Dt], any float dtype. softcap: the
    teacher's, None for none. temperature: above 0. weight: [N] float32 as in Target. No gradient flows here.
    """

    hidden: Tensor
    head: Tensor
    softcap: float | None
    temperature: float
    weight: Tensor
