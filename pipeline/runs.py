"""A whole run: check everything, take its folder, learn the stream, report it; or score its stages again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from eval.references import read_references
from eval.report import write_results
from eval.run_files import read_run
from eval.summary import format_summary
from pipeline.deepspeed_config import deepspeed_config
from pipeline.engine import Ranks
from pipeline.recipe import Output, Recipe
from pipeline.retention import RetentionBook
from pipeline.run_folder import RunFolder, run_facts, this_process
from pipeline.runlog import RunLog
from pipeline.stopping import STOPPED_EXIT_CODE, Stopped, StopRequest
from pipeline.stream import Stream
from pipeline.workload import load_workload


def run(recipe: Recipe, stop: StopRequest, *, share: bool = False) -> dict[str, Any]:
    """Learn the stream, score it, report it; returns the results. Goes on where an earlier run stopped.

    `share`: take over stages of equal address from the runs beside this one, instead of training them again.
    """
    ranks = Ranks.start()
    try:
        stream = _open(recipe, ranks, stop, share=share)
        try:
            stream.run()
            results = ranks.on_first(lambda: write_results(recipe.run_dir))
        finally:
            stream.close()
    except Exception as error:
        if not isinstance(error, UserError | Stopped) and not stop.reason():
            ranks.fail()
        raise
    stream.log.say(format_summary(results))
    stream.log.say(f"report: {recipe.run_dir / 'report.md'}")
    ranks.part()
    return results


def rescore(run_dir: Path, *, missing_only: bool = False) -> None:
    """Score every stage of a finished or unfinished run again, with its own recipe; or only cells that are missing."""
    read_run(run_dir)  # a folder that is no run is named as such
    recipe = Recipe.load_resolved(run_dir.resolve() / "recipe.yaml")
    recipe = recipe.model_copy(update={"output": Output(dir=str(run_dir.resolve()))})  # it may have been moved
    stop = StopRequest()
    try:
        stream = _open(recipe, Ranks.start(), stop)
        try:
            stream.score_again(missing_only=missing_only)
        finally:
            stream.close()
    except Stopped as reason:
        print(f"stopped: {reason}; run the same command again", file=sys.stderr)
        raise SystemExit(STOPPED_EXIT_CODE) from None


def _open(recipe: Recipe, ranks: Ranks, stop: StopRequest, *, share: bool = False) -> Stream:
    """Read and check everything, then take the run's folder: until then nothing is written."""
    ranks.together(lambda: deepspeed_config(recipe.engine, recipe.training, ranks.world))
    workload = load_workload(recipe, ranks)
    ranks.check_stop(stop)
    folder = RunFolder(recipe.run_dir)
    facts = run_facts(workload)
    retention = RetentionBook(workload, ranks)
    facts["retention"] = retention.facts()
    facts["references"] = ranks.on_first(lambda: read_references(recipe.evaluation.references, facts))
    log = RunLog(None, console=False)

    def take() -> None:
        nonlocal log
        resumed = folder.open(recipe)
        folder.check_data(facts)
        log = RunLog(folder.path / "metrics.jsonl", console=True)
        log.say(f"{'going on with' if resumed else 'starting'} {folder.path}: {ranks.world} rank(s), {ranks.device}")

    ranks.on_first(take)
    processes = ranks.gather(this_process())
    ranks.on_first(lambda: folder.write_pids(processes))
    return Stream(workload, ranks, folder, log, stop, facts, retention, share=share)
