"""`report.html`: a run on one page that opens offline, in dark and light and on paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from eval.accuracy import DEFINITIONS
from eval.charts import Interval, Series, interval_chart, line_chart
from eval.comparison_report import READING, SCALARS
from eval.confusion import confusions
from eval.published import backbone_name, figures_for, order_name, other_row_counts, source_legend
from eval.results import SCORES
from eval.run_events import RunEvents, read_events, thinned
from eval.summary import PERPLEXITY, number, score_title, significant

Results = Mapping[str, Any]
HEADLINE = ("average_accuracy", "backward_transfer", "learning_accuracy")
MOST_POINTS = 120  # of a task's training curve


def format_html(run_dir: Path, results: Results) -> str:
    """The page of the run in `run_dir`, whose results.json holds `results`."""
    order: list[str] = results["order"]
    events = read_events(run_dir)
    recipe = run_dir / "recipe.yaml"
    scalars = {key: (name, results[key], results["label_scoring"][key], text) for key, name, text in DEFINITIONS}
    page: str = _page("report.html.j2").render(
        results=results,
        order=order,
        title=f"{results['method']} on {order_name(order) or 'a custom order'}, seed {results['seed']}",
        backbone=backbone_name(results["model"]),
        scalars=list(scalars.values()),
        headline=[scalars[key] for key in HEADLINE],
        matrices=[_matrix(results, score) for score in SCORES if _measured(results, score)],
        forgetting=_forgetting(results),
        over_stream=_over_stream(results),
        training=_training(events),
        confusions=confusions(run_dir, order, list(results["unseen"])),
        unseen=[
            (task, score_title(score), [found["untrained"][score], *found[score]])
            for task, found in results["unseen"].items()
            for score in SCORES
        ],
        perplexity_note=PERPLEXITY,
        occupied=_occupied(events, order),
        spaces=_spaces(events, len(order)),
        drift=_drift(events, results),
        sensitivity=_sensitivity(events, order),
        timing=_timing(results["timing"]),
        memory=[(task, peak / 2**20) for task, peak in events.peak_bytes.items()],
        published=figures_for(backbone_name(results["model"]), order),
        sources=source_legend(),
        unlike=other_row_counts(results["rows"], order),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )
    return page


def format_comparison(content: Mapping[str, Any]) -> str:
    """The page of many runs, from what `comparison_report.compare` gives."""
    charts = []
    for backbone in dict.fromkeys(found["backbone"] for found in content["averages"]):
        for score in SCORES:
            rows = [
                Interval(found["method"], one["mean"], one["low"], one["high"])
                for found in content["averages"]
                if found["backbone"] == backbone and (one := found[score]) is not None
            ]
            title = f"{backbone}: average accuracy, {score.replace('_', ' ')}"
            charts.append((title, interval_chart(rows, title=title, x_title="%, mean and 95 % interval")))
    page: str = _page("comparison.html.j2").render(
        content=content, charts=charts, scores=SCORES, scalars=list(SCALARS), reading=READING
    )
    return page


@cache
def _page(name: str) -> Any:
    pages = Environment(
        loader=PackageLoader("eval"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters["number"] = number
    pages.filters["significant"] = significant
    return pages.get_template(name)


def _model(results: Results) -> Mapping[str, Any]:
    model = results["model"]
    return {"path": model} if isinstance(model, str) else model


def _measured(results: Results, score: str) -> bool:
    rows = [results["untrained"][score], *results["matrix"][score]]
    return any(value is not None for row in rows for value in row)


def _matrix(results: Results, score: str) -> dict[str, Any]:
    """Title, and a row of cells for the untrained model and each task: value, interval, shade from 0 to 9."""

    def cell(value: float | None, interval: Sequence[float] | None) -> dict[str, Any]:
        return {"value": value, "interval": interval, "shade": None if value is None else min(int(value // 10), 9)}

    rows = [("untrained", [cell(value, None) for value in results["untrained"][score]])]
    for task, values, intervals in zip(
        results["order"], results["matrix"][score], results["intervals"][score], strict=True
    ):
        rows.append((f"after {task}", [cell(*pair) for pair in zip(values, intervals, strict=True)]))
    return {"title": score_title(score), "rows": rows}


def _forgetting(results: Results) -> Markup:
    """A line a task, from its own training on, over stages after which it was not scored."""
    order, matrix = results["order"], results["matrix"]["exact_match"]
    series = [
        Series(task, [(t + 1, matrix[t][i]) for t in range(i, len(order)) if matrix[t][i] is not None])
        for i, task in enumerate(order)
    ]
    return line_chart(
        series, title="Exact match on each task", x_title="after training", y_title="exact match, %", x_names=order
    )


def _over_stream(results: Results) -> Markup:
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
        y_title="mean over the tasks so far, %",
        x_names=order,
    )


def _training(events: RunEvents) -> Markup:
    series = [Series(task, thinned(curve, MOST_POINTS)) for task, curve in events.loss.items()]
    return line_chart(
        series,
        title="Training loss",
        x_title="optimizer step of the stream",
        y_title="loss per label token",
        markers=False,
    )


def _occupied(events: RunEvents, order: Sequence[str]) -> Markup:
    points = list(events.occupied().items())
    return line_chart(
        [Series("protected", points)],
        title="Protected directions",
        x_title="after training",
        y_title="protected directions, % of all",
        x_names=order,
    )


def _spaces(events: RunEvents, tasks: int) -> list[dict[str, Any]]:
    """A line a space: its directions after each task, and how many are free after the last."""
    found = []
    for space, sizes in events.spaces.items():
        rank, width = sizes[max(sizes)]
        ranks = [sizes[task][0] if task in sizes else None for task in range(1, tasks + 1)]
        found.append({"name": space, "width": width, "ranks": ranks, "free": width - rank})
    return found


def _drift(events: RunEvents, results: Results) -> list[dict[str, Any]]:
    """By old task: what of the features that its layers read now its spaces still hold, and its fall in accuracy."""
    matrix, order = results["matrix"]["exact_match"], results["order"]
    found = []
    for (after, old), share in events.feature_shares().items():
        then, now = matrix[old - 1][old - 1], matrix[after - 1][old - 1]
        fall = None if then is None or now is None else then - now
        found.append({"old": order[old - 1], "after": order[after - 1], "share": share, "fall": fall})
    return found


def _sensitivity(events: RunEvents, order: Sequence[str]) -> list[dict[str, Any]]:
    """By task, charts of encoder and decoder: each block's mean sensitivity and Fisher information, of its largest."""
    found = []
    for task, layers in sorted(events.sensitivity.items()):
        charts = []
        for part in ("encoder", "decoder"):
            blocks = _by_block(layers, part)
            if not blocks:
                continue
            series = [
                Series(name, [(index, blocks[index][place] / most) for index in sorted(blocks)])
                for place, name in enumerate(("sensitivity", "Fisher information"))
                if (most := max(values[place] for values in blocks.values())) > 0
            ]
            charts.append(
                line_chart(
                    series, title=f"{part}, {order[task - 1]}", x_title=f"{part} block", y_title="of the largest"
                )
            )
        found.append({"task": order[task - 1], "charts": charts})
    return found


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
