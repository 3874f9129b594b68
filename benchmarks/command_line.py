"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.pairs import Report, table, write_json
from benchmarks.streams import MODELS
from data_prep.errors import UserError


def writable(path: str) -> Path:
    """A file to write at the end, whose folder is there now: nobody measures for an hour to learn that it is not."""
    if not Path(path).resolve().parent.is_dir() or Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no folder to write that file in; make it first, or name another")
    return Path(path)


def run(
    file: str, about: str | None, parts: Sequence[str], measure: Callable[[Report, argparse.Namespace], None]
) -> int:
    """Let `measure` fill a report as the command line asks, on one thread; returns the exit code.

    It is given `what`, one of `parts` or "all"; `models`; `pairs`; `only`.
    """
    parser = argparse.ArgumentParser(prog=f"python benchmarks/{Path(file).name}", description=about)
    parser.add_argument("what", nargs="?", default="all", choices=(*parts, "all"))
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--only", default="", metavar="TEXT", help="of single layers, those whose name holds TEXT")
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    arguments = {key: value for key, value in vars(options).items() if key != "json"}
    options.models = [options.model] if options.model else MODELS
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop
    report = Report()
    print(table([]), flush=True)
    try:
        measure(report, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        write_json(options.json, report.ratios, report.stated, arguments)
    return 0
