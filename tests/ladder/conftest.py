"""A ladder of seconds: real text, two sizes, two seeds, every kind of row."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemstill.core.config import parse
from gemstill.ladder.command import run
from gemstill.ladder.config import LadderConfig

# Dies, with no chance to clean up, when the third state of a training run has been written.
DYING = """
import os, sys
from gemstill.cli import main
from gemstill.train.loop import Loop
save, left = Loop._save, [3]
def dying(self, metrics):
    save(self, metrics)
    left[0] -= 1
    if left[0] == 0: os._exit(9)
Loop._save = dying
main(["ladder", sys.argv[1]])
"""


def model(hidden: int, inner: int) -> dict[str, Any]:
    changes = {"hidden_size": hidden, "intermediate_size": inner, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
               "head_dim": 16}  # fmt: skip
    return {"preset": "mini-1m", "overrides": changes}


def settings(folder: Path) -> dict[str, Any]:
    """A recipe over the text in folder/text, into folder/run."""
    teacher = {"tokens": 3000, "model": model(32, 96)}
    return {
        "run": str(folder / "run"), "data": str(folder / "text"), "vocab_size": 384, "heldout_fraction": 0.3,
        "student_fraction": 0.8, "window": 64, "windows_per_step": 2, "teacher": teacher, "tokens": 1000, "seeds": 2,
        "students": [{"name": "small", "model": model(16, 32)}, {"name": "large", "model": model(16, 96)}],
        "rate_factors": [1.0], "optimizer": {"learning_rate": 0.02, "embedding_rate": 0.03},
        "baselines": {"times_tokens": [2.0], "tokens_per_parameter": 0.5, "long_seeds": 1},
        "ablations": {"seeds": 2, "hard": [{"start": 0.0, "end": 0.5}], "temperatures": [2.0],
                      "teachers": {"weaker": teacher | {"tokens": 500}}},
    }  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text/: the beginnings of real source files."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "text").mkdir()
    for path in sorted((Path(sysconfig.get_paths()["stdlib"]) / "email").glob("*.py")):
        (folder / "text" / path.name).write_text(path.read_text()[:3000])
    return folder


@pytest.fixture(scope="session")
def made(text: Path) -> Path:
    """The run's folder: killed in its third training, inspected by nobody, gone on with to the end."""
    recipe = text / "ladder.yaml"
    recipe.write_text(yaml.safe_dump(settings(text)))
    died = subprocess.run([sys.executable, "-c", DYING, str(recipe)], capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert (text / "run" / "report.html").exists()  # of what was there
    run(parse(LadderConfig, recipe))
    return text / "run"
