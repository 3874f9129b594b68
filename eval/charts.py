"""Line charts as SVG that takes its colours from the page: readable in dark and light, and without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 44, 12, 42  # right: half of a name at the last tick
COLOURS = 7  # --line-0 and on, in the page's style sheet: Okabe and Ito's, told apart by the colour-blind
DASHES = ("", "8 3", "2 3", "10 3 2 3", "5 5", "12 4", "2 6")
MARKERS = "circle", "square", "triangle"
MOST_TICKS = 6
ROW = 42  # of an interval, its name above it


@dataclass(frozen=True)
class Series:
    """One line; None: not measured, a gap."""

    name: str
    points: Sequence[tuple[float, float | None]]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_title: str,
    y_title: str,
    x_names: Sequence[str] | None = None,
    markers: bool = True,
) -> Markup:
    """A chart with its legend, from zero; `x_names` stand at x = 1, 2, ...; nothing where there is no point."""
    points = [(x, y) for line in series for x, y in line.points if y is not None]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1)
    ticks = nice_ticks(0.0, max(ys))
    y_low, y_high = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [_svg(HEIGHT, title)]
    for tick in ticks:
        _, y = place(x_low, tick)
        grid = '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
        parts.append(Markup(grid).format(LEFT, WIDTH - RIGHT, y=y))
        parts.append(_text("tick", LEFT - 6, y + 4, "end", f"{tick:g}"))
    for x, name in _x_ticks(x_low, x_high, x_names):
        parts.append(_text("tick", place(x, y_low)[0], HEIGHT - BOTTOM + 16, "middle", name))
    parts.append(_text("axis", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "middle", x_title))
    turned = '<text class="axis" transform="translate(12 {}) rotate(-90)" text-anchor="middle">{}</text>'
    parts.append(Markup(turned).format((HEIGHT - BOTTOM) / 2, y_title))
    for index, line in enumerate(series):
        style = _stroke(index)
        for piece in _pieces(line.points):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in piece))
            parts.append(Markup('<polyline class="line" style="{}" points="{}"/>').format(style, path))
            if markers:
                parts += [_marker(index, *place(x, y), f"{line.name}: {y:.4g}") for x, y in piece]
    parts.append(Markup("</svg>"))
    return Markup('<figure class="chart">{}{}</figure>').format(Markup("").join(parts), _legend(series, markers))


@dataclass(frozen=True)
class Interval:
    """A value with its interval."""

    name: str
    value: float
    low: float
    high: float


def interval_chart(rows: Sequence[Interval], *, title: str, x_title: str) -> Markup:
    """Two lines a row, the name and the interval with its value; from zero."""
    if not rows:
        return Markup("")
    height = ROW * len(rows) + TOP + BOTTOM
    ticks = nice_ticks(0.0, max(row.high for row in rows))

    def across(value: float) -> float:
        return TOP + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - TOP - RIGHT)

    parts = [_svg(height, title)]
    for tick in ticks:
        line = '<line class="grid" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>'
        parts.append(Markup(line).format(across(tick), TOP, height - BOTTOM))
        parts.append(_text("tick", across(tick), height - BOTTOM + 16, "middle", f"{tick:g}"))
    parts.append(_text("axis", WIDTH / 2, height - 6, "middle", x_title))
    for index, row in enumerate(rows):
        y = TOP + ROW * (index + 0.7)
        parts.append(_text("axis", TOP, y - 10, "start", row.name))
        bar = '<line class="line" style="stroke:var(--line-0)" x1="{:.1f}" x2="{:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        parts.append(Markup(bar).format(across(row.low), across(row.high), y=y))
        parts.append(_marker(0, across(row.value), y, f"{row.name}: {row.value:.1f} [{row.low:.1f}, {row.high:.1f}]"))
    return Markup('<figure class="chart">{}</svg></figure>').format(Markup("").join(parts))


def nice_ticks(low: float, high: float) -> list[float]:
    """Round values from at most `low` to at least `high`, two to about seven of them."""
    if not high > low:
        low, high = low - 1, high + 1
    rough = (high - low) / (MOST_TICKS - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 12) for number in range(first, last + 1)]


def _svg(height: float, title: str) -> Markup:
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, title)


def _text(kind: str, x: float, y: float, anchor: str, text: str) -> Markup:
    shape = '<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>'
    return Markup(shape).format(kind, x, y, anchor, text)


def _x_ticks(low: float, high: float, names: Sequence[str] | None) -> list[tuple[float, str]]:
    if names is not None:
        return [(index, name) for index, name in enumerate(names, start=1) if low <= index <= high]
    return [(tick, f"{tick:g}") for tick in nice_ticks(low, high) if low <= tick <= high]


def _pieces(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """The runs of points without a gap between."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _marker(index: int, x: float, y: float, told: str) -> Markup:
    fill = f"fill:var(--line-{index % COLOURS})"
    title = Markup("<title>{}</title>").format(told)
    match MARKERS[index % len(MARKERS)]:
        case "circle":
            return Markup('<circle style="{}" cx="{:.1f}" cy="{:.1f}" r="3.5">{}</circle>').format(fill, x, y, title)
        case "square":
            shape = '<rect style="{}" x="{:.1f}" y="{:.1f}" width="7" height="7">{}</rect>'
            return Markup(shape).format(fill, x - 3.5, y - 3.5, title)
        case _:
            corners = f"{x:.1f},{y - 4.5:.1f} {x - 4:.1f},{y + 3:.1f} {x + 4:.1f},{y + 3:.1f}"
            return Markup('<polygon style="{}" points="{}">{}</polygon>').format(fill, corners, title)


def _stroke(index: int) -> str:
    return f"stroke:var(--line-{index % COLOURS});stroke-dasharray:{DASHES[index % len(DASHES)] or 'none'}"


def _legend(series: Sequence[Series], markers: bool) -> Markup:
    if len(series) < 2:
        return Markup("")
    items = []
    for index, line in enumerate(series):
        style = _stroke(index)
        sample = Markup('<line class="line" style="{}" x1="0" x2="34" y1="6" y2="6"/>').format(style)
        mark = _marker(index, 17, 6, line.name) if markers else Markup("")
        items.append(
            Markup('<span><svg class="sample" viewBox="0 0 34 12">{}{}</svg>{}</span>').format(
                sample, mark, escape(line.name)
            )
        )
    return Markup('<figcaption class="legend">{}</figcaption>').format(Markup("").join(items))
