"""One gradient for an embedding that is the head, too: that of the two apart, and nobody's memory is changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemstill.ops.loss import linear_cross_entropy
from gemstill.ops.target import Target
from gemstill.ops.tied import tied

IDS = torch.tensor([[3, 1, 3], [0, 6, 3]])


def loss_of(rows: Tensor, head: Tensor) -> Tensor:
    loss: Tensor = linear_cross_entropy(rows.flatten(0, 1).sin(), head, Target.hard(IDS.flatten()))
    return loss


def plain_loss_of(rows: Tensor, head: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(rows.flatten(0, 1).sin(), head), IDS.flatten(), reduction="sum")


def weight_of(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("of", [loss_of, plain_loss_of], ids=["fused", "plain"])
def test_it_is_the_gradient_of_both(of, dtype):
    apart, together = weight_of(dtype), weight_of(dtype)
    for _ in range(2):  # the second is added to the first
        of(F.embedding(IDS, apart), apart).backward()
        of(*tied(IDS, together)).backward()
    close = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(together.grad, apart.grad, **close)


@pytest.mark.parametrize("only", ["rows", "head"])
def test_one_of_them_alone(only):
    apart, together = weight_of(), weight_of()
    rows, head = tied(IDS, together)
    (rows if only == "rows" else head).square().sum().backward()
    (F.embedding(IDS, apart) if only == "rows" else apart).square().sum().backward()
    torch.testing.assert_close(together.grad, apart.grad)


@pytest.mark.parametrize("of", [loss_of, plain_loss_of], ids=["fused", "plain"])
def test_a_gradient_that_somebody_else_has_is_left_as_it_is(of):
    """Both parts of a sum are given one gradient, and the other part's is looked at last."""

    def gradients(together: bool) -> list[Tensor]:
        weight, other = weight_of(), weight_of()
        tripled = 3 * other
        rows, head = tied(IDS, weight) if together else (F.embedding(IDS, weight), weight)
        of(rows, head + tripled).backward()
        return [weight.grad, other.grad]

    torch.testing.assert_close(gradients(True), gradients(False))


def test_of_two_uses_of_the_head():
    def gradient(together: bool) -> Tensor:
        weight = weight_of()
        rows, head = tied(IDS, weight) if together else (F.embedding(IDS, weight), weight)
        (loss_of(rows, head) + loss_of(rows.cos(), head) + plain_loss_of(rows, head)).backward()
        return weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_no_second_matrix_is_made():
    """The gradient that the loss made is the parameter's own."""
    weight, seen = weight_of(), []
    rows, head = tied(IDS, weight)
    head.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    loss_of(rows, head).backward()
    assert [weight.grad.data_ptr()] == seen
