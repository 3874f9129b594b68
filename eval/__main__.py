"""`python -m eval RUN [RUN...]`: count the scores of runs again and rewrite their reports."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import UserError
from eval.recount import recount
from eval.report import write_results
from eval.summary import format_summary

USER_FAULT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Rebuild each run that is named; 0, or 2 where one had a fault (the others are still done)."""
    parser = argparse.ArgumentParser(
        prog="python -m eval",
        description="Rebuild results.json and report.md of runs from their predictions.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--rescore", action="store_true", help="run the models again, from the run's stages")
    options = parser.parse_args(arguments)
    code = 0
    for run_dir in options.runs:
        try:
            _rebuild(run_dir, rescore=options.rescore)
        except (UserError, OSError) as fault:
            print(f"error: {fault}", file=sys.stderr)
            code = USER_FAULT
    return code


def _rebuild(run_dir: Path, *, rescore: bool) -> None:
    """Rewrite the counts, results.json and report.md of one run and print its matrix."""
    if rescore:
        # Here and not above: recounting needs no models, nor the seconds that their libraries take to load.
        from pipeline.runs import rescore as run_models_again

        run_models_again(run_dir)
    cells, changed = recount(run_dir)
    results = write_results(run_dir)
    print(f"{run_dir}: {cells} cells counted from their predictions, {changed} changed")
    print(format_summary(results))
    print(f"report: {run_dir / 'report.md'}")


if __name__ == "__main__":
    sys.exit(main())
