"""What a model wrote instead of the label: by label, and the most frequent wrong outputs of a cell."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.run_files import predictions_path, stage_names
from eval.scoring import exact_match

MOST_WRONG = 10
MOST_INSTEAD = 3
LONGEST_OUTPUT = 60  # characters


@dataclass(frozen=True)
class LabelRow:
    """The rows of one label."""

    label: str
    rows: int
    right: int
    options_right: int | None
    instead: list[tuple[str, int]]  # most frequent wrong outputs


@dataclass(frozen=True)
class Confusion:
    """One cell."""

    after: str
    task: str
    labels: list[LabelRow]
    wrong: list[tuple[str, int]]  # the most frequent wrong outputs of all rows
    wrong_rows: int


def confusions(run_dir: Path, order: Sequence[str], unseen: Sequence[str] = ()) -> list[Confusion]:
    """Every cell that has predictions, in the order of the stream; `unseen`: tasks that are only scored."""
    return [
        _confusion(path, after, task)
        for after in stage_names(order)
        for task in (*order, *unseen)
        if (path := predictions_path(run_dir, after, task)).is_file()
    ]


def _confusion(path: Path, after: str, task: str) -> Confusion:
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    by_label: dict[str, list[dict[str, str | None]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    wrong = Counter(_short(row["prediction"]) for row in rows if not exact_match(row["prediction"], row["label"]))
    return Confusion(
        after=after,
        task=task,
        labels=[_label(label, found) for label, found in sorted(by_label.items())],
        wrong=wrong.most_common(MOST_WRONG),
        wrong_rows=wrong.total(),
    )


def _label(label: str, rows: Sequence[dict[str, str | None]]) -> LabelRow:
    wrong = Counter(_short(str(row["prediction"])) for row in rows if not exact_match(str(row["prediction"]), label))
    options = [row["option"] for row in rows]
    return LabelRow(
        label=label,
        rows=len(rows),
        right=len(rows) - wrong.total(),
        options_right=None if None in options else options.count(label),
        instead=wrong.most_common(MOST_INSTEAD),
    )


def _short(text: str) -> str:
    if not text.strip():
        return "(nothing)"
    return text if len(text) <= LONGEST_OUTPUT else f"{text[:LONGEST_OUTPUT]}…"
