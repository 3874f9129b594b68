"""The charts of a run's page, from its results and its events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from eval.charts import Series, line_chart
from eval.results import SCORES
from eval.run_events import RunEvents, thinned

Results = Mapping[str, Any]
MOST_POINTS = 120  # of a task's training curve


def forgetting_chart(results: Results) -> Markup:
    """A line a task, from its own training on, over stages after which it was not scored."""
    order, matrix = results["order"], results["matrix"]["exact_match"]
    series = [
        Series(task, [(t + 1, matrix[t][i]) for t in range(i, len(order)) if matrix[t][i] is not None])
        for i, task in enumerate(order)
    ]
    return line_chart(
        series, title="Exact match on each task", x_title="after training", y_title="exact match, %", x_names=order
    )


def stream_chart(results: Results) -> Markup:
    """The mean over the tasks learnt so far, where all of them were scored."""
    order = results["order"]
    series = []
    for score in SCORES:
        matrix = results["matrix"][score]
        learnt = [matrix[t][: t + 1] for t in range(len(order))]
        points = [(t + 1, None if None in row else fmean(row)) for t, row in enumerate(learnt)]
        series.append(Series(score.replace("_", " "), points))
    return line_chart(
        series,
        title="Average accuracy over the stream",
        x_title="after training",
        y_title="mean so far, %",
        x_names=order,
    )


def training_chart(events: RunEvents) -> Markup:
    """The loss of every task, at the steps of the whole stream."""
    series = [Series(task, thinned(curve, MOST_POINTS)) for task, curve in events.loss.items()]
    return line_chart(
        series,
        title="Training loss",
        x_title="optimizer step of the stream",
        y_title="loss per label token",
        markers=False,
    )


def occupied_chart(events: RunEvents, order: Sequence[str]) -> Markup:
    """The share of all directions that is protected after each task."""
    points = list(events.occupied().items())
    return line_chart(
        [Series("protected", points)],
        title="Protected directions",
        x_title="after training",
        y_title="protected, % of all",
        x_names=order,
    )


def drift_rows(events: RunEvents, results: Results) -> list[dict[str, Any]]:
    """By old task: what of the features that its layers read now its spaces still hold, and its fall in accuracy."""
    matrix, order = results["matrix"]["exact_match"], results["order"]
    found = []
    for (after, old), share in events.feature_shares().items():
        then, now = matrix[old - 1][old - 1], matrix[after - 1][old - 1]
        fall = None if then is None or now is None else then - now
        found.append({"old": order[old - 1], "after": order[after - 1], "share": share, "fall": fall})
    return found


def drift_chart(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """A point for each old task after each later one: how far its features went against what it lost."""
    series = []
    for old in dict.fromkeys(row["old"] for row in rows):
        known = [row for row in rows if row["old"] == old and row["fall"] is not None]
        points = [(100 - row["share"], row["fall"]) for row in known]
        told = [f"{old} after {row['after']}: {100 - row['share']:.1f} % left, {row['fall']:.1f} lost" for row in known]
        series.append(Series(old, points, told))
    return line_chart(
        series,
        title="Feature drift against the fall in accuracy",
        x_title="energy outside the task's own spaces, %",
        y_title="fall in exact match",
        lines=False,
    )


def sensitivity_charts(events: RunEvents, order: Sequence[str]) -> list[dict[str, Any]]:
    """By task a chart: each block's mean sensitivity and Fisher information, both of their largest in any block."""
    found = []
    for task, layers in sorted(events.sensitivity.items()):
        parts = {part: blocks for part in ("encoder", "decoder") if (blocks := _by_block(layers, part))}
        most = [max(values[place] for blocks in parts.values() for values in blocks.values()) for place in (0, 1)]
        series = [
            Series(f"{part}: {name}", [(index, blocks[index][place] / most[place]) for index in sorted(blocks)])
            for part, blocks in parts.items()
            for place, name in enumerate(("sensitivity", "Fisher information"))
            if most[place] > 0
        ]
        last = max((max(blocks) for blocks in parts.values()), default=0)
        chart = line_chart(
            series,
            title=f"Sensitivity to {order[task - 1]}",
            x_title="block",
            y_title="of the largest",
            x_names=[str(block) for block in range(1, last + 1)],
        )
        found.append({"task": order[task - 1], "chart": chart})
    return found


def sensitivity_rows(events: RunEvents) -> tuple[list[int], list[dict[str, Any]]]:
    """Tasks, and a row a layer: by task its sensitivity, and a shade for its share of that task's largest."""
    tasks = sorted(events.sensitivity)
    most = {task: max((score for score, _ in events.sensitivity[task].values()), default=0.0) for task in tasks}
    layers = dict.fromkeys(layer for task in tasks for layer in events.sensitivity[task])

    def cell(task: int, layer: str) -> dict[str, Any]:
        found = events.sensitivity[task].get(layer)
        if found is None:
            return {"value": None, "shade": None}
        return {"value": found[0], "shade": shade(found[0] / most[task]) if most[task] else 0}

    return tasks, [{"layer": layer, "cells": [cell(task, layer) for task in tasks]} for layer in layers]


def shade(share: float) -> int:
    """The class of a heat map's cell, 0 to 9, of a share of 1."""
    return max(0, min(int(10 * share), 9))


def _by_block(layers: Mapping[str, tuple[float, float]], part: str) -> dict[int, tuple[float, float]]:
    """Block number, from 1 -> means over its layers; a model without an encoder has decoder blocks alone."""
    blocks: dict[int, list[tuple[float, float]]] = {}
    for name, values in layers.items():
        words = name.split(".")
        of = "encoder" if words[0] == "encoder" else "decoder"
        numbers = [int(word) for word in words if word.isdigit()]
        if of == part and numbers:
            blocks.setdefault(numbers[0] + 1, []).append(values)
    return {
        block: (fmean(score for score, _ in found), fmean(fisher for _, fisher in found))
        for block, found in blocks.items()
    }
