"""The store: what is written is read back, from anywhere, unbiased; and everything wrong is found and named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.distill import code
from gemstill.distill.block import TENSORS, Rows, block_path, decode, encode, write_block
from gemstill.distill.code import IdCode
from gemstill.distill.estimators import Estimator
from gemstill.distill.store import Store, StoreInfo, write_index
from gemstill.ops.target import Target

VOCAB, TOKENS, WINDOW, BLOCK = 37, 700, 16, 320


class Stream:
    """A data set in memory, as teach and the store see one."""

    vocab_size, tokenizer_fingerprint, fingerprint = VOCAB, "a" * 64, "b" * 64

    def __init__(self, tokens=None):
        self.tokens = np.random.default_rng(0).integers(0, VOCAB, TOKENS) if tokens is None else tokens
        self.num_tokens = len(self.tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


class Words:
    fingerprint, vocab_size = "a" * 64, VOCAB


def info(**changes):
    values = {
        "teacher": "t", "teacher_fingerprint": "c" * 64, "teacher_licence": "mit", "tokenizer_fingerprint": "a" * 64,
        "dataset_fingerprint": "b" * 64, "num_tokens": TOKENS, "vocab_size": VOCAB, "stored_vocab_size": VOCAB + 3,
        "window": WINDOW, "block_tokens": BLOCK, "estimator": "threshold(0.1)", "temperature": 1.0, "seed": 0,
        "batch": 4, "precision": "float32",
    }  # fmt: skip
    return StoreInfo(**(values | changes))


def peaked(labels, seed=0):
    """Distributions that favour the given labels."""
    logits = torch.randn(len(labels), VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    logits[torch.arange(len(labels)), torch.as_tensor(labels)] += 3
    return logits.softmax(1)


def make(folder, made, probs=None):
    """Write a store of `probs`; returns the draws' targets, of all tokens in one."""
    probs = peaked(np.append(Stream().tokens[1:], 0)) if probs is None else probs
    estimator = Estimator.parse(made.estimator)
    generator = torch.Generator().manual_seed(7)
    u = torch.rand(made.num_tokens, estimator.uniforms + 1, dtype=torch.float64, generator=generator)
    code.write(folder, IdCode.of(Stream(), estimator.entries))
    write_index(folder, made, None)
    for block in range(made.num_blocks):
        first, stop = made.span(block)
        parts = [slice(a, min(a + 100, stop)) for a in range(first, stop, 100)]
        write_block(folder, made, block, [encode(estimator(probs[p], u[p]), made, u[p, -1]) for p in parts])
    write_index(folder, made, [files.sha256(block_path(folder, block)) for block in range(made.num_blocks)])
    return estimator(probs, u)


def as_dense(target):
    return torch.zeros(len(target.ids), VOCAB, dtype=target.probs.dtype).scatter_add_(1, target.ids, target.probs)


@pytest.mark.parametrize(
    "estimator", ["threshold(0.1)", "threshold(1)", "topk(5)", "topk(200)", "sample(1)", "sample(9)"]
)
def test_round_trip(tmp_path, estimator):
    made = info(estimator=estimator)
    draw = make(tmp_path, made)
    store = Store.open(tmp_path, Stream(), Words(), vocab_size=VOCAB + 3, window=WINDOW)
    assert (len(store), store.window, store.vocab_size, str(store.estimator)) == (TOKENS, WINDOW, VOCAB, estimator)
    store.verify()
    whole = store[:]
    torch.testing.assert_close(whole.probs.sum(1), torch.ones(TOKENS), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        as_dense(whole), as_dense(draw.target()), rtol=0, atol=0 if "sample" in estimator else 1 / made.units
    )
    assert whole.ids.dtype == torch.int64
    assert torch.equal(whole.weight, torch.ones(TOKENS))
    for a, b in ((0, 1), (3, 3), (250, 330), (255, 258), (639, 700), (0, 700)):
        part = store[a:b]
        assert torch.equal(as_dense(part), as_dense(whole)[a:b])
    starts = torch.tensor([640, 0, 304, 16])
    windows = store.target(starts, 48)
    assert torch.equal(as_dense(windows), torch.cat([as_dense(whole)[s : s + 48] for s in starts]))


@pytest.mark.parametrize("estimator", ["threshold(0.1)", "threshold(0.3)", "topk(37)"])
def test_weights_are_rounded_without_bias(estimator):
    made = info(num_tokens=1, estimator=estimator)
    probs = peaked([5])
    draw = Estimator.parse(estimator)(probs, torch.full((1, 1), 0.3, dtype=torch.float64))
    draw = type(draw)(*(part.expand(40_000, *part.shape[1:]) for part in draw))
    u = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids, stored = decode([encode(draw, made, u)], made.units)
    stored = as_dense(Target(torch.from_numpy(ids), torch.from_numpy(stored).double(), u))
    known = as_dense(draw.target())
    assert float((stored - known).abs().max()) < 1 / made.units
    # A standard error is at most 1/2/units/200; plain rounding would be wrong by a fourth of a unit in the mean.
    assert float((stored.mean(0) - known[0]).abs().max()) < 4.5 / 400 / made.units
    assert float(stored.std(0).max()) <= 0.51 / made.units


def test_bytes_are_few(tmp_path):
    """At a vocabulary of 37, whose ids say little: a bit and a half more an entry than their own entropy."""
    make(tmp_path, info())
    store = Store.open(tmp_path)
    payload = sum(path.stat().st_size for path in (tmp_path / "data").iterdir()) - 600 * store.info.num_blocks
    whole = store[:]
    entries, used = int((whole.probs > 0).sum()), np.bincount(whole.ids[whole.probs > 0], minlength=VOCAB)
    share = used / used.sum()
    entropy = -(share * np.log2(share)).sum()
    assert payload * 8 < entries * (entropy + 1 + 4.5 * 0.5)
    assert store.bytes_per_token > payload / TOKENS


@pytest.mark.parametrize("block", [0, 2])
def test_a_flipped_byte_is_found_and_its_block_named(tmp_path, block):
    make(tmp_path, info())
    path = block_path(tmp_path, block)
    data = bytearray(path.read_bytes())
    data[-40] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(Error, match=f"block-{block:06d}.*SHA-256"):
        Store.open(tmp_path).verify()


@pytest.mark.parametrize("what", ["short", "gone", "empty", "swapped", "noise", "foreign"])
def test_a_broken_block_is_named(tmp_path, what):
    make(tmp_path, info())
    path = block_path(tmp_path, 1)
    data = path.read_bytes()
    if what == "gone":
        path.unlink()
    else:
        other = block_path(tmp_path, 0).read_bytes()
        foreign = save({name: np.zeros(3) for name in TENSORS}, {"gemstill": "[]"})
        bad = {"short": data[:-30], "empty": b"", "swapped": other, "noise": b"\xff" * 900, "foreign": foreign}
        path.write_bytes(bad[what])
    store = Store.open(tmp_path)
    store[:BLOCK]
    with pytest.raises(Error, match="block-000001"):
        store[BLOCK : BLOCK + 1]
    with pytest.raises(Error, match="block-000001"):
        store.verify()


def forged(folder, rows, **changes):
    """A store of one block with these rows, whose files all have the right SHA-256."""
    made = info(num_tokens=len(rows.counts), estimator="threshold(0.1)", **changes)
    ids = np.arange(made.vocab_size)
    code.write(folder, IdCode(made.vocab_size, ids[:9].astype(np.uint32), np.array([3, 6], np.uint8)))
    write_index(folder, made, None)
    write_block(folder, made, 0, [rows])
    write_index(folder, made, [files.sha256(block_path(folder, 0))])
    return Store.open(folder)


@pytest.mark.parametrize(
    ("ids", "own", "what"),
    [
        ([3, 20, 20], [16, 0, 0], "names an entry twice"),
        ([3, 20, 21], [16, 16, 0], "do not sum to one"),  # nothing is left for the third
        ([3, 20, 21], [9, 4, 2], "do not sum to one"),  # something is left for nobody
        ([3, 20, 21], [9, 8, 8], "do not sum to one"),  # more than one
        ([3, 20, 41], [9, 0, 0], "names entry 41 of a vocabulary of 37"),
    ],
)
def test_rows_that_are_no_distributions_are_found(tmp_path, ids, own, what):
    rows = Rows(np.array([1, 3]), np.array([5, *ids], np.uint32), np.array([16, *own], np.uint32))
    forged(tmp_path, rows, vocab_size=64, stored_vocab_size=64)
    record = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(record | {"vocab_size": VOCAB}))
    store = Store.open(tmp_path)
    assert store[0:1].ids.tolist() == [[5]]
    with pytest.raises(Error, match=f"block-000000.*{what}"):
        store[0:2]
    with pytest.raises(Error, match=f"block-000000.*{what}"):
        store.verify()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"dataset_fingerprint": "e" * 64}, ["shards", "e" * 16, "b" * 16]),
        ({"tokenizer_fingerprint": "f" * 64}, ["tokenizer", "f" * 16, "a" * 16]),
        ({"vocab_size": 39}, ["vocabulary", "39", "37"]),
        ({"num_tokens": 699}, ["tokens", "699", "700"]),
        ({"window": 32}, ["windows", "32", "16"]),
    ],
)
def test_another_data_set_tokenizer_or_vocabulary_is_refused_and_both_named(tmp_path, change, names):
    make(tmp_path, info())
    write_index(tmp_path, dataclasses.replace(info(), **change), ["0" * 64] * 3)
    with pytest.raises(Error) as caught:
        Store.open(tmp_path, Stream(), Words(), window=WINDOW)
    assert all(name in str(caught.value) for name in names)


def test_a_student_with_a_smaller_vocabulary_is_refused(tmp_path):
    make(tmp_path, info())
    with pytest.raises(Error, match="vocabulary of 37, not for 36"):
        Store.open(tmp_path, vocab_size=36)


def test_a_store_shifted_by_one_is_found(tmp_path):
    tokens = Stream().tokens
    for name, labels in (("right", np.roll(tokens, -1)), ("late", tokens), ("early", np.roll(tokens, -2))):
        make(tmp_path / name, info(), peaked(labels))
    before, right, after = Store.open(tmp_path / "right").check_alignment(Stream())
    assert right > 2 * max(before, after)
    with pytest.raises(Error, match="about the token before"):
        Store.open(tmp_path / "late").check_alignment(Stream())
    with pytest.raises(Error, match="about the token after"):
        Store.open(tmp_path / "early").check_alignment(Stream())


@pytest.mark.parametrize(
    "change", [{"format": "x"}, {"version": 1}, {"window": "16"}, {"seed": True}, {"blocks": []}, {"complete": False},
               {"estimator": "best(1)"}, {"block_tokens": 100}, {"vocab_size": 1 << 30}, {"num_tokens": 10_000}],
)  # fmt: skip
def test_an_index_that_lies_is_refused(tmp_path, change):
    make(tmp_path, info())
    record = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(record | change))
    with pytest.raises(Error):
        Store.open(tmp_path)


def test_no_store_at_all(tmp_path):
    with pytest.raises(Error, match=r"store\.json"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "store.json").write_text("[]")
    with pytest.raises(Error, match="no probability store"):
        Store.open(tmp_path)


def test_rows_outside_are_refused(tmp_path):
    make(tmp_path, info())
    store = Store.open(tmp_path)
    with pytest.raises(Error, match="700 rows"):
        store.target([696], 16)
    with pytest.raises(Error, match="plain range"):
        store[::2]
    assert store[900:].ids.shape == (0, 1)


@pytest.mark.parametrize("estimator", ["threshold(0.1)", "sample(9)", "topk(5)"])
def test_the_reader_of_the_docs_reads_the_same(tmp_path, estimator):
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
    reader = page.split("```python\n")[1].split("```")[0]
    body = reader[reader.index("def read") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 30
    names: dict = {}
    exec(reader, names)
    made = info(estimator=estimator)
    make(tmp_path, made)
    store = Store.open(tmp_path)
    for block in range(made.num_blocks):
        first, stop = made.span(block)
        row, ids, probs = names["read"](tmp_path, block)
        known = np.zeros((stop - first, VOCAB))
        known[row, ids] = probs
        torch.testing.assert_close(torch.from_numpy(known).float(), as_dense(store[first:stop]), rtol=0, atol=1e-6)
