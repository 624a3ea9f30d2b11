"""The ranks of a run: one process, or several started by torchrun, with parameters sharded by FSDP2."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gemstill.core.machine import own_device

CPU = torch.device("cpu")
LETTING_GO = 0.5  # seconds


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them, and where it computes."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of `values` over all ranks, in float64."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return [float(x) for x in sums.tolist()]

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun started, on CUDA where there is one for each; a single process otherwise."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = own_device()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(device=device)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        dist.barrier()  # a rank that leaves first would cut a connection another still uses
    finally:
        dist.destroy_process_group()
        # A thread of gloo's may still hold the last tensors and wants the interpreter to let go of them: should
        # the process end in that instant, it aborts (pytorch#179291).
        time.sleep(LETTING_GO)


def shard(model: nn.Module, blocks: Sequence[nn.Module], here: Ranks, precision: torch.dtype) -> None:
    """Shard parameters, gradients and optimizer state over the ranks: each block a unit, the rest another.

    Gradients are summed, not averaged: the loss is divided by the global denominator already. Blocks'
    weights travel in `precision`; embedding and head in float32, since the head's gradient is summed in it.
    """
    if here.world == 1:
        return
    mesh = dist.device_mesh.init_device_mesh(here.device.type, (here.world,))
    # Inputs are not cast: rotary angles stay in float32, and the model casts the rest by itself.
    inner = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=outer)
    for unit in (*blocks, model):
        unit.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]
        unit.set_gradient_divide_factor(1.0)  # type: ignore[operator]


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters by name, gathered from every rank (each must call this), on the CPU."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu() for name, p in model.named_parameters()
    }
