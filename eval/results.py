"""`results.json`: every number of a run, from the counts in its cells (schema: `results.schema.json`)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.accuracy import AccuracyMatrix
from eval.intervals import wilson
from eval.references import reference_averages, single_task_scores
from eval.right_rows import pack, read_hits
from eval.run_files import UNTRAINED, Cell, read_cells, read_retention, read_run, stage_names

SCORES = ("exact_match", "label_scoring")  # the headline first

Cells = Mapping[tuple[str, str], Cell]


def build_results(run_dir: Path) -> dict[str, Any]:
    """The content of `results.json` for `run_dir`, as far as the run has come; None where not measured."""
    run = read_run(run_dir)
    order: list[str] = run["order"]
    cells = read_cells(run_dir, run)
    counts = [run["data"][task]["evaluation_rows"] for task in order]
    matrices = {score: _matrix(cells, order, score) for score in SCORES}
    tables = {score: matrix.to_json() for score, matrix in matrices.items()}
    return {
        "order": order,
        "method": run["method"],
        "model": run["model"],
        "seed": run["seed"],
        "settings": run.get("settings") or {},
        "trainable_parameters": run.get("trainable_parameters"),
        "matrix": {score: tables[score]["matrix"] for score in SCORES},
        "untrained": {score: tables[score]["untrained"] for score in SCORES},
        "counts": counts,
        "intervals": {score: _intervals(cells, order, stage_names(order)[1:], score) for score in SCORES},
        "untrained_intervals": {score: _intervals(cells, order, [UNTRAINED], score)[0] for score in SCORES},
        **matrices["exact_match"].scalars(counts, _alone(run, "exact_match")),
        "label_scoring": matrices["label_scoring"].scalars(counts, _alone(run, "label_scoring")),
        "right_rows": {score: pack(read_hits(run_dir, order, score)) for score in SCORES},
        "without_unmatchable": _without_unmatchable(cells, order, counts),
        "unseen": {task: _unseen(cells, order, task) for task in run.get("unseen") or []},
        "retention": {
            measure: {"untrained": values[0], "after": values[1:]}
            for measure, values in read_retention(run_dir, run).items()
        },
        "references": [
            {key: found[key] for key in ("run", "method", "seed")}
            | {"average_accuracy": reference_averages(found, order)}
            for found in run.get("references") or []
        ],
        "leak": run.get("leak"),
        "recipe_sha256": run["recipe_sha256"],
        "rows": _per_task(run, {"train": "train_rows", "evaluation": "evaluation_rows", "unmatchable": "unmatchable"}),
        "data_fingerprints": _per_task(run, {"train": "train_fingerprint", "evaluation": "evaluation_fingerprint"}),
        "dropped": {task: facts.get("dropped") or {} for task, facts in run["data"].items()},
        "truncated": _per_task(run, {"train": "truncated_train", "evaluation": "truncated_evaluation"}),
        "versions": run.get("versions") or {},
        "git": run.get("git"),
        "timing": run.get("timing") or {},  # the only key that two runs of the same recipe may differ in
    }


def measured(results: Mapping[str, Any], score: str) -> bool:
    """Whether any cell of the order has the score."""
    rows = [results["untrained"][score], *results["matrix"][score]]
    return any(value is not None for row in rows for value in row)


def _correct(cell: Cell | None, score: str) -> int | None:
    if cell is None:
        return None
    return cell.exact_match_correct if score == "exact_match" else cell.label_scoring_correct


def _percent(cell: Cell | None, score: str, rows: Callable[[Cell], int] = lambda cell: cell.rows) -> float | None:
    """The cell's score over `rows(cell)` rows; None where it was not measured or no row is left."""
    correct = _correct(cell, score)
    if cell is None or correct is None or rows(cell) == 0:
        return None
    return 100.0 * correct / rows(cell)


def _matchable(cell: Cell) -> int:
    return cell.rows - cell.unmatchable


def _matrix(
    cells: Cells, order: Sequence[str], score: str, rows: Callable[[Cell], int] = lambda cell: cell.rows
) -> AccuracyMatrix:
    """The matrix of one score over `rows(cell)` rows a cell."""
    matrix = AccuracyMatrix(order)
    for i, task in enumerate(order):
        for t, after in enumerate(stage_names(order)):
            value = _percent(cells.get((after, task)), score, rows)
            if value is None:
                continue
            if after == UNTRAINED:
                matrix.record_untrained(i, value)
            else:
                matrix.record(t - 1, i, value)
    return matrix


def _intervals(cells: Cells, tasks: Sequence[str], stages: Sequence[str], score: str) -> list[list[list[float] | None]]:
    """The 95 % interval [low, high] of each cell, [stages, tasks, 2]; None where it was not measured."""

    def interval(after: str, task: str) -> list[float] | None:
        cell = cells.get((after, task))
        correct = _correct(cell, score)
        return None if cell is None or correct is None else list(wilson(correct, cell.rows))

    return [[interval(after, task) for task in tasks] for after in stages]


def _without_unmatchable(cells: Cells, order: Sequence[str], counts: Sequence[int]) -> dict[str, Any] | None:
    """The scalars over the rows that a label can match; None where that is all of them.

    Unmatchable rows are wrong under either score, so leaving them out changes no count of right rows.
    """
    unmatchable = {task: cell.unmatchable for (_, task), cell in cells.items() if task in order}
    if not any(unmatchable.values()):
        return None
    left = [count - unmatchable.get(task, 0) for task, count in zip(order, counts, strict=True)]
    scalars = {score: _matrix(cells, order, score, _matchable).scalars(left) for score in SCORES}
    return {"counts": left, **scalars["exact_match"], "label_scoring": scalars["label_scoring"]}


def _unseen(cells: Cells, order: Sequence[str], task: str) -> dict[str, Any]:
    """The scores on a task that is never trained, with intervals: untrained, and after each task of the order, [T]."""
    stages = stage_names(order)
    intervals = {score: [row[0] for row in _intervals(cells, [task], stages, score)] for score in SCORES}
    return {
        "untrained": {score: _percent(cells.get((UNTRAINED, task)), score) for score in SCORES},
        **{score: [_percent(cells.get((after, task)), score) for after in stages[1:]] for score in SCORES},
        "intervals": {
            "untrained": {score: intervals[score][0] for score in SCORES},
            **{score: intervals[score][1:] for score in SCORES},
        },
    }


def _alone(run: Mapping[str, Any], score: str) -> list[float | None]:
    """By task, the mean over references of its score by a model of its own; None where no reference has it."""
    found = [single_task_scores(run.get("references") or [], task, score) for task in run["order"]]
    return [sum(scores) / len(scores) if scores else None for scores in found]


def _per_task(run: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Facts of `run.json` about each task's data under new names; None for one that is not there."""
    return {task: {name: facts.get(key) for name, key in keys.items()} for task, facts in run["data"].items()}
