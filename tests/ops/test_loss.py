"""linear_cross_entropy against the plain formula, written with all logits at once, in float64."""

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gemstill.core.errors import Error
from gemstill.ops import logits, products
from gemstill.ops.loss import linear_cross_entropy, log_probs
from gemstill.ops.target import Target


def plain(hidden, head, target, softcap=None, hard=None, temperature=1.0, rest="drop", reduction="sum"):
    """Σ weight · ((Σp)·lse(z) − Σ p·z), p dense."""
    z = hidden @ head.to(hidden.dtype).T
    z = z.float() if z.dtype == torch.bfloat16 else z
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    log_q = z.log_softmax(1)
    p = torch.zeros_like(z).scatter_add(1, target.ids, target.probs.to(z.dtype))
    if rest == "renormalise":
        p = p / p.sum(1, keepdim=True)
    rows = p.sum(1) * z.logsumexp(1) - (p * z).sum(1)
    if rest == "bucket":
        outside = log_q.masked_fill(p > 0, -torch.inf).logsumexp(1)
        left = 1 - p.sum(1)
        rows = rows - torch.where(left > 1e-6, left * outside, 0.0)
    if hard is not None:
        rows = (1 - hard[1]) * rows - hard[1] * log_q.gather(1, hard[0][:, None])[:, 0]
    weight = target.weight.to(z.dtype)
    return (
        rows * weight if reduction == "none" else (rows * weight).sum() / (weight.sum() if reduction == "mean" else 1)
    )


def inputs(rows, width, vocab, slots, seed=0, dtype=torch.float64):
    """hidden, head, and a target with unused slots, a doubled id in one row, and weights that are 0 in places."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=g, dtype=torch.float64) * 2
    head = torch.randn(vocab, width, generator=g, dtype=torch.float64)
    ids = torch.rand(rows, vocab, generator=g).argsort(1)[:, :slots]
    # They sum to one only on average, as a drawn target's may; in 1,024ths, so that float32 mixes them exactly.
    probs = (torch.rand(rows, slots, generator=g) * 1536 / slots).round() / 1024
    if slots > 1 and rows > 1:
        probs[0, slots // 2 :] = 0.0
        ids[0, slots // 2 :] = 0
        ids[1, 1] = ids[1, 0]
    weight = torch.rand(rows, generator=g)
    weight[1::3] = 0.0
    return hidden.to(dtype), head.to(dtype), Target(ids, probs, weight)


def blocks(monkeypatch, rows, vocab):
    """Products over `rows` tokens at once, plain operations over half of them."""
    monkeypatch.setattr(products, "ROWS", rows)
    monkeypatch.setattr(products, "ELEMENTS", 0)
    monkeypatch.setattr(logits, "TILE", rows // 2 * vocab)


def gradients(function, hidden, head, *args, **options):
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss = function(hidden, head, *args, **options)
    loss.backward()
    return loss.detach(), hidden.grad, head.grad


SHAPES = [(1, 4, 3, 1), (7, 5, 11, 1), (7, 5, 11, 4), (13, 16, 29, 29), (40, 8, 101, 6)]
REST, TEMPERATURES = ["drop", "renormalise", "bucket"], [1.0, 0.5, 2.0]
OPTIONS = list(
    itertools.product(SHAPES, [None, 30.0, 2.0, 90.0], [None, 0.0, 0.25, 1.0], [None, 1, 3], REST, TEMPERATURES)
)


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("rest", ["drop", "renormalise", "bucket"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("fraction", "slots"), [(None, 1), (0.25, 3)])
def test_gradcheck(rest, softcap, fraction, slots, monkeypatch):
    hidden, head, target = inputs(6, 4, 9, slots)
    blocks(monkeypatch, 2, 9)
    hard = None if fraction is None else (torch.arange(6), fraction)
    leaves = (hidden.requires_grad_(), head.requires_grad_())
    for reduction in ("sum", "none"):
        options = {"softcap": softcap, "hard": hard, "rest": rest, "temperature": 1.3, "reduction": reduction}
        assert torch.autograd.gradcheck(
            lambda h, w, options=options: linear_cross_entropy(h, w, target, **options) * 1.7, leaves, nondet_tol=1e-12
        )


@pytest.mark.parametrize(
    ("shape", "softcap", "fraction", "tile", "rest", "temperature"), random.Random(0).sample(OPTIONS, 90), ids=str
)
def test_value_and_gradients(shape, softcap, fraction, tile, rest, temperature, monkeypatch):
    """float64 to rounding; float32 and a float32 head under bfloat16 against float64. tile: rows at once."""
    hidden, head, target = inputs(*shape)
    labels = torch.randint(shape[2], (shape[0],), generator=torch.Generator().manual_seed(5))
    hard = None if fraction is None else (labels, fraction)
    options = {"softcap": softcap, "hard": hard, "rest": rest, "temperature": temperature}
    if rest == "bucket" and shape[3] == shape[2]:  # nothing is left for the bucket
        target = target._replace(probs=target.probs / target.probs.sum(1, keepdim=True))
    if tile:
        blocks(monkeypatch, tile, shape[2])
    exact = gradients(plain, hidden, head, target, **options)
    for ours, theirs in zip(gradients(linear_cross_entropy, hidden, head, target, **options), exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    single = gradients(linear_cross_entropy, hidden.float(), head.float(), target, **options)
    assert all(part.dtype == torch.float32 for part in single)
    for ours, theirs in zip(single, exact, strict=True):
        assert relative(ours.double(), theirs) <= 1e-5 or theirs.norm() < 1e-4


@pytest.mark.parametrize("peaked", [1.0, 4.0], ids=["spread", "confident"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("slots", [1, 5])
def test_bfloat16_is_no_further_from_float64_than_the_plain_formula(softcap, slots, peaked):
    """A confident model's gradient is softmax − 1, which bfloat16 cannot tell from 0: it must be taken in float32."""
    hidden, head, target = inputs(256, 32, 200, slots)
    hidden, head = (hidden * peaked / 4).bfloat16(), head.bfloat16()
    if slots == 1:  # labels that the model knows
        best = (hidden.double() @ head.double().T).argmax(1)
        target = Target.hard(torch.where(torch.arange(256) % 8 > 0, best, target.ids[:, 0]), target.weight)
    exact = gradients(plain, hidden.double(), head.double(), target, softcap=softcap)
    formula = gradients(plain, hidden, head, target, softcap=softcap)
    ours = gradients(linear_cross_entropy, hidden, head, target, softcap=softcap)
    assert ours[0].dtype == torch.float32
    for mine, theirs, true in zip(ours, formula, exact, strict=True):
        error, bar = relative(mine.double(), true), relative(theirs.double(), true)
        assert error <= 1.5 * bar + 1e-6, f"{error:.1e} against {bar:.1e}"


def test_gradients_of_the_rows_a_confident_model_is_right_about():
    """The same row by row, for the tenth with the largest error: no row's gradient may drown in rounding."""
    hidden, head, _ = inputs(128, 32, 50, 1)
    hidden, head = (hidden * 0.9).bfloat16(), head.bfloat16()
    best = (hidden.double() @ head.double().T).argmax(1)
    target = Target.hard(best)
    exact = gradients(plain, hidden.double(), head.double(), target, softcap=30.0)[1]
    formula = gradients(plain, hidden, head, target, softcap=30.0)[1]
    ours = gradients(linear_cross_entropy, hidden, head, target, softcap=30.0)[1]
    size = exact.norm(dim=1).clamp_min(1e-12)
    error, bar = ((g.double() - exact).norm(dim=1) / size for g in (ours, formula))
    assert error.quantile(0.9) <= 1.5 * bar.quantile(0.9)


def test_one_large_entry_does_not_swallow_many_small_ones():
    """A likely token among 262,143 that are each less than half a unit in the last place of it."""
    small = -17.0
    hidden, head = torch.ones(3, 1), torch.full((262_144, 1), small)
    head[5] = 0
    found = log_probs(hidden, head, torch.tensor([5, 5, 5]))
    due = -math.log1p((len(head) - 1) * math.exp(small))
    assert found.tolist() == pytest.approx([due] * 3, abs=2e-6)


def test_head_gradient_is_summed_in_float32(monkeypatch):
    """Many tiles each add little: summed in bfloat16, the sum stops growing (Liger-Kernel#830)."""
    hidden, head, target = inputs(2048, 8, 16, 1)
    hidden = hidden.abs().bfloat16() / 64
    target = Target.hard(torch.zeros(2048, dtype=torch.int64))
    exact = gradients(plain, hidden.double(), head.bfloat16().double(), target)[2]
    blocks(monkeypatch, 1, 16)
    for stored in (torch.float32, torch.bfloat16):
        d_head = gradients(linear_cross_entropy, hidden, head.bfloat16().to(stored), target)[2]
        assert d_head.dtype == stored
        assert relative(d_head.double(), exact) <= 5e-3


@pytest.mark.parametrize("tile", [3, 1000])
def test_tied_head(tile, monkeypatch):
    """The head is the embedding too: its gradients from both ends add up."""
    _, head, target = inputs(10, 6, 17, 3)
    tokens = torch.arange(10)
    blocks(monkeypatch, tile, 17)
    results = []
    for function in (plain, linear_cross_entropy):
        weight = head.clone().requires_grad_()
        function(F.embedding(tokens, weight).tanh(), weight, target, softcap=5.0).backward()
        results.append(weight.grad)
    torch.testing.assert_close(*results)


def test_hard_labels_are_torchs_cross_entropy():
    hidden, head, _ = inputs(20, 6, 17, 1)
    labels = torch.randint(17, (20,), generator=torch.Generator().manual_seed(0))
    loss = linear_cross_entropy(hidden, head, Target.hard(labels))
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ head.T, labels, reduction="sum"))


def test_only_what_needs_a_gradient_gets_one():
    hidden, head, target = inputs(5, 4, 7, 2)
    expected = gradients(plain, hidden, head, target)
    h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    linear_cross_entropy(h, head, target).backward()
    linear_cross_entropy(hidden, w, target).backward()
    torch.testing.assert_close(h.grad, expected[1])
    torch.testing.assert_close(w.grad, expected[2])
    assert not linear_cross_entropy(hidden, head, target).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(h, w, target), expected[0])


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return out


@pytest.mark.parametrize("slots", [1, 4])
def test_never_holds_tokens_by_vocabulary(slots, monkeypatch):
    rows, width, vocab = 500, 4, 300
    hidden, head, target = inputs(rows, width, vocab, slots, dtype=torch.float32)
    hidden.requires_grad_()
    head.requires_grad_()
    with Largest() as seen:  # the instrument works: the plain formula is caught
        plain(hidden, head, target).backward()
    assert seen.elements >= rows * vocab
    blocks(monkeypatch, 10, vocab)
    labels = torch.zeros(rows, dtype=torch.int64)
    with Largest() as seen:
        linear_cross_entropy(hidden, head, target, softcap=30.0, hard=(labels, 0.1)).backward()
        log_probs(hidden, head, labels, softcap=30.0)
    assert seen.elements <= max(10 * vocab, rows * width, vocab * width, rows * (slots + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0, 200.0])
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4])
def test_extreme_logits_are_finite(size, softcap, dtype):
    hidden, head, target = inputs(9, 4, 30, 3, dtype=dtype)
    parts = gradients(linear_cross_entropy, hidden * size, head, target, softcap=softcap)
    assert all(part.isfinite().all() for part in parts)


def test_rows_of_weight_zero_count_for_nothing():
    hidden, head, target = inputs(9, 4, 30, 3)
    loss, d_hidden, _ = gradients(linear_cross_entropy, hidden, head, target)
    assert d_hidden[target.weight == 0].abs().max() == 0
    keep = target.weight > 0
    kept = Target(target.ids[keep], target.probs[keep], target.weight[keep])
    torch.testing.assert_close(linear_cross_entropy(hidden[keep], head, kept), loss)
    nothing = Target(target.ids, target.probs, torch.zeros(9))
    assert all(part.abs().max() == 0 for part in gradients(linear_cross_entropy, hidden, head, nothing))


def test_no_rows():
    hidden, head, target = inputs(0, 4, 7, 2)
    loss, d_hidden, d_head = gradients(linear_cross_entropy, hidden, head, target)
    assert loss == 0
    assert d_hidden.shape == (0, 4)
    assert d_head.abs().max() == 0
    assert log_probs(hidden, head, torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("tile", [2, 1000])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probs(softcap, tile, monkeypatch):
    hidden, head, target = inputs(9, 4, 30, 1)
    blocks(monkeypatch, tile, 30)
    z = hidden @ head.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = z.log_softmax(1).gather(1, target.ids)[:, 0]
    torch.testing.assert_close(log_probs(hidden, head, target.ids[:, 0], softcap=softcap), expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_compiled_is_the_same(softcap, dtype):
    hidden, head, target = inputs(64, 8, 50, 3, dtype=dtype)
    eager = gradients(linear_cross_entropy, hidden, head, target, softcap=softcap)
    fused = gradients(linear_cross_entropy, hidden, head, target, softcap=softcap, compiled=True)
    for a, b in zip(eager, fused, strict=True):
        assert relative(a.double(), b.double()) <= (1e-5 if dtype == torch.float32 else 5e-3)


def test_shapes_that_do_not_fit_are_refused():
    hidden, head, target = inputs(5, 4, 7, 2)
    with pytest.raises(Error, match=r"\[N, D\] and \[V, D\]"):
        linear_cross_entropy(hidden[:, :3], head, target)
    with pytest.raises(Error, match="does not fit 4 rows"):
        linear_cross_entropy(hidden[:4], head, target)
    with pytest.raises(Error, match="does not fit"):
        linear_cross_entropy(hidden, head, target._replace(probs=target.probs[:, :1]))
    with pytest.raises(Error, match="fraction of hard labels"):
        linear_cross_entropy(hidden, head, target, hard=(torch.zeros(5, dtype=torch.int64), 1.5))
