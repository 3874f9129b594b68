"""How fast tasks are learnt: `python benchmarks/learning_speed.py RUN [RUN ...] [--json OUT]`; see README.md here."""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/learning_speed.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
from dataclasses import asdict, dataclass

from benchmarks.command_line import writable
from data_prep.errors import UserError
from eval.run_events import read_events

WINDOW = 8  # steps of a mean
SHARE = 0.9  # of the way that the first run's loss makes in a task


@dataclass(frozen=True)
class Learnt:
    """One task of one run."""

    run: str
    task: str
    steps: int
    mean_loss: float  # over all its steps
    first_loss: float  # means over a window
    last_loss: float
    steps_to_goal: int | None  # to the end of the first window at the goal or below; None where none is


def losses(folder: Path) -> dict[str, list[float]]:
    """By task, the training loss of each step."""
    if not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: no metrics.jsonl here; give the folders of runs")
    found = {task: [loss for _, loss in curve] for task, curve in read_events(folder).loss.items()}
    short = [task for task, steps in found.items() if len(steps) < WINDOW]
    if short:
        raise UserError(f"{folder}: fewer than {WINDOW} steps of {', '.join(short)}")
    return found


def means(values: list[float]) -> list[float]:
    """Over each window of the steps."""
    return [sum(values[end - WINDOW : end]) / WINDOW for end in range(WINDOW, len(values) + 1)]


def compare(folders: list[Path]) -> list[Learnt]:
    """Every task of every run against the goals that the first run sets."""
    all_losses = [losses(folder) for folder in folders]
    goals = {}
    for task, values in all_losses[0].items():
        first, last = means(values)[0], means(values)[-1]
        goals[task] = last + (1 - SHARE) * (first - last)
    found = []
    for task, goal in goals.items():
        for folder, by_task in zip(folders, all_losses, strict=True):
            if task not in by_task:
                raise UserError(f"{folder}: no steps of {task}, which {folders[0]} has")
            curve = means(by_task[task])
            there = next((index + WINDOW for index, value in enumerate(curve) if value <= goal), None)
            steps = by_task[task]
            found.append(
                Learnt(folder.name, task, len(steps), sum(steps) / len(steps), curve[0], curve[-1], steps_to_goal=there)
            )
    return found


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/learning_speed.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the first sets the goals")
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    try:
        found = compare(options.runs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{'run':40} {'task':12} {'steps':>5} {'to goal':>7} {'mean':>6} {'first':>6} {'last':>6}")
    for one in found:
        goal = "never" if one.steps_to_goal is None else str(one.steps_to_goal)
        print(
            f"{one.run:40} {one.task:12} {one.steps:5} {goal:>7} "
            f"{one.mean_loss:6.2f} {one.first_loss:6.2f} {one.last_loss:6.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
