"""Checks and fingerprints what a run will read, or makes the benchmark's folder.

python -m data_prep RECIPE [key=value ...]
python -m data_prep hub --out DIR [--tasks a,b] [--seed N] [--from-local DIR]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.batches import encode_rows
from data_prep.errors import UserError
from data_prep.hub import make_folder
from data_prep.hub_sources import HUB_SOURCES
from data_prep.tasks import TaskData, load_tasks
from pipeline.checkpoints import backbone_folder
from pipeline.models import load_tokenizer
from pipeline.recipe import Recipe


def main(arguments: Sequence[str]) -> int:
    """Run one command; 0 when done, 2 after a fault of the user's, told in one message."""
    try:
        if arguments[:1] == ["hub"]:
            _hub(arguments[1:])
        else:
            _check(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _check(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep",
        description="Check and fingerprint the rows that a run of RECIPE will read. "
        "`python -m data_prep hub --help`: make the benchmark's folder.",
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    given = parser.parse_args(arguments)
    recipe = Recipe.load(given.recipe, given.overrides)
    split = recipe.evaluation.split
    loaded = load_tasks(recipe.data, recipe.task_names, split=split, seed=recipe.seed)
    cut, reason = _truncated(recipe, loaded)
    print(f"data.path: {recipe.data.path or 'none'}; seed {recipe.seed}; evaluation on {split} rows")
    for number, (data, truncated) in enumerate(zip(loaded, cut, strict=True), start=1):
        print(_description(number, data, truncated))
    if reason:
        print(f"truncated rows not counted: {reason}")


def _truncated(recipe: Recipe, loaded: Sequence[TaskData]) -> tuple[list[tuple[int, int] | None], str]:
    """For each task how many rows of train and of evaluation are cut to fit; None and the reason if unknown.

    The rows can be checked before the backbone is there, so its absence is told and is no failure.
    """
    if recipe.model.path != "synthetic" and not Path(recipe.model.path).is_dir():
        return [None] * len(loaded), f"model.path: {recipe.model.path} is no local folder"
    try:
        tokenizer = load_tokenizer(backbone_folder(recipe.model), recipe.model.family)
    except UserError as error:
        return [None] * len(loaded), str(error)
    counts: list[tuple[int, int] | None] = []
    for data in loaded:
        train, evaluation = (
            sum(
                example.truncated
                for example in encode_rows(data.task, rows, tokenizer, family=recipe.model.family, data=recipe.data)
            )
            for rows in (data.train, data.evaluation)
        )
        counts.append((train, evaluation))
    return counts, ""


def _description(number: int, data: TaskData, truncated: tuple[int, int] | None) -> str:
    task = data.task
    lines = [f"{number}. {task.name} ({task.family}): {', '.join(task.labels)}"]
    for place, (split, rows) in enumerate((("train", data.train), ("evaluation", data.evaluation))):
        cut = "" if truncated is None else f", {truncated[place]} truncated"
        lines.append(f"   {split:<11}{len(rows):>6} rows{cut}, sha256 {data.fingerprints[split]}")
    if data.unmatchable:
        lines.append(f"   {data.unmatchable} evaluation rows have a label outside the set, which nothing can match")
    for split, reasons in data.dropped.items():
        told = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        lines.append(f"   dropped from {split}: {told}")
    return "\n".join(lines)


def _hub(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep hub",
        description="Make a CL_Benchmark folder from public data sets, at pinned revisions.",
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--tasks", default=",".join(HUB_SOURCES), help="of %(default)s")
    parser.add_argument("--seed", type=int, default=42, help="chooses the rows (default %(default)s)")
    parser.add_argument("--from-local", type=Path, help="DIR/<task>/{train,test}.{parquet,jsonl,json,csv} instead")
    given = parser.parse_args(arguments)
    tasks = [name.strip() for name in given.tasks.split(",") if name.strip()]
    counts = make_folder(given.out, tasks, seed=given.seed, local=given.from_local)
    for name, rows in counts.items():
        print(f"{name}: {rows['train']} rows to train on, {rows['test']} to test on")
    print(f"written: {given.out}; use it with data.path={given.out}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
