"""The pages' colours: text and lines stand out from what is behind them, in light and in dark and without hue."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from eval.charts import COLOURS, DASHES, MARKERS

CSS = (Path(__file__).resolve().parents[2] / "eval" / "templates" / "page.css").read_text(encoding="utf-8")
SCHEMES = {
    "light": re.findall(r"--([\w-]+): (#\w+);", CSS.partition("@media")[0]),
    "dark": re.findall(r"--([\w-]+): (#\w+);", CSS.partition("prefers-color-scheme: dark")[2].partition("@media")[0]),
}
LINES = [f"line-{index}" for index in range(COLOURS)]


def luminance(colour: str) -> float:
    """WCAG 2's relative luminance of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_and_lines_stand_out(scheme: str) -> None:
    colours = dict(SCHEMES[scheme])
    for text in ("ink", "faint"):
        assert contrast(colours[text], colours["paper"]) >= 4.5, text
        assert contrast(colours[text], colours["note"]) >= 4.5, text
    for line in LINES:
        assert contrast(colours[line], colours["paper"]) >= 3, line
    for shade in range(10):
        text = "low" if shade < 6 else "high"
        assert contrast(colours[text], colours[f"s{shade}"]) >= 4.5, shade


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shades_go_one_way(scheme: str) -> None:
    """From what is near the paper to what is far from it, by lightness alone."""
    colours = dict(SCHEMES[scheme])
    steps = [contrast(colours[f"s{shade}"], colours["paper"]) for shade in range(10)]
    assert all(b > a for a, b in itertools.pairwise(steps))


def test_fifteen_lines_differ_without_colour() -> None:
    looks = {(str(DASHES[index % len(DASHES)]), MARKERS[index % len(MARKERS)]) for index in range(15)}
    assert len(looks) == 15
