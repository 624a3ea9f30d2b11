"""The loss beside its sum over rows: reductions, ignored rows, dtypes of the head, words for bad input."""

import pytest
import torch
import torch.nn.functional as F

from gemstill.core.errors import Error
from gemstill.ops import logits, products
from gemstill.ops.loss import linear_cross_entropy
from gemstill.ops.target import Target
from tests.ops.test_loss import blocks, gradients, inputs, plain, relative


@pytest.mark.parametrize("reduction", ["sum", "mean", "none", "sum_and_weight"])
def test_reductions(reduction):
    hidden, head, target = inputs(9, 4, 30, 3)
    result = linear_cross_entropy(hidden, head, target, softcap=5.0, reduction=reduction)
    if reduction == "sum_and_weight":
        result, weight = result
        torch.testing.assert_close(weight, target.weight.sum())
        reduction = "sum"
    torch.testing.assert_close(result, plain(hidden, head, target, softcap=5.0, reduction=reduction))


@pytest.mark.parametrize("rest", ["drop", "bucket"])
def test_each_rows_loss_can_be_weighed_afterwards(rest, monkeypatch):
    hidden, head, target = inputs(9, 4, 30, 3)
    blocks(monkeypatch, 4, 30)
    by = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def weighed(function):
        return lambda h, w: (function(h, w, target, softcap=5.0, rest=rest, reduction="none") * by).sum()

    expected, ours = (gradients(weighed(f), hidden, head) for f in (plain, linear_cross_entropy))
    torch.testing.assert_close(ours, expected)


def test_the_mean_of_hard_labels_is_torchs_with_ignored_ones():
    hidden, head, _ = inputs(20, 6, 17, 1)
    labels = torch.randint(17, (20,), generator=torch.Generator().manual_seed(0))
    labels[::3] = -100
    expected = gradients(lambda h, w: F.cross_entropy(h @ w.T, labels), hidden, head)
    torch.testing.assert_close(
        gradients(linear_cross_entropy, hidden, head, Target.hard(labels), reduction="mean"), expected
    )
    # As the hard part of a mixture, -100 takes the row out as well.
    anything = Target(torch.zeros(20, 1, dtype=torch.int64), torch.ones(20, 1), torch.ones(20))
    options = {"hard": (labels, 1.0), "reduction": "mean"}
    torch.testing.assert_close(gradients(linear_cross_entropy, hidden, head, anything, **options), expected)


def test_all_rows_ignored():
    hidden, head, _ = inputs(5, 4, 7, 2)
    nothing = Target.hard(torch.full((5,), -100))
    for part in gradients(linear_cross_entropy, hidden, head, nothing, reduction="mean"):
        assert part.abs().max() == 0


def test_weight_multiplies_the_targets():
    hidden, head, target = inputs(9, 4, 30, 3)
    by = torch.rand(9, generator=torch.Generator().manual_seed(1))
    both = target._replace(weight=target.weight * by)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, head, target, weight=by), linear_cross_entropy(hidden, head, both)
    )


def test_a_second_backward_gives_the_same():
    hidden, head, target = inputs(9, 4, 30, 3)
    h, w = hidden.requires_grad_(), head.requires_grad_()
    loss = linear_cross_entropy(h, w, target, softcap=5.0) * 3
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    kept = [x.clone() for x in first]
    torch.testing.assert_close(torch.autograd.grad(loss, (h, w)), tuple(kept))
    torch.testing.assert_close(first, tuple(kept))


@pytest.mark.parametrize("rows", [2, 1000], ids=["blocks", "one block"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes_of_hidden_and_head(dtype, stored, rows, monkeypatch):
    """A head that is cast a part at a time, products summed in parts, a gradient narrowed in its own memory."""
    hidden, head, target = inputs(40, 16, 101, 6)
    hidden, head = hidden.bfloat16(), head.bfloat16()
    exact = gradients(plain, hidden.double(), head.double(), target, softcap=5.0)
    formula = gradients(plain, hidden.to(dtype), head.to(dtype), target, softcap=5.0)
    blocks(monkeypatch, rows, 101)
    for name, value in (("COLUMNS", 32), ("PART", 7 * 16), ("CAST", 160)):
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr(logits, "CAST", 160)
    ours = gradients(linear_cross_entropy, hidden.to(dtype), head.to(stored), target, softcap=5.0)
    assert [x.dtype for x in ours] == [torch.float32, dtype, stored]
    low = torch.bfloat16 in (dtype, stored)
    for mine, theirs, true in zip(ours, formula, exact, strict=True):
        bar = max(relative(theirs.double(), true), 2.0**-9 if low else 1e-6)
        assert relative(mine.double(), true) <= 1.5 * bar


def test_words_for_bad_input():
    hidden, head, target = inputs(5, 4, 7, 2)
    for options, words in (
        ({"rest": "keep"}, "rest is 'keep'"),
        ({"reduction": "median"}, "reduction is 'median'"),
        ({"backward": "random"}, "backward is 'random'"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"weight": torch.ones(4)}, "4 weights do not fit 5 rows"),
        ({"hard": (torch.zeros(4, dtype=torch.int64), 0.5)}, "4 hard labels do not fit 5 rows"),
    ):
        with pytest.raises(Error, match=words):
            linear_cross_entropy(hidden, head, target, **options)
