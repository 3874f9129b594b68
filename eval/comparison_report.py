"""Many runs side by side as plain numbers: every run, averages over orders and seeds, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

from eval.compared_runs import ComparedRun
from eval.comparison import Average, Difference, MeanDifference, Pair, average, mean_difference, paired
from eval.comparison_grid import absent_runs, mean_matrices, mean_times
from eval.published import figures_for, other_row_counts, source_legend
from eval.references import JOINT, PERTASK, transfer_between
from eval.results import SCORES

SCALARS = {"AA": "average_accuracy", "BWT": "backward_transfer", "LA": "learning_accuracy"}
MICRO, MATCHABLE = "micro AA", "AA matchable"
FURTHER = {
    MICRO: "micro_average_accuracy",
    "BWT over T": "bwt_over_T",
    "forgetting": "forgetting",
    "FWT": "forward_transfer",
}
TRANSFER = "transfer_vs_pertask"
SHORT = {"exact_match": "EM", "label_scoring": "LS"}


def compare(runs: Sequence[ComparedRun], *, against: str | None) -> dict[str, Any]:
    """All numbers, plain.

    `runs`, `averages`, `mean_differences` and `differences` from the method labelled `against`, `matrices`, `times`,
    `missing` cells, `absent` runs, `notes`, `published` with `sources` and `unlike_rows`.
    """
    groups: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in sorted(runs, key=lambda run: (run.backbone, run.label, run.order, run.seed)):
        groups.setdefault((run.backbone, run.label), []).append(run)
    pairs = {} if against is None else _pairs(groups, against)
    return {
        "runs": [_row(run, runs) for group in groups.values() for run in group],
        "averages": [_average_row(backbone, label, group) for (backbone, label), group in groups.items()],
        "against": against,
        "mean_differences": [_mean_row(backbone, label, found) for (backbone, label), found in pairs.items()],
        "differences": [row for (_, label), found in pairs.items() for row in _differences(label, found)],
        "matrices": mean_matrices(groups),
        "times": mean_times(groups),
        "absent": absent_runs(groups),
        "missing": {str(run.folder): run.missing() for run in runs if run.missing()},
        "notes": _unlike(runs),
        "published": (published := _published(runs)),
        "sources": source_legend() if published else [],
        "unlike_rows": _unlike_rows(runs) if published else [],
    }


def _average_row(backbone: str, label: str, group: Sequence[ComparedRun]) -> dict[str, Any]:
    """A method on a backbone: AA over all its runs, and over the seeds of each order; what is published of it."""
    by_order: dict[str, list[ComparedRun]] = {}
    for run in group:
        by_order.setdefault(run.order, []).append(run)
    return {
        "backbone": backbone,
        "method": label,
        "orders": sorted(by_order),
        "seeds": sorted({run.seed for run in group}),
        **{score: _plain(average(group, score)) for score in SCORES},
        MICRO: {score: _over_seeds([run.scalar(FURTHER[MICRO], score) for run in group]) for score in SCORES},
        MATCHABLE: {score: _over_seeds([_matchable(run, score) for run in group]) for score in SCORES},
        "by_order": {
            order: {score: _over_seeds([run.scalar("average_accuracy", score) for run in found]) for score in SCORES}
            for order, found in sorted(by_order.items())
        },
        "published": _group_averages(group),
    }


def _over_seeds(values: Sequence[float | None]) -> dict[str, Any] | None:
    there = [value for value in values if value is not None]
    sd = stdev(there) if len(there) > 1 else None
    return {"mean": fmean(there), "sd": sd, "runs": len(there)} if there else None


def _group_averages(group: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    """The averages over three orders that are published for this method and backbone, each with its source."""
    found = {
        (figure.group_average, figure.source): {"average": figure.group_average, "source": figure.source}
        for run in group
        for figure in figures_for(run.backbone, run.results["order"])
        if figure.method == run.results["method"] and figure.group_average is not None
    }
    return list(found.values())


def _row(run: ComparedRun, runs: Sequence[ComparedRun]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "backbone": run.backbone,
        "method": run.label,
        "order": run.order,
        "seed": run.seed,
        "folder": str(run.folder),
    }
    for short, key in (SCALARS | FURTHER).items():
        for score in SCORES:
            row[f"{short} {SHORT[score]}"] = run.scalar(key, score)
    for score in SCORES:
        row[f"{MATCHABLE} {SHORT[score]}"] = _matchable(run, score)
    for score in SCORES:
        row[f"Tr {SHORT[score]}"] = _transfer(run, runs, score)
    return row


def _matchable(run: ComparedRun, score: str) -> float | None:
    """AA over the rows that a label can match."""
    without = run.results.get("without_unmatchable") or run.results
    value: float | None = (without if score == "exact_match" else without["label_scoring"])["average_accuracy"]
    return value


def _transfer(run: ComparedRun, runs: Sequence[ComparedRun], score: str) -> float | None:
    if run.results["method"] in (PERTASK, JOINT):
        return None
    if any(found["method"] == PERTASK for found in run.results.get("references", [])):
        return run.scalar(TRANSFER, score)
    return transfer_between(run.results, [other.results for other in runs], score)


def _plain(found: Average | Difference | MeanDifference | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _pairs(
    groups: Mapping[tuple[str, str], Sequence[ComparedRun]], against: str
) -> dict[tuple[str, str], list[tuple[ComparedRun, ComparedRun, dict[str, Difference | None]]]]:
    """By backbone and method, its runs with that of the method `against` on the same order and seed."""
    others = {run.place: run for (_, label), group in groups.items() if label == against for run in group}
    found = {
        key: [
            (run, other, {score: paired(run, other, score) for score in SCORES})
            for run in group
            if (other := others.get(run.place)) is not None
        ]
        for key, group in groups.items()
        if key[1] != against
    }
    return {key: pairs for key, pairs in found.items() if pairs}


def _mean_row(
    backbone: str, label: str, pairs: Sequence[tuple[ComparedRun, ComparedRun, dict[str, Difference | None]]]
) -> dict[str, Any]:
    def known(score: str) -> list[Pair]:
        return [(run, other, one) for run, other, found in pairs if (one := found[score]) is not None]

    row = {"backbone": backbone, "method": label}
    return row | {score: _plain(mean_difference(known(score), score)) for score in SCORES}


def _differences(
    label: str, pairs: Sequence[tuple[ComparedRun, ComparedRun, dict[str, Difference | None]]]
) -> list[dict[str, Any]]:
    return [
        {"backbone": run.backbone, "method": label, "order": run.order, "seed": run.seed}
        | {score: _plain(found[score]) for score in SCORES}
        for run, _, found in pairs
    ]


def _unlike(runs: Sequence[ComparedRun]) -> list[str]:
    """Runs on one backbone and order whose rows, prompts or steps are not the same."""
    notes = []
    first: dict[tuple[str, str], ComparedRun] = {}
    for run in runs:
        other = first.setdefault((run.backbone, run.order), run)
        settings = other.results["settings"], run.results["settings"]
        keys = ("split", "add_task_name", "add_dataset_name", "max_source_tokens", "truncation")
        differing = [key for key in keys if settings[0].get(key) != settings[1].get(key)]
        differing += [] if _alike_steps(*settings) else ["steps"]
        rows = [[found.results["data_fingerprints"][task] for task in run.results["order"]] for found in (other, run)]
        if rows[0] != rows[1]:
            differing.append("rows")
        if differing:
            notes.append(f"{run.folder} and {other.folder} differ in {', '.join(differing)}: not like for like")
    return notes


def _alike_steps(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two runs took equally many steps on each task.

    Joint training has one stage for all rows, and fewer batches that are not full: there the sums, to 2 %.
    """
    steps = [found.get("steps") for found in (first, second)]
    if first.get("joint") == second.get("joint") or None in steps:
        return steps[0] == steps[1]
    least, most = sorted(sum(found.values()) for found in steps if found is not None)
    return bool(least >= 0.98 * most)


def _published(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    places = {(run.backbone, run.order): run.results["order"] for run in runs}
    return [
        {"backbone": backbone, "order": order, **asdict(figure)}
        for (backbone, order), tasks in places.items()
        for figure in figures_for(backbone, tasks)
    ]


def _unlike_rows(runs: Sequence[ComparedRun]) -> list[str]:
    """Tasks of published orders with other row counts than published."""
    found: dict[str, None] = {}
    for run in runs:
        if figures_for(run.backbone, run.results["order"]):
            found |= dict.fromkeys(other_row_counts(run.results["rows"], run.results["order"]))
    return list(found)
