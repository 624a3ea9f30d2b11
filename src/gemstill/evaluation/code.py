"""The metric of tasks that run a model's programs: the hub's `code_eval`, with a jail around each program.

lm-eval's HumanEval and MBPP load `code_eval` from the hub, a script that is downloaded and then runs the programs in
a plain child process. Here nothing is downloaded, and no program leaves its jail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gemstill.evaluation.jail import Limits, passes

NAME = "code_eval"


class CodeMetric:
    """`code_eval` as the hub has it, by its interface: `compute(references=, predictions=, k=)`.

    unsafe: run programs without a jail.
    """

    def __init__(self, *, unsafe: bool = False) -> None:
        self.unsafe = unsafe

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1, 10, 100)
    ) -> tuple[dict[str, float], dict[int, list[tuple[int, dict[str, Any]]]]]:
        """pass@k over problems, and whether each program passed.

        references: the tests of each problem. predictions: programs for each problem. k: those with enough programs
        in every problem are told.

        Raises:
            Error: there is no jail here.
        """
        results: dict[int, list[tuple[int, dict[str, Any]]]] = {}
        for problem, (tests, programs) in enumerate(zip(references, predictions, strict=True)):
            results[problem] = []
            for number, program in enumerate(programs):
                passed = passes(f"{program}\n{tests}", Limits(), unsafe=self.unsafe)
                record = {"task_id": problem, "passed": passed, "result": "passed" if passed else "failed"}
                results[problem].append((number, {**record, "completion_id": number}))
        tried = {problem: len(found) for problem, found in results.items()}
        right = {problem: sum(record["passed"] for _, record in found) for problem, found in results.items()}
        scores = {}
        for many in k:
            if tried and min(tried.values()) >= many:
                each = [pass_at_k(tried[problem], right[problem], many) for problem in results]
                scores[f"pass@{many}"] = sum(each) / len(each)
        return scores, results


def pass_at_k(tried: int, right: int, k: int) -> float:
    """The unbiased estimate that one of k programs passes, `right` of `tried` having passed (arXiv 2107.03374, eq. 1).

    >>> round(pass_at_k(4, 1, 2), 2)
    0.5
    """
    return 1.0 - math.comb(tried - right, k) / math.comb(tried, k)


@contextmanager
def jailed_code(*, unsafe: bool = False) -> Iterator[None]:
    """While tasks are loaded: whoever loads `code_eval` gets the one with the jail."""
    import evaluate

    load = evaluate.load

    def load_ours(path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeMetric(unsafe=unsafe) if path == NAME else load(path, *args, **kwargs)

    evaluate.load = load_ours
    try:
        yield
    finally:
        evaluate.load = load
