"""The cache kept between prompts: the same logits as a fresh start gives, whatever was there before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from gemstill.core.errors import Error
from gemstill.infer import session as room
from gemstill.infer.session import Session
from gemstill.model.cache import Cache
from tests.infer.networks import SMALL, SMALL3, network
from tests.model.reference import name_of

WINDOW = SMALL.sliding_window


def tokens(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [2, *(draw.randrange(8, 300) for _ in range(count - 1))]


@pytest.mark.parametrize("config", [SMALL, SMALL3], ids=name_of)
def test_any_walk_over_texts_equals_a_fresh_start(config, monkeypatch):
    """Longer, shorter, branching, equal texts on both sides of the window; chunks and growth on the way."""
    monkeypatch.setattr(room, "CHUNK", 5)
    monkeypatch.setattr(room, "FIRST_CAPACITY", 3)
    model, draw = network(config), random.Random(1)
    session, text = Session(model), tokens(2)
    for step in range(40):
        keep = draw.choice((len(text), len(text) - 1, draw.randrange(1, len(text) + 1)))
        text = text[: max(1, keep)] + tokens(draw.randrange(4), seed=step)[1:]
        ours, fresh = session.feed(text), Session(model).feed(text)
        torch.testing.assert_close(ours, fresh, rtol=1e-4, atol=1e-4)
        assert session.ids == text


def test_only_what_is_new_is_fed():
    session = Session(network())
    text = tokens(20)
    session.feed(text)
    assert session.fed == 20
    session.feed([*text, 40, 41, 42])
    assert session.fed == 3
    session.feed([*text, 40, 41, 42])  # the same again: the last token, for its logits
    assert session.fed == 1
    session.feed([*text, 40, 41, 50])
    assert session.fed == 1


def test_a_rewind_past_what_the_ring_holds_starts_anew():
    session, text = Session(network()), tokens(20)
    session.feed(text)
    session.feed(text[:10])
    assert session.fed == 10
    short = tokens(WINDOW)
    session.reset()
    session.feed(short)
    session.feed([*short[: WINDOW - 2], 50])  # nothing was overwritten yet: any rewind goes
    assert session.fed == 1


def test_the_cache_says_what_it_can_take_back():
    cache = Cache(SMALL, 1, 32)
    with torch.no_grad():
        model = network()
        model(torch.tensor([tokens(12)]), cache=cache)
    assert not cache.rewind(10)
    assert cache.length == 12
    assert cache.rewind(11)
    assert int(cache.next_position) == cache.length == 11
    assert cache.rewind(0)
    assert cache.length == 0
    assert all(int(layer.positions.max()) == -1 for layer in cache.layers)


def test_memory_grows_with_the_text_and_the_rings_do_not():
    config = replace(SMALL, max_position=4096)
    session = Session(network(config))
    session.feed(tokens(3))
    small = session.bytes
    session.feed(tokens(1000))
    layers = [layer.slots for layer in session._cache.layers]
    assert layers == [WINDOW, 1024, WINDOW]
    assert small < session.bytes < Cache(config, 1, 4096).bytes


def test_an_error_on_the_way_leaves_nothing_half_stored():
    model = network()
    session, text = Session(model), tokens(10)
    session.feed(text)

    def fail(*_):
        raise KeyboardInterrupt

    hook = model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        session.feed([*text, 30])
    hook.remove()
    torch.testing.assert_close(session.feed([*text, 30]), Session(model).feed([*text, 30]))
    assert session.fed == 11


def test_cancelled_between_chunks_it_keeps_what_is_done(monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 4)
    session, text = Session(network()), tokens(20)
    asked = iter([False, False, True])
    assert session.feed(text, lambda: next(asked)) is None
    assert session.ids == text[:8]
    session.feed(text)
    assert session.fed == 12


def test_contexts():
    model = network(replace(SMALL, max_position=16))
    assert Session(model).context == Session(model, context=99).context == 16
    session = Session(model, context=8)
    assert session.feed(tokens(8)) is not None
    with pytest.raises(Error, match="9 tokens exceed the context of 8"):
        session.feed(tokens(9))
    with pytest.raises(Error, match="no tokens"):
        session.feed([])
