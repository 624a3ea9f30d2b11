"""Divergences from a teacher at hand, against the plain formulas with all logits at once, in float64."""

import pytest
import torch

from gemstill.core.errors import Error
from gemstill.ops.loss import linear_cross_entropy, linear_jensen_shannon, linear_reverse_kl
from gemstill.ops.target import OnlineTarget
from tests.ops.test_loss import Largest, blocks, gradients, inputs, relative

DIVERGENCES = {
    "cross_entropy": (linear_cross_entropy, {}),
    "reverse_kl": (linear_reverse_kl, {}),
    "jensen_shannon": (linear_jensen_shannon, {"beta": 0.3}),
}
each_kind = pytest.mark.parametrize("kind", DIVERGENCES)


def log_softmax(hidden, head, softcap, temperature):
    z = hidden @ head.T
    z = z.float() if z.dtype == torch.bfloat16 else z
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(1)


def plain(kind):
    def formula(hidden, head, teacher, softcap=None, temperature=1.0, hard=None, beta=0.5, reduction="sum"):
        q = log_softmax(hidden, head, softcap, temperature)
        low = hidden.dtype if hidden.dtype == torch.float64 else teacher.hidden.dtype
        p = log_softmax(teacher.hidden.to(low), teacher.head.to(low), teacher.softcap, teacher.temperature).to(q.dtype)
        if kind == "cross_entropy":
            rows = -(p.exp() * q).sum(1)
        elif kind == "reverse_kl":
            rows = (q.exp() * (q - p)).sum(1)
        else:
            m = (beta * p.exp() + (1 - beta) * q.exp()).log()
            rows = beta * (p.exp() * (p - m)).sum(1) + (1 - beta) * (q.exp() * (q - m)).sum(1)
        if hard is not None:
            rows = (1 - hard[1]) * rows - hard[1] * q.gather(1, hard[0][:, None])[:, 0]
        rows = rows * teacher.weight.to(q.dtype)
        return rows if reduction == "none" else rows.sum()

    return formula


def pair(rows, vocab, softcap=None, temperature=1.0, dtype=torch.float64, scale=1.0):
    hidden, head, target = inputs(rows, 4, vocab, 1)
    g = torch.Generator().manual_seed(3)
    theirs = [torch.randn(n, 7, generator=g, dtype=torch.float64).to(dtype) for n in (rows, vocab)]
    teacher = OnlineTarget(*theirs, softcap, temperature, target.weight)
    return (hidden * scale).to(dtype), head.to(dtype), teacher, target.ids[:, 0]


@each_kind
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap, reduction, kind, monkeypatch):
    function, more = DIVERGENCES[kind]
    hidden, head, teacher, labels = pair(6, 9, softcap, 1.3)
    blocks(monkeypatch, 4, 9)
    more = more | {"softcap": softcap, "temperature": 0.7, "hard": (labels, 0.25), "reduction": reduction}
    leaves = (hidden.requires_grad_(), head.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: function(h, w, teacher, **more), leaves, nondet_tol=1e-12)


@each_kind
@pytest.mark.parametrize("tile", [2, 1000])
@pytest.mark.parametrize("hard", [True, False], ids=["mixed", "pure"])
@pytest.mark.parametrize(
    ("caps", "temperatures"), [((None, None), (1, 1)), ((30.0, 4.0), (1, 2)), ((5.0, 90.0), (0.7, 1))], ids=str
)
def test_value_and_gradients(caps, temperatures, hard, tile, kind, monkeypatch):
    """float64 to rounding, float32 (where the native kernel is) against float64."""
    function, more = DIVERGENCES[kind]
    hidden, head, teacher, labels = pair(9, 30, caps[0], temperatures[0])
    more = more | {"softcap": caps[1], "temperature": temperatures[1], "hard": (labels, 0.25) if hard else None}
    blocks(monkeypatch, tile, 30)
    expected = gradients(plain(kind), hidden, head, teacher, **more)
    torch.testing.assert_close(gradients(function, hidden, head, teacher, **more), expected)
    single = teacher._replace(hidden=teacher.hidden.float(), head=teacher.head.float())
    for ours, true in zip(gradients(function, hidden.float(), head.float(), single, **more), expected, strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours.double(), true) <= 2e-5


@each_kind
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_bfloat16_is_no_further_from_float64_than_the_plain_formula(softcap, kind):
    function, more = DIVERGENCES[kind]
    hidden, head, teacher, _ = pair(128, 200, softcap, dtype=torch.bfloat16)
    more = more | {"softcap": softcap}
    exact = gradients(plain(kind), hidden.double(), head.double(), teacher, **more)
    formula = gradients(plain(kind), hidden, head, teacher, **more)
    ours = gradients(function, hidden, head, teacher, **more)
    for mine, theirs, true in zip(ours, formula, exact, strict=True):
        assert relative(mine.double(), true) <= 1.5 * relative(theirs.double(), true) + 1e-6


@each_kind
def test_a_student_that_is_its_teacher_has_no_gradient(kind):
    function, more = DIVERGENCES[kind]
    hidden, head, target = inputs(9, 4, 30, 1, dtype=torch.float32)
    teacher = OnlineTarget(hidden, head, 5.0, 2.0, target.weight)
    loss, *parts = gradients(function, hidden, head, teacher, softcap=5.0, temperature=2.0, **more)
    for part in parts:
        assert part.abs().max() <= 1e-6
    if kind != "cross_entropy":
        assert abs(loss) <= 1e-5


@each_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.0, 1e2, 1e4])
def test_extreme_logits_are_finite(size, dtype, kind):
    function, more = DIVERGENCES[kind]
    hidden, head, teacher, _ = pair(9, 30, dtype=dtype)
    for mine, theirs in ((size, 1.0), (1.0, size), (size, -size)):
        there = teacher._replace(hidden=teacher.hidden * theirs)
        assert all(part.isfinite().all() for part in gradients(function, hidden * mine, head, there, **more))


@each_kind
def test_never_holds_tokens_by_vocabulary(kind, monkeypatch):
    function, more = DIVERGENCES[kind]
    hidden, head, teacher, labels = pair(500, 300, 30.0, dtype=torch.float32)
    blocks(monkeypatch, 10, 300)
    with Largest() as seen:
        function(hidden.requires_grad_(), head.requires_grad_(), teacher, hard=(labels, 0.1), **more).backward()
    assert seen.elements <= max(10 * 300, 500 * 7, 300 * 7)


def test_a_teacher_in_another_dtype():
    hidden, head, teacher, _ = pair(9, 30)
    expected = gradients(linear_cross_entropy, hidden.float(), head.float(), teacher)
    mixed = teacher._replace(hidden=teacher.hidden.float(), head=teacher.head.bfloat16())
    for ours, true in zip(gradients(linear_cross_entropy, hidden.float(), head.float(), mixed), expected, strict=True):
        assert relative(ours, true) <= 2e-2


def test_words_for_bad_input():
    hidden, head, teacher, labels = pair(5, 7)
    sparse = inputs(5, 4, 7, 2)[2]
    for function in (linear_reverse_kl, linear_jensen_shannon):
        with pytest.raises(Error, match="a sparse target biases"):
            function(hidden, head, sparse)
    for beta in (0.0, 1.0):
        with pytest.raises(Error, match="beta is"):
            linear_jensen_shannon(hidden, head, teacher, beta=beta)
    with pytest.raises(Error, match="the teacher's vocabulary has 6 entries, the student's 7"):
        linear_cross_entropy(hidden, head, teacher._replace(head=teacher.head[:6]))
    with pytest.raises(Error, match="does not fit 5 rows"):
        linear_cross_entropy(hidden, head, teacher._replace(hidden=teacher.hidden[:4]))
    with pytest.raises(Error, match="temperature 0"):
        linear_cross_entropy(hidden, head, teacher._replace(temperature=0.0))
    with pytest.raises(RuntimeError):
        linear_reverse_kl(hidden.float(), head.float(), teacher, hard=(labels.fill_(7), 0.5))
