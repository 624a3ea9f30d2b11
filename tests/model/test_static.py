"""Steps in shapes that stay the same: the plain answers, and nothing in them that a recording could not play again."""

from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from gemstill.core.errors import Error
from gemstill.core.notices import Notice
from gemstill.model import slots as slots_room
from gemstill.model.slots import SlotCache
from gemstill.model.static import Shape, StaticStep, StillView
from tests.model.reference import BASE, GEMMA3, grid, name_of, network, ours, text

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA")
LONG = 40


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(slots_room, "STEP", 8)
    monkeypatch.setattr(slots_room, "SPARE", 3)


def memory(cache, slot):
    return [x[slot].clone() for layer in cache.layers for x in layer.tensors]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def walk(step, model, cache, tokens, most):
    """Texts that were read to different lengths, then steps of changing companies; the largest error of all logits."""
    whole, error = model(tokens), 0.0
    for slot, length in enumerate((11, 2, 25, 5, 1)):
        model(tokens[slot : slot + 1, :length], cache=cache.view(slot))
    for slots in ([0, 1, 2, 3, 4], [4], [0], [2, 1], [1], [3, 0, 4], [2, 3], *[[4, 3]] * 12):
        idle = [slot for slot in range(cache.slots) if slot not in slots]
        before, at = [memory(cache, slot) for slot in idle], [cache.lengths[slot] for slot in slots]
        rows = step([int(tokens[slot, p]) for slot, p in zip(slots, at, strict=True)], slots)
        exact = torch.stack([whole[slot, p] for slot, p in zip(slots, at, strict=True)])
        error = max(error, (torch.stack(rows).to(exact.device) - exact).abs().max().item() / exact.abs().max().item())
        assert [cache.lengths[slot] for slot in slots] == [p + 1 for p in at]
        assert all(same(memory(cache, slot), old) for slot, old in zip(idle, before, strict=True))
    assert error < most
    return error


@pytest.mark.parametrize("config", [*grid(6, seed=9), GEMMA3], ids=name_of)
@torch.no_grad()
def test_any_network(config):
    """Numbers are the plain ones; slots that have no token keep what they have to the last bit."""
    model, cache = ours(config), SlotCache(config, 6, LONG, stepped=True)
    walk(StaticStep(model, cache), model, cache, text(config, 5, LONG), 1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.05), (torch.int8, 0.1)])
@torch.no_grad()
def test_a_cache_in_fewer_bits(dtype, most):
    model, cache = ours(BASE), SlotCache(BASE, 6, LONG, dtype, stepped=True)
    walk(StaticStep(model, cache), model, cache, text(BASE, 5, LONG), most)


class Operations(TorchDispatchMode):
    """What a recording would hold: the operations in their order, with the shapes of their tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.seen.append((str(func), shapes))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_steps_of_one_shape_are_the_same_operations():
    config = replace(GEMMA3, sliding_window=4)
    model, cache, lists = ours(config), SlotCache(config, 4, 64, stepped=True), []
    step = StaticStep(model, cache)
    for slots, length in (([0, 1, 2], 17), ([2], 28), ([0, 2, 1], 5)):
        for slot in slots:
            cache.rewind(slot, 0)
            model(text(config, 1, length), cache=cache.view(slot))
        cache.lengths[3] = 0
        with Operations() as found:
            view = StillView(cache, Shape(4, 32))
            rows = torch.zeros(3, 4, dtype=torch.int64)
            for slot in slots:
                rows[:, slot] = torch.tensor([5, length, 1])
            found.seen.clear()
            step._compute(view, rows)
        lists.append(found.seen)
    assert lists[0] == lists[1] == lists[2]
    assert len(lists[0]) > 300


def test_nothing_is_asked_back_on_the_way():
    """A tensor without numbers refuses to be looked at, as a recording does."""
    model = network(BASE).to("meta")
    cache = SlotCache(BASE, 4, 64, torch.bfloat16, "meta")
    view = StillView(cache, Shape(4, 32))
    with torch.inference_mode():
        logits = StaticStep(model, cache)._compute(view, torch.zeros(3, 4, dtype=torch.int64, device="meta"))
    assert logits.shape == (4, BASE.vocab_size)


@torch.no_grad()
def test_a_step_recorded_once_plays_on_other_tokens_at_other_places():
    """What a CUDA graph does, by a trace on the CPU: no number of the recorded step is left in it."""
    model, tokens = ours(BASE), text(BASE, 3, LONG)
    whole = model(tokens)
    caches = [SlotCache(BASE, 4, 64, stepped=True) for _ in range(2)]
    shape = Shape(4, 32)
    step = StaticStep(model, caches[0])
    recorded = make_fx(lambda rows: step._compute(StillView(caches[0], shape), rows))(torch.zeros(3, 4).long())
    step._play = lambda asked, rows: recorded(rows) if asked == shape else pytest.fail("another shape")
    for slot, length in enumerate((20, 17, 26)):
        model(tokens[slot : slot + 1, :length], cache=caches[0].view(slot))
    for slots in ([0, 1, 2], [2, 0], [2], *[[0, 2]] * 3):
        at = [caches[0].lengths[slot] for slot in slots]
        rows = step([int(tokens[slot, p]) for slot, p in zip(slots, at, strict=True)], slots)
        exact = torch.stack([whole[slot, p] for slot, p in zip(slots, at, strict=True)])
        torch.testing.assert_close(torch.stack(rows), exact, **CLOSE)


@torch.no_grad()
def test_where_it_cannot_be_it_says_so_and_does_nothing():
    assert StaticStep(ours(BASE), SlotCache(BASE, 1, 8))([1], [0]) is None  # read exactly, and not zeroed
    model = network(BASE)
    model.norm.weight = type("Sharded", (Parameter,), {})(model.norm.weight)
    cache = SlotCache(BASE, 1, 8, stepped=True)
    assert StaticStep(model, cache)([1], [0]) is None
    assert cache.lengths == [0]
    step = StaticStep(ours(BASE), cache)
    for _ in range(8):
        assert step([1], [0]) is not None
    with pytest.raises(Error, match="9 tokens do not fit a cache of 8"):
        step([1], [0])


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("config", [BASE, replace(GEMMA3, sliding_window=4)], ids=name_of)
@torch.no_grad()
def test_recorded_it_is_the_same(config):
    """Every shape of the walk a graph; tokens, slots and lengths change under it."""
    model = network(config).cuda()
    cache = SlotCache(config, 6, LONG, device="cuda")
    step = StaticStep(model, cache)
    walk(step, model, cache, text(config, 5, LONG).cuda(), 1e-4)
    assert step._recording
    assert len(step._recorded) >= 4


@pytest.mark.gpu
@GPU
@torch.no_grad()
def test_what_was_recorded_follows_weights_and_cache():
    model, tokens = network(BASE).cuda(), text(BASE, 1, 30)
    cache = SlotCache(BASE, 1, 16, device="cuda")
    step = StaticStep(model, cache)

    def check(recordings):
        cache.rewind(0, 0)
        rows = torch.stack([step([token], [0])[0] for token in tokens[0, :10].tolist()])
        torch.testing.assert_close(rows, model(tokens[:, :10].cuda())[0].cpu(), **CLOSE)
        assert len(step._recorded) == recordings

    check(2)
    graphs = [found.graph for found in step._recorded.values()]
    part = model.layers[1].mlp.up_proj
    part.weight.mul_(0.5)  # in place: the same recordings
    check(2)
    assert graphs == [found.graph for found in step._recorded.values()]
    part.weight.data = part.weight.data * 3
    check(2)
    assert not set(graphs) & {found.graph for found in step._recorded.values()}
    part.weight = Parameter(-part.weight)
    check(2)
    model.compute_dtype = torch.float64
    check(2)
    model.compute_dtype = None
    cache.resize([0], 2, 64)
    check(2)


@pytest.mark.gpu
@GPU
@torch.no_grad()
def test_what_cannot_be_recorded_is_told_once_and_computed(monkeypatch):
    """A network that asks the GPU for a number in the midst of a step."""
    model = network(BASE).cuda()
    cache = SlotCache(BASE, 2, LONG, device="cuda")
    step, plain = StaticStep(model, cache), model.norm.forward
    monkeypatch.setattr(model.norm, "forward", lambda x, *rest: plain(x, *rest) * float(x.isfinite().all()))
    with pytest.warns(Notice, match="steps are not recorded as a CUDA graph"):
        first = step([3], [1])
    torch.testing.assert_close(first[0], model(torch.tensor([[3]]).cuda())[0, 0].cpu(), **CLOSE)
    assert torch.stack(step([4], [1])).isfinite().all()
