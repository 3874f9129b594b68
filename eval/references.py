"""Runs that others are measured against, on the same rows: one model a task (`pertask`), all tasks jointly (`mtl`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from eval.accuracy import AccuracyMatrix
from eval.run_files import read_object

PERTASK, JOINT = "pertask", "mtl"
SCORES = ("exact_match", "label_scoring")
# What both runs must share of `settings`, else their scores are not of the same thing.
SHARED = ("split", "decoding", "add_task_name", "add_dataset_name", "max_source_tokens", "truncation")


def read_references(folders: Sequence[str], facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `run.json` keeps of each reference of a run with `facts`: its folder, method, seed and scores by task.

    Raises `UserError` where a folder holds no such run, or one of another backbone, other rows or other prompts.
    """
    return [_read(Path(folder), facts) for folder in folders]


def single_task_scores(references: Sequence[Mapping[str, Any]], task: str, score: str) -> list[float]:
    """Each reference's score on the task by a model of its own; empty where none has it."""
    found = [reference[score].get(task) for reference in references if reference["method"] == PERTASK]
    return [value for value in found if value is not None]


def reference_averages(reference: Mapping[str, Any], order: Sequence[str]) -> dict[str, float | None]:
    """By score, the reference's mean over the tasks of `order`; None where it lacks one."""
    return {score: _mean([reference[score].get(task) for task in order]) for score in SCORES}


def transfer_between(results: Mapping[str, Any], others: Sequence[Mapping[str, Any]], score: str) -> float | None:
    """`transfer_vs_pertask` of one run's `results` against those of the `pertask` runs among `others` that fit it.

    A task's score alone is the mean over those that have it. None where a task has none, or was not scored by the run.
    """
    found = [
        {score: _scores(other["order"], other["matrix"][score], PERTASK)} | {"method": PERTASK}
        for other in others
        if other["method"] == PERTASK and _known(other) and _known(results) and _fault(other, results) is None
    ]
    order = results["order"]
    scores = [single_task_scores(found, task, score) for task in order]
    matrix = {"tasks": order, "matrix": results["matrix"][score], "untrained": results["untrained"][score]}
    alone = [_mean(one) for one in scores]
    return AccuracyMatrix.from_json(matrix).scalars([None] * len(order), alone)["transfer_vs_pertask"]


def _known(results: Mapping[str, Any]) -> bool:
    """Whether there is what `_fault` compares; runs of earlier releases lack some of it."""
    model = results["model"]
    return isinstance(model, Mapping) and "fingerprint" in model and results["settings"].keys() >= set(SHARED)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(values) if there and len(there) == len(values) else None


def _scores(order: Sequence[str], matrix: Sequence[Sequence[float | None]], method: str) -> dict[str, float]:
    """By task, what the model of that task reaches; or the one model of all, after the last."""
    rows = [matrix[-1 if method == JOINT else index][index] for index in range(len(order))]
    return {task: value for task, value in zip(order, rows, strict=True) if value is not None}


def _read(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    place = f"evaluation.references: {folder}"
    if not (folder / "results.json").is_file():
        raise UserError(
            f"{place}: no results.json there; give the folder of a finished run of method {PERTASK} or {JOINT}"
        )
    results = read_object(folder / "results.json")
    try:
        method = results["method"]
        if method not in (PERTASK, JOINT):
            raise UserError(f"{place}: a run of {method}; a reference has method {PERTASK} or {JOINT}")
        _check(place, results, facts)
        return {
            "run": str(folder),
            "method": method,
            "seed": results["seed"],
            **{score: _scores(results["order"], results["matrix"][score], method) for score in SCORES},
        }
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(
            f"{folder / 'results.json'}: damaged ({error!r}); rebuild it: python -m eval {folder}"
        ) from error


def _check(place: str, results: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    rows = {
        task: {part: found[f"{part}_fingerprint"] for part in ("train", "evaluation")}
        for task, found in facts["data"].items()
    }
    if fault := _fault(results, {**facts, "data_fingerprints": rows}):
        raise UserError(f"{place}: {fault}")


def _fault(reference: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    """Why the scores of `reference` cannot stand beside those of `run`: both with the keys of results.json."""
    theirs, ours = reference["model"]["fingerprint"], run["model"]["fingerprint"]
    if theirs != ours:
        return f"its backbone is another one ({theirs[:12]}, here {ours[:12]})"
    theirs, ours = reference["model"].get("quantization"), run["model"].get("quantization")
    if theirs != ours:
        return f"its backbone's quantization is {theirs or 'none'}, here {ours or 'none'}"
    for key in SHARED:
        theirs, ours = reference["settings"][key], run["settings"][key]
        if theirs != ours:
            return f"its {key} is {theirs!r}, here {ours!r}"
    rows, own = reference["data_fingerprints"], run["data_fingerprints"]
    common = [task for task in run["order"] if task in rows]
    if not common:
        return f"none of this run's tasks; it has {', '.join(reference['order'])}"
    for task in common:
        for part in ("train", "evaluation"):
            if rows[task][part] != own[task][part]:
                return f"its {part} rows of {task} are others than this run's"
    return None
