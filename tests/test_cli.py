"""The command line: it parses, calls one function, and says what is wrong in one line."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gemstill import __version__, cli
from gemstill.core.errors import Error


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1  # of learning


@dataclass(frozen=True)
class Config:
    output: Path  # where to
    prompt: str = ""
    steps: int = 3  # of 100 %
    inner: Inner = field(default_factory=Inner)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A command `job` that records the configurations it is called with."""
    found: list[Any] = []
    module = types.ModuleType("gemstill.job")

    def run(config: Config) -> dict[str, Any]:
        found.append(config)
        if config.prompt == "fail":
            raise Error("went wrong", where="job", fix="mend it")
        if config.prompt == "stop":
            raise KeyboardInterrupt
        return {"tokens_seen": 1234567, "wall_seconds": 61.0, "peak_rss_bytes": 3 * 2**30, "flops": 6e13, "ratio": 0.5}

    module.run, module.plan, module.Config = run, lambda config: {"tokens": 5}, Config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gemstill.job", module)
    monkeypatch.setitem(cli.COMMANDS, "job", cli.Command("do a job", "job", "job:Config", places=("output", "prompt")))
    return found


def test_recipe_settings_flags_and_places(calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output: a\nsteps: 5\ninner: {rate: 3}\n")
    assert cli.main(["job", str(recipe), "b", "--set", "inner.rate=1e-3", "--steps", "7"]) == 0
    assert calls == [Config(Path("b"), "", 7, Inner(1e-3))]
    out = capsys.readouterr().out
    for line in (
        "tokens seen     1,234,567",
        "wall seconds    1:01",
        "peak rss bytes  3 GiB",
        "flops           6.00e+13",
    ):
        assert line in out


def test_texts_are_taken_letter_by_letter(calls: list[Any]) -> None:
    assert cli.main(["job", "o", "def f(x): # {a: 1}"]) == 0
    assert cli.main(["job", "--output=o", "--prompt", "null"]) == 0
    assert [config.prompt for config in calls] == ["def f(x): # {a: 1}", "null"]


def test_dry_run_runs_nothing(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["job", "o", "--dry-run"]) == 0
    assert calls == []
    assert capsys.readouterr().out == "tokens  5\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["jbo"], "there is no command 'jbo'; did you mean 'job'?"),
        (["--job"], "there is no command '--job'"),
        (["job", "o", "--stesp", "3"], "gemstill job: there is no flag --stesp; did you mean '--steps'?"),
        (["job", "o", "--inner.rat", "3"], "did you mean '--inner.rate'?"),
        (["job", "o", "--set", "inner.raet=3"], "there is no field 'inner.raet'; did you mean 'rate'?"),
        (["job", "o", "--steps", "many"], "'steps' is 'many'; it should be a whole number"),
        (["job", "o", "--steps"], "gemstill job: argument --steps: expected one argument; see gemstill job --help"),
        (["job", "o", "p", "q"], "does not know what to do with 'q'"),
        (["job", "none.yaml"], "none.yaml: cannot be read"),
        (["job"], "'output' has no value; give one: --set output=…"),
        (["job", "o", "fail"], "job: went wrong; mend it"),
    ],
)
def test_an_error_is_one_line_and_status_2(
    calls: list[Any], capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("gemstill: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


def test_stopped_by_hand_it_says_how_to_go_on(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["job", "o", "stop"]) == 130
    assert capsys.readouterr().err == "\ngemstill: stopped; the same command goes on where it was\n"


def test_help_lists_the_commands_and_their_fields(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--help"]):
        assert cli.main(words) == 0
        out = capsys.readouterr().out
        assert all(f"\n  {name} " in out for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as ended:
        cli.main(["job", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    for piece in (
        "where to (required)",
        "of 100 % [3]",
        "--inner.rate float",
        "of learning [0.1]",
        "[OUTPUT] [PROMPT]",
    ):
        assert piece in out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"gemstill {__version__}\n"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_is_wired(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = cli.COMMANDS[name]
    module = importlib.import_module(f"gemstill.{command.module}")
    assert callable(getattr(module, command.run))
    assert callable(getattr(module, command.plan))
    with pytest.raises(SystemExit):
        cli.main([*name.split(), "--help"])
    from gemstill.core.config import fields

    config_module, _, class_name = command.config.partition(":")
    known = fields(getattr(importlib.import_module(f"gemstill.{config_module}"), class_name))
    assert {*command.places, *([command.made] if command.made else [])} <= {item.name for item in known}


def test_help_is_instant() -> None:
    """The overview loads neither torch nor any room."""
    heavy = "{'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    code = f"import sys; from gemstill.cli import main; main([]); assert not {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "gemstill", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "gemstill: there is no command 'trian'; did you mean 'train'?\n"
