"""The network's work between and around its products: RMSNorm, joint linear maps, rotary embedding, GeGLU.

Each is a few plain PyTorch operations, or one pass of a native kernel and another backward where there are
native kernels: the same values, up to the rounding of the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemstill.ops.native import kernels
from gemstill.ops.packed import Weight, packed_linear

Angles = tuple[Tensor, Tensor]  # cosines and sines [B or 1, 1, T, d/2] float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """RMSNorm (arXiv 1910.07467) with Gemma's unit offset: y = x / √(mean(x²) + eps) · (1 + weight), + residual.

    x, residual and y: [..., D], any float dtype; computed in float32 at least. weight: [D].
    """
    if kernels(x) is not None:
        norm: Tensor = _RMSNorm.apply(x, weight, residual, eps)  # type: ignore[no-untyped-call]
        return norm
    wide = x if x.dtype == torch.float64 else x.float()  # a mean of squares needs more than bfloat16's 8 bits
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    # Widen before adding: in bfloat16, 1 + 0.003 is 1.
    out = (wide * (1 + weight.to(wide.dtype))).to(x.dtype)
    return out if residual is None else residual + out


def geglu(joint: Tensor) -> Tensor:
    """gelu(gate)·up with the tanh form of gelu: joint [..., 2·I], gate then up -> [..., I]."""
    if kernels(joint) is not None:
        out: Tensor = _GeGLU.apply(joint)  # type: ignore[no-untyped-call]
        return out
    gate, up = joint.chunk(2, -1)
    wide = gate if gate.dtype == torch.float64 else gate.float()
    # ½(1 + tanh u) = sigmoid(2u): one exponential, where tanh costs several.
    u = math.sqrt(2 / math.pi) * (wide + 0.044715 * wide * wide * wide)
    return (wide * torch.sigmoid(2 * u) * up).to(joint.dtype)


def joint_linear(x: Tensor, *weights: Weight) -> Tensor:
    """Several linear maps of the same x: x [..., I], weights [O, I] of any dtype, or packed -> [..., ΣO], in x's dtype.

    With gradients they are one product: the weights are cast to x's dtype, which makes a joint matrix anyway.
    """
    plain = [weight for weight in weights if isinstance(weight, Tensor)]
    if len(plain) < len(weights):
        return packed_linear(x, *weights)
    if not torch.is_grad_enabled():  # to copy the weights would take as long as a few tokens' products
        parts = [F.linear(x, weight.to(x.dtype)) for weight in plain]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if kernels(x) is not None:
        out: Tensor = _JointLinear.apply(x, *plain)  # type: ignore[no-untyped-call]
        return out
    cast = [weight.to(x.dtype) for weight in plain]
    return F.linear(x, cast[0] if len(cast) == 1 else torch.cat(cast))


def rotate(x: Tensor, angles: Angles) -> Tensor:
    """Turn each pair (x[i], x[i + d/2]) of x [B, G, T, d] or [B, G, T, R, d] by its angle; in float32 or wider."""
    cos, sin = (part if x.ndim == 4 else part.unsqueeze(-2) for part in angles)
    wide = x if x.dtype == torch.float64 else x.float()
    a, b = wide.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def split_heads(joint: Tensor, groups: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """joint [B, T, (G·R + 2G)·d], queries, keys, values -> q [B, G, T, R, d], k and v [B, G, T, d]."""
    B, T, width = joint.shape
    heads = groups * rows
    parts = joint.view(B, T, heads + 2 * groups, width // (heads + 2 * groups))
    q, k, v = torch.split(parts, [heads, groups, groups], 2)
    return torch.unflatten(q, 2, (groups, rows)).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def rotated_heads(joint: Tensor, groups: int, rows: int, angles: Angles, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """`split_heads`, with queries and keys turned by `rotate` and queries multiplied by `scale`."""
    if kernels(joint) is not None:
        q, k, v = _RotatedHeads.apply(joint, groups, rows, *angles, scale)  # type: ignore[no-untyped-call]
        return q, k, v
    q, k, v = split_heads(joint, groups, rows)
    return rotate(q, angles) * scale, rotate(k, angles), v


class _JointLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        sizes = [len(weight) for weight in weights]
        if sizes == [len(weights[0])] and weights[0].dtype == x.dtype:
            joint = weights[0]
        else:
            joint = x.new_empty(sum(sizes), x.shape[-1])
            for part, weight in zip(torch.split(joint, sizes), weights, strict=True):
                part.copy_(weight)
        ctx.save_for_backward(x, joint)
        ctx.sizes, ctx.dtypes = sizes, [weight.dtype for weight in weights]
        return F.linear(x, joint)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, joint = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        d_x = (grad @ joint).view(x.shape) if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return d_x, *[None] * len(ctx.sizes)
        parts = torch.split(grad.T @ x.flatten(0, -2), ctx.sizes)
        return d_x, *(part.to(dtype) for part, dtype in zip(parts, ctx.dtypes, strict=True))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> Tensor:
        x, gain = x.contiguous(), 1 + weight.float()
        out, inverse = torch.empty_like(x), torch.empty(x.shape[:-1], dtype=torch.float32)
        rest = x.new_empty(0) if residual is None else residual.contiguous()
        torch.ops.gemstill.rms_norm(x, gain, rest, out, inverse, eps)
        ctx.save_for_backward(x, gain, inverse)
        ctx.weight_dtype = weight.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        x_grad, gain_grad = torch.empty_like(x), torch.empty_like(gain)
        torch.ops.gemstill.rms_norm_backward(grad, x, gain, inverse, x_grad, gain_grad)
        return x_grad, gain_grad.to(ctx.weight_dtype), grad if ctx.needs_input_grad[2] else None, None


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        joint = joint.contiguous()
        out = joint.new_empty(*joint.shape[:-1], joint.shape[-1] // 2)
        torch.ops.gemstill.geglu(joint, out)
        ctx.save_for_backward(joint)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (joint,) = ctx.saved_tensors
        joint_grad = torch.empty_like(joint)
        torch.ops.gemstill.geglu_backward(grad.contiguous(), joint, joint_grad)
        return joint_grad


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, joint: Tensor, groups: int, rows: int, cos: Tensor, sin: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, T, width = joint.shape
        d = width // (groups * rows + 2 * groups)
        q = joint.new_empty(B, groups, T, rows, d)
        k, v = joint.new_empty(B, groups, T, d), joint.new_empty(B, groups, T, d)
        cos, sin = cos.contiguous(), sin.contiguous()
        torch.ops.gemstill.heads(joint.contiguous(), cos, sin, q, k, v, scale, False)
        ctx.save_for_backward(cos, sin)
        ctx.scale = scale
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (grad.contiguous() for grad in grads)
        cos, sin = ctx.saved_tensors
        B, G, T, R, d = q.shape
        joint = q.new_empty(B, T, (G * R + 2 * G) * d)
        torch.ops.gemstill.heads(joint, cos, sin, q, k, v, ctx.scale, True)
        return joint, None, None, None, None, None
