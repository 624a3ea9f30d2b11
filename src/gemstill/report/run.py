"""`gemstill report`: a run's folder into one HTML file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from gemstill import __version__
from gemstill.core import files
from gemstill.core.errors import Error
from gemstill.core.progress import duration, short
from gemstill.evaluation.folder import ANSWERS, RESULTS
from gemstill.report.chart import Series, chart
from gemstill.report.curves import Curves, loss_charts, read_curves
from gemstill.report.page import command, page, pairs, sample, tiles

GIB = 2**30


@dataclass(frozen=True)
class ReportConfig:
    """`gemstill report`."""

    run: Path  # a run's folder, of `gemstill train`, `quickstart`, `ladder` or `eval`; it gets report.html


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the report of a run, whichever command made it; gives where it lies. Raises Error as `run_report` does."""
    from gemstill.report.evaluation import evaluation_report
    from gemstill.report.ladder import ladder_report
    from gemstill.report.quickstart import quickstart_report

    summary = config.run / "summary.json"
    make: Callable[[Path], Path]
    if (config.run / RESULTS).exists() or (config.run / ANSWERS).exists():
        make = evaluation_report
    elif summary.exists() and files.read_json(summary).get("kind") == "ladder":
        make = ladder_report
    else:
        make = quickstart_report if (config.run / "teacher").is_dir() else run_report
    return {"report": str(make(config.run))}


def plan(config: ReportConfig) -> dict[str, Any]:
    """What `run` would write, and over which measurements."""
    found = sorted(str(path.relative_to(config.run)) for path in config.run.rglob("metrics.jsonl"))
    return {"report": str(config.run / "report.html"), "metrics": ", ".join(found)}


def run_report(folder: str | Path) -> Path:
    """Write `folder`/report.html over a training run, finished or not, and give its path.

    It is one file that opens offline: curves, the run's figures, its recipe and the command to make it again.
    Samples are shown where the folder has a samples.json, a list of {"prompt", "text"}.

    Raises:
        Error: the folder holds no run, or cannot be written.
    """
    folder = Path(folder)
    curves = read_curves(folder)
    summary = files.read_json(folder / "summary.json") if (folder / "summary.json").exists() else {}
    recipe = folder / "config.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe.exists() else ""
    name = folder.resolve().name
    parts = [f"<h1>{escape(name)}</h1>", f'<p class="soft">A training run of gemstill {__version__}.</p>']
    if not summary:
        done = curves.steps[-1]["step"] if curves.steps else 0
        parts.append(f"<p>The run is not finished: {done:,} steps are done.</p>")
    parts += [tiles(_first_figures(summary, curves)), "<h2>Curves</h2>", *loss_charts([(name, curves, 2)])]
    parts += _machinery(name, curves)
    parts += samples(folder / "samples.json", 2)
    parts += ["<h2>Figures</h2>", pairs(run_figures(summary))] if summary else []
    if text:
        again = f"gemstill train {recipe}"
        parts += ["<h2>Make it again</h2>", command(again), "<h2>Recipe</h2>", command(text.rstrip())]
    path = folder / "report.html"
    files.write(path, page(f"{name} · gemstill", parts))
    return path


def run_figures(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """A training run's summary.json in words."""
    known = summary.get
    return [
        ("parameters", f"{known('parameters', 0):,} ({known('parameters_without_embedding', 0):,} without embedding)"),
        ("steps", f"{known('steps', 0):,}"),
        ("tokens seen", f"{known('tokens_seen', 0):,.0f}"),
        ("FLOPs", f"{known('flops', 0):.2e}"),
        ("time", duration(known("seconds", 0))),
        ("tokens a second", short(known("tokens_per_second", 0))),
        ("largest memory", f"{known('peak_rss_bytes', 0) / GIB:.2f} GiB"),
        ("precision", f"{known('precision', '')}{', compiled' if known('compiled') else ''}"),
        ("ranks", str(known("ranks", 1))),
    ]


def samples(path: Path, color: int) -> list[str]:
    """The samples of a samples.json, if there is one."""
    if not path.exists():
        return []
    found = files.read_json(path)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise Error("is no list of samples", where=path, fix='it should hold [{"prompt": "...", "text": "..."}]')
    shown = [
        sample(f"Sample {n}", item.get("prompt", ""), item.get("text", ""), color) for n, item in enumerate(found, 1)
    ]
    return ["<h2>Samples</h2>", *shown]


def _first_figures(summary: dict[str, Any], curves: Curves) -> list[tuple[str, str]]:
    found = []
    heldout = summary if "heldout_nll" in summary else (curves.heldout[-1] if curves.heldout else {})
    if heldout:
        found.append((f"{heldout['perplexity']:.4g}", "held-out perplexity"))
        found.append((f"{heldout['bits_per_byte']:.4g}", "held-out bits a byte"))
    if smooth := curves.smooth("loss"):
        found.append((f"{smooth[-1][1]:.4g}", "training loss, running mean"))
        found.append((short(smooth[-1][0]), "tokens seen"))
    if "seconds" in summary:
        found.append((duration(summary["seconds"]), "training time"))
    return found


def _machinery(name: str, curves: Curves) -> list[str]:
    """Learning rate, gradient norm and speed."""
    wanted = (("lr", "Learning rate", "rate"), ("grad_norm", "Gradient norm", "norm"))
    drawn = [chart(title, [Series(name, curves.of(key), 0)], "tokens seen", unit) for key, title, unit in wanted]
    speed = [Series(name, curves.smooth("tokens_per_second"), 0)]
    return [*drawn, chart("Speed", speed, "tokens seen", "tokens a second")]
