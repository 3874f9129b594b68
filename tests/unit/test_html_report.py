"""The pages: well-formed, self-contained, safe with any output, true to the results; in a real browser too."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.__main__ import main
from eval.charts import Interval, Series, interval_chart, line_chart, nice_ticks
from eval.run_events import read_events, thinned

ORDER = ["soil", "rivers"]
LABELS = ["Clay", "<b>Sand</b>"]
SHA = "b" * 64
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with every kind of event, and outputs that would be markup."""
    folder = tmp_path / "a run"
    run = {
        "order": ORDER,
        "method": "lbcl",
        "model": "models/mini-x",
        "seed": 3,
        "recipe_sha256": SHA,
        "settings": {"cells": "lower", "split": "test", "add_dataset_name": True},
        "data": {
            task: {"labels": LABELS, "train_rows": 9, "evaluation_rows": 4, "unmatchable": 0}
            | {"train_fingerprint": SHA, "evaluation_fingerprint": SHA, "dropped": {"train": {"empty label": 2}}}
            | {"truncated_train": 5, "truncated_evaluation": 1}
            for task in ORDER
        },
        "timing": {"soil": {"train_s": 30.0, "evaluate_s": 10.0}, "rivers": {"train_s": 60.0}},
        "leak": {"max": 2.5e-8, "per_task": {}},
    }
    written = ["Clay", "<script>alert('x')</script>", "", "<b>sand</b>"]
    for after, task in (("01-soil", "soil"), ("02-rivers", "soil"), ("02-rivers", "rivers")):
        path = folder / "predictions" / after / f"{task}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"id": index, "prediction": text, "label": LABELS[index % 2], "option": LABELS[index % 2]}
            for index, text in enumerate(written)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [
        {"event": "step", "task": task, "step": step, "loss": 4 / step} for task in ORDER for step in range(1, 301)
    ]
    spaces = [
        {"event": "subspace", "task_index": task, "space": f"encoder.block.0.q.{part}", "width": 10, "rank": 3 * task}
        for task in (1, 2)
        for part in "UV"
    ]
    others: list[dict[str, Any]] = [
        {"event": "subspace", "task_index": 2, "space": "encoder.block.0.q.U", "drift_of": 1, "share": 0.875},
        {"event": "subspace", "task_index": 2, "sensitivity_of": "encoder.block.0.q", "mean": 2.0, "fisher": 4.0},
        {"event": "subspace", "task_index": 2, "sensitivity_of": "decoder.block.1.q", "mean": 1.0, "fisher": 0.5},
        {"event": "subspace", "task_index": 2, "sensitivity_of": "decoder.block.0.q", "mean": 3.0, "fisher": 0.25},
    ]
    others.append({"event": "task", "task_index": 1, "task": "soil", "peak_bytes": 3 * 2**30})
    lines = [json.dumps(event) for event in [*steps, *spaces, *others]]
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "step", "task": "riv']))  # torn by a kill
    (folder / "recipe.yaml").write_text("method: {name: lbcl}  # <recipe>\n")
    assert main([str(folder)]) == 0
    return folder


class Tags(HTMLParser):
    """Checks that every tag is closed in its turn; collects text and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def parsed(path: Path) -> Tags:
    tags = Tags()
    tags.feed(path.read_text(encoding="utf-8"))
    tags.close()
    assert not tags.open
    return tags


def test_the_page_is_whole_and_needs_nothing_from_outside(run_dir: Path) -> None:
    page = parsed(run_dir / "report.html")
    assert all(address.startswith("#") for address in page.addresses)
    assert "script" not in page.tags
    style = (run_dir / "report.html").read_text().partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    names = set(re.findall(r'id="(\w+)"', (run_dir / "report.html").read_text()))
    assert {address[1:] for address in page.addresses} <= names


def test_the_page_says_what_the_results_say(run_dir: Path) -> None:
    page = parsed(run_dir / "report.html")
    text = " ".join(page.text.split())
    results = json.loads((run_dir / "results.json").read_text())
    assert results["average_accuracy"] == 50.0
    assert "Average accuracy (AA)50.0label scoring 100.0" in text
    assert "2.5e-08" in text
    assert "50.015.0 to 85.0" in text.replace(" 50.0", "50.0"), "each cell with its interval"
    for words in (
        "<script>alert('x')</script> (1)",
        "(nothing) (1)",
        "<b>Sand</b>",
        "# <recipe>",
        "5",
        "2 (empty label)",
    ):
        assert words in text
    assert "encoder.block.0.q.U" in text
    assert "soil3,072" in text, "MiB"
    assert "87.5" in text, "what the old task's spaces still hold"
    assert "train90.090.0" in text, "90 of 100 seconds"


def test_a_run_without_events_or_predictions_has_a_page_too(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    shutil.rmtree(run_dir / "predictions")
    shutil.rmtree(run_dir / "cells")
    (run_dir / "recipe.yaml").unlink()
    assert main([str(run_dir)]) == 0
    text = parsed(run_dir / "report.html").text
    for words in ("Not finished", "No steps are logged", "No predictions are there", "The method protects nothing"):
        assert words in text


def test_events_are_read_as_they_were_written(run_dir: Path) -> None:
    events = read_events(run_dir)
    assert [curve[0] for curve in events.loss.values()] == [(1, 4.0), (301, 4.0)], "the stream's steps go on"
    assert events.occupied() == {1: 30.0, 2: 60.0}
    assert events.feature_shares() == {(2, 1): 87.5}
    assert events.sensitivity[2]["decoder.block.1.q"] == (1.0, 0.5)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=300), st.integers(1, 50))
def test_thinned_curves_keep_their_mean_and_end(losses: list[float], most: int) -> None:
    curve = [(float(step), loss) for step, loss in enumerate(losses)]
    found = thinned(curve, most)
    assert len(found) <= most
    assert found[-1][0] == curve[-1][0]
    if len(losses) % len(found) == 0:
        assert sum(y for _, y in found) / len(found) == pytest.approx(sum(losses) / len(losses), abs=1e-9)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_hold_what_they_measure(low: float, spread: float) -> None:
    high = low + spread + abs(low) / 1000  # a chart does not tell closer values apart
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * max(abs(low), abs(high), spread)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    assert all(b - a == pytest.approx(step, rel=1e-4) for a, b in itertools.pairwise(ticks))
    assert nice_ticks(5.0, 5.0) == [4.0, 4.5, 5.0, 5.5, 6.0]


def figure(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text)


def test_lines_rise_with_their_values_and_break_at_gaps() -> None:
    chart = figure(
        line_chart(
            [Series("a & b", [(1, 0.0), (2, 50.0), (3, None), (4, 100.0)]), Series("c", [(1, 25.0)])],
            title='one "title"',
            x_title="x",
            y_title="y",
            x_names=["p", "q", "r", "s"],
        )
    )
    pieces = [
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in chart.iter("polyline")
    ]
    (first, second), (third,), (other,) = pieces
    assert first[0] < second[0] < third[0], "from left to right"
    assert first[1] > other[1] > second[1] > third[1], "upwards"
    assert other[0] == first[0]
    assert first[1] - second[1] == pytest.approx(second[1] - third[1], abs=0.2)
    assert next(chart.iter("svg")).attrib["aria-label"] == 'one "title"'
    assert next(chart.iter("title")).text == "a & b: 0"
    assert line_chart([Series("none", [(1, None)])], title="", x_title="", y_title="") == ""


def test_intervals_hold_their_values() -> None:
    chart = figure(interval_chart([Interval("<one>", 40, 30, 55), Interval("two", 80, 79, 81)], title="t", x_title="x"))
    bars = [line for line in chart.iter("line") if line.attrib["class"] == "line"]
    dots = list(chart.iter("circle"))
    for bar, dot in zip(bars, dots, strict=True):
        assert float(bar.attrib["x1"]) < float(dot.attrib["cx"]) < float(bar.attrib["x2"])
    assert float(dots[0].attrib["cx"]) < float(dots[1].attrib["cx"])
    assert "<one>" in [text.text for text in chart.iter("text")]
    assert interval_chart([], title="t", x_title="x") == ""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: pages are not opened in a browser")
def test_a_browser_shows_the_page_in_dark_and_light(run_dir: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    pictures = {}
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync", "--window-size=900,1600"]
    for scheme, setting in (("dark", 0), ("light", 1)):
        picture = tmp_path / f"{scheme}.png"
        shown = [f"--user-data-dir={tmp_path / scheme}", f"--blink-settings=preferredColorScheme={setting}"]
        subprocess.run(
            [BROWSER, *quiet, *shown, f"--screenshot={picture}", (run_dir / "report.html").as_uri()],
            check=True,
            capture_output=True,
            timeout=120,
        )
        pictures[scheme] = picture.read_bytes()
    assert all(picture.startswith(b"\x89PNG") and len(picture) > 20_000 for picture in pictures.values())
    assert pictures["dark"] != pictures["light"]
