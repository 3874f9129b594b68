"""Counts right rows again from the predictions of a run, trusting nothing that was counted before."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from eval.run_files import (
    Cell,
    cell_path,
    predictions_path,
    read_object,
    read_run,
    stage_names,
    tasks_of,
    write_cell,
)
from eval.scoring import exact_match

_MEND = "restore the file, or score again with `python -m eval --rescore RUN`"


def recount(run_dir: Path) -> tuple[int, int]:
    """Rewrite the counts of every cell from its predictions; how many there are, and how many have changed.

    A fault in any file is a UserError before the first cell is written.
    """
    run = read_run(run_dir)
    found: list[tuple[Path, Cell, dict[str, Any]]] = []
    for after in stage_names(run["order"]):
        for task in tasks_of(run):
            predictions, path = predictions_path(run_dir, after, task), cell_path(run_dir, after, task)
            before = read_object(path) if path.is_file() else {"key": None, "after": after, "task": task}
            if predictions.is_file():
                facts = run["data"][task]
                found.append((path, count(predictions, facts["labels"], facts["evaluation_rows"]), before))
            elif path.is_file():
                raise UserError(f"{predictions}: missing, though its cell was scored; {_MEND}")
    changed = 0
    for path, cell, before in found:
        if any(before.get(key) != value for key, value in vars(cell).items()):
            changed += 1
            write_cell(path, cell, before)
    return len(found), changed


def count(predictions: Path, labels: Collection[str], evaluation_rows: int) -> Cell:
    """The counts of one predictions file, which must hold each of `evaluation_rows` rows once."""
    # Not splitlines(): a prediction may hold characters that it takes for the end of a line.
    lines = predictions.read_bytes().removesuffix(b"\n").split(b"\n")
    rows = [_row(f"{predictions}, line {number}", line) for number, line in enumerate(lines, start=1)]
    if len(rows) != evaluation_rows:
        raise UserError(f"{predictions}: {len(rows)} rows; run.json says {evaluation_rows}; {_MEND}")
    first: dict[int, int] = {}
    for number, row in enumerate(rows, start=1):
        if first.setdefault(row["id"], number) != number:
            place = f"{predictions}, line {number}"
            raise UserError(f"{place}: row id {row['id']} stands in line {first[row['id']]} already; {_MEND}")
    scored = sum(row["option"] is not None for row in rows)
    if scored not in (0, len(rows)):
        raise UserError(f"{predictions}: {scored} of {len(rows)} rows have an option; all or none must; {_MEND}")
    return Cell(
        rows=len(rows),
        exact_match_correct=sum(exact_match(row["prediction"], row["label"]) for row in rows),
        label_scoring_correct=sum(row["option"] == row["label"] for row in rows) if scored else None,
        unmatchable=sum(row["label"] not in labels for row in rows),
    )


def _row(place: str, line: bytes) -> dict[str, Any]:
    """One line of a predictions file, its keys checked."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: is not JSON ({error}); {_MEND}") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: got {type(row).__name__}; a JSON object is expected; {_MEND}")
    legal = {"id": int, "prediction": str, "label": str, "option": str | None}
    for key, kind in legal.items():
        if key not in row or not isinstance(row[key], kind):
            got = f"{row[key]!r}" if key in row else "nothing"
            raise UserError(f"{place}: {key} is {got}; legal is {getattr(kind, '__name__', kind)}; {_MEND}")
    return row
