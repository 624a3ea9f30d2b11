"""Rounding with care: no worse than the plain one by its own measure, and the bytes that a GGUF has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gemstill.core.errors import Error
from gemstill.ops.blocks import dequantize, quantize
from gemstill.ops.rounding import Rounded, gptq, nearest, search_scales, unpack


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def inputs(count: int, columns: int) -> Tensor:
    """Vectors that lie near few directions, as a network's do."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )


def plain(weight: Tensor) -> Tensor:
    return dequantize(quantize(weight, "Q4_0"), "Q4_0")


def test_bytes_are_those_of_q4_0() -> None:
    weight = weights(8, 96)
    found = nearest(weight, search_scales(weight))
    assert torch.equal(dequantize(found.data(), "Q4_0"), found.weights())
    back = unpack(found.data())
    assert torch.equal(back.codes, found.codes)
    assert torch.equal(back.scales, found.scales)
    theirs = quantize(weight, "Q4_0")
    assert torch.equal(unpack(theirs).data(), theirs)


def test_searched_scales_lose_less_in_every_block() -> None:
    weight = weights(64, 128)
    errors = [
        (each - weight).view(-1, 32).square().sum(1)
        for each in (nearest(weight, search_scales(weight)).weights(), plain(weight))
    ]
    assert bool((errors[0] <= errors[1] * 1.02).all())  # the grid of scales has a step
    assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())


def test_importance_is_heeded() -> None:
    weight, importance = weights(64, 64), torch.linspace(0.01, 1, 64) ** 4
    heedful, blind = (nearest(weight, search_scales(weight, given)).weights() for given in (importance, None))
    cost = [float(((each - weight).square() * importance).sum()) for each in (heedful, blind)]
    assert cost[0] < cost[1]


def test_blocks_that_are_zero_or_exact_stay() -> None:
    exact = Rounded(torch.randint(-8, 8, (4, 64), dtype=torch.int8), torch.full((4, 2), 0.25)).weights()
    exact[0] = 0
    assert torch.equal(nearest(exact, search_scales(exact)).weights(), exact)
    assert torch.equal(gptq(exact, torch.eye(64)).weights(), exact)


def test_gptq_loses_less_of_the_product() -> None:
    weight, x = weights(48, 128), inputs(512, 128)
    found = gptq(weight, x.T @ x)
    loss = [float(((each - weight) @ x.T).square().sum()) for each in (found.weights(), plain(weight))]
    assert loss[0] < 0.3 * loss[1]


def test_gptq_is_the_rule_of_the_paper() -> None:
    """Column by column with the inverse Hessian of the columns that are left, as arXiv 2210.17323 has it."""
    weight, x = weights(6, 64, seed=3), inputs(200, 64)
    hessian = x.T @ x
    found = gptq(weight, hessian)
    wide = hessian.double()
    wide += torch.eye(64) * (0.01 * wide.diagonal().mean())
    left, codes = weight.double().clone(), torch.zeros(6, 64, dtype=torch.int8)
    for i in range(64):
        inverse = torch.linalg.inv(wide[i:, i:])
        d = found.scales[:, i // 32].double()
        q = (left[:, i] / d).round().clamp(-8, 7)
        codes[:, i] = q.to(torch.int8)
        left[:, i:] -= ((left[:, i] - q * d) / inverse[0, 0])[:, None] * inverse[0]
    assert (codes == found.codes).float().mean() > 0.99  # a tie may fall to either side


@pytest.mark.parametrize("work", [search_scales, lambda weight: gptq(weight, torch.eye(40))])
def test_rows_that_blocks_do_not_divide(work: Callable[[Tensor], object]) -> None:
    with pytest.raises(Error, match="a row of 40 weights is not a multiple of 32"):
        work(weights(2, 40))
