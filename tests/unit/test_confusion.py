"""eval.confusion: which label was written for which, and the most frequent wrong outputs of a cell."""

from __future__ import annotations

import json
from pathlib import Path

from eval.confusion import MOST_WRONG, confusions


def predictions(folder: Path, after: str, task: str, rows: list[tuple[str, str, str | None]]) -> None:
    """Rows of (label, prediction, option)."""
    path = folder / "predictions" / after / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [{"label": label, "prediction": text, "option": option} for label, text, option in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_labels_written_for_others_are_counted_by_label(tmp_path: Path) -> None:
    rows = [("Clay", "clay.", "Clay"), ("Clay", "SAND", "Clay"), ("Clay", "sand!", "Sand"), ("Clay", "mud", "Clay")]
    rows += [("Sand", "clay", "Sand"), ("-", "sand", "Peat"), ("-", "", "Peat")]
    predictions(tmp_path, "01-soil", "soil", rows)
    (found,) = confusions(tmp_path, ["soil"])
    assert found.columns == ["Clay", "Peat", "Sand"], "a label that is only ranked first is a column, `-` is none"
    by_label = {row.label: row for row in found.labels}
    assert by_label["Clay"].written == [1, 0, 2, 1]
    assert (by_label["Clay"].rows, by_label["Clay"].right, by_label["Clay"].options_right) == (4, 1, 3)
    assert by_label["Sand"].written == [1, 0, 0, 0]
    assert by_label["-"].written == [0, 0, 1, 1]
    assert (by_label["-"].right, by_label["-"].options_right) == (0, 0)
    assert (found.wrong_rows, found.wrong[0]) == (6, ("SAND", 1)), "as they were written"


def test_the_ten_most_frequent_wrong_outputs_are_kept(tmp_path: Path) -> None:
    rows = [("Clay", f"text {kind}", None) for kind in range(12) for _ in range(kind + 1)] + [("Clay", "clay", None)]
    predictions(tmp_path, "untrained", "soil", rows)
    predictions(tmp_path, "01-soil", "peat", [("Clay", "w" * 200, None)])
    first, second = confusions(tmp_path, ["soil"], ["peat"])
    assert (first.after, first.task, second.after, second.task) == ("untrained", "soil", "01-soil", "peat")
    assert first.wrong == [(f"text {kind}", kind + 1) for kind in range(11, 1, -1)]
    assert len(first.wrong) == MOST_WRONG
    assert first.labels[0].options_right is None
    assert len(second.wrong[0][0]) < 100


def test_outputs_that_were_stopped_are_told_from_whole_ones(tmp_path: Path) -> None:
    rows = [("mud", True), ("mud", False), ("", True), ("", False)]
    lines = [{"label": "Clay", "prediction": text, "option": None, "stopped": stopped} for text, stopped in rows]
    path = tmp_path / "predictions" / "untrained" / "soil.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = confusions(tmp_path, ["soil"])
    assert found.wrong == [("mud…", 1), ("mud", 1), ("…", 1), ("(nothing)", 1)]
