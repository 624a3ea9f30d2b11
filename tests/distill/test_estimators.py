"""What each estimator promises: unbiased where it says so, exact where it says so, small, no id twice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemstill.core.errors import Error
from gemstill.distill import mass
from gemstill.distill.estimators import Estimator, dense, join, sample, threshold, topk
from gemstill.distill.mass import LANES


def distributions(rows, vocab, scale=2.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * scale).softmax(1)


def uniform(*shape, seed=1):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def as_dense(draw, vocab):
    return torch.zeros(len(draw.ids), vocab, dtype=torch.float64).scatter_add_(1, draw.ids, draw.probs)


def assert_sound(draw, vocab):
    """Ids within the vocabulary and distinct, weights positive, their sum one, nothing in unused slots."""
    used = torch.arange(draw.ids.shape[1]) < (draw.exact + draw.drawn)[:, None]
    assert bool((draw.probs[used] > 0).all())
    assert not bool(draw.probs[~used].any())
    assert int(draw.ids.min()) >= 0
    assert int(draw.ids.max()) < vocab
    torch.testing.assert_close(draw.probs.sum(1), torch.ones(len(draw.ids), dtype=torch.float64), rtol=0, atol=1e-12)
    for ids, mask in zip(draw.ids, used, strict=True):
        assert len(ids[mask].unique()) == int(mask.sum())


@pytest.mark.parametrize("name", ["threshold(0.1)", "threshold(0.02)", "sample(1)", "sample(8)"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_the_mean_of_many_draws_is_the_teachers_distribution(name, scale):
    vocab, times = 101, 20_000
    p = distributions(1, vocab, scale)
    estimator = Estimator.parse(name)
    draw = estimator(p.expand(times, -1), uniform(times, max(1, estimator.uniforms)))
    assert_sound(draw._replace(**{k: v[:200] for k, v in draw._asdict().items()}), vocab)
    known = p[0].double()
    exact, drawn = int(draw.exact[0]), int(draw.drawn[0])
    if estimator.name == "sample":
        step = 1 / estimator.parameter
        variance = known * (1 - known) * step
    else:
        step = float(draw.probs[0, exact : exact + drawn].max())
        variance = (known * (step - known)).clamp(min=0)  # nothing for entries kept exactly
    error = (variance / times).sqrt()
    # 101 nearly normal scores: beyond 4.5 standard errors happens once in 1,500 such tests; the seed is fixed.
    # An entry so rare that a handful of draws hit it is not normal yet: four draws more are no surprise.
    assert bool(((as_dense(draw, vocab).mean(0) - known).abs() <= 4.5 * error + 4 * step / times).all())


def test_variances_are_the_known_ones():
    p = distributions(1, 50)
    many = p.expand(40_000, -1)
    draws = as_dense(sample(many, uniform(len(many), 8)), 50).var(0).sum()
    torch.testing.assert_close(draws, (1 - p.double().square().sum()) / 8, rtol=0.03, atol=0)
    draw = threshold(many, 0.05, uniform(len(many)))
    weight = (1 - draw.probs[0, : draw.exact[0]].sum()) / draw.drawn[0]
    tail = p[0].double().clone()
    tail[draw.ids[0, : draw.exact[0]]] = 0
    torch.testing.assert_close(as_dense(draw, 50).var(0).sum(), (tail * (weight - tail)).sum(), rtol=0.03, atol=0)
    assert as_dense(draw, 50).var(0).sum() < draws


@settings(max_examples=150, deadline=None)
@given(
    vocab=st.integers(1, 300),
    scale=st.sampled_from([0.0, 0.5, 2.0, 6.0, 30.0]),
    tau=st.sampled_from([0.01, 0.02, 0.05, 0.1, 1 / 3, 0.5, 1.0]),
    wide=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_threshold_keeps_its_promises(vocab, scale, tau, wide, seed):
    p = distributions(7, vocab, scale, seed)
    p = p.double().softmax(1) if wide and scale == 0 else p
    draw = threshold(p, tau, uniform(7, seed=seed + 1))
    assert_sound(draw, vocab)
    assert int((draw.exact + draw.drawn).max()) <= 1 / tau + 1 + 1e-6
    normal = p.double() / p.double().sum(1, keepdim=True)
    for row in range(7):
        exact, drawn = int(draw.exact[row]), int(draw.drawn[row])
        kept = draw.ids[row, :exact]
        if drawn:
            torch.testing.assert_close(draw.probs[row, :exact], normal[row, kept], rtol=1e-12, atol=0)
        else:
            torch.testing.assert_close(draw.probs[row, :exact], normal[row, kept], rtol=1e-6, atol=0)
        assert set((normal[row] >= tau * (1 + 1e-9)).nonzero()[:, 0].tolist()) <= set(kept.tolist())
        weights = draw.probs[row, exact : exact + drawn]
        assert not drawn or float(weights.max() - weights.min()) == 0
        assert bool((normal[row, draw.ids[row, exact : exact + drawn]] <= weights * (1 + 1e-9) + 1e-12).all())


def test_an_entry_that_would_be_drawn_twice_is_kept_exactly():
    # τ = 0.4: nothing reaches it, R = 1, k = 3, R/k = 1/3 < 0.38: the first entry moves; then R = 0.62, k = 2, 0.31
    # < 0.32: the second moves too; then R = 0.3, k = 1 and the rest is one draw.
    p = torch.tensor([[0.38, 0.32, 0.1, 0.1, 0.1]])
    draw = threshold(p, 0.4, uniform(1))
    assert draw.exact.tolist() == [2]
    assert draw.drawn.tolist() == [1]
    assert draw.ids[0, :2].tolist() == [0, 1]
    torch.testing.assert_close(draw.probs[0], torch.tensor([0.38, 0.32, 0.3], dtype=torch.float64), rtol=1e-6, atol=0)


def test_no_id_twice_where_every_entry_is_as_large_as_the_step():
    p = torch.full((64, 40), 1 / 40)
    assert_sound(threshold(p, 0.05, uniform(64)), 40)
    assert threshold(p, 1 / 40, uniform(64)).drawn.sum() == 0


def test_a_large_vocabulary_and_its_smallest_entries():
    # In float32 the cumulative sum of 262,144 entries cannot see entries below 6e-8: they would never be drawn.
    vocab = 262_144
    p = torch.full((4, vocab), 1 / vocab)
    draw = threshold(p, 0.05, torch.tensor([0.0, 0.25, 0.5, 1 - 2**-53], dtype=torch.float64))
    assert_sound(draw, vocab)
    assert draw.drawn.tolist() == [20] * 4
    tile, inside = draw.ids // (64 * LANES), draw.ids % (64 * LANES)
    ordinal = (tile * LANES + inside % LANES) * 64 + inside // LANES  # in the order of drawing, block after block
    steps = ordinal[:, 1:] - ordinal[:, :-1]
    assert int(steps.min()) >= vocab // 20
    assert int(steps.max()) <= vocab // 20 + 1
    assert int(draw.ids[3, -1]) == vocab - 1


def test_a_row_does_not_depend_on_its_neighbours():
    p, u = distributions(40, 64), uniform(40)
    together = threshold(p, 0.05, u)
    alone = join([threshold(p[i : i + 1], 0.05, u[i : i + 1]) for i in range(40)])
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_end_of_a_blocks_mass_is_nothing_that_is_not_there(softcap, dtype):
    """Where the sums of blocks and of their entries differ by rounding: neither padding nor what was taken out."""
    vocab, rows = 300, 60
    logits = (4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(3))).to(dtype)
    parts = mass.Mass.of_logits(logits, 20, softcap)
    values, ids = parts.largest(torch.full((rows, 1), 0.04))
    parts.remove(ids, values > 0)
    there = torch.ones(rows, parts.raw.shape[1], dtype=torch.bool)
    there[:, vocab:] = False
    row, slot = (values > 0).nonzero(as_tuple=True)
    there[row, ids[row, slot]] = False
    ends = parts.sums.cumsum(1) / parts.sums.sum(1, keepdim=True)
    for past in (0.0, 1e-9, 1e-7):
        picked = parts.pick((ends * (1 - past)).clamp(max=1 - 2.0**-40))
        assert bool(there.gather(1, picked).all())


def test_topk_is_renormalised_and_dense_is_everything():
    p = distributions(5, 30)
    draw = topk(p, 4)
    values, ids = p.double().topk(4)
    assert torch.equal(draw.ids, ids)
    torch.testing.assert_close(draw.probs, values / values.sum(1, keepdim=True), rtol=1e-6, atol=0)
    assert_sound(topk(p, 100), 30)
    torch.testing.assert_close(as_dense(dense(p), 30), p.double(), rtol=1e-6, atol=0)


def test_a_certain_teacher_is_one_entry():
    p = torch.zeros(2, 9)
    p[:, 3] = 1
    for draw in (threshold(p, 0.1, uniform(2)), sample(p, uniform(2, 5)), topk(p, 5)):
        assert_sound(draw, 9)
        assert (draw.exact + draw.drawn).tolist() == [1, 1]
        assert draw.ids[:, 0].tolist() == [3, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.25, 0.9])
@pytest.mark.parametrize("name", ["threshold(0.1)", "sample(2)", "topk(2)", "dense"])
def test_bad_probabilities_are_refused(bad, name):
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.25, 0.25, 0.25, bad]])
    with pytest.raises(Error, match=r"not finite|no distributions"):
        Estimator.parse(name)(p, uniform(2, 2))


@pytest.mark.parametrize("name", ["threshold(0.1)", "threshold(0.02)", "sample(9)", "topk(7)", "dense"])
@pytest.mark.parametrize("vocab", [50, 1000, 8192])
@pytest.mark.parametrize("plain", [False, True])
def test_from_logits_comes_what_comes_from_their_softmax(name, vocab, plain, monkeypatch):
    """With and without native kernels, capped and tempered, vocabularies that are whole blocks and others."""
    if plain:
        monkeypatch.setattr(mass, "kernels", lambda x: None)
    estimator, u = Estimator.parse(name), uniform(40, 9)
    for dtype in (torch.float32, torch.bfloat16):
        raw = (torch.randn(40, vocab, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
        p = (5 * torch.tanh(raw.float() / 5) / 0.8).softmax(1)
        ours, known = estimator.of_logits(raw.clone(), u, 5.0, 0.8), estimator(p, u)
        assert torch.equal(ours.exact, known.exact)
        # Of equal entries, of which bfloat16 has many, one may stand for another.
        for a, b in ((ours.probs, known.probs), (p.gather(1, ours.ids), p.gather(1, known.ids))):
            same = (a.double().sort(1).values - b.double().sort(1).values).abs().amax(1) < 1e-5
            assert int(same.sum()) >= 37  # a rounding may move the border between two entries past a draw
        assert_sound(ours, vocab)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("plain", [False, True])
def test_logits_that_are_not_finite_are_refused(bad, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(mass, "kernels", lambda x: None)
    z = torch.zeros(3, 64)
    z[1, 63] = bad
    for name in ("threshold(0.1)", "sample(2)", "topk(2)"):
        with pytest.raises(Error, match="not finite"):
            Estimator.parse(name).of_logits(z.clone(), uniform(3, 2))


@pytest.mark.parametrize("ties", [1, 3, 200])
def test_topk_of_a_large_vocabulary_is_topk(ties):
    """Among equals any may be kept; their number and their probabilities are those of torch.topk."""
    p = (distributions(6, 5000) * 1e3).round().clamp(min=ties % 2) + 0.01
    p = p / p.sum(1, keepdim=True)
    draw = topk(p, ties)
    values = p.double().topk(ties).values
    torch.testing.assert_close(draw.probs, values / values.sum(1, keepdim=True), rtol=1e-6, atol=0)
    torch.testing.assert_close(p.double().gather(1, draw.ids), values, rtol=1e-6, atol=0)


def test_names_are_read_back():
    for text in ("threshold(0.05)", "sample(16)", "topk(8)", "dense"):
        assert str(Estimator.parse(text)) == text
    for text in ("treshold(0.05)", "threshold", "threshold(0)", "topk(2.5)", "sample(1000)", "topk(-1)", "topk(1e)"):
        with pytest.raises(Error):
            Estimator.parse(text)
