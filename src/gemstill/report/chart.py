"""Line charts as inline SVG: drawn by hand, so that a page needs nothing from anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from gemstill.core.progress import short

Point = tuple[float, float]
_Place = Callable[[float, float], Point]
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44  # margins that hold the axes' labels
BOX = (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM)
HEAD = 44  # above it, title and legend of a picture that stands alone
PALETTE = ("#7257c9", "#c96a0c", "#0b8070", "#bd3a76", "#2a6fc4", "#6f6a12")  # as in page.css
MOST_POINTS = 300  # a line has no more corners than this: neighbours are averaged


@dataclass(frozen=True)
class Series:
    """One line. color: 0 to 5, a row of the page's palette. dots: mark every point (few, measured one by one)."""

    name: str
    points: Sequence[Point]
    color: int
    dots: bool = False


def chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """A figure with its legend: HTML around an SVG that screen readers can read as a list of end values.

    Points that are not finite are left out; a chart without any point is an empty string.
    """
    drawn = _drawn(series)
    if not drawn:
        return ""
    told = title + ": " + "; ".join(f"{s.name} ends at {s.points[-1][1]:.4g} {y_label}" for s in drawn)
    legend = "".join(f'<li><span class="key c{s.color}"></span>{escape(s.name)}</li>' for s in drawn)
    body, ends = _body(drawn, x_label, y_label)
    data = {
        "x": ends, "box": BOX, "unit": x_label,
        "series": [{"name": s.name, "color": s.color, "points": [_rounded(p) for p in s.points]} for s in drawn],
    }  # fmt: skip
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption><ul class="legend">{legend}</ul>'
        f'<div class="plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(told)}">'
        f'{body}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
        f'<div class="tip" hidden></div></div><script type="application/json">{_safe(data)}</script></figure>'
    )


def picture(title: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    """The same figure as an SVG file of its own, for pages that are not ours; dark text on white."""
    drawn = _drawn(series)
    body, _ = _body(drawn, x_label, y_label)
    style = "text{font:11.5px system-ui,sans-serif;fill:#5b6470}text.y{text-anchor:end}text.x{text-anchor:middle}"
    style += "text.title{font-weight:600;fill:#1d2127;font-size:13px}.grid{stroke:#e2e4e0}"
    style += "polyline{fill:none;stroke-width:2.2}"
    style += "".join(f".c{n}{{stroke:{color}}}circle.c{n}{{fill:{color}}}" for n, color in enumerate(PALETTE))
    head = f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>'
    x = LEFT
    for s in drawn:
        head += f'<line class="c{s.color}" x1="{x}" x2="{x + 18}" y1="32" y2="32" stroke-width="3"/>'
        head += f'<text x="{x + 24}" y="36">{escape(s.name)}</text>'
        x += 48 + 7 * len(s.name)
    high = HEIGHT + HEAD
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {high}"><style>{style}</style>'
        f'<rect width="{WIDTH}" height="{high}" fill="#fff"/>{head}<g transform="translate(0 {HEAD})">{body}</g>'
        "</svg>\n"
    )


def _drawn(series: Sequence[Series]) -> list[Series]:
    return [Series(s.name, points, s.color, s.dots) for s in series if (points := _thin(s))]


def _body(drawn: Sequence[Series], x_label: str, y_label: str) -> tuple[str, Point]:
    """Axes and lines, and the ends of the horizontal axis."""
    xs, ys = ([point[axis] for s in drawn for point in s.points] for axis in (0, 1))
    left, right = min(0.0, *xs), max(0.0, *xs) or 1.0
    x_ticks, y_ticks = ticks(left, right), ticks(*_shown_range(ys))
    low, high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> Point:
        across = LEFT + (x - left) / (right - left) * (BOX[1] - BOX[0])
        return across, BOX[3] - (y - low) / (high - low) * (BOX[3] - BOX[2])

    lines = "".join(_line(s, place) for s in drawn)
    # An image of its own inside the image cuts off what lies above the shown range.
    width, height = BOX[1] - BOX[0], BOX[3] - BOX[2]
    view = f'x="{LEFT - 4}" y="{TOP}" width="{width + 8}" height="{height + 4}"'
    view += f' viewBox="{LEFT - 4} {TOP} {width + 8} {height + 4}"'
    return f"{_axes(x_ticks, y_ticks, place, x_label, y_label)}<svg {view}>{lines}</svg>", (left, right)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them: steps of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 1e-6 * max(abs(low), abs(high)):  # one value, but for rounding: room below and above
        span = abs(high) or 1.0
        low, high = low - span / 2, high + span / 2
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = max(math.ceil(high / step - 1e-9), first + 1)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _shown_range(values: Sequence[float]) -> tuple[float, float]:
    """The range to show: all of it, less the few first and highest values of an untrained model."""
    ordered = sorted(values)
    return ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.98 * (len(ordered) - 1)))]


def _thin(series: Series) -> list[Point]:
    points = [(float(x), float(y)) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _axes(x_ticks: list[float], y_ticks: list[float], place: _Place, x_label: str, y_label: str) -> str:
    parts = []
    x_end = WIDTH - RIGHT + 0.5
    for value in y_ticks:
        _, y = place(x_ticks[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x_end}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 8}" y="{y + 4:.1f}">{short(value)}</text>')
    for value in x_ticks:
        x, _ = place(value, y_ticks[0])
        if LEFT - 1 <= x <= x_end:
            parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{short(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="x" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    parts.append(f'<text class="x" transform="translate(13 {middle}) rotate(-90)">{escape(y_label)}</text>')
    return "".join(parts)


def _line(series: Series, place: _Place) -> str:
    places = [place(*point) for point in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="c{series.color}{" thin" if not series.dots else ""}" points="{path}"/>']
    if series.dots or len(places) == 1:
        for (x, y), (at, value) in zip(places, series.points, strict=True):
            label = f"{series.name}: {value:.4g} at {short(at)}"
            dot = f'<circle class="c{series.color}" cx="{x:.1f}" cy="{y:.1f}" r="3.2">'
            parts.append(f"{dot}<title>{escape(label)}</title></circle>")
    return "".join(parts)


def _rounded(point: Point) -> list[float]:
    return [float(f"{value:.6g}") for value in point]


def _safe(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
