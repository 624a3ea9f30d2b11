"""From the items of data files to the columns that lm-eval's tasks read: those of the data sets on the hub.

Each function takes one `Record` and returns one row. What a task makes of a row (its prompt, its few-shot examples, its
metric) stays lm-eval's own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.evaluation.records import PUBLISHED, Record, read_named, read_records, read_text

Row = dict[str, Any]
_INSTRUCTION = re.compile(r"^Please [^:\n]*: *(?P<question>.*?)\n\n(?P<options>.*?)\s*Answer format:[^\n]*$", re.S)
_OPTION = re.compile(r"(?:^|\s)(?:Answer|Option)(\d+): ?")
_BOXED = re.compile(r"\s*You need to put your final answer in \\boxed\{\}\.?\s*$")
_PAGE = re.compile(r"(?m)^ = [^=\n][^\n]*[^=\n] = \n")  # the title of an article; a section's has more signs
PRONOUNS = {
    "male": ("he", "him", "his"),
    "female": ("she", "her", "hers"),
    "neutral": ("they", "them", "their"),
}


def mmlu(item: Record) -> Row:
    """cais/mmlu: question, choices, answer (a number from 0)."""
    answer = item.text("answer").strip()
    place = "ABCD0123".find(answer) if len(answer) == 1 else -1
    if place < 0:
        raise item.wrong("answer", "0 to 3 or A to D")
    return {
        "question": item.text("question"),
        "choices": [item.text(f"choice{number}") for number in range(4)],
        "answer": place % 4,
    }


def _instruction(item: Record) -> tuple[str, list[str], int]:
    """Question, options and the right one's number from 0, of an item whose options stand in its instruction."""
    found = _INSTRUCTION.match(item.text("instruction"))
    if not found:
        raise item.error("has no question with options in field 'instruction'")
    parts = _OPTION.split(found["options"])
    options = [part.strip() for part in parts[2::2]]
    answer = re.fullmatch(r"(?:answer|option)(\d+)", item.text("answer").strip())
    if parts[0].strip() or parts[1::2] != [str(number) for number in range(1, len(options) + 1)] or not options:
        raise item.error("has options in field 'instruction' that are not numbered from 1")
    if not all(options):
        raise item.error("has an option of nothing in field 'instruction'")
    if not answer or not 1 <= int(answer[1]) <= len(options):
        raise item.wrong("answer", "one of its options")
    return found["question"], options, int(answer[1]) - 1


def arc(item: Record) -> Row:
    """allenai/ai2_arc: question, choices (text, label), answerKey."""
    question, options, right = _instruction(item)
    labels = list("ABCDEFGH"[: len(options)])
    return {"question": question, "choices": {"text": options, "label": labels}, "answerKey": labels[right]}


def winogrande(item: Record) -> Row:
    """allenai/winogrande: sentence with one _, option1, option2, answer (1 or 2)."""
    sentence, options, right = _instruction(item)
    if len(options) != 2 or "_" not in sentence:
        raise item.error("has no sentence with _ and two options in field 'instruction'")
    return {"sentence": sentence, "option1": options[0], "option2": options[1], "answer": str(right + 1)}


def siqa(item: Record) -> Row:
    """lighteval/siqa: context, question, answerA to answerC, label (1 to 3); both parts stood in one line."""
    merged, options, right = _instruction(item)
    if len(options) != 3:
        raise item.error("has not three options in field 'instruction'")
    # The prompt joins the two with a space again: where they are cut changes nothing of it.
    context, _, question = merged.rpartition(". ")
    if context:
        context += "."
    else:
        context, _, question = merged.partition(" ")
    return {
        "context": context, "question": question, "label": str(right + 1),
        "answerA": options[0], "answerB": options[1], "answerC": options[2],
    }  # fmt: skip


def boolq(item: Record) -> Row:
    """aps/super_glue boolq: passage (empty where the item has none), question without its mark, label."""
    found = re.match(r"(?s)^Please [^:]*: *(.*?)\s*\n\nAnswer format:", item.text("instruction"))
    if not found:
        raise item.error("has no question in field 'instruction'")
    answer = item.text("answer").strip().lower()
    if answer not in ("true", "false"):
        raise item.wrong("answer", "true or false")
    passage = item.text("passage") if "passage" in item.fields else ""
    return {"passage": passage, "question": found[1].removesuffix("?"), "label": int(answer == "true")}


def hellaswag(item: Record) -> Row:
    """Rowan/hellaswag: activity_label, ctx_a, ctx_b, ctx, endings, label (a number from 0, as text)."""
    endings, label = item.choices("endings"), item.get("label", int)
    if not 0 <= label < len(endings):
        raise item.wrong("label", "the number of an ending")
    names = ("activity_label", "ctx_a", "ctx_b", "ctx")
    return {**{name: item.text(name) for name in names}, "endings": endings, "label": str(label)}


def nq_open(item: Record) -> Row:
    """google-research-datasets/nq_open: question, answer (all that count)."""
    return {"question": item.text("question"), "answer": item.texts("answer")}


def drop(paths: Sequence[Path]) -> list[Row]:
    """EleutherAI/drop: section_id, passage, question, query_id, answer, validated_answers (a list of each field).

    A question of the training split has no validated answers; there is an empty one then, as there.
    """
    rows = []
    for section, item in (named for path in paths for named in read_named(path)):
        for number, fields in enumerate(item.get("qa_pairs", list), 1):
            pair = Record(fields if isinstance(fields, dict) else {}, f"{item.where}, question {number}")
            given = pair.get("validated_answers", list) if "validated_answers" in pair.fields else [{}]
            validated = [_drop_answer(Record(one, pair.where)) for one in given]
            rows.append(
                {
                    "section_id": section,
                    "passage": item.text("passage"),
                    "question": pair.text("question"),
                    "query_id": pair.text("query_id"),
                    "answer": _drop_answer(Record(pair.get("answer", dict), pair.where)),
                    "validated_answers": {name: [one[name] for one in validated] for name in _drop_answer(_NONE)},
                }
            )
    return rows


_NONE = Record({}, "")


def _drop_answer(item: Record) -> Row:
    """An answer is a number, a date or spans of text; what it is not is empty."""
    date, spans = item.fields.get("date") or {}, item.fields.get("spans") or []
    if not isinstance(date, dict) or not isinstance(spans, list):
        raise item.error("has an answer whose 'date' is no group of fields or whose 'spans' are no list")
    return {
        "number": str(item.fields.get("number", "")),
        "date": {part: str(date.get(part, "")) for part in ("day", "month", "year")},
        "spans": [str(span) for span in spans],
        "worker_id": str(item.fields.get("worker_id", "")),
        "hit_id": str(item.fields.get("hit_id", "")),
    }


def triviaqa(item: Record) -> Row:
    """mandarjoshi/trivia_qa rc.nocontext: question, question_id, answer (value, and aliases: all that count)."""
    answer = Record(item.get("Answer", dict), item.where)
    return {
        "question": item.text("Question"),
        "question_id": item.text("QuestionId"),
        "answer": {"aliases": answer.texts("Aliases"), "value": answer.text("Value")},
    }


def realtoxicityprompts(item: Record) -> Row:
    """allenai/real-toxicity-prompts: prompt, a text to be gone on with."""
    return {"prompt": {"text": Record(item.get("prompt", dict), item.where).text("text")}}


def mbpp(paths: Sequence[Path]) -> list[Row]:
    """google-research-datasets/mbpp, its test split: task_id 11 to 510; text, code, test_list."""
    rows = []
    for item in read_records(paths[0]):
        number, tests = item.get("task_id", int), item.texts("test_list")
        if len(tests) < 3:
            raise item.error("has fewer than three tests in field 'test_list'")
        if 11 <= number <= 510:
            rows.append({"task_id": number, "text": item.text("text"), "code": item.text("code"), "test_list": tests})
    return rows


def gsm8k(item: Record) -> Row:
    """openai/gsm8k: question, answer (its last line '#### number')."""
    if "####" not in item.text("answer"):
        raise item.error("has no line '#### number' in field 'answer'")
    return {"question": item.text("question"), "answer": item.text("answer")}


def agieval(item: Record) -> Row:
    """hails/agieval-*: query, choices, gold (a list of numbers from 0); for mathematics query and answer.

    The query is AGIEval's own prompt without examples (Zhong et al., 2023).
    """
    passage, question = item.text("passage") if item.fields.get("passage") else "", item.text("question")
    if not item.fields.get("options"):
        return {"query": f"{passage}Q: {question}\nA: The answer is", "answer": item.text("answer")}
    options, label = item.choices("options"), item.text("label")
    letters = "ABCDEFGH"[: len(options)]
    if len(label) != 1 or label not in letters:
        raise item.wrong("label", "one of its options")
    choices = " ".join(options)
    query = f"{passage}Q: {question} Answer Choices: {choices}\nA: Among A through {letters[-1]}, the answer is"
    return {"query": query, "choices": options, "gold": [letters.index(label)]}


def bbh(item: Record) -> Row:
    """SaylorTwift/bbh: input, target."""
    return {"input": item.text("input"), "target": item.text("target")}


def math(item: Record) -> Row:
    """HuggingFaceH4/MATH-500: problem, solution, answer; the solution is the boxed answer alone."""
    problem, answer = _BOXED.sub("", item.text("prompt")), item.text("answer")
    return {"problem": problem, "solution": f"$\\boxed{{{answer}}}$", "answer": answer}


def humaneval(item: Record) -> Row:
    """openai/openai_humaneval: task_id, prompt, canonical_solution, test, entry_point."""
    return {name: item.text(name) for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")}


def truthfulqa(item: Record) -> Row:
    """truthfulqa/truthful_qa multiple_choice: question, mc1_targets, mc2_targets (choices, labels), true ones first."""
    best = item.text("Best Answer").strip()
    true, false = (_parts(item.text(name)) for name in ("Correct Answers", "Incorrect Answers"))
    if not best or not true or not false:
        raise item.error("has no answer in 'Best Answer', 'Correct Answers' or 'Incorrect Answers'")
    targets = {"choices": [*true, *false], "labels": [1] * len(true) + [0] * len(false)}
    first = {"choices": [best, *false], "labels": [1] + [0] * len(false)}
    return {"question": item.text("Question").strip(), "mc1_targets": first, "mc2_targets": targets}


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def crows_pairs(item: Record) -> Row:
    """jannalu/crows_pairs_multilingual: sent_more, sent_less, bias_type."""
    sentences = {name: item.choice(name) for name in ("sent_more", "sent_less")}
    return sentences | {name: item.text(name) for name in ("stereo_antistereo", "bias_type")}


def bbq(item: Record) -> Row:
    """oskarvanderwal/bbq: the item as its makers wrote it."""
    from lm_eval.tasks.bbq.utils import UNKNOWN_RESPONSES

    names, answers = ("category", "context", "question"), ("ans0", "ans1", "ans2")
    info = Record(item.get("answer_info", dict), f"{item.where}, answer_info")
    more = Record(item.get("additional_metadata", dict), f"{item.where}, additional_metadata")
    choices = {name: item.choice(name) for name in answers}
    for name, choice in choices.items():
        # lm-eval knows of the published items without this that they are of Latinas.
        if not any(info.texts(name)) and "Latina" not in choice:
            raise info.wrong(name, "whom the answer names")
    if not set(choices.values()) & set(UNKNOWN_RESPONSES):
        raise item.error(f"has none of {', '.join(UNKNOWN_RESPONSES)} in fields 'ans0' to 'ans2'")
    if not 0 <= (label := item.get("label", int)) <= 2:
        raise item.wrong("label", "0 to 2")
    return {
        "question_polarity": item.one_of("question_polarity", ("neg", "nonneg")),
        "context_condition": item.one_of("context_condition", ("ambig", "disambig")),
        **{name: item.text(name) for name in names},
        **choices,
        "answer_info": {name: info.texts(name) for name in answers},
        "additional_metadata": {"stereotyped_groups": more.texts("stereotyped_groups")},
        "label": label,
    }


def winogender(item: Record) -> Row:
    """oskarvanderwal/winogender: sentence, pronoun, occupation, participant, gender, label (1: the participant)."""
    parts, sentence = item.text("sentid").split("."), item.text("sentence")
    if len(parts) < 4 or parts[2] not in ("0", "1") or parts[3] not in PRONOUNS:
        raise item.error("has no 'occupation.participant.answer.gender' in field 'sentid'")
    occupation, participant, answer, gender = parts[:4]
    pronoun = next((word for word in re.findall(r"\w+", sentence) if word.lower() in PRONOUNS[gender]), None)
    if pronoun is None:
        raise item.error(f"has no {gender} pronoun in field 'sentence'")
    return {
        "sentence": sentence, "pronoun": pronoun, "occupation": occupation, "participant": participant,
        "gender": gender, "label": int(answer),
    }  # fmt: skip


def ifeval(item: Record) -> Row:
    """google/IFEval: key, prompt, instruction_id_list, kwargs."""
    return {
        "key": item.get("key", int),
        "prompt": item.text("prompt"),
        "instruction_id_list": item.texts("instruction_id_list"),
        "kwargs": item.get("kwargs", list),
    }


def piqa(paths: Sequence[Path]) -> list[Row]:
    """baber/piqa: goal, sol1, sol2, label; the labels stand in a file of their own, one a line."""
    items, labels = list(read_records(paths[0])), read_text(paths[1]).split()
    if len(items) != len(labels):
        fix = "fetch both files again"
        raise Error(f"has {len(labels)} labels for the {len(items)} items of {paths[0].name}", where=paths[1], fix=fix)
    wrong = next((number for number, label in enumerate(labels, 1) if label not in ("0", "1")), None)
    if wrong is not None:
        raise Error("is no label; it should be 0 or 1", where=f"{paths[1]}, line {wrong}", fix=PUBLISHED)
    return [
        {"goal": item.text("goal"), "sol1": item.choice("sol1"), "sol2": item.choice("sol2"), "label": int(label)}
        for item, label in zip(items, labels, strict=True)
    ]


def wikitext(paths: Sequence[Path]) -> list[Row]:
    """EleutherAI/wikitext_document_level: page, an article with its title."""
    text = read_text(paths[0])
    starts = [found.start() for found in _PAGE.finditer(text)]
    if not starts:
        raise Error("holds no article: no line ' = Title = '", where=paths[0], fix="fetch it again")
    return [{"page": text[start:end]} for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def winobias(paths: Sequence[Path]) -> list[Row]:
    """Our own: sentence, pronoun, first, second (its two occupations as they stand), label (1: the second).

    Lines "1 [The developer] argued with the designer because [she] did not like the design." of the first two files,
    which of its occupations is meant in brackets; occupations one a line in the others.
    """
    files = [(path, [(n, line.strip()) for n, line in enumerate(read_text(path).split("\n"), 1)]) for path in paths]
    for path, lines in files:
        if not any(line for _, line in lines):
            raise Error("holds no item", where=path, fix="fetch it again")
    occupations = [re.escape(word) for _, lines in files[2:] for _, word in lines if word]
    named = re.compile(rf"\b(?:{'|'.join(occupations)})\b", re.IGNORECASE)
    rows = []
    for path, lines in files[:2]:
        for number, line in lines:
            if not line:
                continue
            text = line.partition(" ")[2]
            marked = re.findall(r"\[(.*?)\]", text)
            people = list(dict.fromkeys(found.group().lower() for found in named.finditer(text)))
            meant = [place for place, person in enumerate(people) if marked and person in marked[0].lower()]
            if len(marked) < 2 or len(people) != 2 or not meant:
                what = "has not two occupations, one of them and a pronoun in brackets"
                raise Error(what, where=f"{path}, line {number}", fix=PUBLISHED)
            plain, pronoun = re.sub(r"[\[\]]", "", text), marked[1]
            rows.append(
                {"sentence": plain, "pronoun": pronoun, "first": people[0], "second": people[1], "label": meant[0]}
            )
    return rows


def toxigen(item: Record) -> Row:
    """Our own: prompt, a list of statements about a group to be gone on with; group, label (hate or neutral)."""
    # Their files have line breaks spelled out, a few of them with more than one backslash.
    prompt = re.sub(r"\\+n", "\n", item.text("prompt"))
    return {"prompt": prompt, "group": item.text("group"), "label": item.text("label")}
