"""The native kernels against the plain PyTorch operations that they stand for, values and gradients."""

import os
import subprocess
import sys

import pytest
import torch

from gemstill.core.errors import Error
from gemstill.core.machine import processor_flags
from gemstill.ops import native
from gemstill.ops.attention import attention, make_mask
from gemstill.ops.fused import geglu, joint_linear, rms_norm, rotated_heads
from gemstill.ops.loss import linear_cross_entropy, linear_jensen_shannon, linear_reverse_kl
from gemstill.ops.target import OnlineTarget, Target

pytestmark = pytest.mark.skipif(bool(native.why_not()), reason=f"no native kernels: {native.why_not()}")
ROOMS = ("attention", "fused", "logits", "columns")


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def run(function, inputs, dtype):
    """The results of `function` of inputs in `dtype`, and the gradients of a fixed weighing of them."""
    leaves = [x.detach().to(dtype, copy=True).requires_grad_() for x in inputs]
    results = tensors(function(*leaves))
    sum((r * draw(*r.shape, seed=9).to(r.dtype)).sum() for r in results).backward()
    return [x.detach().double() for x in [*results, *(leaf.grad for leaf in leaves)]]


@pytest.fixture
def plainly(monkeypatch):
    """Runs a function with plain operations only."""

    def call(function, inputs, dtype):
        with monkeypatch.context() as patch:
            for room in ROOMS:
                patch.setattr(f"gemstill.ops.{room}.kernels", lambda x: None)
            return run(function, inputs, dtype)

    return call


def check(function, inputs, plainly):
    """float32 equal to 1e-5 of the largest value; bfloat16 no further from float64 than the plain operations."""
    exact = plainly(function, inputs, torch.float64)
    for ours, true in zip(run(function, inputs, torch.float32), exact, strict=True):
        assert (ours - true).abs().max() <= 1e-5 * true.abs().max().clamp(min=1.0)
    low = [x.bfloat16().float() for x in inputs]
    exact = plainly(function, low, torch.float64)
    ours, plain = run(function, low, torch.bfloat16), plainly(function, low, torch.bfloat16)
    for x, y, true in zip(ours, plain, exact, strict=True):
        errors = [(z - true).square().mean().sqrt() for z in (x, y)]
        assert errors[0] <= 1.5 * errors[1] + 1e-9


@pytest.mark.parametrize("width", [8, 33, 128])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(width, residual, plainly):
    inputs = [draw(3, 70, width), draw(width, seed=1, scale=0.3), *([draw(3, 70, width, seed=2)] if residual else [])]
    check(lambda x, w, *r: rms_norm(x, w, 1e-6, *r), inputs, plainly)


@pytest.mark.parametrize("width", [5, 96])
def test_geglu(width, plainly):
    check(geglu, [draw(2, 30, 2 * width, scale=3.0)], plainly)


def test_geglu_of_large_values_is_finite():
    first, second = geglu(torch.tensor([-1e4, 1e4, 2.0, 2.0])).tolist()
    assert abs(first) < 1e-30
    assert second == 2e4


def test_joint_linear(plainly):
    check(joint_linear, [draw(2, 9, 16), draw(24, 16, seed=1), draw(8, 16, seed=2)], plainly)
    check(joint_linear, [draw(2, 9, 16), draw(24, 16, seed=1)], plainly)


def test_joint_linear_of_other_dtypes():
    x, w = draw(4, 16).bfloat16().requires_grad_(), draw(8, 16, seed=1).requires_grad_()
    joint_linear(x, w).sum().backward()
    assert (x.grad.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("batch", "groups", "rows"), [(1, 1, 1), (2, 2, 3)])
def test_rotated_heads(batch, groups, rows, plainly):
    angles = draw(batch, 1, 11, 6, seed=3)
    turn = (angles.cos(), angles.sin())
    joint = draw(batch, 11, (groups * rows + 2 * groups) * 12)
    check(lambda x: rotated_heads(x, groups, rows, turn, 0.3), [joint], plainly)


@pytest.mark.parametrize("softcap", [None, 5.0, 50.0, 90.0])
@pytest.mark.parametrize(("tokens", "window"), [(7, None), (300, None), (300, 40), (550, 100), (301, 64)])
def test_attention(tokens, window, softcap, plainly):
    """Whole, in tiles and in bands, with two documents and padding behind them."""
    documents = torch.zeros(2, tokens, dtype=torch.int64)
    documents[1, tokens // 3 :] = 1
    documents[1, tokens - 2 :] = -1
    positions = torch.arange(tokens).expand(2, -1).clone()
    positions[1, tokens // 3 :] -= tokens // 3
    mask = make_mask(positions, positions, documents, documents, window, ordered=True)
    shapes = ((2, 2, tokens, 2, 8), (2, 2, tokens, 8), (2, 2, tokens, 8))
    inputs = [draw(*shape, seed=seed, scale=1.5) for seed, shape in enumerate(shapes)]
    check(lambda q, k, v: attention(q, k, v, mask, softcap=softcap), inputs, plainly)


@pytest.mark.parametrize("softcap", [None, 50.0])
def test_attention_over_holes(softcap, plainly):
    """A ring cache lies in any order: keys that a query sees are then not neighbours."""
    slots = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    slots[::7] = -1
    keys, queries = slots[None], torch.arange(60, 70)[None]
    mask = make_mask(queries, keys, queries.clamp(max=0), keys.clamp(max=0), 33)
    inputs = [draw(1, 2, 10, 2, 8), draw(1, 2, 70, 8, seed=1), draw(1, 2, 70, 8, seed=2)]
    check(lambda q, k, v: attention(q, k, v, mask, softcap=softcap), inputs, plainly)


@pytest.mark.parametrize("rest", ["drop", "bucket"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("softcap", [None, 4.0, 30.0, 80.0])
@pytest.mark.parametrize("vocab", [11, 5000])
def test_loss(vocab, softcap, temperature, rest, plainly):
    ids = torch.randint(0, vocab, (17, 3), generator=torch.Generator().manual_seed(0))
    ids[3] = ids[3, 0]  # the same entry three times
    probs = torch.rand(17, 3, generator=torch.Generator().manual_seed(1)) / 2
    probs[5:7, 1] = 0.0
    target = Target(ids, probs, torch.arange(17.0) % 3)
    inputs = [draw(17, 16, scale=2.0), draw(vocab, 16, seed=1)]
    options = {"softcap": softcap, "temperature": temperature, "rest": rest, "hard": (ids[:, 2], 0.25)}
    check(lambda h, w: linear_cross_entropy(h, w, target, **options), inputs, plainly)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_reverse_kl, linear_jensen_shannon])
@pytest.mark.parametrize("caps", [(None, None), (4.0, 30.0), (80.0, None)], ids=str)
@pytest.mark.parametrize("vocab", [11, 5000])
def test_divergences(vocab, caps, function, plainly):
    """The teacher's side is in float32 throughout: of both dtypes at once."""
    weight = torch.arange(17.0) % 3
    teacher = OnlineTarget(draw(17, 8, seed=2), draw(vocab, 8, seed=3), caps[0], 1.3, weight)
    labels = torch.randint(0, vocab, (17,), generator=torch.Generator().manual_seed(0))
    inputs = [draw(17, 16, scale=2.0), draw(vocab, 16, seed=1)]
    for options in ({"temperature": 0.7}, {"hard": (labels, 0.25)}):
        check(lambda h, w, o=options: function(h, w, teacher, softcap=caps[1], **o), inputs, plainly)


def test_a_loss_that_is_not_a_number_stays_so():
    hidden = torch.full((2, 4), float("nan"))
    assert linear_cross_entropy(hidden, draw(6, 4), Target.hard(torch.tensor([1, 2])), softcap=30.0).isnan()


def test_an_id_outside_the_vocabulary():
    with pytest.raises(RuntimeError, match="outside"):
        linear_cross_entropy(draw(2, 4), draw(6, 4), Target.hard(torch.tensor([1, 6])))


def test_the_number_of_threads_changes_nothing():
    def work():
        x, w = draw(3, 300, 64).requires_grad_(), draw(64, seed=1).requires_grad_()
        rms_norm(x, w, 1e-6).square().sum().backward()
        return [x.grad, w.grad]

    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(work())
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def child(**variables):
    code = "from gemstill.ops.native import why_not; print(why_not())"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    return done.stdout.strip(), done.stderr


def test_the_choice_is_the_users(tmp_path):
    assert child(GEMSTILL_KERNELS="torch")[0] == "GEMSTILL_KERNELS is torch"
    nowhere = {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path), "CXX": ""}
    assert child(**nowhere, GEMSTILL_KERNELS="")[0] == "there is no C++ compiler"
    assert Error.__name__ in child(**nowhere, GEMSTILL_KERNELS="native")[1]
    assert "is no choice" in child(GEMSTILL_KERNELS="fast")[1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", native.SETS)
def test_an_instruction_set_can_be_asked_for(name):
    """It is built and used where the processor has it; elsewhere it is told what is missing."""
    answer, error = child(GEMSTILL_KERNELS=name)
    if native.SETS[name][1] <= processor_flags():
        assert answer == "None", error
    else:
        assert "this processor has no" in error


def test_an_answer_does_not_wait_for_a_compiler(tmp_path):
    """Without gradients the kernels are not built; with them, or once they are there, they are used."""
    code = """
import torch
from gemstill.ops.native import kernels
x = torch.zeros(1)
with torch.inference_mode():
    print(kernels(x) is not None)
print(kernels(x) is not None)
with torch.inference_mode():
    print(kernels(x) is not None)
"""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "GEMSTILL_KERNELS": ""}
    done = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert [out.split() for out in done] == [["False", "True", "True"], ["True", "True", "True"]]
