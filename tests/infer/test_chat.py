"""`gemstill chat` at a real terminal and in a pipe, with a tiny real model."""

from __future__ import annotations

import io
import json
import re
import stat
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gemstill import cli, save
from gemstill.core.terminal import printable
from gemstill.infer.chat import plan
from gemstill.infer.config import ChatConfig
from gemstill.infer.lines import Piped, history_file, is_open, unquoted
from gemstill.model.slots import SPARE
from tests.infer.networks import SMALL, network
from tests.infer.terminal import Terminal
from tests.model.tokenizers import small_tokenizer

FOREVER = "100000"  # new tokens: an answer that does not end before it is stopped


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat") / "model"
    save(network(replace(SMALL, max_position=200_000)), small_tokenizer(), place)
    return place


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    words = ["chat", str(folder), "--max-new-tokens", "8", "--temperature", "0"]
    with Terminal(words, {"XDG_STATE_HOME": str(tmp_path / "state")}) as opened:
        banner = opened.wait("/help lists the commands")
        assert "context 200,000 tokens" in banner
        yield opened


def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("def area\r")
    terminal.wait("8 tokens · ")
    terminal.wait(" tokens/s · read ")
    terminal.type("go on\r")
    terminal.wait("8 tokens · ")
    terminal.wait("cut at max_new_tokens")
    read = re.findall(r"read (\d+) of (\d+) in", terminal.shown)
    assert int(read[0][0]) == int(read[0][1])
    assert int(read[1][0]) < int(read[1][1]) - 8  # the first turn and its answer were kept
    terminal.type(f"/save {tmp_path}/talk.json\r")
    terminal.wait("2 turns are in")
    record = json.loads((tmp_path / "talk.json").read_text())
    assert [message["content"] for message in record["messages"][::2]] == ["def area", "go on"]
    assert all(printable(message["content"]) in terminal.shown for message in record["messages"][1::2])
    terminal.type("/reset\r")
    terminal.wait("begins anew")
    terminal.type(f"/load {tmp_path}/talk.json\r")
    terminal.wait("2 turns are back")
    terminal.type("/exit\r")
    assert terminal.end() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.type(f"/params max_new_tokens={FOREVER}\r")
    terminal.wait(f"max_new_tokens={FOREVER}")
    terminal.type("def area\r")
    terminal.wait("def area")
    while len(terminal.shown.rpartition("def area")[2].strip()) < 20:  # it is writing
        assert terminal.read(5)
    terminal.type("\x03", at_prompt=False)
    terminal.wait("stopped")
    terminal.type("/params max_new_tokens=3\r")
    terminal.wait("max_new_tokens=3")
    terminal.type("go on\r")
    terminal.wait("3 tokens · ")
    terminal.wait("cut at max_new_tokens")
    read = re.findall(r"read (\d+) of (\d+) in", terminal.shown)
    assert int(read[1][0]) < int(read[1][1]) - 5  # what was written before Ctrl-C is still in the cache
    terminal.type("\x03")
    terminal.wait("Ctrl-D or /exit ends")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_several_lines_and_history(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type("one\x1b\rtwo\r")
    terminal.wait("tokens/s")
    terminal.type('"""three\rfour"""\r')
    terminal.wait("tokens/s")
    terminal.type("\x1b[A\x1b[A\x1b[A\x1b[A\r")  # up to the first message, over the lines of the second
    terminal.wait("tokens/s")
    terminal.type(f"/save {tmp_path}/talk.json\r")
    terminal.wait("3 turns are in")
    messages = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["one\ntwo", "three\nfour", "one\ntwo"]
    file = tmp_path / "state" / "gemstill" / "chat_history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert "+one\n+two\n" in file.read_text()


def test_wrong_commands_are_told_and_the_conversation_goes_on(terminal: Terminal) -> None:
    for typed, told in (
        ("/rest", "there is no command /rest; did you mean '/reset'?"),
        ("/load", "/load needs the name of a file"),
        ("/load nothing.json", "nothing.json: cannot be read"),
        ("/params temperature=hot", "it should be a number"),
        ("/params heat=1", "there is no field 'heat'"),
        ("/params top_p=3", "top_p is 3"),
        ("/help", "/system [TEXT]"),
        ("/system Be brief.", "Be brief."),
        ("/system -", "told nothing"),
        ("/params top_k=3 top_p=0.5", "top_k=3"),
    ):
        terminal.type(typed + "\r")
        terminal.wait(told)
    terminal.type("/usr/bin is a folder\r")  # no command, though it begins like one
    terminal.wait("tokens/s")


def piped(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return cli.main(["chat", str(folder), "--temperature", "0", "--max-new-tokens", "8", *words])


def test_a_pipe(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "talk.json"
    assert piped(monkeypatch, folder, f'def area\n\n"""two\nlines"""\n/save {file}\n/exit\nnever\n') == 0
    shown = capsys.readouterr()
    messages = json.loads(file.read_text())["messages"]
    assert [message["content"] for message in messages[::2]] == ["def area", "two\nlines"]
    assert shown.out == "".join(message["content"] + "\n" for message in messages[1::2])
    assert shown.err == ""
    assert piped(monkeypatch, folder, "go on\n/save " + str(file), "--load", str(file), "--system", "Be brief.") == 0
    record = json.loads(file.read_text())
    assert len(record["messages"]) == 6
    assert record["system"] == "Be brief."


def test_in_a_pipe_a_wrong_command_ends_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(monkeypatch, folder, "/load nothing.json\nnever\n") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "nothing.json: cannot be read" in shown.err


def test_a_full_context_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(f"question {number}\n" for number in range(6))
    assert piped(monkeypatch, folder, text, "--context", "120") == 0
    shown = capsys.readouterr()
    assert "the context of 120 tokens is full: the oldest turns left, " in shown.err
    assert len(shown.out) > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "nothing: there is no such file or folder"),
        (["MODEL", "--load", "nothing.json"], "nothing.json: cannot be read"),
        (["MODEL", "--context", "-1"], "context is -1"),
        (["MODEL", "--top-p", "2"], "top_p is 2"),
        (["MODEL", "--image", "x.png"], "takes no images"),
    ],
)
def test_wrong_input(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert cli.main(["chat", *(str(folder) if word == "MODEL" else word for word in words)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


def test_plan(folder: Path) -> None:
    figures = plan(ChatConfig(source=str(folder), context=1000))
    assert figures["context_tokens"] == 1000
    kept = 1000 + 2 * (4 + SPARE)  # tokens of one global layer and two local ones
    assert figures["cache_bytes_at_most"] == 2 * 4 * 2 * 16 * kept  # k and v, float32, heads, width


def test_triple_quotes() -> None:
    assert not is_open("plain")
    assert all(map(is_open, ['"""', '"""a', '  """a\nb', '"""a"', '""""']))
    assert not is_open('"""a\nb"""\n')
    assert unquoted('"""\n  a\nb\n"""\n') == "  a\nb"
    lines = Piped(io.StringIO('a\n"""b\n\nc\n"""\n"""never closed\n'))
    assert [lines.read() for _ in range(4)] == ["a", "b\n\nc", "never closed", None]


def test_no_place_for_a_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history_file() is None
