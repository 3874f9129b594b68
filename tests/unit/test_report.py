"""eval.report and eval.results: a run's folder becomes results.json (by its schema) and a readable report."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from data_prep.errors import UserError
from data_prep.orders import ORDERS
from eval.intervals import wilson
from eval.report import write_results
from eval.summary import format_summary

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((ROOT / "eval" / "results.schema.json").read_text(encoding="utf-8"))
SHA = "0123456789abcdef" * 4
ORDER = ["colours", "tools", "weather"]
# Right answers after training task t (from 0; -1: untrained) on each task, of 200, 100 and 50 rows.
EXACT = {-1: [10, 5, 0], 0: [160, 10, None], 1: [140, 85, 5], 2: [130, 80, 45]}
OPTION = {-1: [100, 50, 25], 0: [170, 50, None], 1: [160, 90, 20], 2: [150, 88, 46]}
ROWS = [200, 100, 50]


def task_facts(rows: int, **changes: Any) -> dict[str, Any]:
    facts = {
        "labels": ["yes", "no"],
        "train_rows": 300,
        "evaluation_rows": rows,
        "train_fingerprint": SHA,
        "evaluation_fingerprint": SHA[::-1],
        "dropped": {},
        "unmatchable": 0,
        "truncated_train": 7,
        "truncated_evaluation": 3,
    }
    return facts | changes


def make_run(folder: Path, *, last: int = 2, **changes: Any) -> Path:
    """A run folder of the three tasks, with cells up to stage `last`."""
    run = {
        "order": ORDER,
        "unseen": [],
        "method": "inclora",
        "model": "models/mini-t5",
        "seed": 42,
        "recipe_sha256": SHA,
        "data": {task: task_facts(rows) for task, rows in zip(ORDER, ROWS, strict=True)},
        "settings": {"split": "test", "decoding": "greedy", "label_scoring": True, "add_dataset_name": True},
        "versions": {"torch": "2.0"},
        "git": {"commit": "abc", "dirty": False},
        "timing": {
            "colours": {"train_s": 12.5, "evaluate_s": 2.0},
            "tools": {"train_s": 10.0, "evaluate_s": 3.5},
        },
        "leak": None,
        "trainable_parameters": 4096,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run | changes), encoding="utf-8")
    for t in range(-1, last + 1):
        for i, task in enumerate(ORDER):
            if EXACT[t][i] is not None:
                write_cell(folder, t, task, ROWS[i], EXACT[t][i], OPTION[t][i])
    return folder


def write_cell(folder: Path, t: int, task: str, rows: int, exact: Any, option: Any, unmatchable: int = 0) -> None:
    after = "untrained" if t < 0 else f"{t + 1:02d}-{ORDER[t]}"
    path = folder / "cells" / after / f"{task}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    cell = {
        "key": "k",
        "after": after,
        "task": task,
        "rows": rows,
        "exact_match_correct": exact,
        "seconds": 1.5,
    }
    path.write_text(json.dumps(cell | {"label_scoring_correct": option, "unmatchable": unmatchable}), encoding="utf-8")


def results_of(folder: Path) -> dict[str, Any]:
    """What `write_results` gives, which must be what it wrote and fit the schema."""
    results = write_results(folder)
    written = json.loads((folder / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert written == results
    jsonschema.Draft202012Validator(SCHEMA).validate(written)
    return results


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_a_whole_run(tmp_path: Path) -> None:
    results = results_of(make_run(tmp_path))
    assert results["order"] == ORDER
    assert results["matrix"]["exact_match"] == [[80.0, 10.0, None], [70.0, 85.0, 10.0], [65.0, 80.0, 90.0]]
    assert results["matrix"]["label_scoring"][2] == [75.0, 88.0, 92.0]
    assert results["untrained"] == {"exact_match": [5.0, 5.0, 0.0], "label_scoring": [50.0, 50.0, 50.0]}
    assert results["counts"] == ROWS
    assert results["average_accuracy"] == pytest.approx(235 / 3)
    assert results["backward_transfer"] == pytest.approx(-10)
    assert results["bwt_over_T"] == pytest.approx(-20 / 3)
    assert results["forgetting"] == pytest.approx(10)
    assert results["learning_accuracy"] == pytest.approx(85)
    assert results["forward_transfer"] == pytest.approx(((10 - 5) + (10 - 0)) / 2)
    assert results["micro_average_accuracy"] == pytest.approx(100 * (130 + 80 + 45) / 350)
    assert results["label_scoring"]["average_accuracy"] == pytest.approx((75 + 88 + 92) / 3)
    assert results["label_scoring"]["backward_transfer"] == pytest.approx(((75 - 85) + (88 - 90)) / 2)
    assert results["without_unmatchable"] is None
    low, high = results["intervals"]["exact_match"][0][0]
    assert (low, high) == pytest.approx((73.91, 84.95), abs=0.01)
    assert results["intervals"]["label_scoring"][0][2] is None
    assert results["untrained_intervals"]["exact_match"] == [
        list(wilson(*pair)) for pair in ((10, 200), (5, 100), (0, 50))
    ]
    assert results["data_fingerprints"]["tools"] == {"train": SHA, "evaluation": SHA[::-1]}
    assert results["truncated"]["tools"] == {"train": 7, "evaluation": 3}


def test_what_was_not_measured_is_null(tmp_path: Path) -> None:
    results = results_of(make_run(tmp_path, last=0))
    assert results["matrix"]["exact_match"] == [[80.0, 10.0, None], [None] * 3, [None] * 3]
    assert results["intervals"]["exact_match"][1] == [None] * 3
    for scalars in (results, results["label_scoring"]):
        for key in ("average_accuracy", "backward_transfer", "bwt_over_T", "forgetting", "learning_accuracy"):
            assert scalars[key] is None
        assert scalars["forward_transfer"] is None
        assert scalars["micro_average_accuracy"] is None
    assert "Not finished: 1 of 3 tasks" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_run_without_any_cell(tmp_path: Path) -> None:
    results = results_of(make_run(tmp_path, last=-2))
    assert results["untrained"]["exact_match"] == [None] * 3
    assert results["counts"] == ROWS


def test_label_scoring_off_is_null(tmp_path: Path) -> None:
    make_run(tmp_path)
    for path in (tmp_path / "cells").glob("*/*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"label_scoring_correct": None}))
    results = results_of(tmp_path)
    assert results["matrix"]["label_scoring"] == [[None] * 3] * 3
    assert set(results["label_scoring"].values()) == {None}
    assert results["average_accuracy"] is not None
    assert "Label scoring, %" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_without_unmatchable_rows(tmp_path: Path) -> None:
    make_run(tmp_path)
    for t in (-1, 0, 1, 2):
        write_cell(tmp_path, t, "tools", ROWS[1], EXACT[t][1], OPTION[t][1], unmatchable=10)
    results = results_of(tmp_path)
    left = results["without_unmatchable"]
    assert results["average_accuracy"] == pytest.approx(235 / 3)  # the headline keeps them
    assert left["counts"] == [200, 90, 50]
    assert left["average_accuracy"] == pytest.approx((65 + 100 * 80 / 90 + 90) / 3)
    assert left["micro_average_accuracy"] == pytest.approx(100 * (130 + 80 + 45) / 340)
    assert left["backward_transfer"] == pytest.approx(((65 - 80) + 100 * (80 - 85) / 90) / 2)
    assert left["forward_transfer"] == pytest.approx((100 * (10 - 5) / 90 + (10 - 0)) / 2)
    assert left["label_scoring"]["average_accuracy"] == pytest.approx((75 + 100 * 88 / 90 + 92) / 3)
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| Backward transfer (BWT) | -10.00 | -6.00 | -10.28 |" in report


def test_a_task_that_nothing_can_match_has_no_score_without_those_rows(tmp_path: Path) -> None:
    make_run(tmp_path, last=-2)
    write_cell(tmp_path, 0, "colours", 200, 0, 0, unmatchable=200)
    results = results_of(tmp_path)
    assert results["matrix"]["exact_match"][0][0] == 0.0
    assert results["without_unmatchable"]["learning_accuracy"] is None


def test_unseen_tasks_are_scored_beside_the_matrix(tmp_path: Path) -> None:
    data = {task: task_facts(rows) for task, rows in zip([*ORDER, "music"], [*ROWS, 40], strict=True)}
    make_run(tmp_path, unseen=["music"], data=data)
    write_cell(tmp_path, -1, "music", 40, 4, 20)
    write_cell(tmp_path, 2, "music", 40, 10, 22)
    results = results_of(tmp_path)
    intervals = results["unseen"]["music"].pop("intervals")
    assert results["unseen"] == {
        "music": {
            "untrained": {"exact_match": 10.0, "label_scoring": 50.0},
            "exact_match": [None, None, 25.0],
            "label_scoring": [None, None, 55.0],
        }
    }
    assert intervals["untrained"]["exact_match"] == list(wilson(4, 40))
    assert intervals["label_scoring"] == [None, None, list(wilson(22, 40))]
    assert results["average_accuracy"] == pytest.approx(235 / 3)
    assert "Tasks never trained" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_only_timing_depends_on_the_clock(tmp_path: Path) -> None:
    first = results_of(make_run(tmp_path / "first"))
    second = results_of(make_run(tmp_path / "second", timing={"colours": {"train_s": 99.0}}))
    assert first.pop("timing") != second.pop("timing")
    assert first == second
    before = (tmp_path / "first" / "results.json").read_bytes()
    write_results(tmp_path / "first")
    assert (tmp_path / "first" / "results.json").read_bytes() == before
    assert not list((tmp_path / "first").glob(".*"))  # no partial file is left


def test_report_prints_scores_definitions_and_rows(tmp_path: Path) -> None:
    dropped = {"train": {"empty text": 2}, "evaluation": {"missing key": 0}}
    data = {task: task_facts(rows, dropped=dropped) for task, rows in zip(ORDER, ROWS, strict=True)}
    write_results(make_run(tmp_path, data=data))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| after weather | 65.00 | 80.00 | 90.00 |" in report
    assert "| after colours | 80.00 | 10.00 | - |" in report
    assert "| untrained | 5.00 | 5.00 | 0.00 |" in report
    assert "| colours | 200 | 80.00 [73.91, 84.95] | 65.00 [58.16, 71.27] |" in report
    assert "| Backward transfer (BWT) | -10.00 | -6.00 | `1/(T-1) sum_{i<T} (a[T, i] - a[i, i])` |" in report
    assert "| colours | 300 | 7 | 200 | 3 | 0 |" in report
    assert "- tools, train: 2 rows dropped (empty text)" in report
    assert "missing key" not in report
    assert "`Dataset:<task>`" in report
    assert "| all | 22.5 | 5.5 |" in report
    assert "- torch: 2.0" in report
    assert f"- recipe (SHA-256): {SHA}" in report


def test_the_task_name_note_is_there_only_where_prompts_name_the_task(tmp_path: Path) -> None:
    write_results(make_run(tmp_path, settings={"add_dataset_name": False}))
    assert "`Dataset:<task>`" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def published_run(folder: Path, model: Any, order: list[str], rows: dict[str, tuple[int, int]] | None = None) -> str:
    """The "Published figures" section of a run of `inclora` that was only set up."""
    data = {task: task_facts(7600) for task in order}
    for task, (train, evaluation) in (rows or {}).items():
        data[task] |= {"train_rows": train, "evaluation_rows": evaluation}
    write_results(make_run(folder, last=-2, model=model, order=order, data=data))
    report = (folder / "report.md").read_text(encoding="utf-8")
    return report[report.index("## Published figures") : report.index("## Time")]


FULL = {"dbpedia": (14000, 7600), "amazon": (5000, 7600), "yahoo": (10000, 7600), "agnews": (4000, 7600)}
ORDER2 = ["dbpedia", "amazon", "agnews", "yahoo"]


def test_published_figures_of_the_same_backbone_and_order(tmp_path: Path) -> None:
    section = published_run(tmp_path, {"family": "t5", "path": "google-t5/t5-large"}, ORDER2, FULL)
    assert "- model: google-t5/t5-large\n- model family: t5\n" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| olora | 75.30 | 75.40 | - | LB-CL |" in section
    assert "| inclora (this method) | 64.90 | 66.40 | - | CoDe |" in section
    assert "| gorp | - | 79.80 | - | GORP |" in section
    assert "| **this run** | - |" in section
    assert "O-LoRA's logs" not in section.split("\n- ")[0]  # those are of orders 1 and 6
    assert "Not like for like" not in section


def test_published_figures_of_a_long_order(tmp_path: Path) -> None:
    section = published_run(tmp_path, "t5-large", list(ORDERS["order6"]))
    assert "| olora | 70.50 | 68.80 | - | LB-CL |" in section
    assert "| seqlora | 32.04 | - | -47.96 | O-LoRA's logs |" in section


def test_published_figures_of_one_logged_run(tmp_path: Path) -> None:
    order1 = ["dbpedia", "amazon", "yahoo", "agnews"]
    section = published_run(tmp_path, "t5-large", order1, FULL | {"yahoo": (500, 7600)})
    assert "| olora | 78.37 | - | -1.18 | O-LoRA's logs |" in section
    assert "Not like for like**, the data differ: yahoo (500/7600 rows, published 10000/7600)." in section


@pytest.mark.parametrize(
    ("model", "order"),
    [
        ("models/mini-t5", ORDER2),
        ("t5-large-lora", ORDER2),
        ("t5-large", ["dbpedia", "amazon", "yelp", "agnews", "yahoo"]),
        ("t5-base", ["agnews", "yahoo"]),
    ],
)
def test_nothing_is_printed_beside_what_it_does_not_compare_with(tmp_path: Path, model: str, order: list[str]) -> None:
    section = published_run(tmp_path, model, order)
    assert "not comparable" in section
    assert "|" not in section


def test_summary_for_the_terminal(tmp_path: Path) -> None:
    text = format_summary(results_of(make_run(tmp_path, last=1)))
    assert text.splitlines()[:8] == [
        "inclora, seed 42, 3 tasks",
        "Exact match, %   colours    tools  weather",
        "  untrained          5.0      5.0      0.0",
        "  after colours     80.0     10.0        -",
        "  after tools       70.0     85.0     10.0",
        "  after weather        -        -        -",
        "average accuracy (AA) -   backward transfer (BWT) -",
        "Label scoring, %  colours    tools  weather",
    ]
    finished = format_summary(results_of(make_run(tmp_path)))
    assert "average accuracy (AA) 78.33   backward transfer (BWT) -10.00" in finished


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 199}, r"colours.json: 199 rows; run.json says 200"),
        ({"exact_match_correct": 201}, r"exact_match_correct is 201; legal is 0 to 200"),
        ({"label_scoring_correct": "many"}, r"label_scoring_correct is 'many'"),
        ({"exact_match_correct": None}, r"exact_match_correct is None"),
        ({"unmatchable": 41}, r"exact_match_correct is 160; legal is 0 to 159"),
    ],
)
def test_a_damaged_cell(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = make_run(tmp_path) / "cells" / "01-colours" / "colours.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        write_results(tmp_path)
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("content", ["[1]", "{", "\udcff", '{"order": ["colours"]}'])
def test_a_damaged_run_file(tmp_path: Path, content: str) -> None:
    make_run(tmp_path)
    (tmp_path / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"run\.json: "):
        write_results(tmp_path)
