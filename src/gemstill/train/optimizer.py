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

# Of each round a, b and c, the odd polynomial a·s + b·s³ + c·s⁵ of a singular value s: those that in turn bring
# [0.005, 1] nearest to 1 (Polar Express, arXiv 2505.16932, algorithm 1), all but the last of s/1.05 instead, since
# they are steep where the range ends and bfloat16 would overstep it.
COEFFICIENTS = (
    (7.9035, -21.1040, 14.1742),
    (3.7288, -2.5234, 0.4382),
    (3.1746, -2.3804, 0.4978),
)
SMALL = 256  # rows or columns up to which a matrix is one thread's work, however many threads there are


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U·Vᵀ, nearly, of each matrix U·S·Vᵀ in a stack [n, rows, columns], by Newton-Schulz iteration in `dtype`.

    Each is scaled by (Σ s⁴)^¼ first: no singular value is larger, the first round's products hold it, and it lies
    nearer to the largest than the usual √(Σ s²), so that what is small needs a round less. Singular values above
    0.005 of that bound come out between 0.45 and 1.5. Returns `dtype`. A matrix of zeros stays zero.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    x: Tensor = (matrices / norm.clamp(min=1e-30)).to(dtype)
    gram = _gram(x, tall)
    bound = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x, gram = x.mul_(bound.rsqrt()), gram.div_(bound)
    for turn, (a, b, c) in enumerate(COEFFICIENTS):
        gram = _gram(x, tall) if turn else gram
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def _gram(x: Tensor, tall: bool) -> Tensor:
    return x.mT @ x if tall else x @ x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, each row then of one length: W ← W - lr·0.2·√columns·oᵢ/‖oᵢ‖ with o the rows
    of orthogonalize(nesterov momentum).

    Rows alike are NorMuon's (arXiv 2510.05491, algorithm 1) with β₂ = 0: no memory of earlier rows, which did no
    better here, and so no state but the momentum. 0.2 a weight is AdamW's usual update, so that one learning rate
    serves both and carries from width to width (arXiv 2502.16982, section 2.2). Weight decay is decoupled. Matrices
    of one shape are orthogonalized in one stack, in `dtype`. Sharded matrices (DTensor, FSDP2) are dealt out whole
    to the ranks, so that each matrix is worked on once.
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
        momenta = [_local(self.state[p]["momentum"]) for p in params]
        weights = [_local(p) for p in params]
        decay, step = 1 - rate * group["weight_decay"], 0.2 * rate * math.sqrt(params[0].shape[1])
        if self._native(params, grads, momenta, beta, step, decay):
            return
        torch._foreach_lerp_(momenta, grads, 1 - beta)
        update = torch.stack(torch._foreach_lerp(grads, momenta, beta))  # Nesterov: one momentum step ahead
        update = self._direction(update, params[0])
        torch._foreach_mul_(weights, decay)
        torch._foreach_add_(weights, list(update.to(weights[0].dtype).unbind()), alpha=-step)

    def _native(
        self, params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], beta: float, step: float, decay: float
    ) -> bool:
        """The whole move in one pass, a matrix a thread; False where it cannot be, or would leave threads idle."""
        if self.dtype != torch.bfloat16 or isinstance(params[0], DTensor):
            return False
        if len(params) < torch.get_num_threads() and min(params[0].shape) > SMALL:
            return False
        plain = all(x.dtype == torch.float32 and x.is_contiguous() for x in (*params, *grads, *momenta))
        if not plain or (ops := kernels(params[0])) is None:
            return False
        table = torch.tensor(COEFFICIENTS, dtype=torch.float64)
        moved: bool = ops.muon(params, grads, momenta, table, beta, step, decay)
        return moved

    def _direction(self, update: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return _unit_rows(orthogonalize(update, self.dtype))
        mesh, (placement,) = like.device_mesh, like.placements
        assert isinstance(placement, Shard)
        pieces = (Shard(placement.dim + 1),)  # of each matrix on every rank; in the stack one dimension further
        shape = torch.Size((len(update), *like.shape))
        strides = torch.empty(shape, device="meta").stride()
        stack = DTensor.from_local(update, mesh, pieces, run_check=False, shape=shape, stride=strides)
        whole = stack.redistribute(mesh, (Shard(0),))
        mine = _unit_rows(orthogonalize(whole.to_local(), self.dtype))
        whole = DTensor.from_local(mine.contiguous(), mesh, (Shard(0),), run_check=False, shape=shape, stride=strides)
        return whole.redistribute(mesh, pieces).to_local()


def _unit_rows(x: Tensor) -> Tensor:
    return x.div_(torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-7))


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
