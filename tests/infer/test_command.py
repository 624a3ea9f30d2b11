"""`gemstill generate`: where prompts come from, what is printed, and the answers to wrong input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemstill import cli, save
from gemstill.core.errors import Error
from gemstill.infer.command import plan, read_prompts
from gemstill.infer.config import GenerateConfig
from gemstill.infer.generate import generate, prompt_ids, stream
from gemstill.model.quantized import quantize_model, weight_bytes
from tests.infer.networks import SMALL, network
from tests.model.tokenizers import small_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("command") / "model"
    save(network(), small_tokenizer(), place)
    return place


def answer(prompt: Any, **options: Any) -> str:
    return generate(network(), small_tokenizer(), prompt, **options)


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["generate", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, folder, "def", "--max-new-tokens", 8) == answer("def", max_new_tokens=8) + "\n"


def test_flags_reach_the_sampler(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"temperature": 2.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3, "seed": 7}
    words = [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), value)]
    assert printed(capsys, folder, "def", *words, "--max-new-tokens=30") == (
        answer("def", max_new_tokens=30, **options) + "\n"
    )


def test_quantized_weights_are_computed_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = replace(SMALL, hidden_size=64, intermediate_size=96)
    save(network(wide), small_tokenizer(), tmp_path / "model")
    model = network(wide)
    quantize_model(model, "int8")
    words = [tmp_path / "model", "def", "--max-new-tokens=6", "--quantize"]
    assert printed(capsys, *words, "int8") == generate(model, small_tokenizer(), "def", max_new_tokens=6) + "\n"
    config = GenerateConfig(source=str(tmp_path / "model"), prompt="def", quantize="int8")
    assert plan(config)["weight_bytes"] == weight_bytes(model)
    for kind, message in (("int3", "no model is quantized to 'int3'"), ("file", "has no blocks of its own")):
        assert cli.main(["generate", *map(str, words), kind]) == 2
        assert message in capsys.readouterr().err


def test_keys_and_values_in_eight_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, folder, "def", "--max-new-tokens=6", "--cache", "int8")
    plain, eight = (
        plan(GenerateConfig(source=str(folder), prompt="def", cache=cache))["cache_bytes"] for cache in ("", "int8")
    )
    assert eight < 0.4 * plain  # of float32: a byte and an eighth for each four
    assert cli.main(["generate", str(folder), "def", "--cache", "int4"]) == 2
    assert "not kept in 'int4'" in capsys.readouterr().err


def test_stop_strings_are_taken_letter_by_letter(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = answer("def", max_new_tokens=20)
    stop = text[5:8]
    assert printed(capsys, folder, "def", "--max-new-tokens=20", "--stop", "[1, 2]", "--stop", stop) == (
        text[: text.find(stop)] + "\n"
    )


def test_standard_input(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("def straße\n".encode())))
        out = printed(capsys, folder, *words, "--max-new-tokens=5")
        assert out == answer("def straße", max_new_tokens=5) + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert cli.main(["generate", str(folder)]) == 2
    assert "standard input: is no UTF-8 text" in capsys.readouterr().err


def test_several_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("def\n\nclass A:\n")
    out = printed(capsys, folder, "--prompts", file, "--max-new-tokens=5")
    assert out == f"{answer('def', max_new_tokens=5)}\n\n{answer('class A:', max_new_tokens=5)}\n"


def test_a_chat_prompt(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "def"}]
    assert printed(capsys, "--chat", folder, "def", "--max-new-tokens=5") == answer(turns, max_new_tokens=5) + "\n"
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"messages": turns}))
    assert printed(capsys, folder, "--prompts", file, "--max-new-tokens=5") == answer(turns, max_new_tokens=5) + "\n"


def test_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('"def"\n{"prompt": "class\\nA"}\n')
    words = ("--prompts", file, "--max-new-tokens", 6, "--temperature", 1, "--seed", 2)
    lines = [json.loads(line) for line in printed(capsys, "--json", folder, *words).splitlines()]
    for line, prompt in zip(lines, ("def", "class\nA"), strict=True):
        pieces = stream(network(), small_tokenizer(), prompt, max_new_tokens=6, temperature=1, seed=2)
        assert line["text"] == "".join(pieces)
        assert (line["prompt"], line["ended"]) == (prompt, "length")
        assert line["prompt_tokens"] == len(prompt_ids(small_tokenizer(), prompt))
        assert [token["id"] for token in line["tokens"]] == [token.id for token in pieces.tokens]
        found = [token["logprob"] for token in line["tokens"]]
        assert found == pytest.approx([token.logprob for token in pieces.tokens], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{", "line 1: is not valid JSON"),
        ("a.jsonl", '"x"\n{"text": "x"}', "line 2: is no prompt"),
        ("a.jsonl", '{"messages": []}', "line 1: is no prompt"),
        ("a.txt", "\n \n", "holds no prompt"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_files_of_prompts_are_checked(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(Error, match=message):
        read_prompts(tmp_path / name)


def test_plan(folder: Path) -> None:
    config = GenerateConfig(source=str(folder), prompt="def", max_new_tokens=8)
    figures = plan(config)
    assert figures["prompt_tokens"] == len(prompt_ids(small_tokenizer(), "def"))
    assert figures["cache_bytes"] > 0
    assert figures["weight_bytes"] == sum(4 * p.numel() for p in network().parameters())


def test_wrong_input_is_answered_in_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "text.gguf").write_text("no")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / ".metadata").write_bytes(b"\x80")
    (tmp_path / "pickle.bin").write_bytes(b"\x80\x04x")
    for words, message in (
        ([tmp_path / "mdel", "x"], "there is no such file or folder"),
        ([f"{folder}l", "x"], f"did you mean '{folder}'?"),
        (
            [other, "x"],
            "holds a model of type 'llama'; only gemma2, gemma3_text and the text part of gemma3 can be opened",
        ),
        ([tmp_path / "picture.png", "x"], "is no model"),
        ([tmp_path / "text.gguf", "x"], "is no GGUF file"),
        ([tmp_path / "state", "x"], "is a training state"),
        ([tmp_path / "pickle.bin", "x"], "is a pickle"),
        ([folder / "model.safetensors", "x"], f"name its folder: {folder}"),
        ([tmp_path, "x"], "name one of them"),
        ([folder, tmp_path / "picture.png"], "is a picture, and this is a text model"),
        ([folder, "x", "--image", "y.png"], "takes no images"),
        ([folder, "x", "--temperature", "-1"], "temperature is -1"),
        ([folder, "x", "--max-new-tokens", "-1"], "max_new_tokens is -1"),
        ([folder, "x", "--prompts", "y"], "has both a prompt and a file of prompts"),
        ([folder, "def area(width) " * 400], "prompt 1 has"),
    ):
        assert cli.main(["generate", *map(str, words)]) == 2, words
        shown = capsys.readouterr()
        assert message in shown.err
        assert (shown.out, shown.err.count("\n")) == ("", 1)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "nothing"], ["generate", "--help"], ["generate", "m", "--top-p", "2"], ["chat", "nothing"],
        ["chat", "--help"], ["inspect", "nothing"], ["inspect", "--help"],
    ],
)  # fmt: skip
def test_wrong_input_and_help_need_no_torch(words: list[str]) -> None:
    code = f"import sys; from gemstill.cli import main\ntry: main({words})\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_broken_file_name_stays_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "a\nb\x1b[2J", "x"]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "\x1b" not in shown
