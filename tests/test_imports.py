"""The house's rules: imports run downwards, files and functions stay short, the reader's parts stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "gemstill"
FILES = sorted(SOURCE.rglob("*.py"))
# Top to bottom: a room may import from rooms below it, never from one above.
ROOMS = [
    "__main__", "cli", "ladder", "shrink", "heal", "quickstart", "report", "serve", "evaluation", "posttrain", "train",
    "distill", "data", "infer", "checkpoint", "text", "model", "ops", "core",
]  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_NETWORK = 500, 80, 400


def room(file: Path) -> str:
    part = file.relative_to(SOURCE).parts[0]
    return part.removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written out: from gemstill.room.module import name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_run_downwards(file: Path) -> None:
    if file == SOURCE / "__init__.py":
        return  # the public names: it imports from everywhere, lazily
    here = room(file)
    assert here in ROOMS, f"{here} has no place in the order of the rooms"
    for name in imports(ast.parse(file.read_text())):
        if name.startswith("gemstill."):
            there = name.split(".")[1]
            if there == "__version__":
                continue
            assert ROOMS.index(there) >= ROOMS.index(here), f"{file.name} imports {name}, which lies above it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_are_short(file: Path) -> None:
    text = file.read_text()
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= LONGEST_FUNCTION, f"{node.name} has {length} lines"


def test_the_network_is_one_file_that_can_be_read_at_once() -> None:
    assert (SOURCE / "model" / "transformer.py").read_text().count("\n") <= LONGEST_NETWORK


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_every_module_and_public_name_says_what_it_is(file: Path) -> None:
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree) is not None, "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if any(ast.unparse(mark) == "overload" for mark in node.decorator_list):
                continue  # a declaration; what follows it says what it is
            assert ast.get_docstring(node) is not None, f"{node.name} has no docstring"


# What the parts that people use from inside other trainers must do without: all of our dependencies
# but torch (with what torch itself asks for), numpy and safetensors.
OTHERS = ("tokenizers", "sentencepiece", "transformers", "rich", "tensorboard", "pydantic", "yaml", "google.protobuf")


def loaded_by(statement: str, without: tuple[str, ...] = ()) -> set[str]:
    """The modules that a statement loads in a fresh process, in which `without` cannot be imported."""
    code = f"import sys\nfor name in {without}: sys.modules[name] = None\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "rooms"),
    [
        ("import gemstill.ops.loss, gemstill.ops.target, gemstill.ops.attention", {"ops", "core"}),
        ("import gemstill.distill.store", {"distill", "data", "ops", "core"}),
        ("import gemstill as g; g.Store, g.Target, g.linear_cross_entropy", {"distill", "data", "ops", "core"}),
    ],
)
def test_loss_and_store_need_torch_numpy_and_safetensors_alone(statement: str, rooms: set[str]) -> None:
    loaded = loaded_by(statement, without=OTHERS)
    assert {name.split(".")[1] for name in loaded if name.startswith("gemstill.")} <= rooms


def test_the_package_itself_loads_nothing() -> None:
    assert not loaded_by("import gemstill; dir(gemstill)") & {"torch", "numpy", *OTHERS}


def test_public_names_are_all_there() -> None:
    import gemstill

    assert set(gemstill._HOMES) == set(gemstill.__all__)
    for name in gemstill.__all__:
        assert getattr(gemstill, name) is not None
        assert name in dir(gemstill)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        gemstill.lod  # noqa: B018


def test_nothing_that_is_ignored_is_kept() -> None:
    """A link to an environment, committed, would replace the real one wherever the commit is checked out."""
    if not (ROOT / ".git").exists():
        pytest.skip("no repository: an unpacked archive")
    listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(listed, capture_output=True, text=True, check=True).stdout == ""
