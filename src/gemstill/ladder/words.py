"""A ladder's findings in sentences, what did not pay first."""

from __future__ import annotations

from typing import Any


def in_words(summary: dict[str, Any]) -> list[str]:
    """What the figures say so far; where distillation does not pay stands in the first sentence."""
    first = _first(summary)
    sentences = [first, *map(_size, (row for row in summary["main"] if row["seeds"]))]
    sentences += [sentence for make in (_more, _break_even, _long, _shrink) for sentence in make(summary)]
    if missing := len(summary["missing"]):
        sentences.append(f"Not finished: {missing} trainings and stores are missing.")
    return sentences


def _first(summary: dict[str, Any]) -> str:
    rows = [row for row in summary["main"] if row["seeds"]]
    if not rows:
        return "Nothing can be said yet: no pair of students is done."
    unpaid = [row["size"] for row in rows if row["verdict"] != "lower"]
    against = []
    if unpaid:
        against.append(f"at equal tokens it is not shown to pay for: {', '.join(unpaid)}")
    if (more := summary["more_tokens"]) and (better := _cheaper(more)):
        against.append(
            f"for one {more['size']} student it does not pay to train a teacher: from scratch it ends at "
            f"{better['heldout_nll']:.3f} nats for {better['flops']:.1e} FLOP, distilled at "
            f"{more['distilled_mean']:.3f} for {more['all_in_all_flops']:.1e}, teacher and store counted"
        )
    long = summary["long"]
    if long and long["difference"] >= 0:
        against.append(f"at {long['tokens_per_parameter']:.0f} tokens a parameter the distilled student is no better")
    if against:
        return "Where distillation does not pay: " + "; ".join(against) + "."
    return "Distillation paid in every comparison that is done."


def _cheaper(more: dict[str, Any]) -> dict[str, Any] | None:
    """The row from scratch with the most FLOPs, but no more than teacher, store and student, that is no worse.

    Rounding up to whole steps may take a row beyond by a step.
    """
    within = [row for row in more["rows"] if row["flops"] <= 1.001 * more["all_in_all_flops"]]
    most: dict[str, Any] = max(within, key=lambda row: row["flops"])
    return most if most["heldout_nll"] <= more["distilled_mean"] else None


def _size(row: dict[str, Any]) -> str:
    said = {"lower": "distillation lowers it", "higher": "distillation raises it", "undecided": "it is undecided"}
    interval = f", 95 % interval {row['low']:+.3f} to {row['high']:+.3f}" if "low" in row else ""
    return (
        f"{row['size']} ({row['parameters_without_embedding']:,} parameters without embedding), {row['seeds']} pairs: "
        f"held-out loss {row['scratch_mean']:.3f} from scratch, {row['distilled_mean']:.3f} distilled, difference "
        f"{row['difference']:+.3f}{interval}: {said.get(row['verdict'], row['verdict'])}."
    )


def _more(summary: dict[str, Any]) -> list[str]:
    more = summary["more_tokens"]
    if not more or len(more["rows"]) < 2:
        return []
    if more["times_to_meet"] is None:
        most = max(row["times"] for row in more["rows"])
        return [f"From scratch {more['size']} does not meet the distilled one's loss on {most:.1f} times the tokens."]
    return [
        f"From scratch {more['size']} meets the distilled one's loss on {more['times_to_meet']:.1f} times the tokens."
    ]


def _break_even(summary: dict[str, Any]) -> list[str]:
    found = summary["break_even"]
    if not found:
        return []
    if found["students"] is None:
        return ["The store never pays: from scratch the same loss costs no more FLOPs than distilled."]
    return [
        f"Teacher and store pay from {found['students']} students of that size on; with a teacher that is there "
        f"already, the store alone from {found['students_of_a_teacher_that_is_there']} on."
    ]


def _long(summary: dict[str, Any]) -> list[str]:
    long = summary["long"]
    if not long:
        return []
    return [
        f"{long['size']} at {long['tokens_per_parameter']:.0f} tokens a parameter ({long['tokens']:,} tokens, "
        f"{long['seeds']} pair{'s' if long['seeds'] > 1 else ''}): {long['scratch_mean']:.3f} from scratch, "
        f"{long['distilled_mean']:.3f} distilled."
    ]


def _shrink(summary: dict[str, Any]) -> list[str]:
    if not summary["shrink"]:
        return []
    each = ", ".join(
        f"{row['size']} {'over ' if row['at_least'] else ''}{row['factor_parameters_without_embedding']:.1f}"
        f" ({row['factor_parameters']:.1f} with embedding)"
        for row in summary["shrink"]
    )
    return [f"For equal loss and tokens a model from scratch has so many times the parameters: {each}."]
