"""What a model wrote instead of the label: by label, and the most frequent wrong outputs of a cell."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.run_files import predictions_path, stage_names
from eval.scoring import exact_match, normalise

MOST_WRONG = 10
LONGEST_OUTPUT = 60  # characters


@dataclass(frozen=True)
class LabelRow:
    """The rows of one label."""

    label: str
    rows: int
    right: int
    options_right: int | None
    written: list[int]  # how often each of the cell's `columns` was written, and last, how often no label was


@dataclass(frozen=True)
class Confusion:
    """One cell."""

    after: str
    task: str
    columns: list[str]  # the labels that rows have or that were ranked first
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
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    wrong = Counter(_short(row) for row in rows if not exact_match(row["prediction"], row["label"]))
    ranked = {row["option"] for row in rows} - {None}
    # A label without a letter (the `-` rows of MNLI) cannot be written.
    columns = sorted(label for label in ranked | by_label.keys() if normalise(label))
    return Confusion(
        after=after,
        task=task,
        columns=columns,
        labels=[_label(label, found, columns) for label, found in sorted(by_label.items())],
        wrong=wrong.most_common(MOST_WRONG),
        wrong_rows=wrong.total(),
    )


def _label(label: str, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> LabelRow:
    texts = Counter(normalise(row["prediction"]) for row in rows)
    written = [texts[normalise(column)] for column in columns]
    options = [row["option"] for row in rows]
    return LabelRow(
        label=label,
        rows=len(rows),
        right=sum(exact_match(row["prediction"], label) for row in rows),
        options_right=None if None in options else options.count(label),
        written=[*written, len(rows) - sum(written)],
    )


def _short(row: Mapping[str, Any]) -> str:
    """What was written; "…" where it would have gone on, or is longer than shown."""
    text: str = row["prediction"]
    if row.get("stopped"):
        return f"{text[:LONGEST_OUTPUT]}…"
    if not text.strip():
        return "(nothing)"
    return text if len(text) <= LONGEST_OUTPUT else f"{text[:LONGEST_OUTPUT]}…"
