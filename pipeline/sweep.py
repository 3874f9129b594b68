"""Many runs: `python -m pipeline.sweep RECIPE... [--set key=a,b ...] [--seeds 1,2,3] [--jobs N]`.

Takes the product of recipes, values and seeds; runs what is not finished yet, each run as the user's own
command in a process of its own; goes on after a failure, and ends with a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError
from pipeline.recipe import Recipe
from pipeline.recipe_source import ROOT, changed_keys, find_recipe
from pipeline.stopping import STOPPED_EXIT_CODE
from pipeline.sweep_jobs import Job, Outcome, run_jobs

TRAIN_SCRIPT = ROOT / "pipeline" / "train.py"
State = Literal["done", "failed", "skipped", "stopped", "not run"]
Pair = tuple[str, tuple[str, ...]]  # a recipe's path, its overrides
_CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Combination:
    """One run of the product."""

    recipe_path: str  # as the user wrote it
    overrides: tuple[str, ...]
    run_dir: Path
    recipe_sha256: str

    @property
    def name(self) -> str:
        """How the run is called on the console and in the table."""
        return self.run_dir.name

    @property
    def log(self) -> Path:
        """Where the run's output goes: beside its folder."""
        return self.run_dir.with_name(f"{self.run_dir.name}.log")

    def results(self) -> dict[str, Any] | None:
        """The results of this very recipe if its run is finished: the last row of the matrix is whole."""
        try:
            results = json.loads((self.run_dir / "results.json").read_bytes())
            same = results["recipe_sha256"] == self.recipe_sha256
            return results if same and results["average_accuracy"] is not None else None
        except (OSError, ValueError, KeyError, TypeError):
            return None


def split_values(text: str) -> list[str]:
    """`a,b,[c,d]` -> `a`, `b`, `[c,d]`: commas inside brackets and braces do not separate."""
    values, start, open_brackets = [], 0, list[str]()
    for place, character in enumerate(text):
        if character in _CLOSING:
            open_brackets.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if not open_brackets or open_brackets.pop() != character:
                raise UserError(f"{text!r}: the {character!r} at {place + 1} closes nothing; mend the brackets")
        elif character == "," and not open_brackets:
            values.append(text[start:place].strip())
            start = place + 1
    values.append(text[start:].strip())
    if open_brackets:
        raise UserError(f"{text!r}: {open_brackets[-1]!r} is missing; mend the brackets")
    if "" in values:
        raise UserError(f"{text!r}: a value is empty; write null where a key shall have no value")
    return list(dict.fromkeys(values))


def product(recipes: Sequence[str], settings: Sequence[str], seeds: Sequence[int]) -> list[Pair]:
    """Every recipe with every choice of overrides, the seed varying fastest; a setting is `key=a,b`."""
    axes: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not key or not equals:
            raise UserError(f"--set {setting}: a setting is key=value[,value...]; recipes come before --set")
        if key in axes:
            raise UserError(f"--set {key}: given twice; give all its values at once: --set {key}=a,b")
        axes[key] = [f"{key}={value}" for value in split_values(values)]
    if seeds and "seed" in axes:
        raise UserError("--set seed and --seeds: the seed is set twice; keep --seeds")
    if seeds:
        axes["seed"] = [f"seed={seed}" for seed in dict.fromkeys(seeds)]
    choices = list(itertools.product(*axes.values()))
    return [(recipe, overrides) for recipe in dict.fromkeys(recipes) for overrides in choices]


def parse_seeds(text: str | None) -> list[int]:
    """`1,2,3` -> the seeds; none where nothing is given."""
    values = [] if text is None else split_values(text)
    for value in values:
        if not (value.isascii() and value.isdecimal()):
            raise UserError(f"--seeds: {value!r} is no seed; give whole numbers from 0, such as --seeds 1,2,3")
    return [int(value) for value in values]


def plan(pairs: Sequence[Pair], out: Path | None) -> list[Combination]:
    """Load every recipe of the product. Raises one `UserError` with the faults of all of them."""
    combinations: dict[Path, Combination] = {}
    faults: dict[str, list[str]] = {}
    for path, overrides in pairs:
        words = " ".join([path, *overrides])
        try:
            if out is not None:
                overrides = (*overrides, _output_override(path, overrides, out))
            recipe = Recipe.load(path, overrides)
        except UserError as error:
            faults.setdefault(str(error), []).append(words)
            continue
        if recipe.run_dir in combinations:
            remedy = "rename a recipe file" if out else "give --out FOLDER"
            fault = f"{recipe.run_dir}: more than one combination would write this folder; {remedy}"
            faults.setdefault(fault, []).append(words)
        else:
            combinations[recipe.run_dir] = Combination(path, overrides, recipe.run_dir, recipe.sha256)
    if faults:
        lines = [f"{fault}\n    (in {where[0]}{_and_more(where)})" for fault, where in faults.items()]
        raise UserError("\n".join(["nothing was run; faults in the combinations of this sweep:", *lines]))
    return list(combinations.values())


def _output_override(path: str, overrides: Sequence[str], out: Path) -> str:
    """The override that puts a run into `out`, under the name it would have in `runs/`."""
    seed = Recipe.load(path, overrides).seed
    name = "-".join([find_recipe(path).stem, *changed_keys(overrides), f"s{seed}"])
    return f"output.dir={json.dumps(str(out.resolve() / name))}"


def command(combination: Combination, launcher: Sequence[str], train_script: Path, *, share: bool = False) -> list[str]:
    """The user's own command for one run."""
    start = list(launcher) or [sys.executable]
    options = ["--share"] if share else []
    return [*start, str(train_script), combination.recipe_path, *combination.overrides, *options]


def find_launcher(text: str) -> list[str]:
    """The launcher's words, its program looked up on the path and beside the running Python."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launcher {text!r}: {error}; mend the quotes") from error
    if words:
        search = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])
        program = shutil.which(words[0], path=search)
        if program is None:
            raise UserError(f"--launcher {words[0]}: no such program on the path; activate its environment")
        words[0] = program
    return words


def table(rows: Sequence[tuple[Combination, State, Outcome | None]]) -> str:
    """What became of each run, as a Markdown table."""
    lines = ["| run | state | exit code | AA | BWT | seconds | log |", "|---|---|---|---|---|---|---|"]
    for combination, state, outcome in rows:
        results = combination.results() or {}
        figures = [_figure(results.get(key)) for key in ("average_accuracy", "backward_transfer")]
        code, seconds = ("", "") if outcome is None else (str(outcome.exit_code), f"{outcome.seconds:.0f}")
        log = "" if outcome is None else str(combination.log)
        lines.append(f"| {' | '.join([combination.name, state, code, *figures, seconds, log])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, *, _train_script: Path = TRAIN_SCRIPT) -> int:
    """Exit code 0: all runs are finished; 1: some failed; 2: a fault in the command; 75: a signal came."""
    arguments = _parser().parse_args(argv)
    try:
        launcher = find_launcher(arguments.launcher)
        pairs = product(arguments.recipes, arguments.settings, parse_seeds(arguments.seeds))
        combinations = plan(pairs, arguments.out)
        todo = [combination for combination in combinations if combination.results() is None]
        jobs = [Job(it.name, command(it, launcher, _train_script, share=arguments.share), it.log) for it in todo]
        if arguments.dry_run:
            planned = {it: shlex.join(job.command) for it, job in zip(todo, jobs, strict=True)}
            for it in combinations:
                print(f"{it.name}: {planned.get(it, 'finished already')}")
            return 0
        outcomes, signalled = run_jobs(jobs, at_once=arguments.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    outcome_of = dict(zip(todo, outcomes, strict=True))
    rows = [(it, _state(it, outcome_of), outcome_of.get(it)) for it in combinations]
    print(table(rows))
    open_ = [(it, state) for it, state, _ in rows if state not in ("done", "skipped")]
    if not open_:
        return 0
    for it, state in open_:
        if state == "failed":
            print(f"{it.name}: {_last_line(it.log)}")
    print(f"{len(open_)} of {len(rows)} runs are not finished; the same command again runs these alone")
    return STOPPED_EXIT_CODE if signalled else 1


def _state(combination: Combination, outcomes: dict[Combination, Outcome | None]) -> State:
    if combination not in outcomes:
        return "skipped"
    outcome = outcomes[combination]
    if outcome is None:
        return "not run"
    if outcome.was_stopped:
        return "stopped"
    return "done" if outcome.exit_code == 0 and combination.results() is not None else "failed"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipeline.sweep", description=__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE")
    parser.add_argument("--set", nargs="+", action="extend", default=[], dest="settings", metavar="key=a,b")
    parser.add_argument("--seeds", metavar="1,2,3", help="run each combination once with every seed")
    parser.add_argument("--jobs", type=_positive, default=1, metavar="N", help="runs at a time (default 1)")
    parser.add_argument("--launcher", default="", help='such as "deepspeed --num_accelerators 2"')
    parser.add_argument("--share", action="store_true", help="train prefixes common to several runs once")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="put the run folders into DIR")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _last_line(log: Path) -> str:
    """Where a log ends: there a failed run says why."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "has no log")


def _and_more(words: Sequence[str]) -> str:
    return f" and {len(words) - 1} more" if len(words) > 1 else ""


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(main())
