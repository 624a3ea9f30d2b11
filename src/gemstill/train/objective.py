"""What the loop asks of an objective. Pre-training, distillation, SFT, reward and RL are objectives."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """One way to learn. The loop cuts a step's batch into micro-batches and calls these for each in turn."""

    def prepare(self, batch: Any, step: int) -> Any:
        """What the loss needs beside the batch (a teacher's rows, rollouts), without gradients.

        batch: a micro-batch of the loader on the run's device. step: counted from 0. Returns anything;
        it is what the other methods get.
        """

    def weight(self, prepared: Any) -> float:
        """The sum of weights in this micro-batch. Known before backward, and summed over the whole global
        batch, it is what every loss sum of the step is divided by: cutting a batch otherwise changes nothing."""

    def loss(self, model: nn.Module, prepared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of losses, a scalar with gradient, and further sums to report (divided alike)."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: tensors and plain values by name, often nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
