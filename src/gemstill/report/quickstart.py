"""The quickstart's report: what distillation bought and what it cost, on one page and in the terminal."""

from __future__ import annotations

import shlex
import sysconfig
from html import escape
from pathlib import Path
from typing import Any

from gemstill import __version__
from gemstill.core import files
from gemstill.core.machine import cpu_name
from gemstill.core.progress import duration, short
from gemstill.report.curves import loss_charts, read_curves
from gemstill.report.page import command, page, pairs, sample, table, tiles

NAMES = {
    "teacher": "teacher",
    "scratch": "from scratch",
    "distilled": "distilled",
    "scratch_longer": "from scratch, longer",
}
COLORS = {"teacher": 0, "scratch": 1, "distilled": 2, "scratch_longer": 3}
HEADS = ("model", "parameters", "tokens", "FLOPs", "held-out loss", "perplexity", "bits a byte", "time")
STEPS = {
    "tokenizer": "tokenizer", "data": "token shards", "teacher": "teacher", "teach": "probability store",
    "scratch": "student from scratch", "distilled": "distilled student",
    "scratch_longer": "student from scratch, longer",
    "evaluate": "held-out comparison and samples", "evaluate_longer": "the same of the longer one",
    "model": "checkpoint",
}  # fmt: skip
_TABLE_NOTE = (
    "Loss in nats a token, perplexity and bits a byte over all held-out documents. FLOPs are those of the matrix "
    "products: forward and backward for training, forward alone for the teacher's pass over the students' text."
)
_CURVES_NOTE = (
    "The distilled student's training loss is its cross-entropy to the teacher's distribution, not to the next token: "
    "it cannot be compared with the others'. Held-out losses along the way are over a first part of the held-out text."
)


def quickstart_report(folder: str | Path) -> Path:
    """Write `folder`/report.html from summary.json and the runs' metrics.jsonl, and give its path.

    Raises:
        Error: the folder holds no finished quickstart, or cannot be written.
    """
    folder = Path(folder)
    summary = files.read_json(folder / "summary.json")
    names = [name for name in summary["rows"] if name in NAMES]
    runs = [(NAMES[name], read_curves(folder / name), COLORS[name]) for name in names]
    held_out, training = loss_charts(runs)
    parts = [
        "<h1>A small model, taught by a larger one</h1>",
        f'<p class="soft">gemstill {__version__} quickstart: text, tokenizer, teacher, probability store, two students '
        "of one size that see the same tokens in the same order.</p>",
        *(f'<p class="lead">{escape(sentence)}</p>' for sentence in in_words(summary)),
        tiles(_first_figures(summary)),
        "<h2>Comparison</h2>",
        table(HEADS, comparison(summary)),
        f"<p><small>{_TABLE_NOTE}</small></p>",
        "<h2>Curves</h2>",
        held_out,
        training,
        f"<p><small>{_CURVES_NOTE}</small></p>",
        "<h2>Samples</h2>",
        "<p><small>What each model writes after the same held-out beginning (grey).</small></p>",
        *(sample(NAMES[n], summary[n].get("prompt", ""), summary[n].get("sample", ""), COLORS[n]) for n in names),
        "<h2>Sizes and times</h2>",
        pairs(_sizes(summary)),
        table(("step", "time"), _times(summary)),
        "<h2>Make it again</h2>",
        command(again(summary, folder)),
    ]
    path = folder / "report.html"
    files.write(path, page("gemstill quickstart", parts))
    return path


def show(summary: dict[str, Any]) -> None:
    """Print the comparison to the terminal, with one sentence on what it says."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for index, head in enumerate(HEADS):
        grid.add_column(head, justify="left" if index == 0 else "right", no_wrap=True)
    rows = comparison(summary)
    for row in rows:
        grid.add_row(*row)
    if console.is_terminal:
        console.print(grid)
    else:  # a log has no width to fit into
        Console(highlight=False, width=140).print(grid)
    for sentence in in_words(summary):
        console.print(sentence, soft_wrap=True)


def comparison(summary: dict[str, Any]) -> list[list[str]]:
    """The rows under HEADS: the models, the store, and the distilled student with all that it took."""
    seconds, rows = summary.get("seconds", {}), []
    for name in summary["rows"]:
        model = summary[name]
        rows.append(
            [
                NAMES.get(name, name),
                f"{model['parameters']:,}",
                f"{model['tokens_seen']:,.0f}",
                f"{model['flops']:.2e}",
                f"{model['heldout_nll']:.3f}",
                f"{model['perplexity']:.2f}",
                f"{model['bits_per_byte']:.3f}",
                duration(seconds[name]) if name in seconds else "",
            ]
        )
        if name == "teacher":
            store = summary["teach"]
            took = duration(seconds["teach"]) if "teach" in seconds else ""
            rows.append(["  its store", "", f"{store['tokens']:,.0f}", f"{store['flops']:.2e}", "", "", "", took])
    all_seconds = sum(seconds.get(name, 0) for name in ("teacher", "teach", "distilled"))
    tokens = f"{summary['teacher']['tokens_seen'] + summary['distilled']['tokens_seen']:,.0f}"
    whole = ["distilled, all in all", "", tokens, f"{distilled_flops(summary):.2e}", "", "", "", duration(all_seconds)]
    place = summary["rows"].index("distilled") + 2 if "distilled" in summary["rows"] else len(rows)
    return [*rows[:place], whole, *rows[place:]]


def distilled_flops(summary: dict[str, Any]) -> float:
    """FLOPs of teacher, store and distilled student together."""
    return float(summary["teacher"]["flops"] + summary["teach"]["flops"] + summary["distilled"]["flops"])


def in_words(summary: dict[str, Any]) -> list[str]:
    """What distillation bought here and what it cost, whichever way it came out."""
    scratch, distilled = summary["scratch"], summary["distilled"]
    ratio, low, high = summary["ratio"], summary["ratio_low"], summary["ratio_high"]
    change = f"from {scratch['perplexity']:.1f} to {distilled['perplexity']:.1f}"
    interval = f"ratio {ratio:.3f}, 95 % interval {low:.3f} to {high:.3f}"
    if high < 1:
        bought = f"Distillation lowered the student's held-out perplexity {change} ({interval})"
    elif low > 1:
        bought = f"Distillation raised the student's held-out perplexity {change} ({interval})"
    else:
        bought = f"Distillation made no difference that these documents can show: perplexity went {change} ({interval})"
    extra = distilled_flops(summary) / distilled["flops"]
    cost = f"with teacher and store it took {extra:.1f} times the FLOPs of the student alone"
    said = [f"{bought}, at the same tokens{', held back by its teacher' if low > 1 else ''}; {cost}."]
    if "scratch_longer" in summary["rows"]:
        longer = summary["scratch_longer"]
        better = "better" if longer["heldout_nll"] < distilled["heldout_nll"] else "worse"
        said.append(
            f"The same FLOPs spent on training from scratch alone ({longer['tokens_seen']:,.0f} tokens) end at a "
            f"perplexity of {longer['perplexity']:.1f}, {better} than the distilled student's."
        )
    return said


def again(summary: dict[str, Any], folder: Path) -> str:
    """The command that makes the same run."""
    words = ["gemstill", "quickstart"]
    if (text := summary.get("text", "")) != sysconfig.get_paths()["stdlib"]:
        words += ["--data", shlex.quote(text)]
    if folder != Path("runs/quickstart"):
        words += ["--run", shlex.quote(str(folder))]
    if "scratch_longer" in summary["rows"]:
        words += ["--compare-compute", "true"]
    return " ".join(words)


def _first_figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    scratch, distilled = summary["scratch"], summary["distilled"]
    return [
        (
            f"{scratch['perplexity']:.1f} → {distilled['perplexity']:.1f}",
            "held-out perplexity, from scratch → distilled",
        ),
        (
            f"{summary['ratio']:.3f}",
            f"their ratio, 95 % from {summary['ratio_low']:.3f} to {summary['ratio_high']:.3f}",
        ),
        (f"{summary['store_bytes_per_token']:.1f}", "bytes a token in the store"),
        (duration(summary["wall_seconds"]), "for everything"),
    ]


def _sizes(summary: dict[str, Any]) -> list[tuple[str, str]]:
    data, distilled = summary.get("data", {}), summary["distilled"]
    speeds = ", ".join(f"{NAMES.get(n, n)} {short(summary[n]['tokens_per_second'])}" for n in summary["rows"])
    return [
        ("text", str(summary.get("text", ""))),
        ("its fingerprint", str(data.get("corpus", ""))),
        ("tokens for the teacher", f"{data['train_tokens']:,}" if "train_tokens" in data else ""),
        ("tokens for the students", f"{data['student_tokens']:,}" if "student_tokens" in data else ""),
        ("held out", _held_out(data)),
        ("estimator of the teacher", str(summary.get("teach", {}).get("estimator", ""))),
        ("student without embedding", f"{distilled.get('parameters_without_embedding', 0):,} parameters"),
        ("training tokens a second", speeds),
        ("precision", str(distilled.get("precision", ""))),
        ("largest memory", f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB"),
        ("disk", f"{summary['disk_bytes'] / 2**20:.0f} MiB"),
        ("processor", cpu_name()),
    ]


def _held_out(data: dict[str, Any]) -> str:
    if "heldout_tokens" not in data:
        return ""
    return f"{data['heldout_tokens']:,} tokens of {data['heldout_documents']:,} documents"


def _times(summary: dict[str, Any]) -> list[list[str]]:
    rows = [[STEPS.get(name, name), duration(seconds)] for name, seconds in summary.get("seconds", {}).items()]
    return [*rows, ["all", duration(summary["wall_seconds"])]]
