"""The order of batches: a function of seed and step, everything once an epoch, the same for all ranks."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemstill.core.errors import Error
from gemstill.data.dataset import TokenDataset
from gemstill.data.loader import BLOCK, Batch, Loader, heldout_batches, permute, quotas
from gemstill.data.shards import write_dataset
from gemstill.text.tokenizer import Tokenizer

WINDOW = 32


def key(number: int) -> np.ndarray:
    return np.array([number], dtype=np.uint64)


@pytest.fixture
def dataset(documents: Path, tokenizer: Tokenizer, tmp_path: Path) -> TokenDataset:
    return write_dataset(documents, tokenizer, tmp_path / "a", heldout_fraction=0, shard_bytes=8000, workers=1).train


@pytest.fixture
def small(tokenizer: Tokenizer, tmp_path: Path) -> TokenDataset:
    (tmp_path / "small.txt").write_text("a small document of its own, said again and again\n" * 20)
    return write_dataset(tmp_path / "small.txt", tokenizer, tmp_path / "b", heldout_fraction=0, workers=1).train


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), number=st.integers(0, 2**64 - 1))
def test_permutation_takes_each_place_once(size: int, number: int) -> None:
    assert sorted(permute(np.arange(size), size, key(number))) == list(range(size))


def test_permutation_of_huge_ranges_needs_no_memory() -> None:
    size = 10**15 + 37
    places = permute(np.arange(100_000), size, key(1))
    assert len(set(places.tolist())) == 100_000
    assert 0 <= places.min() < places.max() < size
    assert abs(places.mean() / size - 0.5) < 0.01


def test_permutation_is_fair() -> None:
    """Over 6,000 keys each of 12 places is taken equally often by the first, and neighbours part."""
    keys = np.arange(6000, dtype=np.uint64)
    first, second = (permute(np.full(6000, index), 12, keys) for index in (0, 1))
    for counts in (np.bincount(first, minlength=12), np.bincount((second - first) % 12, minlength=12)[1:]):
        expected = counts.sum() / len(counts)
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert chi_square < 33, counts  # 11 degrees of freedom: exceeded once in 2,000


@pytest.mark.parametrize(
    ("weights", "total", "shares"),
    [
        ([1], 8, [8]),
        ([1, 1], 8, [4, 4]),
        ([3, 1], 8, [6, 2]),
        ([1, 1, 1], 8, [3, 3, 2]),
        ([1, 1e-9], 8, [7, 1]),
        ([1, 1e-9, 1e-9], 3, [1, 1, 1]),
    ],
)
def test_quotas(weights: Sequence[float], total: int, shares: list[int]) -> None:
    assert quotas(weights, total) == shares


def test_each_window_once_an_epoch_in_a_new_order_each_time(dataset: TokenDataset) -> None:
    windows = dataset.num_tokens // WINDOW
    loader = Loader([(dataset, 1)], WINDOW, 1, seed=3)
    epochs = [[int(loader.places(step)[1][0]) for step in range(e * windows, (e + 1) * windows)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, windows * WINDOW, WINDOW))
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])
    assert loader.steps_per_epoch() == windows


def test_order_depends_on_seed_and_step_alone(dataset: TokenDataset) -> None:
    loader, again = (Loader([(dataset, 1)], WINDOW, 4, seed=5) for _ in range(2))
    other = Loader([(dataset, 1)], WINDOW, 4, seed=6)
    for step in (7, 3, 10**9, 0):
        assert all(torch.equal(one, two) for one, two in zip(loader.batch(step), again.batch(step), strict=True))
    again.batch(99)
    assert torch.equal(loader.batch(3).tokens, again.batch(3).tokens)
    assert not torch.equal(loader.batch(3).start, other.batch(3).start)
    assert loader.describe() == again.describe() != other.describe()


def test_more_windows_a_step_take_the_same_windows_sooner(dataset: TokenDataset) -> None:
    one, four = (Loader([(dataset, 1)], WINDOW, size, seed=5) for size in (1, 4))
    assert four.batch(2).start.tolist() == [int(one.batch(step).start) for step in range(8, 12)]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_parts_make_the_global_batch(dataset: TokenDataset, small: TokenDataset, world: int) -> None:
    loader = Loader([(dataset, 2), (small, 1)], WINDOW, 6, seed=0)
    for step in (0, 5, 1000):
        whole = loader.batch(step)
        parts = [loader.batch(step, rank, world) for rank in range(world)]
        for field in Batch._fields:
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))


def test_ranks_that_do_not_divide_the_batch_are_refused(dataset: TokenDataset) -> None:
    with pytest.raises(Error, match="6 windows a step cannot be shared by 4 ranks"):
        Loader([(dataset, 1)], WINDOW, 6, seed=0).batch(0, 0, 4)


def test_mixture_keeps_its_weights_in_every_block(dataset: TokenDataset, small: TokenDataset) -> None:
    loader = Loader([(dataset, 3), (small, 1)], WINDOW, 64, seed=0)
    seen: Counter[tuple[int, int]] = Counter()
    for block in range(3):
        sources = []
        for step in range(block * BLOCK // 64, (block + 1) * BLOCK // 64):
            source, start = loader.places(step)
            sources += source.tolist()
            seen.update(zip(source.tolist(), start.tolist(), strict=True))
        assert Counter(sources) == {0: BLOCK * 3 // 4, 1: BLOCK // 4}
        assert any(sources[:64]) and not all(sources[:64]), "mixed, not one after the other"  # noqa: PT018
    for source, dataset_ in enumerate((dataset, small)):
        times = [seen[source, start] for start in range(0, dataset_.num_tokens // WINDOW * WINDOW, WINDOW)]
        assert max(times) - min(times) <= 1, "nothing comes again before everything was there"
    assert sum(seen.values()) == 3 * BLOCK


def reference(dataset: TokenDataset, start: int, window: int) -> dict[str, list[float]]:
    """A window's batch row, token by token."""
    stream = dataset.read(0, dataset.num_tokens).tolist()
    row: dict[str, list[float]] = {field: [] for field in ("tokens", "labels", "weight", "documents", "positions")}
    document, position = 0, 0
    for place in range(start, start + window):
        if stream[place] == dataset.bos_id and place > start:
            document, position = document + 1, 0
        following = stream[place + 1] if place + 1 < len(stream) else None
        inside = place == start and stream[place] != dataset.bos_id  # the window begins within a document
        row["tokens"].append(dataset.bos_id if inside else stream[place])
        row["labels"].append(following if following is not None else 0)
        row["weight"].append(float(following is not None and following != dataset.bos_id and not inside))
        row["documents"].append(document)
        row["positions"].append(position)
        position += 1
    return row


@pytest.mark.parametrize("window", [1, 7, 32, 200])
def test_rows_are_what_the_stream_says(dataset: TokenDataset, window: int) -> None:
    batches = list(heldout_batches(dataset, window, 5))
    starts = torch.cat([batch.start for batch in batches]).tolist()
    assert starts == [n * window for n in range(dataset.num_tokens // window)]
    chosen = {0, len(starts) - 1, *random.Random(0).sample(range(len(starts)), 12)}
    for number in chosen:
        batch, row = batches[number // 5], number % 5
        for field, due in reference(dataset, starts[number], window).items():
            assert getattr(batch, field)[row].tolist() == due, field
    types = {field: getattr(batches[0], field).dtype for field in Batch._fields}
    assert types == {
        "tokens": torch.int64,
        "labels": torch.int64,
        "weight": torch.float32,
        "documents": torch.int32,
        "positions": torch.int64,
        "source": torch.int64,
        "start": torch.int64,
    }


def test_the_last_token_of_all_has_no_label(small: TokenDataset) -> None:
    window = small.num_tokens  # one window that holds everything
    (batch,) = heldout_batches(small, window, 8)
    assert batch.weight[0, -1] == 0
    assert batch.weight[0, :-1].all()
    assert batch.labels.min() >= 0


def test_a_text_shorter_than_the_window_is_refused(small: TokenDataset) -> None:
    longer = small.num_tokens + 1
    with pytest.raises(Error, match="less than one window"):
        Loader([(small, 1)], longer, 1, seed=0)
    with pytest.raises(Error, match="less than one window"):
        next(heldout_batches(small, longer, 1))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_weights_out_of_range(small: TokenDataset, weight: float) -> None:
    with pytest.raises(Error, match="weight in the mixture"):
        Loader([(small, weight)], 8, 1, seed=0)


def test_sources_of_different_tokenizers_are_refused(
    small: TokenDataset, documents: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = Tokenizer(tokenizer.data + b"\n", tokenizer.source)
    stranger = write_dataset(documents, other, tmp_path / "c", heldout_fraction=0, workers=1).train
    with pytest.raises(Error, match=r"was encoded with tokenizer .*same tokenizer"):
        Loader([(small, 1), (stranger, 1)], 8, 1, seed=0)


@pytest.mark.parametrize(("sources", "window", "windows"), [(0, 8, 1), (1, 0, 1), (1, 8, 0)])
def test_senseless_sizes_are_refused(small: TokenDataset, sources: int, window: int, windows: int) -> None:
    with pytest.raises(Error):
        Loader([(small, 1)] * sources, window, windows, seed=0)


def test_loading_is_fast(dataset: TokenDataset) -> None:
    """Training makes some ten thousand tokens a second here; a hundred times that, and ten times in hand."""
    loader = Loader([(dataset, 1)], 128, 16, seed=0)
    loader.batch(0)
    best = min(_time(loader, step) for step in range(50))
    assert 16 * 128 / best > 1e6


def _time(loader: Loader, step: int) -> float:
    start = time.perf_counter()
    loader.batch(step)
    return time.perf_counter() - start
