"""Suites: the Gemma 2 report's tables as lists of lm-eval's tasks, with the report's own figures to print beside.

Shots and metrics are the report's; where it names none ("0-shot"), the usual one: accuracy by summed log-probability,
and by log-probability for each byte (acc_norm) for ARC-c and HellaSwag, as on the Open LLM leaderboard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemstill.core.config import nearest
from gemstill.core.errors import Error
from gemstill.evaluation.tasks import Asked


@dataclass(frozen=True)
class Benchmark:
    """One row of a table. metric: lm-eval's "name,filter". published: the report's figures, in the suite's columns.

    variant, overrides: a way of asking that differs from the task's own, as `Asked` has it.
    """

    name: str
    task: str
    shots: int | None
    metric: str
    published: tuple[float | None, ...] = ()
    variant: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def asked(self) -> Asked:
        """The task."""
        metrics = (self.metric.partition(",")[0],) if self.variant else ()
        return Asked(self.task, self.shots, self.variant, self.overrides, metrics)


@dataclass(frozen=True)
class Summary:
    """A row over others: their mean, or their standard deviation (over n − 1).

    published: the report's figures; None: the same taken of its figures for the rows that were measured.
    """

    name: str
    rows: tuple[str, ...]
    deviation: bool = False
    published: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Suite:
    """A table. columns: models of the published figures. turns: ask with the model's chat template.

    directions: say in each row whether higher or lower is better.
    """

    name: str
    about: str
    benchmarks: tuple[Benchmark, ...]
    columns: tuple[str, ...] = ()
    summaries: tuple[Summary, ...] = ()
    turns: bool = False
    directions: bool = False

    def asked(self) -> list[Asked]:
        """The tasks of its rows."""
        return [row.asked() for row in self.benchmarks]


# AGIEval takes as many of its own examples as there are (3 to 5), hence None.
_PRETRAINED = (
    Benchmark("MMLU", "mmlu", 5, "acc,none", (42.3, 52.2, 62.5, 66.6, 64.4, 71.3, 75.2)),
    Benchmark("ARC-C", "arc_challenge", 25, "acc_norm,none", (48.5, 55.7, 60.5, 59.2, 61.1, 68.4, 71.4)),
    Benchmark("GSM8K", "gsm8k", 5, "exact_match,strict-match", (15.1, 24.3, 39.6, 45.7, 51.8, 68.6, 74.0)),
    Benchmark("AGIEval", "agieval_en", None, "acc,none", (24.2, 31.5, 44.0, 45.9, 44.9, 52.8, 55.1)),
    Benchmark("DROP", "drop", 3, "f1,none", (48.5, 51.2, 63.8, 58.4, 56.3, 69.4, 74.2)),
    Benchmark("BBH", "bbh_cot_fewshot", 3, "exact_match,get-answer", (35.2, 41.9, 56.0, 61.1, 59.0, 68.2, 74.9)),
    Benchmark("Winogrande", "winogrande", 5, "acc,none", (66.8, 71.3, 78.5, 76.1, 79.0, 80.6, 83.7)),
    Benchmark("HellaSwag", "hellaswag", 10, "acc_norm,none", (71.7, 72.9, 83.0, 82.0, 82.3, 81.9, 86.4)),
    Benchmark("MATH", "minerva_math500", 4, "exact_match,none", (11.8, 16.0, 12.7, None, 24.3, 36.6, 42.3)),
    Benchmark("ARC-e", "arc_easy", 0, "acc,none", (73.2, 80.6, 80.5, None, 81.5, 88.0, 88.6)),
    Benchmark("PIQA", "piqa", 0, "acc,none", (77.3, 78.4, 82.2, None, 81.2, 81.7, 83.2)),
    Benchmark("SIQA", "social_iqa", 0, "acc,none", (49.7, 51.9, 47.0, None, 51.8, 53.4, 53.7)),
    Benchmark("BoolQ", "boolq", 0, "acc,none", (69.4, 72.7, 83.2, None, 83.2, 84.2, 84.8)),
    Benchmark("TriviaQA", "triviaqa", 5, "exact_match,remove_whitespace", (53.2, 60.4, 62.5, None, 63.4, 76.6, 83.7)),
    Benchmark("NQ", "nq_open", 5, "exact_match,remove_whitespace", (12.5, 17.1, 23.2, None, 23.0, 29.2, 34.5)),
    Benchmark("HumanEval", "humaneval", 0, "pass@1,create_test", (22.0, 20.1, 26.2, None, 32.3, 40.2, 51.8)),
    Benchmark("MBPP", "mbpp", 3, "pass_at_1,none", (29.2, 30.2, 40.2, None, 44.4, 52.4, 62.6)),
)

_NAMES = tuple(row.name for row in _PRETRAINED)
_AVERAGES = (Summary("Average (8)", _NAMES[:8]), Summary("Average (all)", _NAMES))
# With turns a program is asked for in lm-eval's own words for it.
_IN_TURNS = {
    "HumanEval": ("humaneval_instruct", "pass@1,create_test"),
    "MBPP": ("mbpp_instruct", "pass_at_1,extract_code"),
}
_TURNED: dict[str, tuple[float | None, ...]] = {"MMLU": (56.1, 72.3, 76.2), "MBPP": (36.6, 59.2, 67.4)}  # Table 17


def _instruct() -> tuple[Benchmark, ...]:
    rows = []
    for row in _PRETRAINED:
        task, metric = _IN_TURNS.get(row.name, (row.task, row.metric))
        rows.append(Benchmark(row.name, task, row.shots, metric, _TURNED.get(row.name, (None, None, None))))
    return (*rows, Benchmark("IFEval", "ifeval", 0, "prompt_level_strict_acc,none", (None, None, None)))


# Twelve ways to ask MMLU: four prompts, each answered in three ways. The report does not say which twelve it took.
_PROMPTS = {
    "lines": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
    "D. {{choices[3]}}\nAnswer:",
    "brackets": "Question: {{question.strip()}}\n(A) {{choices[0]}}\n(B) {{choices[1]}}\n(C) {{choices[2]}}\n"
    "(D) {{choices[3]}}\nAnswer:",
    "one-line": "Q: {{question.strip()}} A) {{choices[0]}} B) {{choices[1]}} C) {{choices[2]}} D) {{choices[3]}}\nA:",
    "options": "{{question.strip()}}\nOptions:\n- A: {{choices[0]}}\n- B: {{choices[1]}}\n- C: {{choices[2]}}\n"
    "- D: {{choices[3]}}\nThe right option is",
}
_LETTERS = ["A", "B", "C", "D"]
_MEAN = {"aggregation": "mean", "higher_is_better": True}
_WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "letter": ("acc,none", {"doc_to_choice": _LETTERS}),
    "text": ("acc_norm,none", {"doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc_norm", **_MEAN}]}),
    "written": (
        "exact_match,letter",
        {
            "output_type": "generate_until",
            "doc_to_choice": None,
            "doc_to_target": "{{['A', 'B', 'C', 'D'][answer]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **_MEAN}],
            "filter_list": [
                {
                    "name": "letter",
                    "filter": [{"function": "regex", "regex_pattern": r"\b([ABCD])\b"}, {"function": "take_first"}],
                }
            ],
        },
    ),
}


def _formats() -> tuple[Benchmark, ...]:
    return tuple(
        Benchmark(f"{prompt}, {way}", "mmlu", 5, metric, (), f"{prompt}-{way}", {"doc_to_text": text, **overrides})
        for prompt, text in _PROMPTS.items()
        for way, (metric, overrides) in _WAYS.items()
    )


def _both_kinds(rows: Any) -> Any:
    """lm-eval would take an ambiguous item's examples from such items alone: each is answered "Unknown", as it is."""
    from lm_eval.tasks.bbq.utils import process_docs

    return process_docs(rows)


_MIXED = {"fewshot_config": {"split": "test", "process_docs": _both_kinds}}
_SAFETY = (
    Benchmark("RealToxicity", "realtoxicityprompts", 0, "toxicity,none", (7.03, 8.04, 8.16, 8.25, 8.84)),
    Benchmark("CrowS-Pairs", "crows_pairs_english", 0, "pct_stereotype,none", (45.89, 49.67, 37.67, 37.47, 36.67)),
    Benchmark("BBQ Ambig", "bbq_ambig", 4, "acc,none", (58.97, 86.06, 83.20, 88.58, 85.99), overrides=_MIXED),
    Benchmark("BBQ Disambig", "bbq_disambig", 4, "acc,none", (53.9, 85.08, 69.31, 82.67, 86.94), overrides=_MIXED),
    Benchmark("Winogender", "winogender_all", 0, "acc,none", (50.14, 57.64, 52.91, 79.17, 77.22)),
    Benchmark("TruthfulQA", "truthfulqa_mc2", 0, "acc,none", (44.24, 45.34, 43.72, 50.27, 51.60)),
    Benchmark("Winobias 1_2", "winobias_type1", 0, "acc,none", (55.93, 59.22, 59.28, 78.09, 81.94)),
    Benchmark("Winobias 2_2", "winobias_type2", 0, "acc,none", (89.46, 89.2, 88.57, 95.32, 97.22)),
    Benchmark("Toxigen", "toxigen_toxicity", 0, "toxicity,none", (29.64, 38.75, 48.32, 39.30, 38.42)),
)

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "gemma2-pretrained",
            "Table 13 of the Gemma 2 report",
            _PRETRAINED,
            ("Gemma 1 2B", "Gemma 2 2B", "Mistral 7B", "LLaMA-3 8B", "Gemma 1 7B", "Gemma 2 9B", "Gemma 2 27B"),
            _AVERAGES,
        ),
        Suite(
            "gemma2-instruct",
            "Table 13 of the Gemma 2 report in turns, beside its Table 17, and IFEval",
            _instruct(),
            ("Gemma 2 IT 2B", "Gemma 2 IT 9B", "Gemma 2 IT 27B"),
            _AVERAGES,
            turns=True,
        ),
        Suite(
            "gemma2-open-llm",
            "Table 12 of the Gemma 2 report",
            (
                Benchmark("MMLU", "mmlu", 5, "acc,none", (79.2, 74.3, 75.2)),
                Benchmark("GSM8K", "gsm8k", 5, "exact_match,strict-match", (76.9, 61.1, 74.0)),
                Benchmark("ARC-C", "arc_challenge", 25, "acc_norm,none", (68.8, 63.6, 71.4)),
                Benchmark("HellaSwag", "hellaswag", 10, "acc_norm,none", (88.0, 85.0, 86.4)),
                Benchmark("Winogrande", "winogrande", 5, "acc,none", (85.3, 81.5, 83.7)),
            ),
            ("LLaMA-3 70B", "Qwen1.5 32B", "Gemma 2 27B"),
        ),
        Suite(
            "gemma2-safety",
            "the academic sets of Table 18 of the Gemma 2 report",
            _SAFETY,
            ("Gemma 1.1 IT 2.5B", "Gemma 1.1 IT 7B", "Gemma 2 IT 2.6B", "Gemma 2 IT 9B", "Gemma 2 IT 27B"),
            directions=True,
        ),
        Suite(
            "format-robustness",
            "MMLU asked in twelve ways, as Table 11 of the Gemma 2 report",
            _formats(),
            ("Gemma 1 2B", "Gemma 2 2B", "Mistral 7B", "Gemma 1 7B", "Gemma 2 9B", "Gemma 2 27B"),
            (
                Summary("Mean", tuple(row.name for row in _formats()), published=(None,) * 6),
                Summary(
                    "Standard deviation", tuple(row.name for row in _formats()), True, (1.5, 2.1, 6.9, 0.7, 0.9, 1.0)
                ),
            ),
        ),
    )
}


def suite(name: str) -> Suite:
    """The suite of this name.

    Raises:
        Error: there is none; the nearest names are given.
    """
    if name not in SUITES:
        raise Error(f"there is no suite '{name}'", where="--suite", fix=nearest(name, SUITES))
    return SUITES[name]
