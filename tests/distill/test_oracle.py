"""A source whose distribution is known: taught and distilled through the real parts, a student must find it."""

import numpy as np
import pytest
import torch
from torch import nn

from gemstill.data.loader import Loader
from gemstill.distill.teach import describe, teach_model
from gemstill.model.config import ModelConfig
from gemstill.model.transformer import Transformer
from gemstill.train.config import HardConfig
from gemstill.train.objectives import FromStore, NextToken

VOCAB, WINDOW = 32, 32


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only wait for a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bigrams(sharpness):
    """P[a, b], the probability of b after a; 0 begins documents and never comes again."""
    generator = torch.Generator().manual_seed(1)
    logits = sharpness * torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
    logits[:, 0] = -float("inf")
    return logits.softmax(1)


class Source:
    """A data set in memory, drawn from bigrams; 100 tokens a document."""

    vocab_size, bos_id, folder = VOCAB, 0, "memory"
    tokenizer_fingerprint, fingerprint = "a" * 64, "b" * 64

    def __init__(self, table, num_tokens, seed=0):
        rng, cumulative = np.random.default_rng(seed), table.numpy().cumsum(1)
        self.num_tokens, self.document_starts = num_tokens, np.arange(0, num_tokens, 100)
        self.tokens = np.zeros(num_tokens, np.int64)
        for i, u in enumerate(rng.random(num_tokens)):
            if i % 100:
                self.tokens[i] = min(np.searchsorted(cumulative[self.tokens[i - 1]], u), VOCAB - 1)

    def read(self, start, stop):
        return self.tokens[start:stop]


class Oracle(nn.Module):
    """The teacher that knows the table, as a network: the embedding of a token is its row of logits."""

    def __init__(self, table):
        super().__init__()
        self.rows = nn.Parameter(table.clamp(min=1e-30).log().float())

    def forward(self, tokens, *, documents, readout):
        return readout(self.rows[tokens], torch.eye(VOCAB), None)


def learn(objective, data, steps, seed=0):
    """A small student after `steps` steps of AdamW on the loader's batches."""
    shape = ModelConfig(VOCAB, 48, 96, 1, 2, 1, 24, query_pre_attn_scalar=24, sliding_window=16)
    student, loader = Transformer(shape, seed=seed), Loader([(data, 1.0)], WINDOW, 16, seed)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for step in range(steps):
        prepared = objective.prepare(loader.batch(step), step)
        loss, _ = objective.loss(student, prepared)
        optimizer.zero_grad()
        (loss / objective.weight(prepared)).backward()
        optimizer.step()
        schedule.step()
    return student


@torch.no_grad()
def excess(student, table, fresh):
    """Nats a token above the optimum on text never seen: the mean KL from the known row to the student's."""
    batch = Loader([(fresh, 1.0)], WINDOW, 100, 0).batch(0)
    q = student(batch.tokens, documents=batch.documents).double().log_softmax(2)
    p = table[batch.tokens]
    kl = (p * (p.clamp(min=1e-300).log() - q)).sum(2)
    return float((kl * batch.weight).sum() / batch.weight.sum())


def test_taught_and_distilled_a_student_reaches_the_known_optimum(tmp_path):
    table = bigrams(1.5)
    data, fresh = Source(table, 8000), Source(table, 4000, seed=1)
    teacher = Oracle(table)
    info = describe(teacher, data, estimator="threshold(0.1)", window=WINDOW, block_tokens=2048)
    store = teach_model(teacher, data, tmp_path, info)
    before, right, after = store.check_alignment(data)
    optimum = float((table[data.tokens[:-1]] * table[data.tokens[:-1]]).sum(1).mean())
    assert right == pytest.approx(optimum, rel=0.05)
    assert max(before, after) < 0.6 * right
    distilled = excess(learn(FromStore([store], HardConfig(), 200), data, 200), table, fresh)
    plain = excess(learn(NextToken(), data, 200), table, fresh)
    # 8,000 tokens of 32·31 transitions: hard labels cannot teach the table, the teacher can.
    assert distilled < 0.02
    assert distilled < plain / 3


@pytest.mark.slow
def test_threshold_is_no_worse_than_topk_at_equal_bytes(tmp_path):
    table = bigrams(2.0)
    data, fresh = Source(table, 16_000), Source(table, 4000, seed=1)
    result = {}
    for estimator in ("threshold(0.09)", "topk(5)"):
        teacher = Oracle(table)
        info = describe(teacher, data, estimator=estimator, window=WINDOW, block_tokens=16_000)
        store = teach_model(teacher, data, tmp_path / estimator, info)
        scores = [
            excess(learn(FromStore([store], HardConfig(), 300), data, 300, seed), table, fresh) for seed in (0, 1, 2)
        ]
        result[estimator] = store.bytes_per_token, max(scores), min(scores)
    (bytes_ours, worst_ours, _), (bytes_topk, _, best_topk) = result["threshold(0.09)"], result["topk(5)"]
    assert bytes_ours <= bytes_topk
    assert worst_ours < best_topk
