"""`report.html`: a run on one page that opens offline, in dark and light and on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.accuracy import DEFINITIONS
from eval.confusion import Confusion, confusions
from eval.page import cells_of, page_of
from eval.published import backbone_name, figures_for, order_name, other_row_counts, source_legend
from eval.report_charts import (
    drift_chart,
    drift_rows,
    forgetting_chart,
    occupied_chart,
    sensitivity_charts,
    sensitivity_rows,
    shade,
    stream_chart,
    training_chart,
)
from eval.results import SCORES, measured
from eval.run_events import RunEvents, read_events
from eval.run_files import UNTRAINED, stage_names
from eval.summary import PERPLEXITY, score_title

Results = Mapping[str, Any]
HEADLINE = ("average_accuracy", "backward_transfer", "learning_accuracy")


def format_html(run_dir: Path, results: Results) -> str:
    """The page of the run in `run_dir`, whose results.json holds `results`."""
    order: list[str] = results["order"]
    events = read_events(run_dir)
    recipe = run_dir / "recipe.yaml"
    cells = confusions(run_dir, order, list(results["unseen"]))
    drift = drift_rows(events, results)
    page: str = page_of("report.html.j2").render(
        results=results,
        order=order,
        title=f"{results['method']} on {order_name(order) or 'a custom order'}, seed {results['seed']}",
        backbone=backbone_name(results["model"]),
        headline=_scalars(results, HEADLINE),
        scalars=_scalars(results, [key for key, _, _ in DEFINITIONS]),
        matrices=[_matrix(results, score) for score in SCORES if measured(results, score)],
        cells=cells,
        places={(cell.after, cell.task): place for place, cell in enumerate(cells)},
        stages=[(after, after if after == UNTRAINED else f"after {task}") for after, task in _stages(order)],
        scored=[*order, *results["unseen"]],
        wrong={(cell.after, cell.task): _wrong(cell) for cell in cells},
        forgetting=forgetting_chart(results),
        over_stream=stream_chart(results),
        training=training_chart(events),
        unseen=_unseen(results),
        perplexity_note=PERPLEXITY,
        occupied=occupied_chart(events, order),
        spaces=_spaces(events, len(order)),
        drift=drift,
        drift_chart=drift_chart(drift),
        sensitivity=sensitivity_charts(events, order),
        sensitivity_rows=sensitivity_rows(events),
        jumps=[(order[task - 1], jump) for task, found in sorted(events.jumps.items()) for jump in found],
        timing=_timing(results["timing"]),
        memory=_memory(events),
        published=figures_for(backbone_name(results["model"]), order),
        sources=source_legend(),
        unlike=other_row_counts(results["rows"], order),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )
    return page


def _scalars(results: Results, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Name, definition and values of scalars; over matchable rows alone too, where there are others."""
    columns = {"exact match": results, "label scoring": results["label_scoring"]}
    if (without := results["without_unmatchable"]) is not None:
        columns["exact match, matchable rows"] = without
        columns["label scoring, matchable rows"] = without["label_scoring"]
    known = {key: (name, text) for key, name, text in DEFINITIONS}
    return [
        {
            "name": known[key][0],
            "definition": known[key][1],
            "values": {name: column[key] for name, column in columns.items()},
        }
        for key in keys
    ]


def _stages(order: Sequence[str]) -> list[tuple[str, str]]:
    """The folder of each stage, and the task after which it is."""
    return list(zip(stage_names(order), [UNTRAINED, *order], strict=True))


def _wrong(cell: Confusion) -> dict[str, Any]:
    """How many rows are wrong, and the shade of what is right."""
    rows = sum(label.rows for label in cell.labels)
    return {"rows": rows, "wrong": cell.wrong_rows, "shade": shade(1 - cell.wrong_rows / rows) if rows else None}


def _unseen(results: Results) -> list[dict[str, Any]]:
    """A row for each task that is never trained and each score: cells of the untrained model and after each task."""
    return [
        {
            "task": task,
            "score": score_title(score),
            "cells": cells_of(
                [found["untrained"][score], *found[score]],
                [found["intervals"]["untrained"][score], *found["intervals"][score]],
            ),
        }
        for task, found in results["unseen"].items()
        for score in SCORES
    ]


def _matrix(results: Results, score: str) -> dict[str, Any]:
    """Title, and a row of cells for the untrained model and each task: its stage, its name, its cells."""
    rows = [results["untrained"][score], *results["matrix"][score]]
    intervals = [results["untrained_intervals"][score], *results["intervals"][score]]
    names = [UNTRAINED, *(f"after {task}" for task in results["order"])]
    found = [
        (after, name, cells_of(*pair))
        for after, name, *pair in zip(stage_names(results["order"]), names, rows, intervals, strict=True)
    ]
    return {"title": score_title(score), "score": score, "rows": found}


def _spaces(events: RunEvents, tasks: int) -> list[dict[str, Any]]:
    """A line a space: how many of its directions are protected and free after each task, shaded by what is free."""
    found = []
    for space, sizes in events.spaces.items():
        width = sizes[max(sizes)][1]
        cells = [
            {"rank": sizes[task][0], "free": width - sizes[task][0], "shade": shade(1 - sizes[task][0] / width)}
            if task in sizes
            else None
            for task in range(1, tasks + 1)
        ]
        found.append({"name": space, "width": width, "cells": cells})
    return found


def _memory(events: RunEvents) -> dict[str, Any]:
    """MiB by task and part."""
    parts = list(dict.fromkeys(part for found in events.peak_bytes.values() for part in found))
    sizes = [
        (task, [None if part not in found else found[part] / 2**20 for part in parts])
        for task, found in events.peak_bytes.items()
    ]
    return {"parts": parts, "tasks": sizes}


def _timing(timing: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Seconds by part, and their share of all."""
    parts = list(dict.fromkeys(part for found in timing.values() for part in found))
    sums = {part: sum(found.get(part) or 0.0 for found in timing.values()) for part in parts}
    total = sum(sums.values())
    return {
        "total": total,
        "parts": [
            {"name": part.removesuffix("_s"), "seconds": seconds, "share": 100 * seconds / total if total else 0}
            for part, seconds in sums.items()
        ],
        "tasks": [(task, [found.get(part) for part in parts]) for task, found in timing.items()],
    }
