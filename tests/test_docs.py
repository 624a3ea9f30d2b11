"""What the pages and recipes say is so: links lead somewhere, commands exist, recipes and examples are valid."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from gemstill.cli import COMMANDS
from gemstill.core.config import fields, parse
from gemstill.model.config import PRESETS

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def config_of(command: str) -> type:
    module, _, name = COMMANDS[command].config.partition(":")
    found: type = getattr(importlib.import_module(f"gemstill.{module}"), name)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist_with_the_flags_shown(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```\n(.*?)^```", text, re.S | re.M):
        for line in re.findall(r"(?:^| -m )gemstill (.*)", block, re.M):
            words = shlex.split(line, comments=True)
            if "|" in words:
                assert {word for word in words if word != "|"} <= set(COMMANDS)
                continue
            command = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
            known = {"--" + item.name.replace("_", "-") for item in fields(config_of(command))}
            known |= {"--set", "--dry-run", "--help"}
            assert {word for word in words if word.startswith("--")} <= known, line
            for recipe in (word for word in words if word.endswith(".yaml")):
                assert (ROOT / recipe).exists(), recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_are_python_and_import_what_there_is(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gemstill"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gemstill":
                assert hasattr(importlib.import_module("gemstill"), node.attr), node.attr


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_are_valid_for_the_command_they_name(recipe: Path) -> None:
    named = re.search(r"gemstill (\w+) (\S+\.yaml)", recipe.read_text(encoding="utf-8"))
    assert named is not None, "a recipe says by which command it is run"
    assert ROOT / named[2] == recipe
    parse(config_of(named[1]), recipe)


def test_the_table_of_presets_is_true() -> None:
    text = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    for name, shape in PRESETS.items():
        row = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.M)
        assert row is not None, name
        numbers = [int(cell) for cell in re.findall(r"\d+", row[1].replace(",", ""))]
        assert numbers == [
            shape.num_layers, shape.hidden_size, shape.intermediate_size, shape.num_heads, shape.num_kv_heads,
            shape.head_dim, shape.sliding_window, shape.vocab_size, shape.body_parameters, shape.embedding_parameters,
        ]  # fmt: skip
