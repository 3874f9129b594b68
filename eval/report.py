"""`report.md`, `report.html` and `results.json` of a run: what was run, scores with definitions, published figures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import write_atomic, write_json
from eval.accuracy import DEFINITIONS
from eval.html_report import format_html
from eval.published import backbone_name, figures_for, order_name, other_row_counts, source_legend
from eval.results import SCORES, build_results, measured
from eval.summary import PERPLEXITY, number, score_title, significant
from eval.tables import markdown_table

Results = Mapping[str, Any]

READING = """\
- **Exact match** (the headline): the text that the model generates freely and greedily equals the label, both
  in lower case, without ASCII punctuation and with white space collapsed. A wrong format is a wrong answer.
- **Label scoring**: the answer is the option with the highest summed log-probability of its tokens and the
  end token (no length normalisation; ties to the first option). It cannot fail by format, so a gap between
  the two scores is format that was lost, not knowledge.
- Rows of a matrix: after training which task; columns: on which task. A dash: not measured (not zero).
- Intervals are 95 % Wilson intervals over the rows of a task; they hold no variance over seeds and orders."""

REFERENCES = {"pertask": "one model a task", "mtl": "all tasks jointly"}

TASK_NAME_NOTE = """\
- The prompts hold a line `Dataset:<task>` (`data.add_dataset_name` is on, as in the published runs): it is a
  task id in words. Methods that must not know the task are to be compared with it off as well."""


def write_results(run_dir: Path) -> dict[str, Any]:
    """Rebuild `results.json`, `report.md`, `report.html` in `run_dir` from its run.json and cells; the results."""
    results = build_results(run_dir)
    report = format_report(results)
    write_json(run_dir / "results.json", results)
    write_atomic(run_dir / "report.md", report)
    write_atomic(run_dir / "report.html", format_html(run_dir, results))
    return results


def format_report(results: Results) -> str:
    """The Markdown report of `results`, the content of results.json."""
    name = order_name(results["order"])
    parts = [
        f"# {results['method']} on {name or 'a custom order'}, seed {results['seed']}",
        _what_was_run(results),
        "## Scores",
        *(_matrix_section(results, score) for score in SCORES if measured(results, score)),
        "## Summary",
        _scalarsmarkdown_table(results),
        *_references_section(results),
        "## How to read the numbers",
        READING + ("\n" + TASK_NAME_NOTE if results["settings"].get("add_dataset_name") else ""),
        *_unseen_section(results),
        *_retention_section(results),
        "## Rows",
        _rowsmarkdown_table(results),
        *_dropped_lines(results),
        "## Published figures",
        _published_section(results),
        "## Time",
        _timemarkdown_table(results["timing"]),
        "## Versions",
        _facts_list({**results["versions"], "git": results["git"], "recipe (SHA-256)": results["recipe_sha256"]}),
    ]
    return "\n\n".join(parts) + "\n"


def _what_was_run(results: Results) -> str:
    facts = {
        "method": results["method"],
        **_model_facts(results["model"]),
        "order": ", ".join(results["order"]),
    }
    facts |= {"seed": results["seed"], "trainable parameters": results["trainable_parameters"]}
    if results["leak"] is not None:
        facts["leak"] = results["leak"]["max"]
    done = sum(row[t] is not None for t, row in enumerate(results["matrix"]["exact_match"]))
    total = len(results["order"])
    if results["settings"].get("joint"):
        done, total = int(results["average_accuracy"] is not None), 1
    unfinished = f"\n\n**Not finished: {done} of {total} tasks are trained and scored.**" if done < total else ""
    return _facts_list(facts | dict(results["settings"])) + "\n\nThe whole recipe: `recipe.yaml`." + unfinished


def _model_facts(model: str | Mapping[str, Any]) -> dict[str, Any]:
    """The backbone's path under "model", then what else is known of it."""
    known = {"path": model} if isinstance(model, str) else model
    return {"model": known["path"]} | {f"model {key}": value for key, value in known.items() if key != "path"}


def _facts_list(facts: Mapping[str, Any]) -> str:
    """One line a fact; what is not known is left out."""

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value)

    return "\n".join(f"- {name}: {text(value)}" for name, value in facts.items() if value is not None)


def _matrix_section(results: Results, score: str) -> str:
    """The matrix of one score and, in a second table, its diagonal and last row with their intervals."""
    order, matrix = results["order"], results["matrix"][score]
    rows = [["untrained", *(number(value) for value in results["untrained"][score])]]
    rows += [[f"after {task}", *(number(value) for value in row)] for task, row in zip(order, matrix, strict=True)]
    intervals = results["intervals"][score]
    spread = [
        [
            task,
            str(results["counts"][i]),
            _with_interval(matrix[i][i], intervals[i][i]),
            _with_interval(matrix[-1][i], intervals[-1][i]),
        ]
        for i, task in enumerate(order)
    ]
    return "\n\n".join(
        [
            f"### {score_title(score)}",
            markdown_table(["", *order], rows),
            "With 95 % intervals:",
            markdown_table(["task", "rows", "right after training it", "after the last task"], spread),
        ]
    )


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    return number(value) if interval is None else f"{number(value)} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _scalarsmarkdown_table(results: Results) -> str:
    """Each scalar under both scores, where rows are unmatchable also without those, and its definition."""
    columns: dict[str, Results] = {"exact match": results, "label scoring": results["label_scoring"]}
    without = results["without_unmatchable"]
    if without is not None:
        columns["exact match, matchable rows"] = without
        columns["label scoring, matchable rows"] = without["label_scoring"]
    rows = [
        [name, *(number(column[key]) for column in columns.values()), f"`{definition}`"]
        for key, name, definition in DEFINITIONS
    ]
    legend = "`a[t, i]`: score on task i after training task t; `b[i]`: the untrained model's; T: number of tasks."
    return markdown_table(["", *columns, "definition"], rows) + "\n\n" + legend


def _references_section(results: Results) -> list[str]:
    """What models of one task, and one model of all, reach on the same rows; nothing where no run is named."""
    if not results["references"]:
        return []
    rows = [
        [f"{REFERENCES[found['method']]}, seed {found['seed']}"]
        + [number(found["average_accuracy"][score]) for score in SCORES]
        + [found["run"]]
        for found in results["references"]
    ]
    return ["## References", markdown_table(["", *(score_title(score) for score in SCORES), "run"], rows)]


def _unseen_section(results: Results) -> list[str]:
    """The scores on tasks that are never trained; nothing where there are none."""
    if not results["unseen"]:
        return []
    rows = [
        [task, score_title(score), *(number(value) for value in [scores["untrained"][score], *scores[score]])]
        for task, scores in results["unseen"].items()
        for score in SCORES
    ]
    header = ["task", "score", "untrained", *(f"after {task}" for task in results["order"])]
    return ["## Tasks never trained", markdown_table(header, rows)]


def _retention_section(results: Results) -> list[str]:
    """What is left of the backbone's general ability; nothing where nothing is asked."""
    if not results["retention"]:
        return []
    rows = [
        [measure, *(significant(value) for value in [values["untrained"], *values["after"]])]
        for measure, values in results["retention"].items()
    ]
    header = ["", "untrained", *(f"after {task}" for task in results["order"])]
    return ["## Retention of general ability", markdown_table(header, rows), PERPLEXITY]


def _rowsmarkdown_table(results: Results) -> str:
    rows = []
    for task, counts in results["rows"].items():
        truncated = results["truncated"][task]
        shown = [counts["train"], truncated["train"], counts["evaluation"], truncated["evaluation"]]
        rows.append([task, *(number(count, 0) for count in [*shown, counts["unmatchable"]])])
    header = ["task", "train", "of them truncated", "evaluation", "of them truncated", "of them unmatchable"]
    return markdown_table(header, rows) + (
        "\n\nTruncated: the passage was cut to fit `data.max_source_tokens`. Unmatchable: the "
        "row's label is outside the label set (the `-` rows of MNLI): no answer is right, and it counts."
    )


def _dropped_lines(results: Results) -> list[str]:
    """How many bad rows were left out of each file and why; nothing where none were."""
    lines = [
        f"- {task}, {split}: {count} rows dropped ({reason})"
        for task, splits in results["dropped"].items()
        for split, reasons in splits.items()
        for reason, count in reasons.items()
        if count
    ]
    return ["\n".join(lines)] if lines else []


def _published_section(results: Results) -> str:
    name = backbone_name(results["model"])
    figures = figures_for(name, results["order"])
    if not figures:
        return (
            f"None: nothing is published for `{name}` on this order, and figures of other "
            "backbones and orders are not comparable with this run."
        )
    rows = [
        [
            figure.method + (" (this method)" if figure.method == results["method"] else ""),
            number(figure.on_order),
            number(figure.group_average),
            number(figure.backward_transfer),
            "; ".join(filter(None, [figure.source, figure.note])),
        ]
        for figure in figures
    ]
    ours = ["**this run**", number(results["average_accuracy"]), "", number(results["backward_transfer"]), ""]
    header = ["method", "AA on this order", "AA over its three orders", "BWT", "source"]
    parts = [markdown_table(header, [ours, *rows]), "\n".join(f"- {line}" for line in source_legend())]
    differing = other_row_counts(results["rows"], results["order"])
    if differing:
        parts.insert(0, f"**Not like for like**, the data differ: {'; '.join(differing)}.")
    return "\n\n".join(parts)


def _timemarkdown_table(timing: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds of each part of each task, and their sums."""
    columns = list(dict.fromkeys(part for parts in timing.values() for part in parts))
    if not columns:
        return "Not measured."
    rows = [[task, *(number(parts.get(part), 1) for part in columns)] for task, parts in timing.items()]
    sums = [sum(parts.get(part) or 0.0 for parts in timing.values()) for part in columns]
    rows.append(["all", *(number(seconds, 1) for seconds in sums)])
    header = ["", *(part.removesuffix("_s").replace("_", " ") + ", s" for part in columns)]
    return markdown_table(header, rows) + f"\n\nAll together: {number(sum(sums), 1)} s."
