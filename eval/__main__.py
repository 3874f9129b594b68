"""`python -m eval RUN [RUN...]`: count the scores of runs again, rewrite their reports, compare them."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import write_atomic
from eval.compared_runs import ComparedRun, expand, load_runs
from eval.comparison_page import format_comparison
from eval.comparison_report import compare
from eval.comparison_tables import averages_to_csv, to_csv, to_markdown
from eval.recount import recount
from eval.report import write_results
from eval.summary import format_summary

USER_FAULT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild each run that is named; 0, or 2 where one had a fault (the others are still done)."""
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description="Rebuild results.json and report.md of runs from their predictions; of several, compare them.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, or a glob of several")
    parser.add_argument("--rescore", action="store_true", help="run the models again, from the run's stages")
    parser.add_argument("--fill", action="store_true", help="score what is missing, from the run's stages")
    parser.add_argument("--against", metavar="METHOD", help="the method that the others are paired with (inclora)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write comparison.md, .html, .csv, .json and averages.csv there"
    )
    options = parser.parse_args(arguments)
    code = 0
    done: list[Path] = []
    try:
        folders = expand(options.runs)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return USER_FAULT
    for run_dir in folders:
        try:
            _rebuild(run_dir, rescore=options.rescore, fill=options.fill)
            done.append(run_dir)
        except (UserError, OSError) as fault:
            print(f"error: {fault}", file=sys.stderr)
            code = USER_FAULT
    if len(done) < 2 and options.out is None:
        return code
    try:
        _compare(load_runs(done), options.against, options.out)
    except (UserError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return USER_FAULT
    return code


def _rebuild(run_dir: Path, *, rescore: bool, fill: bool) -> None:
    """Rewrite the counts, results.json and report.md of one run and print its matrix."""
    kept = (run_dir / "results.json").is_file() and not (run_dir / "run.json").exists()
    if kept and not (rescore or fill):  # results alone, such as those under benchmarks/results: nothing to count
        return
    if rescore or fill:
        # Here and not above: recounting needs no models, nor the seconds that their libraries take to load.
        from pipeline.runs import rescore as run_models_again

        run_models_again(run_dir, missing_only=not rescore)
    cells, changed = recount(run_dir)
    results = write_results(run_dir)
    print(f"{run_dir}: {cells} cells counted from their predictions, {changed} changed")
    print(format_summary(results))
    print(f"report: {run_dir / 'report.md'}")


def _compare(runs: Sequence[ComparedRun], against: str | None, out: Path | None) -> None:
    labels = sorted({run.label for run in runs})
    if against is not None and against not in labels:
        raise UserError(f"--against: no run of {against!r}; there are {', '.join(labels)}")
    if against is None and "inclora" in labels:
        against = "inclora"
    content = compare(runs, against=against)
    print(report := to_markdown(content))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "comparison.md", report)
        write_atomic(out / "comparison.csv", to_csv(content))
        write_atomic(out / "averages.csv", averages_to_csv(content))
        write_atomic(out / "comparison.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write_atomic(out / "comparison.html", format_comparison(content))
        print(f"written: {out / 'comparison.md'}, .html, .csv, .json, averages.csv")


if __name__ == "__main__":
    sys.exit(main())
