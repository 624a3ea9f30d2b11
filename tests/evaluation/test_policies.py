"""Probes of content policies: a model's answers and a judge's verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemstill import cli, save
from gemstill.core.errors import Error
from gemstill.evaluation.policies import PATIENCE, examine, probes
from tests.evaluation.judges import JudgeServer
from tests.infer.networks import SMALL, network
from tests.model.tokenizers import small_tokenizer

WORDS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("policies") / "model"
    save(network(SMALL), small_tokenizer(), place)
    return place


def rule(request: str, answer: str) -> str:
    """Violations are all answers to what asks "How"; everything that begins with "Which" was refused."""
    verdict = {"violates": request.startswith("How"), "refuses": request.startswith("Which")}
    return f"Here is my verdict:\n```json\n{json.dumps(verdict)}\n```"


def test_six_policies_with_probes_of_both_kinds() -> None:
    asked = probes()
    policies = {probe.policy for probe in asked}
    assert len(policies) == 6
    assert len({probe.request for probe in asked}) == len(asked)
    for policy in policies:
        kinds = [probe.harmless for probe in asked if probe.policy == policy]
        assert kinds.count(False) >= 6
        assert kinds.count(True) >= 2


def test_shares_are_those_of_the_verdicts_and_nothing_is_asked_twice(folder: Path, tmp_path: Path, capsys) -> None:
    words = ["eval", "policies", str(folder), "--out", str(tmp_path / "out"), "--max-new-tokens", str(WORDS)]
    with JudgeServer(rule) as judge:
        assert cli.main([*words, "--judge", judge.place]) == 0
        asked = len(judge.questions)
        assert asked == len(probes())
        assert cli.main([*words, "--judge", judge.place]) == 0
        assert len(judge.questions) == asked
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["judge"] == "the/judge"
    for row in results["policies"]:
        for name, harmless, start in (("violated", False, "How"), ("harmless_refused", True, "Which")):
            these = [p for p in probes() if p.policy == row["policy"] and p.harmless == harmless]
            due = sum(probe.request.startswith(start) for probe in these) / len(these)
            assert row[name]["value"] == pytest.approx(due)
            assert row[name]["judged"] == len(these)
            assert 0 <= row[name]["low"] <= due <= row[name]["high"] <= 1
    assert len(results["items"]) == len(probes())
    assert sum(bool(item["answer"]) for item in results["items"]) > len(probes()) / 2  # noise is sometimes blank
    out = capsys.readouterr().out
    assert all(row["policy"] in out for row in results["policies"])


def test_the_answer_is_what_the_model_writes_in_its_turn(folder: Path, tmp_path: Path) -> None:
    from gemstill import generate, load

    model, tokenizer = load(folder)
    with JudgeServer(rule) as judge:
        found = examine(model, tokenizer, judge.place, out=tmp_path, max_new_tokens=WORDS)
    for item in found["items"][::9]:
        turn = [{"role": "user", "content": item["request"]}]
        assert item["answer"] == generate(model, tokenizer, turn, max_new_tokens=WORDS, temperature=0).strip()


@pytest.mark.filterwarnings("ignore:.*chat template differs")
def test_another_chat_template_is_another_question(folder: Path, tmp_path: Path) -> None:
    from gemstill import load

    model, tokenizer = load(folder)
    with JudgeServer(rule) as judge:
        examine(model, tokenizer, judge.place, out=tmp_path, max_new_tokens=WORDS)
        first = {line for line in (tmp_path / "answers.jsonl").read_text().splitlines() if "violates" not in line}
        tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
        examine(model, tokenizer, judge.place, out=tmp_path, max_new_tokens=WORDS)
    again = [line for line in (tmp_path / "answers.jsonl").read_text().splitlines() if "violates" not in line]
    assert len(again) == len(first) + len(probes())


NONSENSE = {
    "words": "I cannot say.", "empty": "{}", "a text": '{"violates": "no", "refuses": false}', "a list": "[1, 2]",
    "half": '{"violates": true', "nothing": "", "a grade": '{"violates": 11, "refuses": -3}',
    "deep": '{"violates":' * 50_000 + "1" + "}" * 50_000,  # was a traceback
    "braces": "{" * 2_000_000,  # took hours to search
}  # fmt: skip


@pytest.mark.parametrize("nonsense", NONSENSE.values(), ids=NONSENSE)
def test_a_judge_of_nonsense_is_told_and_its_words_are_not_kept(
    folder: Path, tmp_path: Path, capsys, nonsense: str
) -> None:
    words = ["eval", "policies", str(folder), "--out", str(tmp_path / "out"), "--max-new-tokens", "2"]
    with JudgeServer(lambda *_: nonsense) as judge:
        assert cli.main([*words, "--judge", judge.place]) == 2
        err = capsys.readouterr().err
        assert f"judge the/judge: gave no verdict on {PATIENCE} of {PATIENCE} answers" in err
        assert not (tmp_path / "out" / "results.json").exists()
        judge.rule = rule  # the judge has come to its senses
        assert cli.main([*words, "--judge", judge.place]) == 0


def test_answers_that_are_damaged_are_named_and_those_before_a_judges_death_are_kept(
    folder: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("gemstill.core.server.PAUSE", 0.001)
    monkeypatch.setattr("gemstill.core.server.TRIES", 2)
    words = ["eval", "policies", str(folder), "--out", str(tmp_path), "--max-new-tokens", "2"]
    kept = tmp_path / "answers.jsonl"

    def dying(request: str, answer: str) -> str:
        if len(judge.questions) > 5:
            judge.status = 503
        return rule(request, answer)

    with JudgeServer(dying) as judge:
        assert cli.main([*words, "--judge", judge.place]) == 2
        assert "answers 503" in capsys.readouterr().err
        assert kept.read_text().count("violates") == 5
        written = kept.read_text()
        kept.write_text(written + '{"key": "a", "answer": "\\ud800"}\n')
        assert cli.main([*words, "--judge", judge.place]) == 2
        assert f"answers.jsonl, line {len(written.splitlines()) + 1}: is no answer" in capsys.readouterr().err
        kept.write_text(written)
        judge.status, judge.rule, before = 200, rule, len(judge.questions)
        assert cli.main([*words, "--judge", judge.place]) == 0
        assert len(judge.questions) - before == len(probes()) - 5


def test_a_verdict_that_comes_at_the_second_try_counts(folder: Path, tmp_path: Path) -> None:
    from gemstill import load

    model, tokenizer = load(folder)
    seen: set[str] = set()

    def late(request: str, answer: str) -> str:
        if request in seen:
            return rule(request, answer)
        seen.add(request)
        return "Let me think about it."

    with JudgeServer(late) as judge:
        found = examine(model, tokenizer, judge.place, out=tmp_path, max_new_tokens=2)
    assert all(item["violates"] is not None for item in found["items"])


def test_another_models_folder_a_missing_judge_and_no_turns_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    from gemstill import load

    model, tokenizer = load(folder)
    with JudgeServer(rule) as judge:
        examine(model, tokenizer, judge.place, out=tmp_path / "out", max_new_tokens=2)
        with pytest.raises(Error, match="holds the answers of another model"):
            examine(network(SMALL, seed=5), tokenizer, judge.place, out=tmp_path / "out", max_new_tokens=2)
        with pytest.raises(Error, match="has no model 'other'"):
            examine(model, tokenizer, judge.place.replace("the/judge", "other"), out=tmp_path / "new")
    with pytest.raises(Error, match="is no address of a server"):
        examine(model, tokenizer, "nowhere", out=tmp_path / "new")
    assert cli.main(["eval", "policies", str(folder), "--judge", "http://127.0.0.1:9/v1", "--dry-run"]) == 0
    assert str(len(probes())) in capsys.readouterr().out
