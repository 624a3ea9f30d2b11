"""The id code: every id has one place, frequent ones take few bits, and what is damaged is refused."""

import numpy as np
import pytest

from gemstill.core.errors import Error
from gemstill.distill.code import FILE, IdCode, best_widths, write


class Text:
    def __init__(self, tokens, vocab_size):
        self.tokens, self.vocab_size, self.num_tokens = tokens, vocab_size, len(tokens)

    def read(self, start, stop):
        return self.tokens[start:stop]


def zipf(vocab, count, seed=0):
    """Tokens of Zipf's law, the frequent ids scattered over the vocabulary."""
    rng = np.random.default_rng(seed)
    share = 1 / (np.arange(vocab) + 2.7)
    return Text(rng.permutation(vocab)[rng.choice(vocab, count, p=share / share.sum())], vocab)


@pytest.mark.parametrize("vocab", [1, 2, 37, 256, 5000])
@pytest.mark.parametrize("count", [1, 100, 40_000])
def test_every_id_has_one_place(vocab, count):
    code = IdCode.of(zipf(vocab, count), 10)
    assert sorted(code.ids.tolist()) == list(range(vocab))
    assert np.array_equal(code.ids[code.ranks], np.arange(vocab))
    place = np.arange(vocab) - code.first[code.classes(np.arange(vocab))]
    assert place.min() == 0
    assert bool((place < 1 << code.widths[code.classes(np.arange(vocab))].astype(np.int64)).all())
    assert len(code.order) <= max(1, count // 64)


def test_the_widths_are_the_best_of_all():
    """Against a search of everything, for a vocabulary small enough."""
    share = np.array([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.02, 0.02, 0.02, 0.02, 0.02])

    def cost(widths):
        first = 0
        total = len(widths) / 3
        for width in widths:
            total += width * share[first : first + (1 << width)].sum()
            first += 1 << width
        return total

    def all_of(left):
        if left <= 0:
            yield ()
            return
        for width in range(5):
            for rest in all_of(left - (1 << width)):
                yield (width, *rest)

    assert cost(best_widths(share, 3.0).tolist()) == pytest.approx(min(map(cost, all_of(len(share)))))


def test_ids_take_hardly_more_than_their_entropy():
    vocab, text = 50_000, zipf(50_000, 400_000)
    code = IdCode.of(text, 12)
    rows = np.sort(code.ranks[text.tokens[: 12 * 20_000].reshape(-1, 12)], axis=1)
    bits = 12 + len(code.widths) + code.widths[code.classes(rows)].sum() / len(rows)
    share = 1 / (np.arange(vocab) + 2.7)
    share /= share.sum()
    entropy = -12 * (share * np.log2(share)).sum()
    # The order of twelve different ids is log2(12!) = 28.8 bits that need not be told.
    assert entropy - 28.9 < bits < entropy - 28.9 + 0.12 * entropy
    assert bits < 12 * 16 * 0.75


def test_what_is_written_is_read_and_the_bytes_are_the_same(tmp_path):
    code = IdCode.of(zipf(300, 5000), 8)
    write(tmp_path, code)
    again = IdCode.read(tmp_path, 300)
    assert np.array_equal(again.ids, code.ids)
    assert np.array_equal(again.widths, code.widths)
    assert IdCode.of(zipf(300, 5000), 8).to_bytes() == code.to_bytes()


@pytest.mark.parametrize("entries", [1.0, 51.0, 255.0])
def test_a_code_for_few_or_many_entries_is_read_back(tmp_path, entries):
    """Many entries make many classes worth while: 66 of them for threshold(0.012) at Gemma's vocabulary."""
    code = IdCode.of(zipf(262_144, 300_000), entries)
    write(tmp_path, code)
    assert np.array_equal(IdCode.read(tmp_path, 262_144).widths, code.widths)


@pytest.mark.parametrize("bad", ["gone", "short", "twice", "outside", "few", "none"])
def test_a_broken_code_is_named(tmp_path, bad):
    code = IdCode.of(zipf(300, 5000), 8)
    order, widths = code.order, code.widths
    changed = {
        "twice": IdCode(300, np.append(order, order[:1]), widths),
        "outside": IdCode(300, np.append(order, np.uint32(300)), widths),
        "few": IdCode(300, order, widths[:-1]),
        "none": IdCode(300, order, widths[:0]),
    }
    data = changed.get(bad, code).to_bytes()
    if bad != "gone":
        (tmp_path / FILE).write_bytes(data[:-9] if bad == "short" else data)
    with pytest.raises(Error, match=r"code\.safetensors"):
        IdCode.read(tmp_path, 300)
