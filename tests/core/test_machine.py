"""The machine probe: measured once, cached, and what follows from it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from gemstill.core import machine
from gemstill.core.errors import Error
from gemstill.core.machine import Machine, fast_dtype, probe


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(machine.OVERRIDE, raising=False)
    probe.cache_clear()
    yield tmp_path
    probe.cache_clear()


def test_measured_once_and_read_afterwards(cache: Path) -> None:
    start = time.perf_counter()
    first = probe()
    assert time.perf_counter() - start < 15  # about a second on a free machine
    assert min(first.float32, first.bfloat16, first.read) > 0
    assert len(list(cache.rglob("machine-*.json"))) == 1
    probe.cache_clear()
    assert probe() == first


def test_a_spoilt_record_is_measured_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Machine("cpu", 2, "x", 100.0, 20.0, 1.0, 30.0, "float32")
    monkeypatch.setattr(machine, "_measure", lambda threads: made)
    probe()
    record = next(cache.rglob("machine-*.json"))
    for spoilt in ('{"cpu": "x"}', "{", "[]"):
        record.write_text(spoilt)
        probe.cache_clear()
        assert probe() == made


def test_the_probe_works_where_nothing_can_be_written(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = Machine("cpu", 2, "x", 100.0, 20.0, 1.0, 30.0, "float32")
    monkeypatch.setattr(machine, "_measure", lambda threads: made)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert probe() == made


def test_bfloat16_is_fast_only_where_it_was_measured_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(float32: float, bfloat16: float) -> torch.dtype:
        seconds = {torch.float32: 1 / float32, torch.bfloat16: 1 / bfloat16, torch.int8: 1.0}
        monkeypatch.setattr(machine, "_product", lambda dtype: (lambda: seconds[dtype], 1.0))
        monkeypatch.setattr(machine, "_best", lambda work, clock=None: work() if clock else 1.0)
        return machine._measure(torch.get_num_threads()).fast_dtype

    assert measured(150, 790) == torch.bfloat16  # AVX-512 with bfloat16
    assert measured(150, 20) == torch.float32  # AVX2 alone: the dtype is there and slow
    assert measured(150, 160) == torch.float32  # casts would eat it


def test_the_probe_leaves_the_number_of_threads_as_it_was() -> None:
    before = torch.get_num_threads()
    found = machine._measure(before)
    assert torch.get_num_threads() == found.cores == before
    assert found.rate(torch.bfloat16) == found.bfloat16


def test_the_environment_overrides_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("float32", "bfloat16"):
        monkeypatch.setenv(machine.OVERRIDE, name)
        assert fast_dtype() == getattr(torch, name)
    monkeypatch.setenv(machine.OVERRIDE, "float16")
    with pytest.raises(Error, match="'float16' is no precision; set it to float32 or bfloat16"):
        fast_dtype()
