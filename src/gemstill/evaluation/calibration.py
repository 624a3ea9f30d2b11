"""How far a model's probabilities can be trusted: of items that choose among given continuations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from gemstill.evaluation.scores import is_figure

BINS = 10


class Choice(NamedTuple):
    """An item's likeliest choice: its probability among the choices, whether it is right, and the texts."""

    confidence: float
    right: bool
    prompt: str
    chosen: str
    wanted: str


class Bar(NamedTuple):
    """The items of one bin: their mean confidence and the share of them that is right."""

    confidence: float
    right: float
    items: int


def choice(sample: dict[str, Any]) -> Choice | None:
    """The choice of one logged item; None where it does not choose, or its accuracy is no yes or no.

    The probability is softmax over the log-likelihoods of the choices, as `acc` takes the largest of them; where the
    task asks for `acc_norm` alone, that one is right which is the target.
    """
    found = likeliest(sample)
    if found is None:
        return None
    best, confidence = found
    arguments, target = sample["arguments"], sample["target"]
    right = sample.get("acc", int(best == target) if "acc_norm" in sample else None)
    if right not in (0, 1):
        return None
    contexts = {str(pair[0]) for pair in arguments}
    # Where the choices stand in the context (Winogrande), its end tells them apart.
    texts = [str(pair[1]) if len(contexts) == 1 else f"…{str(pair[0])[-60:]}{pair[1]}" for pair in arguments]
    wanted = texts[target] if isinstance(target, int) and len(contexts) == 1 and 0 <= target < len(texts) else ""
    return Choice(confidence, bool(right), str(arguments[best][0]), texts[best], wanted)


def likeliest(sample: dict[str, Any]) -> tuple[int, float] | None:
    """The likeliest continuation of a logged item and its probability among them; None where it has none to choose."""
    answers = sample["filtered_resps"]
    if len(answers) < 2 or not all(map(_rated, answers)) or not all(map(_continuation, sample["arguments"])):
        return None
    logprobs = [float(answer[0]) for answer in answers]
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    if not math.isfinite(logprobs[best]):  # all of them are impossible to the model
        return None
    return best, 1 / math.fsum(math.exp(value - logprobs[best]) for value in logprobs)


def _rated(answer: Any) -> bool:
    """Whether this answer is a log-probability and a greedy flag."""
    return isinstance(answer, list | tuple) and len(answer) == 2 and is_figure(answer[0])


def _continuation(arguments: Any) -> bool:
    return len(arguments) == 2 and all(isinstance(text, str) for text in arguments)


def bins(chosen: Sequence[Choice]) -> list[Bar]:
    """The items in bins of equal width by confidence, empty ones left out."""
    groups: list[list[Choice]] = [[] for _ in range(BINS)]
    for one in chosen:
        groups[min(BINS - 1, int(one.confidence * BINS))].append(one)
    return [
        Bar(sum(one.confidence for one in group) / len(group), sum(one.right for one in group) / len(group), len(group))
        for group in groups
        if group
    ]


def expected_error(chosen: Sequence[Choice]) -> float:
    """Expected calibration error: |share right − confidence|, the mean over items of their bins' (Guo et al. 2017)."""
    return sum(abs(bar.right - bar.confidence) * bar.items for bar in bins(chosen)) / len(chosen)
