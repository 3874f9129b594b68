"""eval.charts: what matplotlib drew stands where its values are, in the page's colours and words."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from eval.charts import COLOURS, Interval, Series, interval_chart, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def figure(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def told(chart: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where each marker that tells something stands, by what it tells."""
    return {
        str(mark[0].text): (float(mark.attrib["x"]), float(mark.attrib["y"]))
        for mark in chart.iter(f"{SVG}use")
        if len(mark)
    }


def words(chart: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()) for text in chart.iter(f"{SVG}text")]


def test_lines_rise_with_their_values_and_break_at_gaps() -> None:
    given = [Series("a & b", [(1, 0.0), (2, 50.0), (3, None), (4, 100.0)]), Series("_c$x$", [(1, 25.0)])]
    chart = figure(line_chart(given, title='one "title"', x_title="<x>", y_title="y", x_names=["p", "q", "r", "s"]))
    places = told(chart)
    assert list(places) == ["a & b: 0", "a & b: 50", "a & b: 100", "_c$x$: 25"]
    first, second, third, other = places.values()
    assert first[0] < second[0] < third[0], "from left to right"
    assert first[1] > other[1] > second[1] > third[1], "upwards"
    assert other[0] == first[0]
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.2)
    line = next(path.attrib["d"] for path in chart.iter(f"{SVG}path") if "--line-0" in path.get("style", ""))
    assert (line.count("M"), line.count("L")) == (2, 1), "one piece of two points, one of one"
    assert next(chart.iter(f"{SVG}svg")).attrib["aria-label"] == 'one "title"'
    assert {"p", "q", "r", "s", "<x>", "y", "a & b", " _c$x$"} <= set(words(chart))
    assert line_chart([Series("none", [(1, None)])], title="", x_title="", y_title="") == ""


def test_values_below_zero_are_shown_too() -> None:
    chart = figure(line_chart([Series("fall", [(1, -20.0), (2, -10.0)])], title="t", x_title="x", y_title="y"))
    height = float(next(chart.iter(f"{SVG}svg")).attrib["viewBox"].split()[3])
    assert all(0 < y < height for _, y in told(chart).values())
    assert "\u221220" in words(chart)
    level = line_chart([Series("level", [(1, 0.0), (2, 0.0)], "ab")], title="t", x_title="x", y_title="y")
    assert len(told(figure(level))) == 2


def test_every_colour_is_the_page_s_and_lines_differ_without_it() -> None:
    many = [Series(f"task {index}", [(1, 1.0), (2, float(index))]) for index in range(15)]
    text = line_chart(many, title="t", x_title="x", y_title="y", x_names=["one", "two"])
    assert set(re.findall(r"(?:fill|stroke): ([^;\"]+)", text)) - {"none"} == {
        "var(--ink)",
        "var(--faint)",
        "var(--rule)",
        *(f"var(--line-{index})" for index in range(COLOURS)),
    }
    assert "font-family" not in text
    lines = [p for p in figure(text).iter(f"{SVG}path") if "--line-" in p.get("style", "") and "L" in p.get("d", "")]
    looks = {re.sub(r"stroke: [^;]+;", "", line.attrib["style"]) for line in lines}
    assert len(looks) >= COLOURS, "a dash of its own for each colour"


def test_charts_of_a_page_share_no_names_and_bring_no_rules() -> None:
    text = line_chart([Series("a", [(1, 1.0)])], title="t", x_title="x", y_title="y")
    used = set(re.findall(r"#([\w-]+)", text))
    assert set(re.findall(r' id="([^"]+)"', text)) <= used
    assert "<style" not in text
    assert "metadata" not in text
    assert text == line_chart([Series("a", [(1, 1.0)])], title="t", x_title="x", y_title="y"), "the same every time"


def test_points_alone_tell_what_they_are() -> None:
    chart = line_chart(
        [Series("soil", [(3.0, 1.0), (1.0, 2.0)], ["after rivers", "after hills"])],
        title="t",
        x_title="x",
        y_title="y",
        lines=False,
    )
    places = told(figure(chart))
    assert places["after rivers"][0] > places["after hills"][0]
    assert not [p for p in figure(chart).iter(f"{SVG}path") if "--line-" in p.get("style", "") and "clip" in p.attrib]


def test_intervals_hold_their_values() -> None:
    rows = [Interval("<one> of a name that is long, and longer", 40, 30, 55), Interval("two", 80, 79, 81)]
    chart = figure(interval_chart(rows, title="t", x_title="x"))
    bars = [
        [float(number) for number in re.findall(r"[ML] ([\d.]+)", path.attrib["d"])]
        for path in chart.iter(f"{SVG}path")
        if "--line-0" in path.get("style", "") and "L" in path.get("d", "") and "clip-path" in path.attrib
    ]
    dots = list(told(chart).values())
    assert list(told(chart)) == [
        "<one> of a name that is long, and longer: 40.0 [30.0, 55.0]",
        "two: 80.0 [79.0, 81.0]",
    ]
    for (low, high), (x, _) in zip(bars, dots, strict=True):
        assert low < x < high
    assert dots[0][0] < dots[1][0]
    assert dots[0][1] < dots[1][1], "in their order, downwards"
    assert "<one>" in " ".join(words(chart))
    assert interval_chart([], title="t", x_title="x") == ""
