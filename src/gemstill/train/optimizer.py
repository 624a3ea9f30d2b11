"""Muon on the hidden matrices, AdamW on embeddings and norms, as one optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from gemstill.ops.native import kernels
from gemstill.train.config import OptimizerConfig

# Five steps of a quintic whose slope at zero is as steep as convergence to [0.7, 1.2] allows
# (Keller Jordan, kellerjordan.github.io/posts/muon).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
LEAST = 1e-7  # of a matrix's norm: one of zeros stays zero
SMALL = 256  # rows or columns up to which a matrix is one thread's work, however many threads there are


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U·Vᵀ, nearly, of each matrix U·S·Vᵀ in a stack [n, rows, columns], by Newton-Schulz iteration in `dtype`.

    The singular values of the result lie about between 0.7 and 1.2, which Muon does as well with as with 1.
    Returns the matrices' own dtype, or `dtype` where that is wider. A matrix of zeros stays zero.
    """
    if dtype == torch.bfloat16 and (done := _native(matrices)) is not None:
        return done
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    x = (x / norm.clamp(min=LEAST)).to(dtype).contiguous()
    # The short form squares the condition number, which bfloat16 cannot bear, and saves nothing on squares.
    short = dtype != torch.bfloat16 and x.shape[-1] >= 2 * x.shape[-2]
    x = _polynomial(x @ x.mT) @ x if short else _iterate(x)
    return (x.mT if tall else x).to(torch.promote_types(dtype, matrices.dtype))


def _native(matrices: Tensor) -> Tensor | None:
    """`orthogonalize` in bfloat16, a matrix a thread; None where it cannot be, or would leave threads idle."""
    idle = len(matrices) < torch.get_num_threads() and min(matrices.shape[1:]) > SMALL
    if idle or matrices.dtype != torch.float32 or (ops := kernels(matrices)) is None:
        return None
    out = torch.empty_like(matrices, memory_format=torch.contiguous_format)
    table = torch.tensor([COEFFICIENTS] * ROUNDS, dtype=torch.float64)
    return out if ops.newton_schulz(matrices.contiguous(), out, table, LEAST) else None


def _iterate(x: Tensor) -> Tensor:
    """Each round takes x [n, r, c] to (a + b·g + c·g²)·x with g = x·xᵀ."""
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _polynomial(gram: Tensor) -> Tensor:
    """What `_iterate` multiplies x by, from g = x·xᵀ [n, r, r] alone: the rounds' factors are polynomials in g.

    With p = a + b·g + c·g², the next round's g is p·g·p: products of the small side only.
    """
    a, b, c = COEFFICIENTS
    total = None
    for turn in range(ROUNDS):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        total = p if total is None else p @ total
        if turn < ROUNDS - 1:
            gram = p @ gram @ p
    assert total is not None
    return total


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: each matrix moves by lr·0.2·√max(rows, columns)·orthogonalize(nesterov momentum).

    The factor gives updates AdamW's usual size, so that one learning rate serves both and carries from
    width to width (arXiv 2502.16982, equation 4). Weight decay is decoupled. Matrices of one shape are
    orthogonalized in one stack, in `dtype`. Sharded matrices (DTensor, FSDP2) are dealt out whole to the
    ranks, so that each matrix is worked on once.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[tuple(p.shape)].append(p)
            for params in alike.values():
                self._move(params, group)

    def _move(self, params: list[Tensor], group: dict[str, Any]) -> None:
        beta, rate = group["momentum"], group["lr"]
        grads = [_local(p.grad) for p in params if p.grad is not None]
        buffers = [_local(self.state[p]["momentum"]) for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - beta)
        update = torch.stack(torch._foreach_lerp(grads, buffers, beta))  # Nesterov: one momentum step ahead
        update = self._orthogonal(update, params[0])
        locals_ = [_local(p) for p in params]
        if group["weight_decay"]:
            torch._foreach_mul_(locals_, 1 - rate * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(params[0].shape))
        torch._foreach_add_(locals_, list(update.unbind()), alpha=-rate * scale)

    def _orthogonal(self, update: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return orthogonalize(update, self.dtype)
        mesh, (placement,) = like.device_mesh, like.placements
        assert isinstance(placement, Shard)
        pieces = (Shard(placement.dim + 1),)  # of each matrix on every rank; in the stack one dimension further
        shape = torch.Size((len(update), *like.shape))
        strides = torch.empty(shape, device="meta").stride()
        stack = DTensor.from_local(update, mesh, pieces, run_check=False, shape=shape, stride=strides)
        whole = stack.redistribute(mesh, (Shard(0),))
        mine = orthogonalize(whole.to_local(), self.dtype).to(self.dtype)  # what is sent is no wider than need be
        whole = DTensor.from_local(mine.contiguous(), mesh, (Shard(0),), run_check=False, shape=shape, stride=strides)
        return whole.redistribute(mesh, pieces).to_local().to(update.dtype)


def _local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


class Optimizer:
    """All parameters of a model with the rule that each moves by.

    muon: Muon on matrices of the blocks, AdamW (arXiv 1711.05101) on embeddings, head and norms. adamw:
    AdamW on all. Weight decay is for the blocks' matrices alone. dtype: of Muon's products. matrices: those of the
    blocks; by default all whose names do not say that they are an embedding or a head.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        config: OptimizerConfig,
        *,
        dtype: torch.dtype = torch.float32,
        matrices: Iterable[Tensor] | None = None,
    ) -> None:
        self.config = config
        self.names = {p: name for name, p in named}
        plain = [p for p, name in self.names.items() if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
        chosen = set(plain if matrices is None else matrices)
        hidden = [p for p in self.names if p in chosen]
        others = [p for p in self.names if p not in chosen]
        self.parts: list[torch.optim.Optimizer] = []
        adam: list[dict[str, Any]] = [{"params": others, "lr": config.embedding_rate, "weight_decay": 0.0}]
        if config.name == "muon":
            rate, decay = config.learning_rate, config.weight_decay
            self.parts.append(Muon(hidden, rate, momentum=config.momentum, weight_decay=decay, dtype=dtype))
        else:
            adam.append({"params": hidden, "lr": config.learning_rate, "weight_decay": config.weight_decay})
        adamw = torch.optim.AdamW(adam, betas=(config.betas[0], config.betas[1]), fused=True)
        for p in (p for group in adamw.param_groups for p in group["params"]):
            # Made now, not at the first step: a state is loaded into what is there.
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw.state[p] = {"step": torch.tensor(0.0), **zeros}
        self.parts.append(adamw)
        self.rates = [[group["lr"] for group in part.param_groups] for part in self.parts]

    def step(self, factor: float) -> None:
        """Move all parameters by their gradients, at `factor` times the full rates, and drop the gradients."""
        for part, rates in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Tensor]:
        """The live state, "parameter's name.kind" -> tensor, sharded as the parameters are."""
        return {
            f"{self.names[p]}.{kind}": tensor
            for part in self.parts
            for p, state in part.state.items()
            for kind, tensor in state.items()
        }
