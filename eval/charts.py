"""Charts as SVG that takes its colours from the page: readable in dark and light, and without colour.

matplotlib draws them in stand-in colours, which `_themed` replaces by the variables of the page's style sheet, so that
one picture serves every scheme and paper.
"""

from __future__ import annotations

import io
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 480, 260  # of 12 points' text: readable on a phone, where a chart is 350 pixels wide
FONT = 12
COLOURS = 7  # --line-0 and on, in the page's style sheet: Okabe and Ito's, told apart by the colour-blind
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 4)), (0, (9, 3)), (0, (2, 4)))
MARKERS = "os^"
MOST_UPRIGHT = 45  # letters of all names under an axis together; more are written aslant
LONGEST_NAME = 22  # letters in a line beside an interval
LEGEND_LETTERS = 56  # in a line, with their samples
INK, FAINT, RULE = "#000100", "#000200", "#000300"  # stand-ins, as are those of lines
LINES = tuple(f"#0004{index:02x}" for index in range(COLOURS))
_PAGE = {INK: "var(--ink)", FAINT: "var(--faint)", RULE: "var(--rule)"} | {
    colour: f"var(--line-{index})" for index, colour in enumerate(LINES)
}
_STYLE: Any = {  # matplotlib types the keys as literals
    "svg.fonttype": "none",  # text stays text: searchable, and in the page's font
    "svg.hashsalt": "chart",  # the same chart is the same file
    "font.size": FONT,
    "text.parse_math": False,  # a name may hold a $
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 2,
    "lines.markersize": 6,
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Series:
    """One line; None: not measured, a gap. `told` says of each point what a pointer over it shows."""

    name: str
    points: Sequence[tuple[float, float | None]]
    told: Sequence[str] | None = None


@dataclass(frozen=True)
class Interval:
    """A value with its interval."""

    name: str
    value: float
    low: float
    high: float


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_title: str,
    y_title: str,
    x_names: Sequence[str] | None = None,
    markers: bool = True,
    lines: bool = True,
) -> Markup:
    """A chart with its legend, from zero or below; nothing where there is no point. `x_names` stand at x = 1, 2, ...

    `lines` off: points alone.
    """
    values = [y for line in series for _, y in line.points if y is not None]
    if not values:
        return Markup("")
    columns = max(1, LEGEND_LETTERS // (9 + max(len(line.name) for line in series)))
    legend_rows = -(-len(series) // columns) if len(series) > 1 else 0
    aslant = x_names is not None and sum(map(len, x_names)) > MOST_UPRIGHT
    with rc_context(_STYLE):
        figure, axes = _canvas(HEIGHT + legend_rows * 1.6 * FONT + (50 if aslant else 0))
        tips: dict[str, Sequence[str]] = {}
        drawn: list[Line2D] = []
        for index, line in enumerate(series):
            shown = [(x, float("nan") if y is None else y) for x, y in line.points]
            tips[f"tip-{index}"] = line.told or [f"{line.name}: {y:.4g}" for _, y in line.points if y is not None]
            drawn += axes.plot(
                [x for x, _ in shown],
                [y for _, y in shown],
                gid=f"tip-{index}",
                color=LINES[index % COLOURS],
                linestyle=DASHES[index % len(DASHES)] if lines else "none",
                marker=MARKERS[index % len(MARKERS)] if markers else "none",
                clip_on=False,  # markers at the edge whole
            )
        axes.set(xlabel=x_title, ylabel=y_title, ylim=(min(0.0, *values, 0.0), max(*values, 0.0) * 1.06 or 1.0))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        if x_names is not None:
            axes.set_xticks(range(1, len(x_names) + 1), [*x_names])
            if aslant:
                axes.tick_params(axis="x", rotation=40)
                for name in axes.get_xticklabels():
                    name.set(horizontalalignment="right", rotation_mode="anchor")
        if legend_rows:
            names = [f" {line.name}" if line.name.startswith("_") else line.name for line in series]  # "_": left out
            figure.legend(drawn, names, loc="outside lower center", ncols=min(columns, len(series)), handlelength=3)
        return _inline(figure, title, tips if markers else {})


def interval_chart(rows: Sequence[Interval], *, title: str, x_title: str) -> Markup:
    """A line a row, its name and its interval with the value; from zero or below."""
    if not rows:
        return Markup("")
    names = [textwrap.fill(row.name, LONGEST_NAME) for row in rows]
    lines_of_text = sum(1 + name.count("\n") for name in names)
    with rc_context(_STYLE):
        figure, axes = _canvas(86 + 14 * len(rows) + 1.3 * FONT * lines_of_text)
        for place, row in enumerate(rows):
            axes.plot([row.low, row.high], [place, place], color=LINES[0], marker="|", markersize=9)
            axes.plot([row.value], [place], color=LINES[0], marker="o", gid=f"tip-{place}")
        told = {
            f"tip-{n}": [f"{row.name}: {row.value:.1f} [{row.low:.1f}, {row.high:.1f}]"] for n, row in enumerate(rows)
        }
        low, high = min(0.0, *(row.low for row in rows), 0.0), max(*(row.high for row in rows), 0.0)
        axes.set(xlabel=x_title, xlim=(low * 1.04, high * 1.04 or 1.0), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticks(range(len(rows)), names)
        axes.grid(visible=False, axis="y")
        return _inline(figure, title, told)


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.subplots()
    axes.patch.set_visible(False)
    return figure, axes


def _inline(figure: Figure, title: str, tips: Mapping[str, Sequence[str]]) -> Markup:
    """The figure as part of a page, `tips` on the markers of the lines of these ids."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(out.getvalue())
    _without_leftovers(root)
    for group in root.iter(f"{{{_SVG}}}g"):
        for mark, told in zip(group.iter(f"{{{_SVG}}}use"), tips.get(group.get("id", ""), ()), strict=False):
            ElementTree.SubElement(mark, f"{{{_SVG}}}title").text = told
    _without_unused_ids(root)
    for size in ("width", "height"):
        root.attrib.pop(size)
    root.attrib |= {"role": "img", "aria-label": title}
    return Markup('<figure class="chart">{}</figure>').format(Markup(_themed(_text(root))))


def _without_leftovers(root: ElementTree.Element) -> None:
    """Drops matplotlib's own description of the file and its style rule, which would hold for the whole page."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)


def _without_unused_ids(root: ElementTree.Element) -> None:
    """Drops ids that nothing refers to: several charts stand on a page, each with an `axes_1`."""
    used = set(re.findall(r"#([\w-]+)", " ".join(value for each in root.iter() for value in each.attrib.values())))
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _text(root: ElementTree.Element) -> str:
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return ElementTree.tostring(root, encoding="unicode")


def _themed(text: str) -> str:
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page's
    return re.sub("|".join(_PAGE), lambda found: _PAGE[found.group()], text)
