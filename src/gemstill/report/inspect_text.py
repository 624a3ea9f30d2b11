"""What `gemstill inspect` found, as lines for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def text(found: Mapping[str, Any]) -> str:
    """A description (see gemstill.report.inspect.describe) as text."""
    head = [str(found["source"]), *_model_head(found)] if "architecture" in found else [str(found["source"])]
    if len(head) == 1:
        head.append(str(found["kind"]))
    sections = []
    if "architecture" in found:
        sections += _model(found)
    for name in ("store", "dataset", "run"):
        if name in found:
            sections.append(("", _pairs(found[name])))
    for name, part in found.get("datasets", {}).items():
        sections.append((name, _pairs(part)))
    for name in ("tokenizer", "template"):
        if name in found:
            sections.append((name, _pairs(found[name])))
    if found.get("unusual"):
        sections.append(("unusual", [f"- {what}" for what in found["unusual"]]))
    blocks = ["\n".join(head)]
    for title, lines in sections:
        blocks.append("\n".join([title, *(f"  {line}" for line in lines)] if title else lines))
    return "\n\n".join(blocks)


def size(count: float) -> str:
    """Bytes in words.

    >>> size(3 * 2**30)
    '3 GiB'
    """
    unit = 0
    while count >= 1000 and unit < len(_UNITS) - 1:  # 1023 would take four figures
        count, unit = count / 1024, unit + 1
    return f"{count:.3g} {_UNITS[unit]}"


def _model_head(found: Mapping[str, Any]) -> list[str]:
    total = found["parameters"]["total"]
    family = found["architecture"]["family"]
    named = [f"{name}: {found[name]}" for name in ("name", "organization", "finetune", "license") if name in found]
    lines = [f"{found['format']} · {family} · {total:,} parameters · {size(found['bytes'])} of weights"]
    return [*lines, " · ".join(named)] if named else lines


def _model(found: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    shape, parameters = found["architecture"], found["parameters"]
    layers, pattern = shape["num_layers"], shape["layer_pattern"]
    wide = layers // pattern
    window = f"{layers} ({layers - wide} local, window {shape['sliding_window']:,}; {wide} global)"
    described = {"layers": window, **{k: v for k, v in shape.items() if k not in _SHOWN_ELSEWHERE and v is not None}}
    parts = [
        [part, f"{count:,}", f"{count / max(1, parameters['total']):.1%}"]
        for part, count in parameters["parts"].items()
    ]
    parts.append(["without embedding", f"{parameters['without_embedding']:,}", ""])
    rows = [[r["kind"], r["type"], str(r["count"]), f"{r['parameters']:,}", size(r["bytes"])] for r in found["tensors"]]
    contexts = list(found["memory"][0]["with_context_bytes"])
    needs = [["", "weights", *(f"{int(length):,}" for length in contexts)]]
    for row in found["memory"]:
        sizes = [size(row["with_context_bytes"][length]) for length in contexts]
        needs.append([row["precision"], size(row["weights_bytes"]), *sizes])
    return [
        ("architecture", _pairs(described)),
        ("parameters", _table(parts)),
        ("tensors", _table([["", "type", "tensors", "parameters", "size"], *rows])),
        ("memory, with a context of so many tokens (local layers keep their window alone)", _table(needs)),
    ]


_SHOWN_ELSEWHERE = {"family", "num_layers", "layer_pattern", "sliding_window"}


def _pairs(values: Mapping[str, Any]) -> list[str]:
    lines: list[list[str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            plain = {inner: item for inner, item in value.items() if not isinstance(item, Mapping)}
            lines += [[f"{key} {inner}".replace("_", " "), _value(inner, item)] for inner, item in plain.items()]
        else:
            lines.append([key.replace("_", " "), _value(key, value)])
    width = max((len(key) for key, _ in lines), default=0)
    return [f"{key:{width}}  {value}" for key, value in lines]


def _value(key: str, value: Any) -> str:
    if value is None or value == [] or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and key.endswith("bytes"):
        return size(value)
    if isinstance(value, int):
        return str(value) if key.endswith(("_id", "seed")) else f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, str):
        return value
    return ", ".join(map(str, value)) if isinstance(value, Sequence) else str(value)


def _table(rows: list[list[str]]) -> list[str]:
    """Rows with their columns under each other, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [f"{row[0]:{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in rows
    ]
