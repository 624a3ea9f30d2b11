"""What a ladder found: summary.json from the steps that are done, and what it comes to in words."""

from __future__ import annotations

import math
from typing import Any

from gemstill.core.config import as_dict
from gemstill.core.steps import Steps
from gemstill.ladder.config import LadderConfig, StudentConfig
from gemstill.ladder.jobs import (
    KINDS,
    Sizes,
    hard_name,
    jobs,
    long_name,
    longer_name,
    store_flops,
    student_name,
    sweep_name,
    temperature_name,
    training_flops,
)
from gemstill.ladder.statistics import break_even, crossing, paired_interval
from gemstill.ladder.words import in_words

RULE = (
    "At equal tokens distillation pays for a size where the 95 % t interval of the paired differences of held-out "
    "loss, distilled less scratch, lies wholly below 0; it harms where it lies wholly above; else it is undecided. "
    "At equal compute it pays where the distilled students' mean lies below the loss of the student from scratch "
    "that got the FLOPs of teacher, store and student together."
)


def summarise(config: LadderConfig, sizes: Sizes, steps: Steps) -> dict[str, Any]:
    """Everything that is known so far; parts whose steps are not all done are None, and "missing" names the steps.

    Losses are nats a token over all held-out text.
    """
    planned = jobs(config, sizes)
    main = [_size(config, steps, student) for student in config.students]
    summary: dict[str, Any] = {
        "kind": "ladder",
        "rule": RULE,
        "recipe": as_dict(config),
        "text": steps.done["recipe"]["data"],
        "data": steps.result("data"),
        "wall_seconds": steps.seconds,
        "peak_rss_bytes": steps.done["peak_rss_bytes"],
        "flops": math.fsum(job.flops for job in planned if job.name in steps.done),
        "planned_flops": math.fsum(job.flops for job in planned),
        "missing": [job.name for job in planned if job.name not in steps.done],
        "seconds": {job.name: steps.each[job.name] for job in planned if job.name in steps.done},
        "teacher": _model(steps, "teacher"),
        "store": steps.result("store") if "store" in steps.done else None,
        "rates": {kind: _rates(config, steps, kind) for kind in KINDS},
        "main": main,
        "teacher_shape": _model(steps, "baselines/teacher-shape"),
        "more_tokens": _more_tokens(config, sizes, steps, main),
        "long": _long(config, steps),
        "ablations": _ablations(config, steps),
    }
    summary["shrink"] = _shrink(summary)
    summary["break_even"] = _break_even(config, sizes, summary)
    return summary | {"in_words": in_words(summary)}


def _loss(steps: Steps, name: str) -> float:
    return float(steps.result(name)["heldout_nll"])


def _model(steps: Steps, name: str) -> dict[str, Any] | None:
    if name not in steps.done:
        return None
    wanted = (
        "parameters", "parameters_without_embedding", "tokens_seen", "flops", "heldout_nll", "perplexity",
        "bits_per_byte", "tokens_per_second", "precision", "rate_factor",
    )  # fmt: skip
    return {key: steps.result(name)[key] for key in wanted}


def _rates(config: LadderConfig, steps: Steps, kind: str) -> list[dict[str, float]]:
    """The sweep of one kind with the middle size, on the comparison's tokens but another seed."""
    tried = [(factor, sweep_name(kind, factor)) for factor in config.rate_factors]
    return [
        {
            "factor": factor,
            "learning_rate": factor * config.optimizer.learning_rate,
            "embedding_rate": factor * config.optimizer.embedding_rate,
            "heldout_nll": _loss(steps, name),
        }
        for factor, name in tried
        if name in steps.done
    ]


def _size(config: LadderConfig, steps: Steps, student: StudentConfig) -> dict[str, Any]:
    """One size of the comparison, over the seeds whose pair is done."""
    seeds = [
        seed for seed in range(config.seeds) if all(student_name(student, kind, seed) in steps.done for kind in KINDS)
    ]
    shape = config.shape(student.model)
    found: dict[str, Any] = {
        "size": student.name,
        "parameters": shape.body_parameters + shape.embedding_parameters,
        "parameters_without_embedding": shape.body_parameters,
        "tokens": config.tokens,
        "tokens_per_parameter": config.tokens / shape.body_parameters,
        "flops": training_flops(config, student.model, config.tokens),
        "seeds": len(seeds),
    }
    for kind in KINDS:
        found[kind] = [_loss(steps, student_name(student, kind, seed)) for seed in seeds]
    return found | compared(found["distilled"], found["scratch"])


def compared(distilled: list[float], scratch: list[float]) -> dict[str, Any]:
    """Means of two rows of losses, their paired difference with its interval, and the ratio of perplexities."""
    if not distilled:
        return {"verdict": "missing"}
    found: dict[str, Any] = {
        "distilled_mean": math.fsum(distilled) / len(distilled),
        "scratch_mean": math.fsum(scratch) / len(scratch),
    }
    found["difference"] = found["distilled_mean"] - found["scratch_mean"]
    found["ratio"] = math.exp(found["difference"])
    if len(distilled) < 2:
        return found | {"verdict": "one seed"}
    interval = paired_interval(distilled, scratch)
    return found | {"low": interval.low, "high": interval.high, "verdict": interval.verdict}


def _shrink(summary: dict[str, Any]) -> list[dict[str, Any]] | None:
    """For each size the size from scratch of equal loss, on scratch's curve, straight in log parameters.

    Counted without embedding and with it. `at_least`: the curve ends before it comes down to that loss, and
    the factor is that to its last point.
    """
    rows = [row for row in summary["main"] if row["seeds"]]
    if len(rows) < len(summary["main"]):
        return None
    losses = [row["scratch_mean"] for row in rows]
    points = [*rows, summary["teacher_shape"]] if summary["teacher_shape"] else rows
    if summary["teacher_shape"]:
        losses.append(summary["teacher_shape"]["heldout_nll"])
    found = []
    for row in rows:
        entry: dict[str, Any] = {"size": row["size"]}
        for count in ("parameters_without_embedding", "parameters"):
            curve = [float(point[count]) for point in points]
            equal = crossing(curve, losses, row["distilled_mean"])
            entry[count] = min(equal, curve[-1])
            entry[f"factor_{count}"] = entry[count] / row[count]
            entry["at_least"] = math.isinf(equal)
        found.append(entry)
    return found


def _more_tokens(config: LadderConfig, sizes: Sizes, steps: Steps, main: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The middle size from scratch on more tokens: how many times more until it meets the distilled one?"""
    row = main[len(config.students) // 2]
    if not row["seeds"]:
        return None
    rows = [{"times": 1.0, "tokens_seen": row["tokens"], "flops": row["flops"], "heldout_nll": row["scratch_mean"]}]
    names = [longer_name(config.middle, times) for times in config.baselines.times_tokens]
    for name in [*names, "baselines/same-flops"]:
        if trained := _model(steps, name):
            rows.append(trained | {"times": trained["tokens_seen"] / row["tokens"]})
    rows.sort(key=lambda point: point["times"])
    times, losses = [point["times"] for point in rows], [point["heldout_nll"] for point in rows]
    met = crossing(times, losses, row["distilled_mean"])
    return {
        "size": row["size"],
        "rows": rows,
        "distilled_mean": row["distilled_mean"],
        "times_to_meet": None if math.isinf(met) else met,
        "same_flops": _model(steps, "baselines/same-flops"),
        "all_in_all_flops": training_flops(config, config.teacher.model, config.teacher.tokens)
        + store_flops(config, config.teacher.model, sizes)
        + row["flops"],
    }


def _long(config: LadderConfig, steps: Steps) -> dict[str, Any] | None:
    """The smallest size with many tokens a parameter."""
    seeds = [
        seed
        for seed in range(config.baselines.long_seeds)
        if all(long_name(kind, seed) in steps.done for kind in KINDS)
    ]
    if not seeds:
        return None
    shape = config.shape(config.smallest.model)
    losses = {kind: [_loss(steps, long_name(kind, seed)) for seed in seeds] for kind in KINDS}
    return {
        "size": config.smallest.name,
        "tokens": config.long_tokens,
        "tokens_per_parameter": config.long_tokens / shape.body_parameters,
        "tokens_per_parameter_with_embedding": config.long_tokens
        / (shape.body_parameters + shape.embedding_parameters),
        "seeds": len(seeds),
        **losses,
        **compared(losses["distilled"], losses["scratch"]),
    }


def _break_even(config: LadderConfig, sizes: Sizes, summary: dict[str, Any]) -> dict[str, Any] | None:
    """From how many students of the middle size on teacher and store pay, in FLOPs for equal loss."""
    more = summary["more_tokens"]
    if more is None or more["times_to_meet"] is None:
        return None
    distilled = training_flops(config, config.middle.model, config.tokens)
    alone = more["times_to_meet"] * distilled
    teacher = training_flops(config, config.teacher.model, config.teacher.tokens)
    store = store_flops(config, config.teacher.model, sizes)
    counts = {
        "students": break_even(teacher + store, alone, distilled),
        "students_of_a_teacher_that_is_there": break_even(store, alone, distilled),
    }
    return {
        "teacher_flops": teacher,
        "store_flops": store,
        "distilled_flops": distilled,
        "scratch_flops_to_meet": alone,
        **{name: None if math.isinf(count) else int(count) for name, count in counts.items()},
    }


def _ablations(config: LadderConfig, steps: Steps) -> list[dict[str, Any]]:
    """Each ablation against the comparison's distilled students of the same seeds, the ladder's own choice."""
    asked, own = config.ablations, config.hard
    changes: dict[str, str] = {}
    for hard in asked.hard:
        was = f"was {own.start:g} to {own.end:g}"
        changes[hard_name(hard)] = f"hard labels, {hard.start:g} to {hard.end:g} ({was})"
    changes |= {temperature_name(value): f"temperature {value:g} (was 1)" for value in asked.temperatures}
    changes |= {name: f"{name} teacher" for name in asked.teachers}
    found = []
    for name, what in changes.items():
        pairs = [
            (_loss(steps, f"ablations/{name}-{seed}"), _loss(steps, student_name(config.smallest, "distilled", seed)))
            for seed in range(asked.seeds)
            if f"ablations/{name}-{seed}" in steps.done
        ]
        if not pairs:
            continue
        theirs, ours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        row = compared(theirs, ours)
        entry: dict[str, Any] = {
            "name": name,
            "change": what,
            "teacher": _model(steps, f"teachers/{name}"),
            "seeds": len(pairs),
            "losses": theirs,
            "mean": row["distilled_mean"],
            "as_in_the_comparison": row["scratch_mean"],
        }
        found.append(entry | {key: row[key] for key in ("difference", "low", "high", "verdict") if key in row})
    return found
