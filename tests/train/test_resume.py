"""A run that is killed at any moment goes on to the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemstill.core.errors import Error
from gemstill.core.files import locked
from gemstill.train.config import OptimizerConfig, TrainConfig
from gemstill.train.metrics import TIMES, read
from gemstill.train.run import train


def figures(run: str) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl without what the clock says."""
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read(Path(run) / "metrics.jsonl")]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: hundreds of fsyncs cost nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def crashes(corpus: Path, folder: Path, mode: str, count: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GEMSTILL_PRECISION": "float32"}
    command = [sys.executable, str(Path(__file__).with_name("crashes.py")), str(corpus), str(folder), mode, str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_killed_at_every_disk_operation_of_a_save(corpus: Path, memory: Path) -> None:
    """Every write (left half done), fsync, rename, mkdir and unlink of the second save, in turn."""
    assert crashes(corpus, memory, "save", 1000)["killed"] > 15


def test_killed_at_random_moments(corpus: Path, memory: Path) -> None:
    assert crashes(corpus, memory, "random", 3)["killed"] >= 3


@pytest.mark.slow
def test_killed_at_every_disk_operation_of_a_run(corpus: Path, memory: Path) -> None:
    assert crashes(corpus, memory, "all", 1000)["killed"] > 60


@pytest.mark.slow
def test_killed_at_many_random_moments(corpus: Path, memory: Path) -> None:
    assert crashes(corpus, memory, "random", 25)["killed"] >= 25


def test_an_interrupted_run_knows_no_more_than_its_state(recipe: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written to metrics.jsonl after the last state is cut off, and comes again the same."""
    from gemstill.train.loop import Loop

    whole = dataclasses.replace(recipe, run=recipe.run + "-whole")
    train(whole)
    step = Loop._train_step

    def stop(self: Loop) -> Any:
        if self.step == 8:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    path = Path(recipe.run) / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 9, "lo')
    train(recipe)
    assert figures(recipe.run) == figures(whole.run)
    assert train(recipe)["steps"] == 12  # all done: nothing is trained again
    assert figures(recipe.run) == figures(whole.run)


def test_states_kept_are_the_last_and_the_best(recipe: TrainConfig) -> None:
    train(dataclasses.replace(recipe, save_every=2, keep_last=2))
    names = sorted(path.name for path in (Path(recipe.run) / "state").iterdir())
    assert names == ["step-00000010", "step-00000012"]


def test_another_recipe_is_refused_by_name(recipe: TrainConfig) -> None:
    train(dataclasses.replace(recipe, steps=2))
    with pytest.raises(Error, match=r"steps was 2 and is 3"):
        train(dataclasses.replace(recipe, steps=3))
    rate = dataclasses.replace(recipe, steps=2, optimizer=OptimizerConfig(learning_rate=0.5))
    with pytest.raises(Error, match=r"optimizer.learning_rate was 0.01 and is 0.5"):
        train(rate)
    train(dataclasses.replace(recipe, steps=2, save_every=1, keep_last=5))  # no part of what is computed


def test_other_data_are_refused_by_name(recipe: TrainConfig, corpus: Path, tmp_path: Path) -> None:
    from gemstill.data.shards import write_dataset
    from gemstill.text.tokenizer import Tokenizer

    train(dataclasses.replace(recipe, steps=2))
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"other text number {i}, and more of it. " * 20)
    tokenizer = Tokenizer.open(corpus / "tokenizer")
    write_dataset(tmp_path / "text", tokenizer, tmp_path / "other", heldout_fraction=0.2, workers=1)
    source = dataclasses.replace(recipe.data.sources[0], folder=str(tmp_path / "other"))
    data = dataclasses.replace(recipe.data, sources=[source])
    with pytest.raises(Error, match="data_fingerprints"):
        train(dataclasses.replace(recipe, steps=2, data=data))


def test_a_second_process_is_refused(recipe: TrainConfig) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(recipe.run):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        with pytest.raises(Error, match="another process"):
            train(recipe)
    finally:
        done.set()
        thread.join()
