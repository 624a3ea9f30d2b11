"""Sampled backward products: unbiased, of little noise, the same for the same seed, exact where nothing is small."""

import pytest
import torch

from gemstill.ops import columns, native
from gemstill.ops.columns import choose
from gemstill.ops.loss import linear_cross_entropy, linear_jensen_shannon
from gemstill.ops.target import OnlineTarget, Target
from tests.ops.test_loss import blocks, gradients, relative


def student(rows=64, width=16, vocab=4096, dtype=torch.float64, seed=0):
    """A model that knows something: most entries are improbable everywhere, as in a trained one."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64)
    head = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    common = -3 * torch.log1p(torch.arange(vocab, dtype=torch.float64))  # a long tail, by one constant input
    hidden[:, 0], head[:, 0] = 1.0, common[torch.randperm(vocab, generator=g)]
    z = hidden @ head.T
    labels = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    return hidden.to(dtype), head.to(dtype), labels


@pytest.mark.parametrize("online", [False, True])
def test_the_expectation_is_the_exact_gradient(online, monkeypatch):
    hidden, head, labels = student()
    function, target = linear_cross_entropy, Target.hard(labels)
    if online:
        function, target = linear_jensen_shannon, OnlineTarget(*student(seed=1)[:2], None, 1.0, torch.ones(64))
    blocks(monkeypatch, 32, 4096)
    monkeypatch.setattr(columns, "NOISE", 0.05)  # noisy, so that a bias of the tenth part of it would show
    exact = gradients(function, hidden, head, target)
    draws = 200
    mean = [torch.zeros_like(x) for x in exact[1:]]
    noise = [0.0, 0.0]
    for seed in range(draws):
        loss, *sampled = gradients(function, hidden, head, target, backward="sampled", seed=1000 * seed)
        torch.testing.assert_close(loss, exact[0])
        for i, (x, true) in enumerate(zip(sampled, exact[1:], strict=True)):
            mean[i] += x / draws
            noise[i] += relative(x, true) ** 2 / draws
    for x, true, variance in zip(mean, exact[1:], noise, strict=True):
        assert 0.01 <= variance**0.5 <= 0.3  # columns were drawn
        assert relative(x, true) <= 1.3 * (variance / draws) ** 0.5


def test_each_column_stands_for_itself_on_average():
    """The mean of a column's factor, 0 where it is not drawn, is 1."""
    hidden, head, labels = student(vocab=512)
    g = (hidden @ head.T).softmax(1)
    g[torch.arange(64), labels] -= 1
    total, chance = torch.zeros(512, dtype=torch.float64), torch.zeros(512, dtype=torch.float64)
    draws = 4000
    for seed in range(draws):
        found = choose(g, seed)
        assert found is not None
        assert (found.ids.diff() > 0).all()
        assert (found.factor >= 1).all()
        total[found.ids] += found.factor / draws
        chance[found.ids] = 1 / found.factor
    seen = chance > 0
    assert seen.double().mean() > 0.9
    assert ((total - 1).abs() <= 6 * ((1 / chance - 1) / draws).sqrt() + 1e-9)[seen].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_little_noise_from_few_columns(dtype):
    hidden, head, labels = student(rows=256, vocab=16384, dtype=dtype)
    target = Target.hard(labels)
    exact = gradients(linear_cross_entropy, hidden.double(), head.double(), target)
    ours = gradients(linear_cross_entropy, hidden, head, target)
    sampled = gradients(linear_cross_entropy, hidden, head, target, backward="sampled", seed=3)
    for x, all_of_it, true in zip(sampled[1:], ours[1:], exact[1:], strict=True):
        assert relative(x.double(), true) <= relative(all_of_it.double(), true) + 1e-2
    g = (hidden.double() @ head.double().T).softmax(1)
    g[torch.arange(256), labels] -= 1
    assert len(choose(g, 0).ids) <= 0.25 * 16384


def test_a_seed_is_a_gradient():
    hidden, head, labels = student(dtype=torch.float32)
    options = {"backward": "sampled"}
    first, again, other = (
        gradients(linear_cross_entropy, hidden, head, Target.hard(labels), seed=seed, **options) for seed in (1, 1, 2)
    )
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[2], other[2])


def test_where_nothing_is_small_all_columns_are_taken():
    """An untrained model's gradient is spread over the vocabulary: sampled is then exact, to the bit."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(64, 8, generator=g) / 4, torch.randn(500, 8, generator=g)
    target = Target.hard(torch.randint(500, (64,), generator=g))
    exact = gradients(linear_cross_entropy, hidden, head, target)
    assert all(map(torch.equal, exact, gradients(linear_cross_entropy, hidden, head, target, backward="sampled")))
    nothing = target._replace(weight=torch.zeros(64))
    for part in gradients(linear_cross_entropy, hidden, head, nothing, backward="sampled"):
        assert part.abs().max() == 0


def test_each_rows_loss_draws_too():
    hidden, head, labels = student(dtype=torch.float32)
    options = {"backward": "sampled", "seed": 5}
    whole = gradients(linear_cross_entropy, hidden, head, Target.hard(labels), **options)
    rows = gradients(
        lambda h, w: linear_cross_entropy(h, w, Target.hard(labels), reduction="none", **options).sum(), hidden, head
    )
    for a, b in zip(rows, whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(bool(native.why_not()), reason="no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_native_sum_of_squares(dtype):
    g = torch.randn(37, 5003, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = torch.empty(5003)
    torch.ops.gemstill.column_squares(g, out)
    torch.testing.assert_close(out, g.float().square().sum(0))
