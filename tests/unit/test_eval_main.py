"""`python -m eval`: scores come from the predictions, and a user's fault gets one message and exit code 2."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["soil", "rivers"]
LABELS = {"soil": ["Clay", "Loose Sand"], "rivers": ["yes", "no"]}
# prediction, label, option: right by exact match in 2 of 4, by option in 3 of 4
SOIL = [
    ("clay.", "Clay", "Clay"),
    (" loose  SAND", "Loose Sand", "Clay"),
    ("Loose Sands", "Loose Sand", "Loose Sand"),
    ("Cl", "Clay", "Clay"),
]
RIVERS = [("yes", "yes", "yes"), ("no", "yes", "no"), ("", "-", "yes")]


def prediction_lines(rows: list[tuple[str, str, str | None]]) -> str:
    """Lines of a predictions file whose "correct" and "option_correct" are all wrong on purpose."""
    lines = [
        {
            "id": i,
            "prediction": prediction,
            "label": label,
            "correct": True,
            "stopped": False,
            "option": option,
        }
        | {"option_correct": False, "tokens": 3}
        for i, (prediction, label, option) in enumerate(rows)
    ]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two tasks with predictions for the lower triangle and cells that count them wrongly."""
    folder = tmp_path / "a run"
    facts = {
        task: {
            "labels": LABELS[task],
            "train_rows": 9,
            "evaluation_rows": rows,
            "unmatchable": int(task == "rivers"),
        }
        | {"train_fingerprint": "0" * 64, "evaluation_fingerprint": "1" * 64, "dropped": {}}
        for task, rows in (("soil", 4), ("rivers", 3))
    }
    run = {
        "order": ORDER,
        "method": "seqlora",
        "model": "mini",
        "seed": 1,
        "recipe_sha256": "a" * 64,
        "data": facts,
    }
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    for after, task, rows in (
        ("01-soil", "soil", SOIL),
        ("02-rivers", "soil", SOIL),
        ("02-rivers", "rivers", RIVERS),
    ):
        cell = {"key": f"{after}/{task}", "after": after, "task": task, "rows": len(rows), "seconds": 2.5}
        cell |= {"exact_match_correct": 1, "label_scoring_correct": 0, "unmatchable": 0}
        for path, text in (
            (folder / "cells" / after / f"{task}.json", json.dumps(cell)),
            (folder / "predictions" / after / f"{task}.jsonl", prediction_lines(rows)),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return folder


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return content


def test_scores_are_counted_from_the_predictions(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir)]) == 0
    got = results(run_dir)
    assert got["matrix"]["exact_match"] == [[50.0, None], [50.0, pytest.approx(100 / 3)]]
    assert got["matrix"]["label_scoring"] == [[75.0, None], [75.0, pytest.approx(100 / 3)]]
    assert got["without_unmatchable"]["counts"] == [4, 2]
    assert got["without_unmatchable"]["average_accuracy"] == pytest.approx(50)
    cell = json.loads((run_dir / "cells" / "02-rivers" / "rivers.json").read_text())
    assert cell == {
        "key": "02-rivers/rivers",
        "after": "02-rivers",
        "task": "rivers",
        "rows": 3,
        "seconds": 2.5,
        "exact_match_correct": 1,
        "label_scoring_correct": 1,
        "unmatchable": 1,
    }
    printed = capsys.readouterr().out
    assert "3 cells counted from their predictions, 3 changed" in printed
    assert "  after rivers    50.0    33.3" in printed
    assert "average accuracy (AA) 41.67   backward transfer (BWT) 0.00" in printed
    assert str(run_dir / "report.md") in printed


def test_a_second_time_changes_nothing(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(run_dir)])
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([str(run_dir)]) == 0
    assert "3 cells counted from their predictions, 0 changed" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_lost_cells_are_rebuilt(run_dir: Path) -> None:
    (run_dir / "cells" / "01-soil" / "soil.json").unlink()
    assert main([str(run_dir)]) == 0
    assert results(run_dir)["matrix"]["exact_match"][0][0] == 50.0


def test_an_edited_prediction_changes_the_score(run_dir: Path) -> None:
    path = run_dir / "predictions" / "02-rivers" / "soil.jsonl"
    path.write_text(
        prediction_lines([("Clay", "Clay", "Clay"), *SOIL[1:3], ("clay", "Clay", "Clay")]), encoding="utf-8"
    )
    main([str(run_dir)])
    assert results(run_dir)["matrix"]["exact_match"] == [[50.0, None], [75.0, pytest.approx(100 / 3)]]
    assert results(run_dir)["backward_transfer"] == pytest.approx(25)


def test_predictions_may_hold_any_character(run_dir: Path) -> None:
    path = run_dir / "predictions" / "02-rivers" / "soil.jsonl"
    path.write_text(prediction_lines([("a\u2028b\x85c\x0bd\n\r", "Clay", "Clay"), *SOIL[1:]]), encoding="utf-8")
    assert main([str(run_dir)]) == 0


def test_without_label_scoring(run_dir: Path) -> None:
    for name, rows in (("01-soil/soil", SOIL), ("02-rivers/soil", SOIL), ("02-rivers/rivers", RIVERS)):
        text = prediction_lines([(prediction, label, None) for prediction, label, _ in rows])
        (run_dir / "predictions" / f"{name}.jsonl").write_text(text, encoding="utf-8")
    assert main([str(run_dir)]) == 0
    assert results(run_dir)["matrix"]["label_scoring"] == [[None, None], [None, None]]
    assert results(run_dir)["matrix"]["exact_match"][0][0] == 50.0


def lines_with(number: int, line: str) -> str:
    lines = prediction_lines(SOIL).splitlines()
    lines[number - 1] = line
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines_with(3, '{"id": 2, "pred'), "soil.jsonl, line 3: is not JSON"),
        (lines_with(2, ""), "soil.jsonl, line 2: is not JSON"),
        (lines_with(4, "[1]"), "soil.jsonl, line 4: got list"),
        (
            lines_with(1, '{"id": 0, "label": "Clay", "option": null}'),
            "line 1: prediction is nothing; legal is str",
        ),
        (
            lines_with(1, '{"id": 0, "prediction": 5, "label": "Clay", "option": null}'),
            "line 1: prediction is 5",
        ),
        (lines_with(1, '{"id": 0, "prediction": "", "label": "", "option": 1}'), "legal is str | None"),
        (
            lines_with(4, '{"id": 1, "prediction": "", "label": "Clay", "option": "Clay"}'),
            "line 4: row id 1 stands in line 2",
        ),
        (
            lines_with(1, '{"id": 0, "prediction": "", "label": "Clay", "option": null}'),
            "3 of 4 rows have an option",
        ),
        (prediction_lines(SOIL[:3]), "soil.jsonl: 3 rows; run.json says 4"),
        ("", "soil.jsonl, line 1: is not JSON"),
        ("\udcff\n", "soil.jsonl, line 1: is not JSON"),
    ],
)
def test_damaged_predictions(run_dir: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (run_dir / "predictions" / "02-rivers" / "soil.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert main([str(run_dir)]) == 2
    fault = capsys.readouterr().err
    assert message in fault
    assert "--rescore" in fault
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_lost_predictions_of_a_scored_cell(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "predictions" / "01-soil" / "soil.jsonl").unlink()
    assert main([str(run_dir)]) == 2
    assert "soil.jsonl: missing, though its cell was scored" in capsys.readouterr().err


def test_the_other_runs_are_done_though_one_has_a_fault(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir.parent / "nowhere"), str(run_dir.parent), str(run_dir)]) == 2
    fault = capsys.readouterr().err
    assert "nowhere: no such folder" in fault
    assert "holds no run.json" in fault
    assert results(run_dir)["average_accuracy"] == pytest.approx(125 / 3)


def test_a_fault_of_the_disk_is_a_message(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "report.md").mkdir()
    assert main([str(run_dir)]) == 2
    assert "report.md" in capsys.readouterr().err
    assert not list(run_dir.glob(".*"))


def test_the_command_itself(run_dir: Path, tmp_path: Path) -> None:
    """As users start it: code 2 and one line for a fault, 0 and the table for a run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "eval"]
    good = subprocess.run(
        [*command, "a run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (good.returncode, good.stderr) == (0, "")
    assert "average accuracy (AA) 41.67" in good.stdout
    bad = subprocess.run([*command, "none"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 2
    assert bad.stderr.strip().splitlines() == [
        "error: none: no such folder; give the folder of a run (output.dir of its recipe)"
    ]
