"""A comparison of runs as text: Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from eval.comparison_report import MATCHABLE, MICRO, SCALARS, SHORT
from eval.results import SCORES
from eval.summary import NOT_MEASURED, number
from eval.tables import markdown_table

MOST_ORDERS = 6  # columns of the table of averages
OF_AVERAGE = ("mean", "sd", "low", "high", "runs")
OF_DIFFERENCE = ("mean", "low", "high", "better", "pairs", "p_value")
READING = """\
EM: exact match of free greedy generation, the headline; LS: constrained label scoring; in percent. AA: average
accuracy after the last task (macro: the mean over tasks); micro AA: over rows; AA matchable: without the rows that no
label can match; BWT: backward transfer; LA: learning accuracy; Tr: LA minus that of one model a task
(the run's references, else the runs of pertask among these).
Averages hold a bootstrap 95 % interval: orders are drawn, seeds in them, rows of each task in those; of one run, rows
alone. Differences are paired on one backbone, order and seed, by row: their interval is over rows, task by task, p is
that of the exact McNemar test over all rows; mean differences have an interval as averages have, and p of the sign-flip
permutation test over pairs of runs (exact; of two pairs it is at least 0.5, of six at least 0.03). Of many differences,
some are small by chance: no correction is made for their number."""


def to_markdown(content: Mapping[str, Any]) -> str:
    """The report."""
    parts = [f"# {len(content['runs'])} runs compared", READING]
    parts += [
        "## Averages over orders and seeds",
        _averages_table(content),
        "## Every run",
        _runs_table(content["runs"]),
    ]
    if content["differences"]:
        parts += [f"## AA against {content['against']}, run by run", _differences_table(content["differences"])]
    if content["times"]:
        parts += ["## Seconds of a run", _times_table(content["times"])]
    if content["absent"]:
        parts += ["## Runs that are missing", "\n".join(f"- {line}" for line in content["absent"])]
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
        legend = "\n".join(f"- {line}" for line in content["sources"])
        unlike = [f"**Not like for like**, the data differ: {'; '.join(content['unlike_rows'])}."]
        parts += ["## Published figures", *(unlike if content["unlike_rows"] else [])]
        parts += [_published_table(content["published"]), legend]
    return "\n\n".join(parts) + "\n"


def run_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The scalars that a table of runs shows: those that say something of any of them."""

    def differs(column: str, from_column: str) -> bool:
        return any(
            row[f"{column} {short}"] != row[f"{from_column} {short}"] for row in rows for short in SHORT.values()
        )

    transfer = any(row[f"Tr {short}"] is not None for row in rows for short in SHORT.values())
    named = [*SCALARS, *(["Tr"] if transfer else []), MICRO]
    return [*named, MATCHABLE] if differs(MATCHABLE, "AA") else named


def _runs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    named = run_columns(rows)
    header = ["method", "backbone", "order", "seed", *(f"{short}, EM / LS" for short in named)]
    lines = [
        [row["method"], row["backbone"], row["order"], str(row["seed"])]
        + [" / ".join(number(row[f"{short} {SHORT[score]}"], 1) for score in SCORES) for short in named]
        for row in rows
    ]
    return markdown_table(header, lines)


def average_table(content: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a method by orders (mean and sd over seeds), over all, against another, and as published."""
    averages, against = content["averages"], content["against"]
    orders = sorted({order for found in averages for order in found["orders"]})
    orders = orders if 1 < len(orders) <= MOST_ORDERS else []
    published = any(found["published"] for found in averages)
    beside = [MICRO, *([MATCHABLE] if any(found[MATCHABLE] != _macro(found) for found in averages) else [])]
    header = ["method", "backbone", "orders", "seeds", *(f"{order}, EM / LS" for order in orders)]
    header += ["AA EM: mean ± sd over runs [95 %]", "AA LS", *(f"{name}, EM / LS" for name in beside)]
    header += [f"EM against {against}", f"LS against {against}"] if content["mean_differences"] else []
    header += ["published AA over three orders"] if published else []
    differences = {(row["backbone"], row["method"]): row for row in content["mean_differences"]}
    lines = []
    for found in averages:
        line = [found["method"], found["backbone"], str(len(found["orders"])), str(len(found["seeds"]))]
        line += [" / ".join(_mean(found["by_order"].get(order, {}).get(score)) for score in SCORES) for order in orders]
        line += [_mean(found[score]) for score in SCORES]
        line += [" / ".join(_mean(found[name][score]) for score in SCORES) for name in beside]
        if differences:
            row = differences.get((found["backbone"], found["method"]), {})
            line += [_mean_difference(row.get(score)) for score in SCORES]
        if published:
            line.append("; ".join(f"{one['average']:.1f} ({one['source']})" for one in found["published"]))
        lines.append(line)
    return header, lines


def _macro(found: Mapping[str, Any]) -> dict[str, Any]:
    """AA of both scores as `_over_seeds` would give it."""
    keys = ("mean", "sd", "runs")
    return {score: found[score] and {key: found[score][key] for key in keys} for score in SCORES}


def times_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a method's mean seconds by part, and their sum."""
    parts = list(dict.fromkeys(part for row in rows for part in row["seconds"]))
    header = ["method", "backbone", "runs", *(part.removesuffix("_s") for part in parts), "sum"]
    lines = []
    for row in rows:
        seconds = row["seconds"]
        line = [row["method"], row["backbone"], str(row["runs"])]
        lines.append([*line, *(number(seconds.get(part), 1) for part in parts), number(sum(seconds.values()), 1)])
    return header, lines


def _times_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(*times_table(rows))


def _averages_table(content: Mapping[str, Any]) -> str:
    return markdown_table(*average_table(content))


def _mean(found: Mapping[str, Any] | None) -> str:
    """With its sd and interval, where it has them."""
    if found is None:
        return NOT_MEASURED
    sd = "" if found["sd"] is None else f" ± {found['sd']:.1f}"
    interval = f" [{found['low']:.1f}, {found['high']:.1f}]" if "low" in found else ""
    return f"{found['mean']:.1f}{sd}{interval}"


def _mean_difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return NOT_MEASURED
    interval = "" if found["low"] is None else f" [{found['low']:+.1f}, {found['high']:+.1f}]"
    p = "" if found["p_value"] is None else f", {p_text(found['p_value'])}"
    return f"{found['mean']:+.1f}{interval}, better in {found['better']} of {found['pairs']}{p}"


def p_text(p: float) -> str:
    """A p-value for a reader."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def difference_text(found: Mapping[str, Any] | None) -> str:
    """A difference of two runs for a reader."""
    if found is None:
        return NOT_MEASURED
    if found["low"] is None:
        return f"{found['difference']:+.1f} (no predictions to pair)"
    return f"{found['difference']:+.1f} [{found['low']:+.1f}, {found['high']:+.1f}], {p_text(found['p_value'])}"


def _differences_table(differences: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [
            found["method"],
            found["backbone"],
            found["order"],
            str(found["seed"]),
            *(difference_text(found[score]) for score in SCORES),
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
    return _csv(content["runs"])


def averages_to_csv(content: Mapping[str, Any]) -> str:
    """Every method on a backbone, a line each: averages, differences from `against`, what is published of it."""
    differences = {(row["backbone"], row["method"]): row for row in content["mean_differences"]}
    lines = []
    for found in content["averages"]:
        line: dict[str, Any] = {"backbone": found["backbone"], "method": found["method"]}
        line |= {key: " ".join(map(str, found[key])) for key in ("orders", "seeds")}
        against = differences.get((found["backbone"], found["method"]), {})
        for score in SCORES:
            for name, of in (("AA", found[score]), (MICRO, found[MICRO][score]), (MATCHABLE, found[MATCHABLE][score])):
                shown = OF_AVERAGE if name == "AA" else OF_AVERAGE[:2]
                line |= {f"{name} {SHORT[score]} {key}": (of or {}).get(key) for key in shown}
            compared = against.get(score) or {}
            line |= {f"difference {SHORT[score]} {key}": compared.get(key) for key in OF_DIFFERENCE}
        line["against"] = content["against"]
        line["published"] = "; ".join(f"{one['average']} ({one['source']})" for one in found["published"])
        lines.append(line)
    return _csv(lines)


def _csv(lines: Sequence[Mapping[str, Any]]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
