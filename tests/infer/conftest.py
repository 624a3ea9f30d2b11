"""Equal texts need equal arithmetic: everything here computes in float32, whatever is fastest on the machine."""

import pytest

from gemstill.core import machine


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.OVERRIDE, "float32")
