"""The ladder's report: held-out loss against parameters, the comparison, the sceptic's rows, the ablations."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from gemstill import __version__
from gemstill.core import files
from gemstill.core.config import dump
from gemstill.core.machine import cpu_name
from gemstill.core.progress import duration, short
from gemstill.report.chart import Series, chart, picture
from gemstill.report.page import command, page, pairs, table, tiles

TITLE = "Held-out loss against parameters"
X, Y = "parameters without embedding", "nats a token"
_MAIN_NOTE = (
    "Loss in nats a token over all held-out documents, the mean over seeds; both students of a seed start from the "
    "same weights and see the same batches. The ratio is that of perplexities; the interval that of the paired "
    "differences, by Student's t."
)


def ladder_report(folder: str | Path) -> Path:
    """Write `folder`/report.html and `folder`/ladder.svg from summary.json, finished or not; gives the page's path.

    Raises:
        Error: the folder holds no ladder's summary, or cannot be written.
    """
    folder = Path(folder)
    summary = files.read_json(folder / "summary.json")
    lines = series(summary)
    parts = [
        "<h1>A ladder of students</h1>",
        f'<p class="soft">gemstill {__version__}: {len(summary["main"])} sizes, from scratch and distilled, at the '
        f"same tokens. {short(summary['flops'])} of {short(summary['planned_flops'])} FLOP are done.</p>",
        *(f'<p class="lead">{escape(sentence)}</p>' for sentence in summary["in_words"]),
        tiles(_first_figures(summary)),
        chart(TITLE, lines, X, Y),
        "<h2>Same tokens</h2>",
        f"<p>{escape(summary['rule'])}</p>",
        _table(MAIN_HEADS, main_rows(summary)),
        f"<p><small>{_MAIN_NOTE}</small></p>",
        "<h2>What a sceptic asks</h2>",
        _table(BASELINE_HEADS, baseline_rows(summary)),
        "<h2>Size for equal loss</h2>",
        _table(SHRINK_HEADS, shrink_rows(summary)),
        "<h2>Ablations</h2>",
        _table(ABLATION_HEADS, ablation_rows(summary)),
        "<h2>The sweep of rates</h2>",
        _table(RATE_HEADS, rate_rows(summary)),
        "<h2>Sizes and times</h2>",
        pairs(_sizes(summary)),
        table(("step", "time"), [[name, duration(seconds)] for name, seconds in summary["seconds"].items()]),
        *(["<h2>Missing</h2>", f"<p>{escape(', '.join(summary['missing']))}</p>"] if summary["missing"] else []),
        "<h2>Recipe</h2>",
        command(dump(summary["recipe"]).rstrip()),
    ]
    if lines:
        files.write(folder / "ladder.svg", picture(TITLE, lines, X, Y))
    path = folder / "report.html"
    files.write(path, page("gemstill ladder", parts))
    return path


def series(summary: dict[str, Any]) -> list[Series]:
    """The figure's lines: scratch to the teacher's network, distilled, and the teacher itself."""
    rows = [row for row in summary["main"] if row["seeds"]]
    count = "parameters_without_embedding"
    scratch = [(row[count], row["scratch_mean"]) for row in rows]
    if shape := summary["teacher_shape"]:
        scratch.append((shape[count], shape["heldout_nll"]))
    found = [
        Series("from scratch", scratch, 1, dots=True),
        Series("distilled", [(row[count], row["distilled_mean"]) for row in rows], 2, dots=True),
    ]
    if teacher := summary["teacher"]:
        found.append(Series("teacher, on more tokens", [(teacher[count], teacher["heldout_nll"])], 0, dots=True))
    return [line for line in found if line.points]


MAIN_HEADS = ("size", "parameters", "without embedding", "tokens each", "pairs", "from scratch", "distilled",
              "difference", "95 % interval", "ratio", "verdict")  # fmt: skip
BASELINE_HEADS = ("row", "tokens", "times", "FLOPs", "held-out loss", "distilled")
SHRINK_HEADS = ("distilled size", "equal size from scratch", "factor", "factor with embedding")
ABLATION_HEADS = ("change", "its teacher's loss", "pairs", "loss", "in the comparison", "difference", "95 % interval")
RATE_HEADS = ("student", "matrices", "embeddings", "held-out loss", "chosen")


def main_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The comparison, a row for each size that has a pair."""
    return [
        [
            row["size"], f"{row['parameters']:,}", f"{row['parameters_without_embedding']:,}", f"{row['tokens']:,}",
            str(row["seeds"]), f"{row['scratch_mean']:.4f}", f"{row['distilled_mean']:.4f}",
            f"{row['difference']:+.4f}", _interval(row), f"{row['ratio']:.3f}", row["verdict"],
        ]
        for row in summary["main"] if row["seeds"]
    ]  # fmt: skip


def baseline_rows(summary: dict[str, Any]) -> list[list[str]]:
    """More tokens, the same FLOPs, many tokens a parameter, the teacher's network on the students' tokens."""
    found = []
    if more := summary["more_tokens"]:
        taught = f"{more['distilled_mean']:.4f}"
        for row in more["rows"]:
            same = more["same_flops"] and row["flops"] == more["same_flops"]["flops"]
            name = f"{more['size']} from scratch" + (", FLOPs of teacher, store and student" if same else "")
            found.append(
                [name, f"{row['tokens_seen']:,.0f}", f"{row['times']:.3g}", f"{row['flops']:.2e}",
                 f"{row['heldout_nll']:.4f}", taught]
            )  # fmt: skip
        whole = f"{more['all_in_all_flops']:.2e}"
        found.append([f"{more['size']} distilled, with teacher and store", "", "", whole, taught, taught])
    if long := summary["long"]:
        name = f"{long['size']} at {long['tokens_per_parameter']:.0f} tokens a parameter"
        taught = f"{long['distilled_mean']:.4f}"
        found.append([name, f"{long['tokens']:,}", "", "", f"{long['scratch_mean']:.4f}", taught])
    if shape := summary["teacher_shape"]:
        tokens, flops = f"{shape['tokens_seen']:,.0f}", f"{shape['flops']:.2e}"
        found.append(
            ["teacher's network on the students' tokens", tokens, "", flops, f"{shape['heldout_nll']:.4f}", ""]
        )
    if teacher := summary["teacher"]:
        tokens, flops = f"{teacher['tokens_seen']:,.0f}", f"{teacher['flops']:.2e}"
        found.append(["teacher", tokens, "", flops, f"{teacher['heldout_nll']:.4f}", ""])
    return found


def shrink_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The size from scratch that has a distilled student's loss."""
    return [
        [
            row["size"],
            f"{'more than ' if row['at_least'] else ''}{row['parameters_without_embedding']:,.0f}",
            *(f"{'> ' if row['at_least'] else ''}{row[f'factor_{count}']:.2f}" for count in
              ("parameters_without_embedding", "parameters")),
        ]
        for row in summary["shrink"] or []
    ]  # fmt: skip


def ablation_rows(summary: dict[str, Any]) -> list[list[str]]:
    """One change each, beside the comparison's own distilled students of the same seeds."""
    return [
        [
            row["change"], f"{row['teacher']['heldout_nll']:.4f}" if row["teacher"] else "", str(row["seeds"]),
            f"{row['mean']:.4f}", f"{row['as_in_the_comparison']:.4f}", f"{row['difference']:+.4f}", _interval(row),
        ]
        for row in summary["ablations"]
    ]  # fmt: skip


def rate_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The sweep, the same for both kinds."""
    found = []
    for kind, tried in summary["rates"].items():
        best = min((row["heldout_nll"] for row in tried), default=0.0)
        for row in tried:
            chosen = "yes" if row["heldout_nll"] == best else ""
            rates = [f"{row['learning_rate']:g}", f"{row['embedding_rate']:g}"]
            found.append([kind, *rates, f"{row['heldout_nll']:.4f}", chosen])
    return found


def _interval(row: dict[str, Any]) -> str:
    return f"{row['low']:+.4f} to {row['high']:+.4f}" if "low" in row else ""


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    return table(heads, rows) if rows else "<p>Nothing is done yet.</p>"


def _first_figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    found = [(f"{row['ratio']:.3f}", f"{row['size']}: perplexity, distilled / scratch") for row in summary["main"]
             if row["seeds"]]  # fmt: skip
    if (even := summary["break_even"]) and even["students"] is not None:
        found.append((str(even["students"]), "students from which on teacher and store pay"))
    return [*found, (duration(summary["wall_seconds"]), "so far" if summary["missing"] else "for everything")]


def _sizes(summary: dict[str, Any]) -> list[tuple[str, str]]:
    data, store = summary["data"], summary["store"]
    return [
        ("text", summary["text"]),
        ("its fingerprint", str(data["corpus"])),
        ("tokens of all of it", f"{data['train_tokens']:,} of {data['train_documents']:,} documents"),
        ("tokens of the students' sample", f"{data['student_tokens']:,} of {data['student_documents']:,} documents"),
        ("held out", f"{data['heldout_tokens']:,} tokens of {data['heldout_documents']:,} documents"),
        ("store", f"{store['tokens']:,} tokens, {store['bytes_per_token']:.1f} bytes each" if store else ""),
        ("estimator of the teacher", summary["recipe"]["estimator"]),
        ("largest memory", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB"),
        ("processor", cpu_name()),
    ]
