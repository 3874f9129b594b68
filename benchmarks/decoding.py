"""Would compiled models or static caches score faster? `python benchmarks/decoding.py`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/decoding.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import time
from functools import partial
from typing import Any, ClassVar

import torch

from benchmarks.command_line import writable
from benchmarks.evaluation import Scoring
from benchmarks.pairs import Report, compare, table, write_json
from benchmarks.streams import MODELS
from data_prep.errors import UserError
from pipeline.models import load_backbone
from pipeline.recipe import Recipe
from pipeline.workload import Alone, StreamTask, Workload, load_workload

TASKS = ("dbpedia", "agnews", "RTE")  # fourteen long labels, four short ones, two


class StaticCache(Scoring):
    """Its baseline is transformers' `generate` with a cache of fixed size."""

    generation: ClassVar[dict[str, Any]] = {"cache_implementation": "static"}


def compiled(model: Any) -> Any:
    """A copy whose forwards are compiled, for any number of rows and tokens."""
    faster = copy.deepcopy(model)
    inner = faster.model if hasattr(faster, "lm_head") and hasattr(faster, "model") else None
    for part in filter(None, (faster, inner)):  # a decoder-only model's prompts are read by its inner model
        part.compile(dynamic=True)
    return faster


def measure(report: Report, model: Any, workload: Workload, task: StreamTask, options: argparse.Namespace) -> None:
    """Both forms against ours on one task; each must be right on the same rows."""
    size = (options.rows, options.batch_size)
    ours, fixed = Scoring(model, workload, task, *size), StaticCache(model, workload, task, *size)
    form = Scoring(model, workload, task, *size)
    form.prepared = compiled(model)  # as loaded: torch's compiler cannot trace the oneDNN op of a prepared one
    title = f"{options.model}, {task.name}, {len(ours.examples)} rows"
    start = time.perf_counter()
    form.ours(0)
    report.state(f"{title}: seconds of the first compiled scoring", round(time.perf_counter() - start, 1))
    add = partial(compare, pairs=options.pairs)
    report.add(add(f"{title}: compiled / ours", form.ours, ours.ours))
    report.add(add(f"{title}: generate, static cache / ours", fixed.baseline, ours.ours))
    report.add(add(f"{title}: generate, static / growing cache", fixed.baseline, ours.baseline))
    fixed.texts["ours"] = ours.texts["ours"]
    ours.texts["compiled"] = form.texts["ours"]
    report.state(f"{title}: right", [ours.check(), fixed.check()])


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/decoding.py", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="all by default")
    parser.add_argument("--rows", type=int, default=100, help="of each task")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = Report()
    print(table([]), flush=True)
    try:
        recipe = Recipe.load(f"recipes/{options.model}_order4.yaml")
        workload = load_workload(recipe, Alone())
        model = load_backbone(workload.model_folder, recipe.model.family, dtype=torch.float32)
        for task in workload.tasks:
            if task.name in (options.task or TASKS):
                measure(report, model, workload, task, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        arguments = {key: str(value) for key, value in vars(options).items() if key != "json"}
        write_json(options.json, report.ratios, report.stated, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
