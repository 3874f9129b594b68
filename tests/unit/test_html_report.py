"""A run's page: well-formed, self-contained, safe with any output, true to the results."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from page_runs import make_run

from eval.__main__ import main
from eval.run_events import read_events, thinned

VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path / "a run")


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
    names = set(re.findall(r'id="([\w-]+)"', (run_dir / "report.html").read_text()))
    assert {address[1:] for address in page.addresses} <= names


def test_the_page_says_what_the_results_say(run_dir: Path) -> None:
    page = parsed(run_dir / "report.html")
    text = " ".join(page.text.split())
    results = json.loads((run_dir / "results.json").read_text())
    assert results["average_accuracy"] == 50.0
    assert "Average accuracy (AA)50.0label scoring 100.0" in text
    assert "2.5e-08" in text
    assert "50.015.0\u201385.0" in text.replace(" 50.0", "50.0"), "each cell with its interval"
    for words in ("<script>alert('x')</script> 1", "(nothing) 1", "# <recipe>", "5", "2 (empty label)"):
        assert words in text
    assert "encoder.block.0.q.U" in text
    assert "untrained512-- soil-1,0243,072" in text, "MiB of evaluate, method, train"
    assert "train90.090.0" in text, "90 of 100 seconds"


def test_the_page_says_what_layers_and_features_became(run_dir: Path) -> None:
    text = " ".join(parsed(run_dir / "report.html").text.split())
    assert "encoder.block.0.q.U10 37 free 64 free" in text, "protected and free directions after each task"
    assert "soilrivers87.50.0" in text, "what the old task's spaces still hold, and what it lost"
    assert "soil after rivers: 12.5 % left, 0.0 lost" in text, "in the chart"
    assert "encoder.block.0.q2 decoder.block.1.q1 decoder.block.0.q3" in text, "the sensitivity of each layer"
    assert "riversseed samples85.0007.000--" in text, "the loss before training"
    assert "riversother rows645.5006.25012.50.0" in text
    for title in ("Feature drift against the fall in accuracy", "Sensitivity to rivers", "Protected directions"):
        assert f'aria-label="{title}"' in (run_dir / "report.html").read_text()


def test_a_cell_leads_to_what_was_written_in_it(run_dir: Path) -> None:
    """Of two rows of Clay one is right and one is empty; of two of Sand, none is, one by its markup alone."""
    page = parsed(run_dir / "report.html")
    links = [address for address in page.addresses if address.startswith("#cell-")]
    assert sorted(links) == sorted(["#cell-0", "#cell-1", "#cell-2"] * 2), "from the matrix and from the wrong rows"
    text = " ".join(page.text.split())
    assert "rivers, after rivers: 2 of 4 rows wrong" in text
    assert "<b>Sand</b>212 1 1 Clay212 1 1" in text, "rows, right by both scores, written by label and not a label"


def test_rows_of_tasks_that_are_never_trained_are_told_of(run_dir: Path) -> None:
    run = json.loads((run_dir / "run.json").read_text())
    run["data"]["peat"] = run["data"]["soil"] | {"train_rows": 0, "truncated_train": 0, "truncated_evaluation": 3}
    (run_dir / "run.json").write_text(json.dumps(run | {"unseen": ["peat"]}))
    assert main([str(run_dir)]) == 0
    text = " ".join(parsed(run_dir / "report.html").text.split())
    assert "peat (never trained)00430train" in text, "train, truncated; scored, truncated; unmatchable"


def test_untrained_and_unmatchable_rows_are_told_of(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "cells")
    shutil.copytree(run_dir / "predictions" / "01-soil", run_dir / "predictions" / "untrained")
    run = json.loads((run_dir / "run.json").read_text())
    run["data"]["soil"]["labels"] = ["Clay"]  # so that two rows' label is outside the set
    (run_dir / "run.json").write_text(json.dumps(run))
    for path in (run_dir / "predictions").glob("*/soil.jsonl"):
        path.write_text(path.read_text().replace('"option": "<b>Sand</b>"', '"option": "Clay"').replace("<b>sand", "x"))
    assert main([str(run_dir)]) == 0
    results = json.loads((run_dir / "results.json").read_text())
    assert results["without_unmatchable"]["counts"] == [2, 4]
    assert results["untrained_intervals"]["exact_match"] == [pytest.approx([4.6, 69.9], abs=0.1), None]
    text = " ".join(parsed(run_dir / "report.html").text.split())
    assert "untrained 25.04.6\u201369.9 -" in text
    assert "exact match, matchable rows" in text


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
