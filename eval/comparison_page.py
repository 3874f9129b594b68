"""`comparison.html`: many runs on one page, in the form of a run's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from eval.charts import Interval, Series, interval_chart, line_chart
from eval.comparison_tables import READING, average_table, difference_text, run_columns, times_table
from eval.page import cells_of, page_of
from eval.results import SCORES


def format_comparison(content: Mapping[str, Any]) -> str:
    """The page of many runs, from what `comparison_report.compare` gives."""
    charts = [
        (title, interval_chart(rows, title=title, x_title=x_title)) for title, rows, x_title in _intervals(content)
    ]
    header, averages = average_table(content)
    page: str = page_of("comparison.html.j2").render(
        content=content,
        charts=charts,
        by_task=list(_by_task(content)),
        matrices=[_matrix(found) for found in content["matrices"]],
        times=times_table(content["times"]),
        header=header,
        averages=averages,
        wide=[name for name in header if name == "backbone" or "against" in name or "published" in name],
        columns=run_columns(content["runs"]),
        scores=SCORES,
        reading=READING,
        difference_text=difference_text,
    )
    return page


def _intervals(content: Mapping[str, Any]) -> Iterator[tuple[str, list[Interval], str]]:
    """Title, rows and what is measured of each chart: averages, then differences, by backbone and score."""
    for key, what, x_title in (
        ("averages", "average accuracy", "%, mean and 95 % interval"),
        ("mean_differences", f"AA against {content['against']}", "points, mean and 95 % interval"),
    ):
        for backbone in dict.fromkeys(found["backbone"] for found in content[key]):
            for score in SCORES:
                rows = [
                    Interval(found["method"], one["mean"], one["low"], one["high"])
                    for found in content[key]
                    if found["backbone"] == backbone and (one := found[score]) is not None and one["low"] is not None
                ]
                yield f"{backbone}: {what}, {score.replace('_', ' ')}", rows, x_title


def _by_task(content: Mapping[str, Any]) -> Iterator[tuple[str, Markup]]:
    """Title and chart: by backbone and order, each method's exact match on every task after the last; AA so far."""
    matrices = content["matrices"]
    for backbone, order in dict.fromkeys((found["backbone"], found["order"]) for found in matrices):
        own = [found for found in matrices if (found["backbone"], found["order"]) == (backbone, order)]
        tasks = own[0]["tasks"]
        last = [Series(one["method"], list(enumerate(one["exact_match"][-1], 1))) for one in own]
        so_far = [Series(one["method"], _stream(one["exact_match"])) for one in own]
        for title, series, x_title in (
            (f"{backbone}, {order}: exact match on each task after the last", last, "task"),
            (f"{backbone}, {order}: mean over the tasks learnt so far", so_far, "after training"),
        ):
            # AA so far of a first and a last task alone is no course.
            if any(_known(line) > min(2, len(tasks) - 1) for line in series):
                yield title, line_chart(series, title=title, x_title=x_title, y_title="exact match, %", x_names=tasks)


def _known(line: Series) -> int:
    return sum(y is not None for _, y in line.points)


def _stream(matrix: list[list[float | None]]) -> list[tuple[float, float | None]]:
    """AA after each task, where all learnt so far were scored."""
    points: list[tuple[float, float | None]] = []
    for t, row in enumerate(matrix):
        learnt = [value for value in row[: t + 1] if value is not None]
        points.append((t + 1, sum(learnt) / len(learnt) if len(learnt) == t + 1 else None))
    return points


def _matrix(found: Mapping[str, Any]) -> dict[str, Any]:
    """Title, tasks, and a row of cells after each task."""
    many = f", mean of {found['runs']} runs" if found["runs"] > 1 else ""
    rows = [
        (task, cells_of(row, [None] * len(row))) for task, row in zip(found["tasks"], found["exact_match"], strict=True)
    ]
    title = f"{found['method']} on {found['backbone']}, {found['order']}{many}"
    return {"title": title, "tasks": found["tasks"], "rows": rows}
