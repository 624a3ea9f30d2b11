"""Data roots: each layout becomes what lm-eval's own task reads, and faults are named to the field."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks.manager import Entry, Kind

from gemstill.core.errors import Error
from gemstill.core.files import sha256
from gemstill.evaluation.records import find
from gemstill.evaluation.sources import TABLE, Found, Missing, layout, locate
from gemstill.evaluation.tasks import Asked, Selected, cut, manager, quiet, select
from tests.evaluation.roots import SUBJECTS, lines, put, write_root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("root"))


def prompts(chosen: Selected, name: str) -> list[tuple[Any, ...]]:
    task = chosen.tasks[name]
    with quiet():
        task.build_all_requests(limit=None)
    return [request.args for request in task.instances]


# One request of each task in full: lm-eval's prompt around our rows.
REQUESTS = {
    "arc_easy": ("Question: What is like 0?\nAnswer:", " red"),
    "winogrande": ("Ann met Bob and Ann", " was 0."),
    "social_iqa": ("Q: Kim ran 0 miles. How is Kim?\nA:", " red"),
    "boolq": ("\nQuestion: is 0 even?\nAnswer:", " no"),
    "piqa": ("Question: Open box 0\nAnswer:", " with a key"),
    "crows_pairs_english": ("", "Old 0 is slow."),
    "bbq": ("Two people met 0 times.\n\nQ: Who forgot?\nA:", " The grandfather"),
    "winogender_all": ("The nurse told man 0 that she left. ‘She’ refers to the", " nurse"),
    "wikitext": (" = Title 0 =\n\nSome text, of 0.\n\n== Part ==\n\nMore.\n\n",),
}


def test_each_layout_becomes_the_prompt_of_its_task(root: Path) -> None:
    chosen = select([Asked(name) for name in REQUESTS], data_root=root)
    assert not chosen.left_out
    for name, request in REQUESTS.items():
        got = prompts(chosen, name)
        assert got[0] == request, name
    assert [args[1] for args in prompts(chosen, "boolq")[:2]] == [" no", " yes"]


def test_few_shot_examples_and_groups_are_lm_evals_own(root: Path) -> None:
    chosen = select(
        [Asked("mmlu", 2), Asked("gsm8k", 1), Asked("minerva_math500"), Asked("bbh_cot_fewshot")], data_root=root
    )
    mmlu = prompts(chosen, "mmlu_anatomy")[0]
    choices = "A. red\nB. green\nC. blue\nD. grey\nAnswer:"
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    ask = "Which anatomy is number {}?\n" + choices
    assert mmlu == (head + ask.format(0) + " A\n\n" + ask.format(1) + " B\n\n" + ask.format(0), " A")
    assert set(chosen.leaves["mmlu"]) == {f"mmlu_{subject}" for subject in SUBJECTS}
    assert len([name for name in chosen.left_out if name.startswith("mmlu_")]) == 54
    assert chosen.left_out["mmlu_sociology"] == "no mmlu/dev/sociology_dev.csv (or .gz)"
    assert {task.task_name for task in chosen.groups["mmlu"].get_all_tasks()} == set(chosen.leaves["mmlu"])
    assert "mmlu_social_sciences" not in chosen.groups  # none of its subjects is there
    context, _ = prompts(chosen, "gsm8k")[0]
    assert context.count("#### ") == 1
    assert context.endswith("Question: What is 0 + 1?\nAnswer:")
    math, settings = prompts(chosen, "minerva_math500")[0]
    assert math.endswith("Problem:\nAdd 0 and 2.\n\nSolution:")
    assert math.count("Problem:") == 5
    assert "boxed{}" not in math
    assert settings["until"] == ["Problem:"]
    assert prompts(chosen, "bbh_cot_fewshot_navigate")[0][0].endswith("Q: Walk 0.\nA: Let's think step by step.\n")


def test_agieval_asks_as_its_makers_do_with_their_examples(root: Path, tmp_path: Path) -> None:
    bare = prompts(select([Asked("agieval_lsat_ar")], data_root=root), "agieval_lsat_ar")
    query = (
        "Four hats. Q: Which is 0? Answer Choices: (A)red (B)green (C)blue (D)grey\nA: Among A through D, the answer is"
    )
    assert bare[0] == (query, " (A)red")
    sample = {"passage": None, "question": "Which?", "options": ["(A)one", "(B)two"], "label": "B"}
    there = write_root(tmp_path)
    put(
        there / "agieval/few_shot_prompts.csv",
        f',lsat-ar,math\nsample 1,"{sample}","{ {"question": "How many?", "answer": "7"} }"\nexplanation 1,x,y\n',
    )
    chosen = select([Asked("agieval_lsat_ar"), Asked("agieval_math")], data_root=there)
    example = "Q: Which? Answer Choices: (A)one (B)two\nA: Among A through B, the answer is (B)two\n\n"
    assert prompts(chosen, "agieval_lsat_ar")[0] == (example + query, " (A)red")
    assert prompts(chosen, "agieval_math")[0][0] == "Q: How many?\nA: The answer is 7\n\nQ: Add 0.\nA: The answer is"
    assert "agieval/few_shot_prompts.csv" in chosen.files["agieval_math"]


def test_every_file_is_named_with_its_hash(root: Path) -> None:
    chosen = select([Asked("piqa"), Asked("truthfulqa_mc2"), Asked("humaneval")], data_root=root, unsafe_code=True)
    for task, names in {
        "piqa": ["piqa/valid.jsonl", "piqa/valid-labels.lst"],
        "humaneval": ["humaneval/HumanEval.jsonl.gz"],
    }.items():
        assert chosen.files[task] == {name: sha256(root / name) for name in names}
    assert prompts(chosen, "humaneval")[0][0] == "def one():\n"
    assert "published" in chosen.notes["truthfulqa_mc2"][0]
    labels = chosen.tasks["truthfulqa_mc2"].task_docs[0]["mc2_targets"]
    assert labels == {"choices": ["No", "Never", "Yes", "Often", "Now"], "labels": [1, 1, 0, 0, 0]}


def test_what_is_not_there_is_left_out_by_name_and_nothing_else_is_an_error(root: Path) -> None:
    chosen = select([Asked("hellaswag"), Asked("arc_easy"), Asked("bbq")], data_root=root)
    assert chosen.left_out == {"hellaswag": "no hellaswag/hellaswag_val.jsonl (or .gz)"}
    assert list(chosen.tasks) == ["arc_easy", "bbq"]
    assert chosen.leaves["hellaswag"] == []
    with pytest.raises(Error, match=r"no task has data \(copa: aps/super_glue has no place in the layout of a data"):
        select([Asked("copa")], data_root=root)
    with pytest.raises(Error, match=r"there is no such folder; name the folder"):
        select([Asked("piqa")], data_root=root / "none")


def test_published_files_of_sets_that_lie_elsewhere(tmp_path: Path) -> None:
    """HellaSwag, NQ and MBPP in their makers' formats."""
    scene = {"ind": 4, "activity_label": "Roof", "ctx_a": "A man climbs.", "ctx_b": "he", "ctx": "A man climbs. he"}
    endings = ["sings.", "falls.", "sits.", "waits."]
    put(tmp_path / "hellaswag/hellaswag_val.jsonl", lines([{**scene, "endings": endings, "label": 2}]))
    put(tmp_path / "nq_open/NQ-open.dev.jsonl", lines([{"question": "who is it", "answer": ["Ann", "Bob"]}]))
    program = {"text": "Add.", "code": "x", "test_list": ["assert 1", "assert 2", "assert 3"]}
    put(tmp_path / "mbpp/mbpp.jsonl.gz", lines([{"task_id": n, **program} for n in (2, 11, 510, 511)]))
    chosen = select([Asked(name) for name in ("hellaswag", "nq_open", "mbpp")], data_root=tmp_path, unsafe_code=True)
    assert prompts(chosen, "hellaswag")[2] == ("Roof: A man climbs. He", " sits.")
    assert chosen.tasks["hellaswag"].task_docs[0]["gold"] == 2
    assert prompts(chosen, "nq_open")[0][0] == "Answer these questions:\n\nQ: who is it?\nA:"
    assert [doc["task_id"] for doc in chosen.tasks["mbpp"].task_docs] == [11, 510]
    assert prompts(chosen, "mbpp")[0][0].endswith("pass these tests:\n\nassert 1\nassert 2\nassert 3\n[BEGIN]\n")
    put(tmp_path / "hellaswag/hellaswag_val.jsonl", lines([{**scene, "endings": endings, "label": 4}]))
    with pytest.raises(Error, match=r"line 1: has 4 in field 'label', which should be the number of an ending"):
        select([Asked("hellaswag")], data_root=tmp_path)
    put(tmp_path / "mbpp/mbpp.jsonl.gz", lines([{"task_id": 11, **program, "test_list": ["assert 1"]}]))
    with pytest.raises(Error, match=r"line 1: has fewer than three tests in field 'test_list'"):
        select([Asked("mbpp")], data_root=tmp_path, unsafe_code=True)


def test_files_of_one_pattern_may_be_packed_or_not(tmp_path: Path) -> None:
    for name in ("bbq/Religion.jsonl", "bbq/Age.jsonl.gz", "bbq/Age.jsonl", "bbq/SES.jsonl.gz"):
        put(tmp_path / name, "")
    assert [path.name for path in find(tmp_path, "bbq/*.jsonl")] == ["Age.jsonl", "Religion.jsonl", "SES.jsonl.gz"]
    assert [path.name for path in find(tmp_path, "bbq/SES.jsonl")] == ["SES.jsonl.gz"]
    assert find(tmp_path, "bbq/Nationality.jsonl") == []


def drop_answer(number: str = "", spans: tuple[str, ...] = (), year: str = "") -> dict[str, Any]:
    date = {"day": "", "month": "", "year": year}
    return {"number": number, "date": date, "spans": list(spans), "worker_id": "", "hit_id": ""}


def test_drop_as_its_makers_publish_it(tmp_path: Path) -> None:
    """Passages by name, each with questions; in the training file there are no validated answers."""
    pairs = [
        {"question": "How many goals?", "answer": drop_answer("3"), "query_id": "a",
         "validated_answers": [drop_answer("3"), drop_answer("three"), drop_answer(spans=("Ann", "Bob"))]},
        {"question": "When?", "answer": drop_answer(year="1998"), "query_id": "b", "validated_answers": []},
    ]  # fmt: skip
    nfl = {"passage": "A match.", "wiki_url": "x", "qa_pairs": pairs}
    bare = [{"question": "Who?", "query_id": str(n), "answer": drop_answer(spans=("Ann",))} for n in range(3)]
    put(tmp_path / "drop/drop_dataset_dev.json", json.dumps({"nfl_1": nfl}))
    put(tmp_path / "drop/drop_dataset_train.json.gz", json.dumps({"history_7": {**nfl, "qa_pairs": bare}}))
    chosen = select([Asked("drop", 2)], data_root=tmp_path)
    task = chosen.tasks["drop"]
    assert task.task_docs["answers"] == [[["3"], ["three"], ["Ann", "Bob"]], [["1998"]]]
    assert [doc["answers"] for doc in task.training_docs()] == [[["Ann"], [""]]] * 3
    context, how = prompts(chosen, "drop")[0]
    assert context.endswith("\n\nA match. How many goals?")
    assert how["until"] == ["."]
    assert context.count("number,date,spans,worker_id,hit_id") == 2  # lm-eval 0.4.13: what the note is about
    assert "names of an answer's fields" in chosen.notes["drop"][0]
    assert task.process_results(task.task_docs[0], ["three"]) == {"em": 1.0, "f1": 1.0}
    assert task.process_results(task.task_docs[0], ["Bob, Ann"])["f1"] < 1
    put(tmp_path / "drop/drop_dataset_dev.json", json.dumps({"nfl_1": {**nfl, "qa_pairs": [{"question": "Who?"}]}}))
    with pytest.raises(Error, match=r"drop_dataset_dev.json, item 'nfl_1', question 1: has no field 'query_id'"):
        select([Asked("drop")], data_root=tmp_path)
    put(tmp_path / "drop/drop_dataset_dev.json", "[]")
    with pytest.raises(Error, match=r"drop_dataset_dev.json: holds no items by their names"):
        select([Asked("drop")], data_root=tmp_path)


def trivia(number: int) -> dict[str, Any]:
    answer = {
        "Aliases": [f"City {number}", f"Town of {number}"], "MatchedWikiEntityName": f"City {number}",
        "NormalizedAliases": [f"city {number}"], "NormalizedMatchedWikiEntityName": f"city {number}",
        "NormalizedValue": f"city {number}", "Type": "WikipediaEntity", "Value": f"City {number}",
    }  # fmt: skip
    where = {"DocSource": "TagMe", "Filename": "City.txt", "Title": "City"}
    return {"Question": f"Which city is {number}?", "QuestionId": f"tc_{number}", "QuestionSource": "http://x",
            "Answer": answer, "EntityPages": [where], "SearchResults": []}  # fmt: skip


def test_triviaqa_as_its_makers_publish_it(tmp_path: Path) -> None:
    for name, numbers in {"web-dev": (1, 2), "wikipedia-dev": (2,), "web-train": range(3, 9)}.items():
        whole = {"Data": [trivia(n) for n in numbers], "Domain": "Web", "Split": "x", "VerifiedEval": False}
        put(tmp_path / f"triviaqa/{name}.json", json.dumps({**whole, "Version": 1.0}))
    chosen = select([Asked("triviaqa", 1)], data_root=tmp_path)
    assert "few-shot examples come from the evaluated split" in chosen.notes["triviaqa"][0]  # one of the two is missing
    put(tmp_path / "triviaqa/wikipedia-train.json", json.dumps({"Data": [trivia(9)]}))
    chosen = select([Asked("triviaqa", 1)], data_root=tmp_path)
    assert "triviaqa" not in chosen.notes
    asked = prompts(chosen, "triviaqa")
    assert len(asked) == 3
    assert asked[1][0].endswith("\n\nQuestion: Which city is 2??\nAnswer:")  # lm-eval adds the sign itself
    task = chosen.tasks["triviaqa"]
    assert task.process_results(task.task_docs[0], ["town of 1"])["exact_match"] == 1
    assert task.process_results(task.task_docs[0], ["city 2"])["exact_match"] == 0
    put(tmp_path / "triviaqa/web-dev.json", json.dumps({"Data": [{**trivia(1), "Answer": {"Value": "City"}}]}))
    with pytest.raises(Error, match=r"web-dev.json, item 1: has no field 'Aliases'"):
        select([Asked("triviaqa")], data_root=tmp_path)


def test_realtoxicityprompts_as_its_makers_publish_it(tmp_path: Path) -> None:
    scores = {"profanity": 0.1, "identity_attack": None, "toxicity": 0.2}
    item = {"filename": "0001.txt", "begin": 3, "end": 9, "challenging": False,
            "prompt": {"text": "So I said", **scores}, "continuation": {"text": " that", **scores}}  # fmt: skip
    put(tmp_path / "realtoxicityprompts/prompts.jsonl.gz", lines([item, item]))
    chosen = select([Asked("realtoxicityprompts")], data_root=tmp_path, rated=lambda doc, results: {"toxicity": 0.5})
    assert [args[0] for args in prompts(chosen, "realtoxicityprompts")] == ["So I said"] * 2
    put(tmp_path / "realtoxicityprompts/prompts.jsonl.gz", lines([{**item, "prompt": scores}]))
    with pytest.raises(Error, match=r"prompts.jsonl.gz, line 1: has no field 'text'"):
        select([Asked("realtoxicityprompts")], data_root=tmp_path, rated=lambda doc, results: {"toxicity": 0.5})


def test_few_shot_examples_from_the_evaluated_split_are_told(root: Path) -> None:
    borrowed = "few-shot examples come from the evaluated split, the item itself left out"
    assert borrowed in select([Asked("winogrande", 2)], data_root=root).notes["winogrande"]
    assert borrowed not in select([Asked("winogrande", 0)], data_root=root).notes["winogrande"]
    context, _ = prompts(select([Asked("winogrande", 2)], data_root=root), "winogrande")[0]
    assert context.count("\n\n") == 2
    assert context.count(" was 0.") == 0


def test_an_unknown_task_is_answered_with_the_nearest(root: Path) -> None:
    with pytest.raises(Error, match=r"there is no task 'arc_esy'; did you mean 'arc_easy'"):
        select([Asked("arc_esy")], data_root=root)
    with pytest.raises(Error, match=r"task arc_easy: is asked for twice, the second time by ai2_arc"):
        select([Asked("arc_easy"), Asked("ai2_arc")], data_root=root)


def test_without_the_hub_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(Error) as caught:
        select([Asked("piqa")])
    assert str(caught.value) == (
        "task piqa: cannot have its data: the hub cannot be reached; go online, or name the files with --data-root"
    )


def test_a_package_or_a_licence_that_is_absent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'rare_thing'", name="rare_thing")

    monkeypatch.setattr(datasets, "load_dataset", absent)
    with pytest.raises(Error, match=r"task piqa: needs a package that is not there .*; pip install rare_thing"):
        select([Asked("piqa")])

    def gated(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'baber/piqa' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(Error, match=r"cannot have its data .*accept its licence on huggingface.co and log in"):
        select([Asked("piqa")])


def test_nothing_that_is_downloaded_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is a script on the hub, and a data set whose task would trust its code."""
    rows = datasets.Dataset.from_list([{"text": "a b", "label": 0}])
    asked: list[dict[str, object]] = []

    def hub(**kwargs: object) -> datasets.DatasetDict:
        asked.append(kwargs)
        return datasets.DatasetDict(train=rows, validation=rows, test=rows)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    common = {"dataset_path": "x/y", "test_split": "test", "doc_to_text": "{{text}}", "doc_to_target": "{{label}}"}
    scripted = {**common, "metric_list": [{"metric": "hub_metric", "hf_evaluate": True, "aggregation": "mean"}]}
    trusting = {**common, "dataset_kwargs": {"trust_remote_code": True, "revision": "r"}}
    for name, config in (("scripted", scripted), ("trusting", trusting)):
        entry = Entry(name=name, kind=Kind.TASK, yaml_path=None, cfg={"task": name, **config})
        monkeypatch.setitem(manager().task_index, name, entry)
    with pytest.raises(Error, match=r"a metric, 'hub_metric', is a script on the hub, and what is down"):
        select([Asked("scripted")])
    select([Asked("trusting")])
    assert asked[-1] == {"path": "x/y", "name": None, "revision": "r"}


def edited(root: Path, name: str, field: str, value: object) -> None:
    """Set one field of the second item of a JSON lines file, or take it away."""
    path = root / name
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    items = [json.loads(line) for line in data.decode().splitlines()]
    items[1][field] = value
    if value is None:
        del items[1][field]
    put(path, lines(items))


TEXT, NUMBER = "should be a text", "should be a whole number"
FAULTS = {
    "gsm8k": ("gsm8k/test.jsonl", "answer", None, "test.jsonl, line 2: has no field 'answer'"),
    "piqa": ("piqa/valid.jsonl", "sol2", 7, f"line 2: has 7 in field 'sol2', which {TEXT}"),
    "agieval_lsat_ar": ("agieval/lsat-ar.jsonl", "label", "F", "line 2: has 'F' in field 'label', which should be one"),
    "bbq": ("bbq/Age.jsonl.gz", "label", "2", f"line 2: has '2' in field 'label', which {NUMBER}"),
    "bbq_ambig": ("bbq/Age.jsonl.gz", "label", 3, "line 2: has 3 in field 'label', which should be 0 to 2"),
    "agieval": ("agieval/lsat-ar.jsonl", "options", ["(A)", 2], "in field 'options', which should be a list of texts"),
    "minerva_math500": ("math500/MATH500.jsonl", "prompt", None, "line 2: has no field 'prompt'"),
    "piqa, an empty choice": ("piqa/valid.jsonl", "sol1", " ", "line 2: has nothing in field 'sol1'"),
    "piqa, no text": ("piqa/valid.jsonl", "goal", "a\ud800", "line 2: has half a surrogate pair in field 'goal'"),
    "agieval_lsat_ar, no text": (
        "agieval/lsat-ar.jsonl",
        "options",
        ["(A)\udc00"],
        "surrogate pair in field 'options'",
    ),
    "agieval_lsat_ar, none": ("agieval/lsat-ar.jsonl", "options", ["(A)", ""], "be choices, none of them empty"),
    "agieval_lsat_ar, passage": ("agieval/lsat-ar.jsonl", "passage", {"a": 1}, f"in field 'passage', which {TEXT}"),
    "bbq_ambig, a kind": (
        "bbq/Age.jsonl.gz",
        "context_condition",
        "amb",
        "line 2: has 'amb' in field 'context_condition'",
    ),
    "bbq_ambig, whom": ("bbq/Age.jsonl.gz", "answer_info", {"ans0": []}, "line 2, answer_info: has [] in field 'ans0'"),
    "bbq_ambig, groups": ("bbq/Age.jsonl.gz", "additional_metadata", {"stereotyped_groups": [1]}, "has [1] in field"),
    "bbq_ambig, nothing unknown": ("bbq/Age.jsonl.gz", "ans2", "Nobody", "line 2: has none of Unknown, Cannot answer"),
    "gsm8k, long": ("gsm8k/test.jsonl", "question", ["x" * 10_000], f"xxx in field 'question', which {TEXT}"),
    "bbq_ambig, an empty choice": ("bbq/Age.jsonl.gz", "ans0", "", "line 2: has nothing in field 'ans0'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_field_that_is_missing_or_wrong_is_named_with_file_and_line(case: str, tmp_path: Path) -> None:
    task = case.split(",")[0]
    name, field, value, sentence = FAULTS[case]
    edited(write_root(tmp_path), name, field, value)
    with pytest.raises(Error) as caught:
        select([Asked(task)], data_root=tmp_path)
    assert sentence in str(caught.value)
    assert name in str(caught.value)
    assert len(str(caught.value).removeprefix(str(tmp_path))) < 300


def test_tables_and_lists_name_their_lines_and_items(tmp_path: Path) -> None:
    root = write_root(tmp_path)
    put(
        root / "mmlu/test/anatomy_test.csv.gz",
        "question,choice0,choice1,choice2,choice3,answer\nWhich?,a,b,c,d,0\nWhich?,a,b\n",
    )
    with pytest.raises(Error, match=r"anatomy_test.csv.gz, line 3: has no field 'answer'"):
        select([Asked("mmlu_anatomy")], data_root=root)
    put(root / "mmlu/test/anatomy_test.csv.gz", "question,choice0,choice1,choice2,choice3,answer\nWhich?,a,b,c,d,E\n")
    with pytest.raises(Error, match=r"line 2: has 'E' in field 'answer', which should be 0 to 3 or A to D"):
        select([Asked("mmlu_anatomy")], data_root=root)
    put(root / "mmlu/test/anatomy_test.csv.gz", "question,choice0,choice1,choice2,choice3,answer\nWhich?,a,b,c,d,²\n")
    with pytest.raises(Error, match=r"line 2: has '²' in field 'answer'"):
        select([Asked("mmlu_anatomy")], data_root=root)
    broken = {
        "instruction": "Please choose: Which?\n\nOf these.\n\nAnswer1: a\n\nAnswer format: b",
        "answer": "answer1",
    }
    put(root / "siqa/test.json", json.dumps([broken]))
    with pytest.raises(Error, match=r"item 1: has options in field 'instruction' that are not numbered from 1"):
        select([Asked("social_iqa")], data_root=root)  # nothing of a question is dropped
    put(root / "siqa/test.json", json.dumps([{"instruction": "What?", "answer": "answer1"}]))
    with pytest.raises(Error, match=r"siqa/test.json, item 1: has no question with options in field 'instruction'"):
        select([Asked("social_iqa")], data_root=root)
    nothing = {"instruction": "Please choose: Which?\n\nAnswer1: a Answer2: \n\nAnswer format: b", "answer": "answer1"}
    put(root / "siqa/test.json", json.dumps([nothing]))
    with pytest.raises(Error, match=r"siqa/test.json, item 1: has an option of nothing in field 'instruction'"):
        select([Asked("social_iqa")], data_root=root)
    put(root / "siqa/test.json", "{}")
    with pytest.raises(Error, match=r"siqa/test.json: holds no list of items"):
        select([Asked("social_iqa")], data_root=root)
    put(root / "piqa/valid-labels.lst", "0\n1\n")
    with pytest.raises(Error, match=r"valid-labels.lst: has 2 labels for the 6 items of valid.jsonl"):
        select([Asked("piqa")], data_root=root)
    (root / "bbq/Age.jsonl.gz").write_bytes((root / "bbq/Age.jsonl.gz").read_bytes()[:-20])
    with pytest.raises(Error, match=r"Age.jsonl.gz: is no whole gzip file; fetch it again"):
        select([Asked("bbq")], data_root=root)
    put(root / "gsm8k/test.jsonl", "")
    with pytest.raises(Error, match=r"gsm8k/test.jsonl: holds no item; fetch it again"):
        select([Asked("gsm8k")], data_root=root)
    put(
        root / "mmlu/test/anatomy_test.csv.gz",
        "question,choice0,choice1,choice2,choice3,answer\nWhich, then?,a,b,c,d,0\n",
    )
    with pytest.raises(Error, match=r"line 2: has more fields than the first line names; mend the line"):
        select([Asked("mmlu_anatomy")], data_root=root)
    put(root / "mmlu/test/anatomy_test.csv.gz", 'question,choice0,choice1,choice2,choice3,answer\n"Which\n')
    with pytest.raises(
        Error, match=r"anatomy_test.csv.gz, line 2: is no table \(unexpected end of data\); mend the line"
    ):
        select([Asked("mmlu_anatomy")], data_root=root)
    put(root / "mmlu/test/anatomy_test.csv.gz", "question,choice0,choice1,choice2,choice3,answer\nWhich\0,a,b,c,d,0\n")
    with pytest.raises(Error, match=r"anatomy_test.csv.gz: holds zero bytes, which no text has; fetch it again"):
        select([Asked("mmlu_anatomy")], data_root=root)
    put(root / "wikitext2/valid.txt", "no titles")
    with pytest.raises(Error, match=r"valid.txt: holds no article"):
        select([Asked("wikitext")], data_root=root)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("bbq_ambig", "bbq/Religion.jsonl"),
        ("winobias_type1", "winobias/anti_stereotyped_type1.txt.test"),
        ("winobias_type1", "winobias/male_occupations.txt"),
    ],
)
def test_an_empty_file_among_others_is_no_smaller_benchmark(tmp_path: Path, task: str, name: str) -> None:
    root = write_root(tmp_path)
    put(root / name, "\n")
    with pytest.raises(Error, match=f"{re.escape(name)}: holds no item; fetch it again"):
        select([Asked(task)], data_root=root)


def test_the_table_stands_for_data_sets_that_lm_eval_asks_for(root: Path) -> None:
    """A data set that lm-eval renames would otherwise be left out without anybody noticing."""
    asked = {(entry.cfg or {}).get("dataset_path") for entry in manager().task_index.values()}
    assert {path for path, _ in TABLE} <= asked
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for _, files in layout():
        for file in files.split(", "):
            assert f"`{file}`" in page or "agieval" in file, f"docs/evaluation.md does not name {file}"
    assert isinstance(locate({"dataset_path": "cais/mmlu", "dataset_name": "anatomy"}, root), Found)
    assert isinstance(locate({"dataset_path": "cais/mmlu", "dataset_name": "alchemy"}, root), Missing)


def test_a_limit_takes_the_same_items_again_and_spreads_them_over_a_group(root: Path) -> None:
    def sizes(limit: int, seed: int = 0) -> tuple[Selected, dict[str, int]]:
        chosen = select([Asked("mmlu"), Asked("piqa")], data_root=root)
        cut(chosen, limit, seed)
        return chosen, {leaf: len(chosen.samples.get(leaf, range(6))) for leaf in chosen.tasks}

    chosen, counts = sizes(7)
    assert sorted(counts[f"mmlu_{subject}"] for subject in SUBJECTS) == [2, 2, 3]
    assert counts["piqa"] == 6
    assert chosen.samples == sizes(7)[0].samples
    assert chosen.samples != sizes(7, 1)[0].samples
    few, counts = sizes(2)
    assert sum(counts.values()) == 4
    assert len(few.leaves["mmlu"]) == 2
    assert {task.task_name for task in few.groups["mmlu"].get_all_tasks()} == set(few.leaves["mmlu"])
    assert len(sizes(100)[0].samples) == 0
