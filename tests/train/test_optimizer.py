"""The optimizer beside torch's own, and the schedule."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gemstill.core.errors import Error
from gemstill.core.machine import processor_flags
from gemstill.ops.native import loaded
from gemstill.train import optimizer as rules
from gemstill.train.config import HardConfig, OptimizerConfig, ScheduleConfig
from gemstill.train.optimizer import COEFFICIENTS, Muon, Optimizer, orthogonalize
from gemstill.train.schedule import factor


class Net(nn.Module):
    """Two matrices of one shape, one of another, an embedding and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 24, bias=False)
        self.second = nn.Linear(8, 24, bias=False)
        self.third = nn.Linear(24, 8, bias=False)
        self.norm = nn.LayerNorm(8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed_tokens(ids))
        return self.third(torch.tanh(self.first(x)) * self.second(x)).square().sum()


def backward(net: nn.Module, step: int) -> None:
    net.zero_grad()
    net(torch.randint(0, 11, (5,), generator=torch.Generator().manual_seed(step))).backward()


def matrices(net: Net) -> list[Tensor]:
    return [net.first.weight, net.second.weight, net.third.weight]


def plain(x: Tensor) -> Tensor:
    """What orthogonalize computes, of one matrix in float64, from its singular values."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.pow(4).sum().pow(0.25)
    for a, b, c in COEFFICIENTS:
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_orthogonalize_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([plain(each) for each in x])
    torch.testing.assert_close(orthogonalize(x.double(), torch.float64), exact)
    torch.testing.assert_close(orthogonalize(x).double(), exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(orthogonalize(1e-15 * x).double(), exact, rtol=1e-4, atol=1e-5)
    before = torch.linalg.svdvals(x)
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.max() < 1.5
    bound = before.pow(4).sum(-1, keepdim=True).pow(0.25)
    large = (before > 0.0051 * bound).sum(-1)  # how many the rounds are made for
    assert all(row[:count].min() > 0.45 for row, count in zip(values, large, strict=True))


def test_orthogonalize_of_nearly_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 8, generator=generator) @ torch.randn(8, 90, generator=generator)
    x = x + 0.01 * torch.randn(30, 90, generator=generator)
    exact = plain(x)
    assert (orthogonalize(x[None])[0] - exact).norm() < 1e-3 * exact.norm()
    assert orthogonalize(torch.zeros(2, 4, 4)).abs().sum() == 0


def test_orthogonalize_in_bfloat16_is_as_near_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative error of one update: at most 1.5 times that of torch.optim.Muon's five rounds, each against float64."""
    grad = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    options = ((3.4445, -4.775, 2.0315), 5, 1e-7)
    rounded = torch.optim._muon._zeropower_via_newtonschulz(grad, *options).double()
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.double)
    exact = torch.optim._muon._zeropower_via_newtonschulz(grad, *options)
    theirs = (rounded - exact).norm() / exact.norm()
    ours = (orthogonalize(grad[None], torch.bfloat16)[0].double() - plain(grad)).norm() / plain(grad).norm()
    assert ours <= 1.5 * theirs


SHAPES = [(20, 50), (50, 20), (64, 64), (1, 5), (100, 7), (130, 300)]


@pytest.mark.parametrize("shape", SHAPES)
def test_native_moves_are_as_near_as_plain_ones(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, which the kernel pads, tall and wide, one without gradient; against float64."""

    def moved(dtype: torch.dtype, wide: bool = False) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(2)
        made = [torch.randn(shape, generator=generator) for _ in range(3)]
        weights = [nn.Parameter(x.double() if wide else x) for x in made]
        muon = Muon(weights, 0.02, momentum=0.8, weight_decay=0.3, dtype=dtype)
        for scale in (1.0, 1e-4, 1.0):
            for at, weight in enumerate(weights):
                weight.grad = (0.0 if at == 2 else scale) * torch.randn(shape, generator=generator).to(weight.dtype)
            muon.step()
        return torch.stack([w.detach() for w in weights]), muon.state[weights[0]]["momentum"]

    wanted = os.environ.get("GEMSTILL_KERNELS", "") in ("", "native")
    if not (loaded() and wanted and "avx512_bf16" in processor_flags()):
        pytest.skip("no kernels, or no products of bfloat16 among this processor's instructions")
    exact, momentum = moved(torch.float64, wide=True)
    with monkeypatch.context() as patch:
        patch.setattr(rules, "kernels", lambda x: None)
        plain, _ = moved(torch.bfloat16)
    calls = []
    original = Muon._native
    monkeypatch.setattr(Muon, "_native", lambda self, *given: calls.append(original(self, *given)) or calls[-1])
    ours, ahead = moved(torch.bfloat16)
    assert calls
    assert all(calls)
    assert (ours - exact).norm() <= 1.1 * (plain - exact).norm()
    assert (ours[2] - exact[2]).abs().max() < 1e-6  # only decay moves it
    torch.testing.assert_close(ahead.double(), momentum, rtol=1e-5, atol=1e-7)
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        assert torch.equal(moved(torch.bfloat16)[0], ours)
    torch.set_num_threads(threads)


def test_muon_is_its_equation_in_float64() -> None:
    net = Net()
    muon = Muon(matrices(net), 0.02, momentum=0.9, weight_decay=0.1)
    weights = [p.detach().double() for p in matrices(net)]
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(20):
        backward(net, step)
        muon.step()
        for w, m, p in zip(weights, momenta, matrices(net), strict=True):
            assert p.grad is not None
            m.copy_(0.9 * m + 0.1 * p.grad.double())
            direction = plain(0.1 * p.grad.double() + 0.9 * m)
            rows = direction / direction.norm(dim=1, keepdim=True)
            w.copy_((1 - 0.02 * 0.1) * w - 0.02 * 0.2 * w.shape[1] ** 0.5 * rows)
    for p, w in zip(matrices(net), weights, strict=True):
        torch.testing.assert_close(p.double(), w, rtol=1e-3, atol=1e-4)


def test_a_row_without_gradient_stays() -> None:
    matrix = nn.Parameter(torch.ones(4, 6))
    matrix.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    matrix.grad[2] = 0
    Muon([matrix], 0.1).step()
    assert torch.equal(matrix[2], torch.ones(6))
    torch.testing.assert_close((matrix - 1).norm(dim=1)[[0, 1, 3]], torch.full((3,), 0.1 * 0.2 * 6**0.5))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_rates_decay_and_rules_go_to_the_right_parameters(name: str) -> None:
    """Stepped beside torch.optim.AdamW (and Muon) set up by hand."""
    config = OptimizerConfig(name=name, learning_rate=0.02, embedding_rate=0.003, weight_decay=0.1)  # type: ignore[arg-type]
    ours, theirs = Net(), Net()
    mine = Optimizer(ours.named_parameters(), config)
    rest = [theirs.embed_tokens.weight, theirs.norm.weight]
    groups = [{"params": rest, "lr": 0.003, "weight_decay": 0.0}]
    yours: list[torch.optim.Optimizer] = []
    if name == "adamw":
        groups.append({"params": matrices(theirs), "lr": 0.02, "weight_decay": 0.1})
    else:
        yours.append(Muon(matrices(theirs), 0.02, weight_decay=0.1))
    yours.append(torch.optim.AdamW(groups, betas=(0.9, 0.95)))
    for step in range(10):
        backward(ours, step)
        mine.step(1.0)
        backward(theirs, step)
        for part in yours:
            part.step()
    for x, y in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


def test_state_taken_up_gives_the_same_bits() -> None:
    config = OptimizerConfig()
    net = Net()
    optimizer = Optimizer(net.named_parameters(), config)
    for step in range(3):
        backward(net, step)
        optimizer.step(0.5)
    other = copy.deepcopy(net)
    resumed = Optimizer(other.named_parameters(), config)
    saved = optimizer.state_dict()
    assert {name.split(".")[-1] for name in saved} == {"momentum", "step", "exp_avg", "exp_avg_sq"}
    for name, tensor in resumed.state_dict().items():
        tensor.copy_(saved[name])
    for network, optimizer_ in ((net, optimizer), (other, resumed)):
        backward(network, 9)
        optimizer_.step(0.25)
    for x, y in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y)


def test_cosine() -> None:
    config = ScheduleConfig("cosine", warmup=0.1, final=0.2)
    values = [factor(config, step, 100) for step in range(100)]
    assert values[0] == pytest.approx(0.1)
    assert values[9] == values[10] == 1
    assert values[99] == pytest.approx(0.2)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_wsd() -> None:
    config = ScheduleConfig("wsd", warmup=0.1, decay=0.2, final=0.0)
    values = [factor(config, step, 100) for step in range(100)]
    assert values[9:80] == [1.0] * 71
    assert values[99] == 0
    assert values[89] == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedules_of_very_short_runs(steps: int) -> None:
    for name in ("cosine", "wsd"):
        assert all(0 <= factor(ScheduleConfig(name), step, steps) <= 1 for step in range(steps))  # type: ignore[arg-type]


def test_hard_labels_mix_in_by_a_line() -> None:
    hard = HardConfig(start=0.2, end=1.0)
    assert hard.fraction(0, 5) == 0.2
    assert hard.fraction(2, 5) == pytest.approx(0.6)
    assert hard.fraction(4, 5) == 1.0


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: OptimizerConfig(learning_rate=-1.0), "learning_rate"),
        (lambda: OptimizerConfig(embedding_rate=float("nan")), "embedding_rate"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "weight_decay"),
        (lambda: OptimizerConfig(betas=[0.9]), "betas"),
        (lambda: OptimizerConfig(momentum=1.0), "momentum"),
        (lambda: ScheduleConfig(warmup=1.5), "warmup"),
        (lambda: ScheduleConfig("wsd", warmup=0.5, decay=0.6), "overlap"),
        (lambda: HardConfig(start=2.0), "start"),
    ],
)
def test_bad_values_are_refused_by_name(make: Callable[[], object], name: str) -> None:
    with pytest.raises(Error, match=name):
        make()
