"""Suites: the Gemma 2 report's tables as lists of lm-eval's tasks, with the report's own figures to print beside.

Shots and metrics are the report's; where it names none ("0-shot"), the usual one: accuracy by summed log-probability,
and by log-probability for each byte (acc_norm) for ARC-c and HellaSwag, as on the Open LLM leaderboard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemstill.core.config import nearest
from gemstill.core.errors import Error
from gemstill.evaluation.tasks import Asked


@dataclass(frozen=True)
class Benchmark:
    """One row of a table. metric: lm-eval's "name,filter". published: the report's figures, in the suite's columns."""

    name: str
    task: str
    shots: int | None
    metric: str
    published: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Suite:
    """A table. columns: models of the published figures. averages: name -> the rows that it is taken over."""

    name: str
    about: str
    benchmarks: tuple[Benchmark, ...]
    columns: tuple[str, ...] = ()
    averages: tuple[tuple[str, tuple[str, ...]], ...] = ()
    turns: bool = False

    def asked(self) -> list[Asked]:
        """The tasks of its rows."""
        return [Asked(row.task, row.shots) for row in self.benchmarks]


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

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "gemma2-pretrained",
            "Table 13 of the Gemma 2 report",
            _PRETRAINED,
            ("Gemma 1 2B", "Gemma 2 2B", "Mistral 7B", "LLaMA-3 8B", "Gemma 1 7B", "Gemma 2 9B", "Gemma 2 27B"),
            (
                ("Average (8)", tuple(row.name for row in _PRETRAINED[:8])),
                ("Average (all)", tuple(row.name for row in _PRETRAINED)),
            ),
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


def average(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
