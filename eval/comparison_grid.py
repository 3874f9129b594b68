"""What runs of one method have in common, over seeds: their matrices and times; and which runs are not there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from eval.compared_runs import ComparedRun
from eval.results import SCORES

Groups = Mapping[tuple[str, str], Sequence[ComparedRun]]  # by backbone and method
Matrix = list[list[float | None]]


def absent_runs(groups: Groups) -> list[str]:
    """Runs that other methods have and a method has not, "<method> on <backbone>: <order>, seed <seed>, ...; ..."."""
    lines = []
    for backbone in dict.fromkeys(backbone for backbone, _ in groups):
        own = {label: found for (of, label), found in groups.items() if of == backbone}
        places = sorted({(run.order, run.seed) for found in own.values() for run in found})
        for label, found in own.items():
            there = {(run.order, run.seed) for run in found}
            wanting: dict[str, list[str]] = {}
            for order, seed in places:
                if (order, seed) not in there:
                    wanting.setdefault(order, []).append(str(seed))
            if wanting:
                told = "; ".join(f"{order}, seed {', '.join(seeds)}" for order, seeds in wanting.items())
                lines.append(f"{label} on {backbone}: {told}")
    return lines


def mean_matrices(groups: Groups) -> list[dict[str, Any]]:
    """By backbone, order and method: the accuracy matrices [T, T], each cell the mean over the runs that have it."""
    found = []
    for (backbone, label), runs in groups.items():
        for order in dict.fromkeys(run.order for run in runs):
            own = [run for run in runs if run.order == order]
            matrices = {score: _mean([run.results["matrix"][score] for run in own]) for score in SCORES}
            place = {"backbone": backbone, "method": label, "order": order, "runs": len(own)}
            found.append(place | {"tasks": list(own[0].results["order"])} | matrices)
    return sorted(found, key=lambda one: (one["backbone"], one["order"]))


def _mean(matrices: Sequence[Matrix]) -> Matrix:
    return [[_mean_of(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def _mean_of(cells: Iterable[float | None]) -> float | None:
    there = [value for value in cells if value is not None]
    return fmean(there) if there else None


def mean_times(groups: Groups) -> list[dict[str, Any]]:
    """By backbone and method: seconds of a run by part, the mean over runs that tell them."""
    found = []
    for (backbone, label), runs in groups.items():
        timed = [timing.values() for run in runs if (timing := run.results.get("timing"))]
        parts = dict.fromkeys(part for tasks in timed for task in tasks for part in task)
        seconds = {part: fmean(sum(task.get(part) or 0.0 for task in tasks) for tasks in timed) for part in parts}
        if timed:
            found.append({"backbone": backbone, "method": label, "runs": len(timed), "seconds": seconds})
    return found
