"""Runs that others are measured against, on the same rows: one model a task (`pertask`), all tasks jointly (`mtl`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
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
    theirs, ours = results["model"]["fingerprint"], facts["model"]["fingerprint"]
    if theirs != ours:
        raise UserError(f"{place}: its backbone is another one ({theirs[:12]}, here {ours[:12]})")
    theirs, ours = results["model"].get("quantization"), facts["model"].get("quantization")
    if theirs != ours:
        raise UserError(f"{place}: its backbone's quantization is {theirs or 'none'}, here {ours or 'none'}")
    for key in SHARED:
        if results["settings"][key] != facts["settings"][key]:
            raise UserError(f"{place}: its {key} is {results['settings'][key]!r}, here {facts['settings'][key]!r}")
    common = [task for task in facts["order"] if task in results["data_fingerprints"]]
    if not common:
        raise UserError(f"{place}: none of this run's tasks; it has {', '.join(results['order'])}")
    for task in common:
        for part in ("train", "evaluation"):
            if results["data_fingerprints"][task][part] != facts["data"][task][f"{part}_fingerprint"]:
                raise UserError(f"{place}: its {part} rows of {task} are others than this run's")
