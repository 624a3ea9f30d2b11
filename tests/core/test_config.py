"""Configuration from recipes and settings: every fault names its place and how to mend it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemstill.core import config
from gemstill.core.errors import Error


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 3e-4  # of the matrices
    kind: Literal["muon", "adamw"] = "muon"
    # shown first
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Source:
    folder: Path  # where the shards are
    weight: float = 1.0


@dataclass(frozen=True)
class Base:
    output: Path  # the run's folder
    steps: int = 3  # of the optimizer

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise Error(f"steps is {self.steps}", where="recipe", fix="it must be above 0")


@dataclass(frozen=True)
class Recipe(Base):
    compile: bool = True
    clip: float | None = 1.0
    names: list[str] = field(default_factory=list)
    optimizer: Optimizer = field(default_factory=Optimizer)
    sources: list[Source] = field(default_factory=list)
    teacher: Optimizer | None = None


def refused(*overrides: str | tuple[str, object], source: object = None) -> str:
    with pytest.raises(Error) as caught:
        config.parse(Recipe, source, overrides)  # type: ignore[arg-type]
    return str(caught.value)


def test_recipe_with_settings_over_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("output: runs/a\noptimizer:\n  learning_rate: 1e-3\nsources:\n- folder: x\n")
    built = config.parse(
        Recipe, recipe, ["optimizer.kind=adamw", "sources.0.weight=2", "sources.1.folder=y", "clip=null"]
    )
    assert built == Recipe(
        Path("runs/a"),
        clip=None,
        optimizer=Optimizer(1e-3, "adamw"),
        sources=[Source(Path("x"), 2.0), Source(Path("y"))],
    )


def test_dump_is_read_back_as_it_was(tmp_path: Path) -> None:
    built = config.parse(
        Recipe, None, ["output=o", "optimizer.learning_rate=1e-9", "sources=[{folder: é}]", "teacher.kind=adamw"]
    )
    (tmp_path / "config.yaml").write_text(config.dump(built), encoding="utf-8")
    assert config.parse(Recipe, tmp_path / "config.yaml") == built
    assert config.as_dict(built)["sources"] == [{"folder": "é", "weight": 1.0}]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_value_given_as_it_is_stays_letter_by_letter(text: str) -> None:
    assert config.parse(Recipe, None, [("output", "o"), ("names", [text])]).names == [text]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stepps=3"], "--set stepps=3: there is no field 'stepps'; did you mean 'steps'?"),
        (["optimizer.lerning_rate=1"], "did you mean 'learning_rate'?"),
        (["sources=[{folder: a, wieght: 1}]"], "there is no field 'sources.0.wieght'; did you mean 'weight'?"),
        (["teacher.knid=muon"], "there is no field 'teacher.knid'; did you mean 'kind'?"),
        (["zzz=1"], "known: output, steps, compile"),
        (["steps=1.5"], "--set steps=1.5: 'steps' is 1.5; it should be a whole number"),
        (["steps=many"], "'steps' is 'many'; it should be a whole number"),
        (["optimizer.kind=sgd"], "it should be 'muon' or 'adamw'"),
        (["optimizer=3"], "'optimizer' is 3; it should be a group of fields"),
        (["output=[1]"], "it should be a path"),
        (["sources=a"], "it should be a list"),
        (["sources.1.folder=a"], "--set sources.1.folder=a: there is no '1' to set"),
        (["steps=-1"], "steps is -1; it must be above 0"),
        (["steps"], "--set steps: is no setting; write --set path.to.field=value"),
    ],
)
def test_faults_of_settings(overrides: list[str], message: str) -> None:
    assert message in refused("output=o", *overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("output: o\nstepps: 3\n", "there is no field 'stepps'; did you mean 'steps'?"),
        ("output: o\nsteps: 3\nsteps: 4\n", "is not valid YAML in line 3: 'steps' stands here twice"),
        ("output: o\nsteps: -3\n", "recipe: steps is -3; it must be above 0"),
        ("output: {\n", "is not valid YAML"),
        ("- a\n", "holds no fields"),
        ("output: " + "[" * 5000, "is nested too deeply"),
        ("steps: 3\n", "'output' has no value; give one: --set output=…"),
        ("", "'output' has no value"),
        ("output: !!python/object/apply:os.system ['true']\n", "is not valid YAML"),
    ],
)
def test_faults_of_a_recipe_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    said = refused(source=recipe)
    assert message in said
    assert said.startswith(str(recipe))


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in refused(source=tmp_path / "none.yaml")
    assert "cannot be read" in refused(source=tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is no UTF-8 text" in refused(source=tmp_path / "binary.yaml")


def test_help_comes_from_the_comments() -> None:
    found = {item.name: item for item in config.fields(Recipe)}
    assert found["output"] == config.Field("output", "path", None, "the run's folder")
    assert found["steps"].help == "of the optimizer"  # inherited
    assert found["optimizer.learning_rate"][1:] == ("float", "0.0003", "of the matrices")
    assert found["optimizer.kind"].type == "muon|adamw"
    assert found["optimizer.betas"].help == "shown first"
    assert found["sources.0.folder"].default is None
