"""Training through rounding: what the network computes with, what learns, and what the gradient is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.checkpoint.gguf_models import GEMMA3
from torch import Tensor

from gemstill.data.calibration import Calibration
from gemstill.distill.teachers import ModelTeacher
from gemstill.model.readout import logits
from gemstill.model.transformer import Transformer
from gemstill.ops.rounding import Rounded, nearest, search_scales
from gemstill.train.divergence import Divergence, divergence, logits_of
from gemstill.train.rounded import FromReference, Pieces, RoundedMatrix, likely, round_model

SHAPE = replace(GEMMA3, vocab_size=96, num_layers=2, layer_pattern=2, hidden_size=32, intermediate_size=64)


def rounded(weight: Tensor) -> Rounded:
    return nearest(weight.detach(), search_scales(weight.detach()))


def made(rows: Tensor | None = None, dtype: torch.dtype = torch.float32) -> tuple[Rounded, RoundedMatrix]:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    start = rounded(weight)
    return start, RoundedMatrix(start, weight, dtype, rows)


def reference() -> Transformer:
    return Transformer(SHAPE, seed=1, compute_dtype=torch.float32)


def start_of(model: Transformer) -> dict[str, Rounded]:
    return {name: rounded(p) for name, p in model.named_parameters() if p.ndim == 2}


def pieces(count: int = 6, length: int = 16) -> Calibration:
    tokens = torch.randint(0, 96, (count, length), generator=torch.Generator().manual_seed(2))
    lengths = torch.full((count,), length)
    lengths[-1] = 9
    return Calibration(tokens, lengths, "made up")


def test_it_begins_as_it_was_rounded() -> None:
    start, matrix = made()
    assert torch.equal(matrix.weight, start.weights())
    now = matrix.rounded()
    assert torch.equal(now.codes, start.codes)
    assert torch.equal(now.scales, start.scales)


def test_the_gradient_passes_through_the_rounding() -> None:
    """As if the weight were d·exp(shift)·code, unless the code lies beyond the last one."""
    start, matrix = made()
    with torch.no_grad():
        matrix.codes[0, 0], matrix.codes[1, 1] = 7.6, -8.6
    grad = torch.randn(12, 64, generator=torch.Generator().manual_seed(3))
    (matrix.weight * grad).sum().backward()
    scales = start.scales.repeat_interleave(32, 1)
    expected = grad * scales
    expected[0, 0] = expected[1, 1] = 0
    torch.testing.assert_close(matrix.codes.grad, expected)
    codes = matrix.codes.detach().round().clamp(-8, 7)
    torch.testing.assert_close(matrix.shift.grad, (grad * scales * codes).view(12, 2, 32).sum(-1))


def test_some_rows_learn() -> None:
    rows = torch.tensor([1, 4, 5])
    start, matrix = made(rows)
    ids = torch.tensor([[0, 1, 4, 11]])
    assert torch.equal(matrix.weight, start.weights()[rows])  # of a head in training, these alone
    found = matrix(ids)
    assert torch.equal(found, start.weights()[ids])
    found.sum().backward()
    assert matrix.codes.grad is not None
    assert matrix.codes.grad.abs().sum(1).gt(0).tolist() == [True, True, False]
    with torch.no_grad():
        matrix.codes[1] = 3
    matrix.eval()
    changed = matrix.weight.ne(start.weights()).any(1)
    assert changed.nonzero().flatten().tolist() == [4]
    assert torch.equal(matrix(ids), matrix.weight[ids])
    assert torch.equal(matrix.rounded().weights(), matrix.weight)


def test_a_network_of_rounded_matrices_is_the_rounded_network() -> None:
    model = reference()
    start = start_of(model)
    learner, matrices = round_model(model, start, None)
    other = Transformer(SHAPE, compute_dtype=torch.float32)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    other.load_state_dict(weights | {name: each.weights() for name, each in start.items()})
    tokens = pieces().tokens
    torch.testing.assert_close(learner(tokens), other(tokens))
    assert set(matrices) == set(start)
    learns = {name.rsplit(".", 1)[1] for name, _ in learner.named_parameters()}
    assert learns == {"codes", "shift", "weight"}  # the last of norms


@pytest.mark.parametrize("part", [False, True], ids=["all rows", "some rows"])
def test_the_loss_is_the_cross_entropy_given_the_columns(part: bool) -> None:
    model, text = reference(), pieces()
    rows = likely(ModelTeacher(model), text, 40) if part else None
    learner, _ = round_model(model, start_of(model), rows)
    objective = FromReference(ModelTeacher(model), rows)
    prepared = objective.prepare(Pieces(text, 6, 0).batch(0), 0)
    assert objective.weight(prepared) == int(text.lengths.sum())
    learner.train()
    found = objective.loss(learner, prepared)[0] / objective.weight(prepared)
    learner.eval()
    columns = torch.arange(96) if rows is None else rows
    with torch.no_grad():
        p = model(text.tokens, readout=logits)[text.real][:, columns].log_softmax(1)
        q = learner(text.tokens, readout=logits)[text.real][:, columns].log_softmax(1)
    torch.testing.assert_close(found, -(p.exp() * q).sum(1).mean(), rtol=1e-4, atol=1e-5)


def test_every_piece_comes_once_a_turn() -> None:
    batches = Pieces(pieces(6), 4, seed=1)
    seen = torch.cat([batches.batch(step).tokens for step in range(3)])
    for turn in (seen[:6], seen[6:]):
        assert sorted(turn.tolist()) == sorted(pieces(6).tokens.tolist())
    assert seen[:6].tolist() != seen[6:].tolist()
    assert torch.equal(batches.batch(2).tokens, Pieces(pieces(6), 4, seed=1).batch(2).tokens)


def test_likely_are_what_is_there_and_what_is_expected() -> None:
    model, text = reference(), pieces()
    with torch.no_grad():
        expected = model(text.tokens)[text.real].softmax(1).sum(0)
    counts = text.tokens[text.real].bincount(minlength=96)
    best = (expected + counts).argsort(descending=True)[:10].sort().values
    assert torch.equal(likely(ModelTeacher(model), text, 10), best)


def test_divergence_against_the_plain_formulas() -> None:
    model, text = reference(), pieces()
    other = Transformer(SHAPE, seed=2, compute_dtype=torch.float32)
    figures = divergence(logits_of(model), logits_of(other), text).figures()
    with torch.no_grad():
        p, q = (net(text.tokens).double().log_softmax(2) for net in (model, other))
    real, next_ = text.real, text.real.roll(-1, 1)
    next_[:, -1] = False
    assert figures["tokens"] == int(real.sum())
    assert figures["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(2)[real].mean()), rel=1e-5)
    assert figures["agreement"] == pytest.approx(float((p.argmax(2) == q.argmax(2))[real].double().mean()))
    labels = text.tokens.roll(-1, 1)[..., None]
    for name, each in (("perplexity", q), ("reference_perplexity", p)):
        nll = -each.gather(2, labels)[..., 0][next_].mean()
        assert figures[name] == pytest.approx(float(nll.exp()), rel=1e-5)
    assert divergence(logits_of(model), logits_of(model), text).figures()["kl"] == pytest.approx(0, abs=1e-6)
    assert Divergence().figures()["kl"] == 0
