"""The optimizer beside torch's own, and the schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gemstill.core.errors import Error
from gemstill.ops.native import kernels
from gemstill.train import optimizer as rules
from gemstill.train.config import HardConfig, OptimizerConfig, ScheduleConfig
from gemstill.train.optimizer import Muon, Optimizer, _iterate, orthogonalize
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


def test_orthogonalize_makes_singular_values_alike() -> None:
    x = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(x))
    assert values.min() > 0.6
    assert values.max() < 1.3
    torch.testing.assert_close(orthogonalize(x.mT), orthogonalize(x).mT)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    assert torch.cosine_similarity(orthogonalize(x).flatten(), (u @ v).flatten(), 0) > 0.97
    assert orthogonalize(torch.zeros(2, 4, 4)).abs().sum() == 0


def test_the_short_form_is_the_plain_iteration() -> None:
    """Also for matrices of nearly low rank, whose squares have singular values near nothing."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 30, 8, generator=generator) @ torch.randn(3, 8, 90, generator=generator)
    x = x + 0.01 * torch.randn(3, 30, 90, generator=generator)
    exact = orthogonalize(x.double(), torch.float64)
    normed = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(_iterate(normed.double()), exact, rtol=1e-4, atol=1e-5)
    assert (orthogonalize(x) - exact).norm() < 1e-3 * exact.norm()


def test_muon_in_float32_is_torch_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon rounds to bfloat16 inside; told not to, it is the same function as ours."""
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.float)
    ours, theirs = Net(), Net()
    options = {"momentum": 0.9, "weight_decay": 0.1}
    a = Muon(matrices(ours), 0.02, **options)
    b = torch.optim.Muon(matrices(theirs), 0.02, adjust_lr_fn="match_rms_adamw", **options)
    for step in range(20):
        for net, optimizer in ((ours, a), (theirs, b)):
            backward(net, step)
            optimizer.step()
    for x, y in zip(matrices(ours), matrices(theirs), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_muon_in_bfloat16_is_as_near_as_torch_muon() -> None:
    """Error of one update against float64: ours in bfloat16 at most 1.5 times torch's."""
    grad = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(1))
    exact = orthogonalize(grad.double(), torch.float64)
    ours = orthogonalize(grad, torch.bfloat16).double()
    theirs = torch.stack(
        [torch.optim._muon._zeropower_via_newtonschulz(g, (3.4445, -4.775, 2.0315), 5, 1e-7) for g in grad]
    )
    assert (ours - exact).norm() <= 1.5 * (theirs.double() - exact).norm()


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (4, 64, 64), (2, 1, 5), (2, 100, 7), (3, 130, 300)])
def test_native_rounds_are_as_near_as_plain_ones(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes, which the kernel pads, tall and wide; against float64. The number of threads changes no bit."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x[0] *= 1e-4
    exact = orthogonalize(x.double(), torch.float64)
    kernels(x)  # with gradients on: built, where they can be
    ours = rules._native(x)
    if ours is None:
        pytest.skip("no kernels, or no products of bfloat16 among this processor's instructions")
    with monkeypatch.context() as patch:
        patch.setattr(rules, "kernels", lambda x: None)
        plain = orthogonalize(x, torch.bfloat16)
    assert ours.dtype == plain.dtype == torch.float32
    assert (ours - exact).norm() <= 1.1 * (plain - exact).norm()
    assert rules._native(torch.zeros(shape)).abs().sum() == 0  # type: ignore[union-attr]
    threads = torch.get_num_threads()
    for number in (1, 3):
        torch.set_num_threads(number)
        assert torch.equal(orthogonalize(x, torch.bfloat16), ours)
    torch.set_num_threads(threads)


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
