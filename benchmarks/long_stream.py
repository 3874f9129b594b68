"""A stream of 50 small tasks: `python benchmarks/long_stream.py [--method pegp] [--tasks 50]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/long_stream.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from random import Random
from statistics import fmean
from typing import Any

import yaml

from benchmarks.command_line import writable
from benchmarks.pairs import ROOT
from data_prep.synthetic import TASKS

ROWS = {"train": 96, "test": 32}
MIB = 2**20


def make_tasks(folder: Path, count: int) -> dict[str, dict[str, Any]]:
    """Files of rows, and the recipe's `data.tasks`: the four synthetic questions again and again.

    Each task turns the labels of its question by another step, so that it contradicts the one before it and only the
    task's name in the prompt tells them apart.
    """
    made: dict[str, dict[str, Any]] = {}
    for number in range(count):
        question, turn = TASKS[number % len(TASKS)], number // len(TASKS)
        name, draw = f"{question.name}{turn}", Random(f"long stream {number}")
        for part, rows in ROWS.items():
            kinds = [row % len(question.labels) for row in range(rows)]
            content = [
                {"sentence": question.draw(draw, kind), "label": question.labels[(kind + turn) % len(question.labels)]}
                for kind in kinds
            ]
            (folder / f"{name}.{part}.json").write_text(json.dumps(content), encoding="utf-8")
        made[name] = {
            "family": question.family,
            "labels": list(question.labels),
            "instruction": question.full_instruction,
            **{part: str(folder / f"{name}.{part}.json") for part in ROWS},
        }
    return made


def run(folder: Path, method: str, count: int) -> Path:
    """Train the stream with the pipeline's own command; the run's folder."""
    raw: dict[str, Any] = yaml.safe_load((ROOT / "recipes/tiny_t5_order1.yaml").read_text(encoding="utf-8"))
    tasks = make_tasks(folder, count)
    raw["data"] |= {"tasks": tasks}
    raw |= {"order": {"tasks": list(tasks)}, "method": {"name": method}, "output": {"dir": str(folder / "run")}}
    raw["evaluation"] |= {"cells": "diagonal_and_last"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(ROOT / "pipeline/train.py"), str(folder / "recipe.yaml")]
    with (folder / "log").open("w", encoding="utf-8") as log:
        subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return folder / "run"


def figures(run_dir: Path) -> list[dict[str, float]]:
    """By task: milliseconds a step (NaN where nothing was left to train), seconds of the method, of saving and scoring,
    MiB, share of free directions.
    """
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    timing = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))["timing"]
    folders = sorted((run_dir / "stages").iterdir())
    found = []
    for event in (event for event in events if event["event"] == "task"):
        index = event["task_index"]
        spaces = [e for e in events if e["event"] == "subspace" and e["task_index"] == index and "free" in e]
        files = [file for file in folders[index - 1].rglob("*") if file.is_file()]
        found.append(
            {
                "step_ms": 1000 * event["train_s"] / event["steps"] if event["steps"] else math.nan,
                "steps": event["steps"],
                "method_s": event["method_s"],
                "save_s": event["save_s"],
                "evaluate_s": timing[event["task"]].get("evaluate_s", 0.0),
                "peak_mib": event["peak_bytes"] / MIB,
                "stage_mib": sum(file.stat().st_size for file in files) / MIB,
                "free": fmean(space["free"] / space["width"] for space in spaces) if spaces else 1.0,
            }
        )
    return found


def table(found: Sequence[Mapping[str, float]]) -> str:
    """Means of ten tasks a line."""
    heads = ("step_ms", "steps", "method_s", "save_s", "evaluate_s", "peak_mib", "stage_mib", "free")
    lines = ["tasks    " + "".join(f"{head:>12}" for head in heads)]
    for start in range(0, len(found), 10):
        part = found[start : start + 10]
        known = {head: [task[head] for task in part if not math.isnan(task[head])] for head in heads}
        cells = "".join(f"{fmean(known[head]):12.2f}" if known[head] else f"{'-':>12}" for head in heads)
        lines.append(f"{start + 1:3}-{start + len(part):<5}{cells}")
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/long_stream.py", description=__doc__)
    parser.add_argument("--method", default="pegp")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = run(Path(folder), options.method, options.tasks)
        found = figures(run_dir)
        results = json.loads((run_dir / "results.json").read_text(encoding="utf-8"))
    print(table(found))
    print(
        f"{options.method}: average accuracy {results['average_accuracy']:.1f}, BWT {results['backward_transfer']:.1f}"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"method": options.method, "tasks": found}, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
