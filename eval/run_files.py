"""The files of a run that scores are made of: `run.json`, `cells/` and `predictions/`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import write_json

UNTRAINED = "untrained"


@dataclass(frozen=True)
class Cell:
    """How many rows of one task were right after one stage; None: label scoring was off."""

    rows: int
    exact_match_correct: int
    label_scoring_correct: int | None
    unmatchable: int  # rows whose label is outside the label set, so that nothing can match them


def stage_names(order: Sequence[str]) -> list[str]:
    """The folder names under `cells` and `predictions`: "untrained", then "01-<task>" and on, [T + 1]."""
    return [UNTRAINED, *(f"{t:02d}-{task}" for t, task in enumerate(order, start=1))]


def cell_path(run_dir: Path, after: str, task: str) -> Path:
    """Where the counts of `task` after the stage `after` lie."""
    return run_dir / "cells" / after / f"{task}.json"


def predictions_path(run_dir: Path, after: str, task: str) -> Path:
    """Where the predictions on `task` after the stage `after` lie."""
    return run_dir / "predictions" / after / f"{task}.jsonl"


def retention_path(run_dir: Path, after: str, name: str) -> Path:
    """Where the scores of `name`, something outside the stream, after the stage `after` lie."""
    return run_dir / "retention" / after / f"{name}.json"


def read_retention(run_dir: Path, run: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Each measure of `evaluation.retention`: untrained, then after each task [T + 1]; None where not measured."""
    stages = stage_names(run["order"])
    found: dict[str, list[float | None]] = {}
    for name in run.get("retention") or {}:
        for place, after in enumerate(stages):
            path = retention_path(run_dir, after, name)
            scores = read_object(path).get("scores") if path.is_file() else {}
            for measure, value in scores.items() if isinstance(scores, dict) else ():
                found.setdefault(measure, [None] * len(stages))[place] = value
    return found


def read_run(run_dir: Path) -> dict[str, Any]:
    """The content of `run.json`; a UserError where `run_dir` is not the folder of a run."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give the folder of a run (output.dir of its recipe)")
    path = run_dir / "run.json"
    if not path.is_file():
        raise UserError(f"{run_dir}: not the folder of a run, it holds no run.json; give a folder that a run wrote")
    run = read_object(path)
    missing = [key for key in ("order", "method", "model", "seed", "recipe_sha256", "data") if key not in run]
    missing += [f"data.{task}" for task in tasks_of(run) if task not in run.get("data", {})]
    if missing or not run["order"]:
        raise UserError(f"{path}: no {', '.join(missing) or 'order'}; the file is damaged, run the recipe again")
    return run


def tasks_of(run: Mapping[str, Any]) -> list[str]:
    """Every task that a run scores: its order, then the tasks it never trains on."""
    return [*run.get("order", []), *(run.get("unseen") or [])]


def read_cells(run_dir: Path, run: Mapping[str, Any]) -> dict[tuple[str, str], Cell]:
    """The cells that exist, by (stage name, task), each checked against the row counts of `run.json`."""
    cells = {}
    for after in stage_names(run["order"]):
        for task in tasks_of(run):
            path = cell_path(run_dir, after, task)
            if path.is_file():
                cells[after, task] = _cell(path, read_object(path), run["data"][task]["evaluation_rows"])
    return cells


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; a UserError with the place where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); restore the file or run again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: got {type(content).__name__}; a JSON object is expected; restore the file")
    return content


def write_cell(path: Path, cell: Cell, kept: Mapping[str, Any]) -> None:
    """Write `cell` with the other keys of the file that it replaces, `kept`, unchanged."""
    write_json(path, {**kept, **asdict(cell)})


def _cell(path: Path, content: Mapping[str, Any], evaluation_rows: int) -> Cell:
    """The counts in the cell file `path`, which must be possible and over all `evaluation_rows` rows."""

    def count(key: str, most: int) -> int:
        value = content.get(key)
        if not isinstance(value, int) or not 0 <= value <= most:
            raise UserError(f"{path}: {key} is {value!r}; legal is 0 to {most}; {_MEND}")
        return value

    rows, unmatchable = count("rows", evaluation_rows), count("unmatchable", evaluation_rows)
    if rows != evaluation_rows or rows == 0:
        raise UserError(f"{path}: {rows} rows; run.json says {evaluation_rows} (at least 1); {_MEND}")
    matchable = rows - unmatchable
    return Cell(
        rows=rows,
        exact_match_correct=count("exact_match_correct", matchable),
        label_scoring_correct=(
            None if content.get("label_scoring_correct") is None else count("label_scoring_correct", matchable)
        ),
        unmatchable=unmatchable,
    )


_MEND = "recount with `python -m eval RUN`, or score again with `python -m eval --rescore RUN`"
