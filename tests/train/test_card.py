"""The card of a finished model: its run's facts, and its teacher's licence."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from gemstill.checkpoint.sidecars import licence
from gemstill.checkpoint.source import load
from gemstill.data.dataset import TokenDataset
from gemstill.distill.teach import describe, teach_model
from gemstill.train.config import ModelChoice, TrainConfig
from gemstill.train.run import train


def header(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_a_model_from_scratch_a_student_and_one_trained_further(
    recipe: TrainConfig, corpus: Path, tmp_path: Path
) -> None:
    summary = train(recipe)
    folder = Path(recipe.run) / "model"
    card = (folder / "README.md").read_text()
    assert "trained from scratch" in card
    assert f"{summary['tokens_seen']:,} in 12 steps" in card
    assert f"perplexity {summary['perplexity']:.4g} a token" in card
    assert "Licence" not in card
    assert header(card) == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gemstill"]}

    teacher, _ = load(folder)
    dataset = TokenDataset.open(corpus / "data" / "train")
    info = describe(teacher, dataset, window=32, block_tokens=1024, teacher="the: *teacher*", licence="gemma")
    teach_model(teacher, dataset, tmp_path / "store", info)
    source = dataclasses.replace(recipe.data.sources[0], store=str(tmp_path / "store"))
    student = dataclasses.replace(
        recipe, run=str(tmp_path / "student"), steps=2, data=dataclasses.replace(recipe.data, sources=[source])
    )
    train(student)
    card = (tmp_path / "student" / "model" / "README.md").read_text()
    assert "student: a Gemma 2 language model, distilled" in card
    assert "**the: *teacher***: gemma" in card
    assert header(card)["license"] == "gemma"
    assert header(card)["tags"] == ["gemstill", "distillation"]
    assert licence(tmp_path / "student" / "model") == "gemma"

    further = dataclasses.replace(
        recipe, run=str(tmp_path / "further"), steps=2, model=ModelChoice(start=str(tmp_path / "student" / "model"))
    )
    train(further)
    card = (tmp_path / "further" / "model" / "README.md").read_text()
    assert "started from the weights of student" in card
    assert header(card)["license"] == "gemma"


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: gemma\n---\n", "gemma"),
        ("license: x\n", "unknown"),
        ('---\nlicense: "a"\n---\n', "a"),
        ("", "unknown"),
    ],
)
def test_the_licence_is_read_from_a_cards_header(card: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence(tmp_path) == expected
