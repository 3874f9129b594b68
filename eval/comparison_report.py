"""Many runs in one report: every run, averages over orders and seeds, paired differences, published figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from eval.compared_runs import ComparedRun
from eval.comparison import Average, Difference, average, paired
from eval.published import figures_for
from eval.references import JOINT, PERTASK, transfer_between
from eval.results import SCORES
from eval.summary import number
from eval.tables import markdown_table

SCALARS = {"AA": "average_accuracy", "BWT": "backward_transfer", "LA": "learning_accuracy"}
TRANSFER = "transfer_vs_pertask"
SHORT = {"exact_match": "EM", "label_scoring": "LS"}
READING = """\
EM: exact match of free greedy generation, the headline; LS: constrained label scoring; in percent. AA: average
accuracy after the last task; BWT: backward transfer; LA: learning accuracy; Tr: LA minus that of one model a task
(the run's references, else the runs of pertask among these).
Averages hold a bootstrap 95 % interval over runs (orders and seeds) and over the rows of each task in them: of one
run, over rows alone. Differences are paired by row on one backbone, order and seed; their interval is over rows,
task by task; p is that of the exact McNemar test over all rows. Of many differences, some are small by chance: no
correction is made for their number."""


def compare(runs: Sequence[ComparedRun], *, against: str | None) -> dict[str, Any]:
    """All numbers, plain: `runs`, `averages`, `differences` from the method labelled `against`, `missing`, `notes`."""
    groups: dict[tuple[str, str], list[ComparedRun]] = {}
    for run in sorted(runs, key=lambda run: (run.backbone, run.label, run.order, run.seed)):
        groups.setdefault((run.backbone, run.label), []).append(run)
    return {
        "runs": [_row(run, runs) for group in groups.values() for run in group],
        "averages": [
            {
                "backbone": backbone,
                "method": label,
                "orders": sorted({run.order for run in group}),
                "seeds": sorted({run.seed for run in group}),
                **{score: _plain(average(group, score)) for score in SCORES},
            }
            for (backbone, label), group in groups.items()
        ],
        "against": against,
        "differences": [] if against is None else _differences(groups, against),
        "missing": {str(run.folder): run.missing() for run in runs if run.missing()},
        "notes": _unlike(runs),
        "published": _published(runs),
    }


def _row(run: ComparedRun, runs: Sequence[ComparedRun]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "backbone": run.backbone,
        "method": run.label,
        "order": run.order,
        "seed": run.seed,
        "folder": str(run.folder),
    }
    for short, key in SCALARS.items():
        for score in SCORES:
            row[f"{short} {SHORT[score]}"] = run.scalar(key, score)
    for score in SCORES:
        row[f"Tr {SHORT[score]}"] = _transfer(run, runs, score)
    return row


def _transfer(run: ComparedRun, runs: Sequence[ComparedRun], score: str) -> float | None:
    if run.results["method"] in (PERTASK, JOINT):
        return None
    if any(found["method"] == PERTASK for found in run.results.get("references", [])):
        return run.scalar(TRANSFER, score)
    return transfer_between(run.results, [other.results for other in runs], score)


def _plain(found: Average | Difference | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _differences(groups: Mapping[tuple[str, str], Sequence[ComparedRun]], against: str) -> list[dict[str, Any]]:
    others = {run.place: run for (_, label), group in groups.items() if label == against for run in group}
    return [
        {
            "backbone": run.backbone,
            "method": label,
            "order": run.order,
            "seed": run.seed,
            **{score: _plain(paired(run, others[run.place], score)) for score in SCORES},
        }
        for (_, label), group in groups.items()
        for run in group
        if label != against and run.place in others
    ]


def _unlike(runs: Sequence[ComparedRun]) -> list[str]:
    """Runs on one backbone and order whose rows, prompts or steps are not the same."""
    notes = []
    first: dict[tuple[str, str], ComparedRun] = {}
    for run in runs:
        other = first.setdefault((run.backbone, run.order), run)
        settings = other.results["settings"], run.results["settings"]
        keys = ("split", "add_task_name", "add_dataset_name", "max_source_tokens", "truncation", "steps")
        differing = [key for key in keys if settings[0].get(key) != settings[1].get(key)]
        rows = [[found.results["data_fingerprints"][task] for task in run.results["order"]] for found in (other, run)]
        if rows[0] != rows[1]:
            differing.append("rows")
        if differing:
            notes.append(f"{run.folder} and {other.folder} differ in {', '.join(differing)}: not like for like")
    return notes


def _published(runs: Sequence[ComparedRun]) -> list[dict[str, Any]]:
    places = {(run.backbone, run.order): run.results["order"] for run in runs}
    return [
        {"backbone": backbone, "order": order, **asdict(figure)}
        for (backbone, order), tasks in places.items()
        for figure in figures_for(backbone, tasks)
    ]


def to_markdown(content: Mapping[str, Any]) -> str:
    """The report."""
    parts = [f"# {len(content['runs'])} runs compared", READING, "## Every run", _runs_table(content["runs"])]
    parts += ["## Averages over orders and seeds", _averages_table(content["averages"])]
    if content["differences"]:
        parts += [f"## AA against {content['against']}", _differences_table(content["differences"])]
    if content["missing"]:
        lines = [f"- {folder}: {'; '.join(cells)}" for folder, cells in content["missing"].items()]
        parts += [
            "## Cells that are missing",
            "Compute them with `--fill`, or run the recipes again.",
            "\n".join(lines),
        ]
    if content["notes"]:
        parts += ["## Not like for like", "\n".join(f"- {note}" for note in content["notes"])]
    if content["published"]:
        parts += ["## Published figures", _published_table(content["published"])]
    return "\n\n".join(parts) + "\n"


def _runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    transfer = any(row[f"Tr {SHORT[score]}"] is not None for row in rows for score in SCORES)
    named = [*SCALARS, "Tr"] if transfer else SCALARS
    header = ["method", "backbone", "order", "seed", *(f"{short}, EM / LS" for short in named)]
    lines = [
        [row["method"], row["backbone"], row["order"], str(row["seed"])]
        + [" / ".join(number(row[f"{short} {SHORT[score]}"], 1) for score in SCORES) for short in named]
        for row in rows
    ]
    return markdown_table(header, lines)


def _averages_table(averages: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for found in averages:
        line = [found["method"], found["backbone"], str(len(found["orders"])), str(len(found["seeds"]))]
        for score in SCORES:
            one = found[score]
            if one is None:
                line.append("-")
            else:
                sd = "" if one["sd"] is None else f" ± {one['sd']:.1f}"
                line.append(f"{one['mean']:.1f}{sd} [{one['low']:.1f}, {one['high']:.1f}]")
        lines.append(line)
    header = ["method", "backbone", "orders", "seeds", "AA EM: mean ± sd over runs [95 %]", "AA LS"]
    return markdown_table(header, lines)


def _differences_table(differences: Sequence[Mapping[str, Any]]) -> str:
    def text(found: Mapping[str, Any] | None) -> str:
        if found is None:
            return "-"
        if found["low"] is None:
            return f"{found['difference']:+.1f} (no predictions to pair)"
        p = "p < 0.001" if found["p_value"] < 0.001 else f"p = {found['p_value']:.3f}"
        return f"{found['difference']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}], {p}"

    lines = [
        [
            found["method"],
            found["backbone"],
            found["order"],
            str(found["seed"]),
            *(text(found[score]) for score in SCORES),
        ]
        for found in differences
    ]
    return markdown_table(["method", "backbone", "order", "seed", "EM", "LS"], lines)


def _published_table(figures: Sequence[Mapping[str, Any]]) -> str:
    scores = ("on_order", "group_average", "backward_transfer")
    lines = [
        [figure["method"], figure["backbone"], figure["order"]]
        + [number(figure[score]) for score in scores]
        + ["; ".join(filter(None, [figure["source"], figure["note"]]))]
        for figure in figures
    ]
    return markdown_table(["method", "backbone", "order", "AA", "AA over its three orders", "BWT", "source"], lines)


def to_csv(content: Mapping[str, Any]) -> str:
    """Every run, a line each; what was not measured is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(content["runs"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(content["runs"])
    return out.getvalue()
