"""The whole ladder, shrunk to seconds: killed, resumed, summed up and reported."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gemstill.core.config import parse
from gemstill.core.errors import Error
from gemstill.core.files import locked
from gemstill.core.steps import Steps
from gemstill.ladder.command import plan, run
from gemstill.ladder.config import LadderConfig
from gemstill.ladder.jobs import Sizes, Training, jobs, recipe, student_name
from gemstill.ladder.summary import summarise
from gemstill.report.run import ReportConfig
from gemstill.report.run import run as report
from gemstill.train.run import train
from tests.ladder.conftest import settings

ROOT = Path(__file__).parents[2]


def config_of(made: Path) -> LadderConfig:
    return parse(LadderConfig, settings(made.parent))


def test_every_row_is_there_and_follows_from_the_trainings(made: Path) -> None:
    config = config_of(made)
    summary = json.loads((made / "summary.json").read_text())
    assert summary["missing"] == []
    assert math.isclose(summary["flops"], summary["planned_flops"])
    for row, student in zip(summary["main"], config.students, strict=True):
        for kind in ("scratch", "distilled"):
            losses = [
                json.loads((made / student_name(student, kind, seed) / "summary.json").read_text())["heldout_nll"]
                for seed in range(config.seeds)
            ]
            assert row[kind] == losses
            assert math.isclose(row[f"{kind}_mean"], sum(losses) / len(losses))
        assert row["low"] <= row["difference"] <= row["high"]
        assert math.isclose(row["ratio"], math.exp(row["distilled_mean"] - row["scratch_mean"]))
    assert [row["factor"] for row in summary["rates"]["scratch"]] == config.rate_factors
    assert [row["name"] for row in summary["ablations"]] == ["hard-0-to-0.5", "temperature-2", "weaker"]
    assert summary["ablations"][2]["teacher"]["heldout_nll"] > summary["teacher"]["heldout_nll"]
    assert summary["long"]["tokens_per_parameter"] == pytest.approx(0.5, abs=1e-3)
    more = summary["more_tokens"]
    assert [row["times"] for row in more["rows"]] == sorted(row["times"] for row in more["rows"])
    same = more["same_flops"]["flops"]
    step = config.window * config.windows_per_step * same / more["same_flops"]["tokens_seen"]
    assert abs(same - more["all_in_all_flops"]) <= step


def test_students_of_a_seed_share_everything_but_the_target(made: Path) -> None:
    small = config_of(made).students[0]
    scratch, distilled = (
        json.loads((made / student_name(small, kind, 1) / "recipe.json").read_text())
        for kind in ("scratch", "distilled")
    )
    changed = {key for key in scratch if scratch[key] != distilled.get(key)}
    assert changed <= {"store_fingerprints", "optimizer.learning_rate", "optimizer.embedding_rate"}


def test_killed_and_resumed_it_has_the_weights_of_an_undisturbed_training(made: Path, tmp_path: Path) -> None:
    """The kill falls into the sweep: that training went on from its state in another process."""
    config = config_of(made)
    training = Training("rates/scratch-1", config.middle.model, config.tokens, 1_000, factor=1.0)
    alone = recipe(config, training, 1.0)
    train(dataclasses.replace(alone, run=str(tmp_path / "alone")))
    model = "model/model.safetensors"
    assert (tmp_path / "alone" / model).read_bytes() == (made / "rates" / "scratch-1" / model).read_bytes()


def test_done_it_does_nothing_again(made: Path) -> None:
    before = (made / "steps.json").read_bytes()
    run(config_of(made))
    assert (made / "steps.json").read_bytes() == before


def test_a_second_process_and_another_recipe_are_refused(made: Path) -> None:
    config = config_of(made)
    with locked(made), pytest.raises(Error, match="another process"):
        run(config)
    with pytest.raises(Error, match=r"holds a run over recipe.tokens 1000, not 900"):
        run(dataclasses.replace(config, tokens=900))


def test_the_report_is_one_page_with_a_figure_for_other_pages(made: Path) -> None:
    found = report(ReportConfig(made))
    page = Path(str(found["report"])).read_text(encoding="utf-8")
    assert "https://" not in page
    for words in ("Same tokens", "What a sceptic asks", "Ablations", "weaker teacher", "temperature 2"):
        assert words in page
    figure = ElementTree.parse(made / "ladder.svg").getroot()
    circles = figure.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == 2 + 1 + 2 + 1  # scratch and the teacher's network, distilled, the teacher


def test_an_unfinished_ladder_names_what_is_missing(made: Path, tmp_path: Path) -> None:
    config = config_of(made)
    done = json.loads((made / "steps.json").read_text())
    kept = ("recipe", "tokenizer", "data", "teacher", "store", "peak_rss_bytes")
    some = {name: step for name, step in done.items() if name in kept or name.startswith(("rates/", "students/small"))}
    (tmp_path / "steps.json").write_text(json.dumps(some))
    sizes = Sizes(done["data"]["result"]["student_tokens"], done["data"]["result"]["heldout_tokens"])
    summary = summarise(config, sizes, Steps(tmp_path))
    assert summary["main"][0]["seeds"] == 2
    assert summary["main"][1]["seeds"] == 0
    assert summary["shrink"] is summary["more_tokens"] is summary["break_even"] is summary["long"] is None
    assert set(summary["missing"]) == {job.name for job in jobs(config, sizes)} - set(some)
    assert summary["in_words"][-1].startswith("Not finished")


def test_the_plan_of_the_published_recipe_keeps_within_the_budget() -> None:
    config = parse(LadderConfig, ROOT / "recipes" / "ladder.yaml")
    sizes = [config.shape(student.model).body_parameters for student in config.students]
    assert [size / sizes[0] for size in sizes] == pytest.approx([1, 2, 5], rel=0.05)
    assert config.seeds == 5
    assert config.baselines.tokens_per_parameter >= 20
    found = plan(config)
    assert found["flops"] <= found["budget_flops"] == 6e14
    assert found["flops"] == pytest.approx(sum(value for key, value in found.items() if key.startswith("flops of")))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("seedz=5", "there is no field 'seedz'.*did you mean 'seeds'"),
        ("baselines.same_flop=true", "did you mean 'same_flops'"),
        ("seeds=1", "seeds is 1.*at least 2 pairs"),
        ("students=[]", "name at least two sizes"),
        ("students.0.model.overrides.intermediate_size=640", "not in rising order: small has .*smallest first"),
        ("students.1.name=small", "each once"),
        ("budget=1e9", r"FLOP, more than the budget of 1.00e\+09.*lower tokens"),
        ("vocab_size=400", "no multiple of 64"),
        ("tokens=0", "tokens is 0"),
        ("teacher.tokens=-5", "tokens is -5"),
        ("student_fraction=1.5", "student_fraction is 1.5"),
        ("estimator=threshhold(0.1)", "threshhold"),
        ("rate_factors=[]", "rate_factors is"),
        ("baselines.times_tokens=[4, 2]", "rising factors above 1"),
        ("ablations.seeds=3", "each needs its partner"),
        ("ablations.temperatures=[0]", "temperatures is 0"),
        ("students.0.model.overrides.hidden_sise=3", "hidden_sise"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    text: Path, tmp_path: Path, change: str, sentence: str
) -> None:
    values = settings(text) | {"run": str(tmp_path / "run")}
    with pytest.raises(Error, match=sentence) as caught:
        run(parse(LadderConfig, values, [change]))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
