"""The model card of a trained model: what it is, how it was made, and what its teacher's licence says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemstill.checkpoint.sidecars import version
from gemstill.distill.store import StoreInfo
from gemstill.train.config import TrainConfig
from gemstill.train.student import Shape


def model_card(
    config: TrainConfig,
    shape: Shape,
    summary: Mapping[str, Any],
    stores: Sequence[StoreInfo],
    started_from: tuple[str, str] | None = None,
    teacher: tuple[str, str] | None = None,
) -> str:
    """README.md with the Hub's header, of facts that a resumed run shares with one that was never interrupted.

    stores: what was distilled from, none for next-token training. started_from: the name and the licence of the
    model that training went on from. teacher: those of one that answered while this one learned.
    """
    parents = {info.teacher: info.teacher_licence for info in stores}
    parents |= dict(parent for parent in (teacher, started_from) if parent)
    distilled = bool(stores or teacher)
    how = "distilled" if distilled else "trained further" if started_from else "trained from scratch"
    names = sorted({info.teacher for info in stores} | ({teacher[0]} if teacher else set()))
    lines = [
        f"# {Path(config.run).name}: a {shape.family} language model, {how}",
        "",
        f"Made by gemstill {version()}. {_origin(names, started_from)}",
        "",
        *_table(config, shape, summary, stores),
    ]
    if parents:
        named = "; ".join(f"**{name}**: {licence}" for name, licence in parents.items())
        lines += [
            "",
            "## Licence",
            "",
            f"Of the models that this one was made with: {named}. What a licence says of models derived from those "
            "weights or trained on their outputs holds for this model. A licence that is unknown here has to be looked "
            "up where that model is published.",
        ]
    return _header(parents, distilled=distilled) + "\n".join(lines) + "\n"


def _header(parents: Mapping[str, str], *, distilled: bool) -> str:
    known = sorted({licence for licence in parents.values() if licence != "unknown"})
    licence = known[0] if len(known) == 1 and "unknown" not in parents.values() else "other" if parents else ""
    # JSON is YAML, whatever a licence is called.
    lines = [f"license: {json.dumps(licence)}"] if licence else []
    tags = ["gemstill", *(["distillation"] if distilled else [])]
    lines += ["library_name: transformers", "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}"]
    return "---\n" + "\n".join(lines) + "\n---\n"


def _origin(teachers: Sequence[str], started_from: tuple[str, str] | None) -> str:
    begin = f"It started from the weights of {started_from[0]}. " if started_from else ""
    if not teachers:
        return begin + "It learned to predict the next token."
    return begin + f"It learned the next-token distributions of its teacher, {' and '.join(teachers)}."


def _table(config: TrainConfig, shape: Shape, summary: Mapping[str, Any], stores: Sequence[StoreInfo]) -> list[str]:
    sources = config.data.sources
    total = sum(source.weight for source in sources)
    mixture = ", ".join(f"{Path(source.folder).name} ({source.weight / total:.0%})" for source in sources)
    rows = {
        "parameters": f"{summary['parameters']:,}, {summary['parameters_without_embedding']:,} without embedding",
        "shape": f"{shape.num_layers} layers, width {shape.hidden_size}, vocabulary {shape.vocab_size:,}, "
        f"context {shape.max_position:,} tokens, trained in windows of {config.data.window}",
        "data": mixture,
        "tokens seen": f"{summary['tokens_seen']:,} in {summary['steps']:,} steps",
        "operations": f"{summary['flops']:.3g} FLOPs, products in {summary['precision']}",
        "optimizer": f"{config.optimizer.name}, {config.schedule.name} schedule, seed {config.seed}",
    }
    if "perplexity" in summary:
        bits = summary["bits_per_byte"]
        rows["held-out text"] = f"perplexity {summary['perplexity']:.4g} a token, {bits:.4g} bits a byte"
    if config.teacher.source:
        rows["teacher"] = f"ran beside it, whole distributions at temperature {config.teacher.temperature:g}"
    for info in stores:
        rows[f"teacher {info.teacher}"] = (
            f"{info.estimator} at temperature {info.temperature:g} over {info.num_tokens:,} tokens"
        )
    return ["| | |", "| --- | --- |", *(f"| {name} | {text} |" for name, text in rows.items())]
