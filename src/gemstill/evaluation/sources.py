"""Where the items of lm-eval's tasks come from: the Hugging Face hub, or files in a folder on disk.

On disk the table below says which files stand for which data set of the hub. lm-eval's own task is kept as it is; only
where it would fetch its data, it is handed rows made of the files (its hook `custom_dataset`).
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemstill.core.errors import Error
from gemstill.core.files import sha256
from gemstill.evaluation import columns
from gemstill.evaluation.columns import Row
from gemstill.evaluation.records import Record, find, read_records

Config = dict[str, Any]  # of a task, as lm-eval's YAML has it
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
OPTIONAL = "train"  # the split that a task can do without: it gives few-shot examples alone


def _each(convert: Callable[[Record], Row]) -> Callable[[Sequence[Path]], list[Row]]:
    return lambda paths: [convert(record) for path in paths for record in read_records(path)]


@dataclass(frozen=True)
class Source:
    """A data set of the hub as files. splits: from a split to paths under the root ({name}: its configuration)."""

    splits: Mapping[str, tuple[str, ...]]
    rows: Callable[[Sequence[Path]], list[Row]]
    note: str = ""  # what a reader of the score should know
    examples: str = ""  # a file of few-shot examples
    names: Mapping[str, str] = field(default_factory=dict)  # a configuration's name in paths, where it differs


_MIRROR = "a mirror of the published set, its options split out of one line of text"
_AGIEVAL = (
    "aqua-rat", "gaokao-english", "logiqa-en", "lsat-ar", "lsat-lr", "lsat-rc", "math", "sat-en",
    "sat-en-without-passage", "sat-math",
)  # fmt: skip

_OCCUPATIONS = ("winobias/male_occupations.txt", "winobias/female_occupations.txt")

# From a data set's name on the hub and its configuration (* for any) to files. docs/evaluation.md shows it.
TABLE: dict[tuple[str, str], Source] = {
    ("cais/mmlu", "*"): Source(
        {"dev": ("mmlu/dev/{name}_dev.csv",), "test": ("mmlu/test/{name}_test.csv",)}, _each(columns.mmlu)
    ),
    ("allenai/ai2_arc", "*"): Source(
        {"train": ("{name}/train.json",), "test": ("{name}/test.json",)},
        _each(columns.arc),
        _MIRROR,
        names={"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"},
    ),
    ("openai/gsm8k", "main"): Source(
        {"train": ("gsm8k/train.jsonl",), "test": ("gsm8k/test.jsonl",)}, _each(columns.gsm8k)
    ),
    **{
        (f"hails/agieval-{name}", "*"): Source(
            {"test": (f"agieval/{name}.jsonl",)}, _each(columns.agieval), examples="agieval/few_shot_prompts.csv"
        )
        for name in _AGIEVAL
    },
    ("SaylorTwift/bbh", "*"): Source({"test": ("bbh/{name}.json",)}, _each(columns.bbh)),
    ("allenai/winogrande", "*"): Source(
        {"train": ("winogrande/train.json",), "validation": ("winogrande/test.json",)},
        _each(columns.winogrande),
        _MIRROR,
    ),
    ("HuggingFaceH4/MATH-500", "*"): Source(
        {"test": ("math500/MATH500.jsonl",)}, _each(columns.math), "500 of the 5,000 problems"
    ),
    ("baber/piqa", "*"): Source({"validation": ("piqa/valid.jsonl", "piqa/valid-labels.lst")}, columns.piqa),
    ("lighteval/siqa", "*"): Source(
        {"train": ("siqa/train.json",), "validation": ("siqa/test.json",)}, _each(columns.siqa), _MIRROR
    ),
    ("aps/super_glue", "boolq"): Source(
        {"train": ("boolq/train.json",), "validation": ("boolq/test.json",)},
        _each(columns.boolq),
        "closed book: an item without the field 'passage' is asked without one",
    ),
    ("Rowan/hellaswag", "*"): Source(
        {"train": ("hellaswag/hellaswag_train.jsonl",), "validation": ("hellaswag/hellaswag_val.jsonl",)},
        _each(columns.hellaswag),
    ),
    ("EleutherAI/drop", "*"): Source(
        {"train": ("drop/drop_dataset_train.json",), "validation": ("drop/drop_dataset_dev.json",)},
        columns.drop,
        "lm-eval's few-shot examples of it show the names of an answer's fields where the answer should stand",
    ),
    ("mandarjoshi/trivia_qa", "rc.nocontext"): Source(
        {
            "train": ("triviaqa/web-train.json", "triviaqa/wikipedia-train.json"),
            "validation": ("triviaqa/web-dev.json", "triviaqa/wikipedia-dev.json"),
        },
        _each(columns.triviaqa),
    ),
    ("google-research-datasets/nq_open", "*"): Source(
        {"train": ("nq_open/NQ-open.train.jsonl",), "validation": ("nq_open/NQ-open.dev.jsonl",)},
        _each(columns.nq_open),
    ),
    ("google-research-datasets/mbpp", "full"): Source({"test": ("mbpp/mbpp.jsonl",)}, columns.mbpp),
    ("openai/openai_humaneval", "*"): Source({"test": ("humaneval/HumanEval.jsonl",)}, _each(columns.humaneval)),
    ("truthfulqa/truthful_qa", "multiple_choice"): Source(
        {"validation": ("truthfulqa/TruthfulQA.csv",)},
        _each(columns.truthfulqa),
        "choices made of the lists of true and false answers; the published multiple-choice file differs a little",
    ),
    ("jannalu/crows_pairs_multilingual", "english"): Source(
        {"test": ("crows_pairs/crows_pairs_anonymized.csv",)}, _each(columns.crows_pairs)
    ),
    ("oskarvanderwal/bbq", "All"): Source(
        {"test": ("bbq/*.jsonl",)}, _each(columns.bbq), "the categories whose files are there"
    ),
    ("oskarvanderwal/winogender", "all"): Source(
        {"test": ("winogender/all_sentences.tsv",)}, _each(columns.winogender)
    ),
    ("files/winobias", "type1"): Source(
        {"test": (*(f"winobias/{kind}_stereotyped_type1.txt.test" for kind in ("pro", "anti")), *_OCCUPATIONS)},
        columns.winobias,
    ),
    ("files/winobias", "type2"): Source(
        {"test": (*(f"winobias/{kind}_stereotyped_type2.txt.test" for kind in ("pro", "anti")), *_OCCUPATIONS)},
        columns.winobias,
    ),
    ("files/toxigen", "*"): Source(
        {"test": ("toxigen/prompts_100_per_file.jsonl",)}, _each(columns.toxigen), "100 prompts of each group"
    ),
    ("allenai/real-toxicity-prompts", "*"): Source(
        {"train": ("realtoxicityprompts/prompts.jsonl",)}, _each(columns.realtoxicityprompts)
    ),
    ("google/IFEval", "*"): Source({"train": ("ifeval/input_data.jsonl",)}, _each(columns.ifeval)),
    ("EleutherAI/wikitext_document_level", "*"): Source(
        {"validation": ("wikitext2/valid.txt",)},
        columns.wikitext,
        "the validation articles, rare words already <unk>: not to be compared with figures of the raw text",
    ),
}


@dataclass(frozen=True)
class Found:
    """A task's data on disk. override: what its configuration is given. files: path under the root to SHA-256.

    note: what a reader of the score should know. borrows: few-shot examples are not from a split of their own.
    """

    override: Config
    files: dict[str, str]
    note: str
    borrows: bool


@dataclass(frozen=True)
class Missing:
    """Why a task has no data on disk."""

    reason: str


def locate(config: Config, root: Path) -> Found | Missing:
    """Find the data of one task, whose lm-eval configuration is given, under `root`, and read them.

    Raises:
        Error: a file is there and cannot be read, or lacks a field (file, line and field are named).
    """
    path, name = str(config.get("dataset_path")), str(config.get("dataset_name") or "")
    source = TABLE.get((path, name)) or TABLE.get((path, "*"))
    if source is None:
        return Missing(f"{path} has no place in the layout of a data root")
    folder = source.names.get(name, name)
    there: dict[str, list[Path]] = {}
    for split, patterns in source.splits.items():
        found = [find(root, pattern.format(name=folder)) for pattern in patterns]
        if all(found):
            there[split] = [path for paths in found for path in paths]
        elif split != OPTIONAL or config.get("test_split") == OPTIONAL:
            absent = next(pattern for pattern, paths in zip(patterns, found, strict=True) if not paths)
            return Missing(f"no {absent.format(name=folder)} (or .gz)")
    rows = {split: source.rows(paths) for split, paths in there.items()}
    if (empty := next((split for split, items in rows.items() if not items), None)) is not None:
        raise Error("holds no item", where=there[empty][0], fix="fetch it again")
    override: Config = {"custom_dataset": _dataset(rows)}
    # Where a split is not there lm-eval's own rule takes the next: few-shot examples from the evaluated split, without
    # the item itself.
    for key in _SPLITS:
        if config.get(key) and config[key] not in there:
            override[key] = None
    files = [path for paths in there.values() for path in paths]
    if source.examples and (examples := find(root, source.examples)):
        override |= _examples(examples[0], path.removeprefix("hails/agieval-"))
        files += examples
    hashes = {str(path.relative_to(root)): sha256(path) for path in files}
    return Found(override, hashes, source.note, OPTIONAL in source.splits and OPTIONAL not in there)


def _dataset(rows: Mapping[str, list[Row]]) -> Callable[..., Any]:
    @functools.cache
    def made() -> Any:
        import datasets

        return datasets.DatasetDict({split: datasets.Dataset.from_list(items) for split, items in rows.items()})

    return lambda **_: made()


def _examples(path: Path, name: str) -> Config:
    """AGIEval's own few-shot examples (3 to 5, by subject), as the samples of a task."""
    bare = name.endswith("-without-passage")  # has those of its twin, as in AGIEval's own code
    name, samples = name.removesuffix("-without-passage"), []
    for record in read_records(path):
        if record.fields.get("", "").startswith("sample") and (text := record.text(name).strip()):
            try:
                fields = ast.literal_eval(text)
            except (ValueError, SyntaxError) as error:
                raise record.error(f"has no group of fields in field '{name}'") from error
            samples.append(columns.agieval(Record(fields | {"passage": ""} if bare else fields, record.where)))
    target = "{{choices[gold[0]]}}" if samples and "choices" in samples[0] else "{{answer}}"
    config = {"sampler": "first_n", "samples": samples, "doc_to_target": target}
    return {"fewshot_config": config, "num_fewshot": len(samples)} if samples else {}


def layout() -> Iterable[tuple[str, str]]:
    """The table as pairs: a data set of the hub, and its files under a data root, with commas between."""
    for (path, name), source in TABLE.items():
        files = [pattern for patterns in source.splits.values() for pattern in patterns]
        yield f"{path} {name}".removesuffix(" *"), ", ".join([*files, *([source.examples] if source.examples else [])])
