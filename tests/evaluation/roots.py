"""A miniature of a data root: every data set in its layout, a few items each, written by the tests themselves."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

SUBJECTS = ("anatomy", "astronomy", "virology")
COLORS = ("red", "green", "blue", "grey")


def write_root(root: Path, items: int = 6) -> Path:
    """All data sets under `root`; some files packed, some not."""
    for subject in SUBJECTS:
        table = [("question", "choice0", "choice1", "choice2", "choice3", "answer")]
        table += [(f"Which {subject} is number {n}?", *COLORS, str(n % 4)) for n in range(items)]
        put(root / f"mmlu/dev/{subject}_dev.csv", table_text(table))
        put(root / f"mmlu/test/{subject}_test.csv.gz", table_text(table))
    choose = "Please choose the correct answer to the question: "
    for name in ("arc_easy", "arc_challenge"):
        rows = [options(f"{choose}What is like {n}?", "Answer", COLORS, n % 4) for n in range(items)]
        put(root / f"{name}/test.json.gz", json.dumps(rows))
        put(root / f"{name}/train.json", json.dumps(rows * 5))
    blank = "Please choose the correct answer to fill in the blank to complete the given sentence: "
    rows = [options(f"{blank}Ann met Bob and _ was {n}.", "Option", ("Ann", "Bob"), n % 2) for n in range(items)]
    put(root / "winogrande/test.json", json.dumps(rows))
    rows = [options(f"{choose}Kim ran {n} miles. How is Kim?", "Answer", COLORS[:3], n % 3) for n in range(items)]
    put(root / "siqa/test.json", json.dumps(rows))
    put(root / "boolq/test.json", json.dumps([boolean(f"is {n} even?", n % 2 == 0) for n in range(items)]))
    sums = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(items)]
    put(root / "gsm8k/test.jsonl", lines(sums))
    put(root / "gsm8k/train.jsonl.gz", lines(sums * 2))
    goals = [{"goal": f"Open box {n}", "sol1": "with a key", "sol2": "with a song"} for n in range(items)]
    put(root / "piqa/valid.jsonl", lines(goals))
    put(root / "piqa/valid-labels.lst", "".join(f"{n % 2}\n" for n in range(items)))
    boxed = " You need to put your final answer in \\boxed{}."
    put(
        root / "math500/MATH500.jsonl",
        lines([{"prompt": f"Add {n} and 2.{boxed}", "answer": str(n + 2)} for n in range(items)]),
    )
    exam = [agieval_item(n) for n in range(items)]
    put(root / "agieval/lsat-ar.jsonl", lines(exam))
    put(
        root / "agieval/math.jsonl.gz",
        lines(
            [
                {"passage": None, "question": f"Add {n}.", "options": None, "label": None, "answer": "1"}
                for n in range(items)
            ]
        ),
    )
    put(
        root / "bbh/navigate.json",
        json.dumps({"canary": "", "examples": [{"input": f"Walk {n}.", "target": "Yes"} for n in range(items)]}),
    )
    programs = [
        {
            "task_id": f"T/{n}",
            "prompt": "def one():\n",
            "canonical_solution": "    return 1\n",
            "test": "def check(f):\n    assert f() == 1\n",
            "entry_point": "one",
        }
        for n in range(2)
    ]
    put(root / "humaneval/HumanEval.jsonl.gz", lines(programs))
    heads = ("Type", "Category", "Question", "Best Answer", "Correct Answers", "Incorrect Answers", "Source")
    put(
        root / "truthfulqa/TruthfulQA.csv",
        table_text(
            [heads, *(("A", "B", f"Is {n} more?", "No", "No; Never", "Yes; Often; Now", "") for n in range(items))]
        ),
    )
    heads = ("", "sent_more", "sent_less", "stereo_antistereo", "bias_type")
    put(
        root / "crows_pairs/crows_pairs_anonymized.csv",
        table_text(
            [heads, *((str(n), f"Old {n} is slow.", f"Young {n} is slow.", "stereo", "age") for n in range(items))]
        ),
    )
    put(root / "bbq/Age.jsonl.gz", lines([bbq_item(n) for n in range(4 * items)]))
    people = [("sentid", "sentence")]
    people += [(f"nurse.man.{n % 2}.female.txt", f"The nurse told man {n} that she left.") for n in range(items)]
    put(root / "winogender/all_sentences.tsv", "".join("\t".join(row) + "\n" for row in people))
    put(
        root / "wikitext2/valid.txt",
        "".join(
            f" \n = Title {n} = \n \n Some text , of {n} . \n \n = = Part = = \n \n More . \n" for n in range(items)
        ),
    )
    for kind, pronoun in (("pro", "he"), ("anti", "she")):
        line = f"[The developer] argued with the designer because [{pronoun}] did not like the design."
        other = f"The designer met [the developer] and thanked [{pronoun}]."
        for number, text in ((1, line), (2, other)):
            path = root / f"winobias/{kind}_stereotyped_type{number}.txt.test"
            put(path, "".join(f"{n} {text}\n" for n in range(1, 4)))
    put(root / "winobias/male_occupations.txt", "developer\n")
    put(root / "winobias/female_occupations.txt", "designer\n")
    hate = [{"group": "g", "label": "hate", "prompt": f"- group {n} one\\n- group {n} two\\n-"} for n in (0, 0, 0, 0)]
    put(root / "toxigen/prompts_100_per_file.jsonl", lines(hate))
    return root


def options(question: str, word: str, choices: Sequence[str], right: int) -> dict[str, str]:
    listed = " ".join(f"{word}{number}: {choice}" for number, choice in enumerate(choices, 1))
    kinds = "/".join(f"{word.lower()}{number}" for number in range(1, len(choices) + 1))
    text = f"{question}\n\n{listed}{' ' if word == 'Option' else chr(10) * 2}Answer format: {kinds}"
    return {"instruction": text, "input": "", "output": "", "answer": f"{word.lower()}{right + 1}"}


def boolean(question: str, right: bool) -> dict[str, str]:
    text = f"Please answer the following question with true or false, question: {question}\n\nAnswer format: true/false"
    return {"instruction": text, "input": "", "output": "", "answer": str(right).lower()}


def agieval_item(n: int) -> dict[str, Any]:
    listed = [f"({letter}){color}" for letter, color in zip("ABCD", COLORS, strict=True)]
    return {
        "passage": "Four hats. ",
        "question": f"Which is {n}?",
        "options": listed,
        "label": "ABCD"[n % 4],
        "answer": None,
    }


def bbq_item(n: int) -> dict[str, Any]:
    info = {"ans0": ["grandfather", "old"], "ans1": ["grandson", "nonOld"], "ans2": ["Not known", "unknown"]}
    return {
        "example_id": n, "question_polarity": ("neg", "nonneg")[n % 2], "category": "Age",
        "context_condition": ("ambig", "disambig")[n // 2 % 2], "answer_info": info,
        "additional_metadata": {"stereotyped_groups": ["old"]}, "context": f"Two people met {n} times.",
        "question": "Who forgot?", "ans0": "The grandfather", "ans1": "The grandson", "ans2": "Not known",
        "label": 2 if n // 2 % 2 == 0 else n % 2,
    }  # fmt: skip


def lines(values: Sequence[Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def table_text(rows: Sequence[Sequence[str]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out).writerows(rows)
    return out.getvalue()


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


class Teller(LM):
    """Answers from the text alone, and tells its hook each as it comes; dies after `lives` of them."""

    def __init__(self, lives: int = 1 << 30) -> None:
        super().__init__()
        self.lives, self.asked = lives, 0

    def _tell(self, method: str, request: Instance, answer: Any) -> Any:
        if self.asked == self.lives:
            raise KeyboardInterrupt
        self.asked += 1
        self.cache_hook.add_partial(method, request.args, answer)
        return answer

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [
            self._tell("loglikelihood", one, (-float(sum(one.args[1].encode()) % 97) - 0.1, False)) for one in requests
        ]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [self._tell("loglikelihood_rolling", one, -2.0 * len(one.args[0])) for one in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._tell("generate_until", one, " So the answer is 3.\n#### 3") for one in requests]
