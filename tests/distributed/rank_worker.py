"""One rank: runs every case of CASES in one process group. `rank_worker.py CASES BACKBONES OUT`."""

import pickle
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from rank_cases import Case
from rank_runs import RUNS, Job

from pipeline.engine import Ranks


def main(cases: Path, backbones: Path, out: Path) -> None:
    """Each case's result goes to `<case>.<rank>.pt`; an error in a case is its result."""
    warnings.filterwarnings("error", module=r"(pipeline|data_prep)\b")  # as pytest has it, of our own code
    torch.set_num_threads(1)
    ranks = Ranks.start(timeout_minutes=1)
    todo: list[Case] = pickle.loads(cases.read_bytes())
    for case in todo:
        started = time.monotonic()
        result = run(case, ranks, backbones, out)
        result["seconds"] = time.monotonic() - started
        part = out / f"{case}.{ranks.rank}.part"
        torch.save(result, part)
        part.rename(part.with_suffix(".pt"))
        ranks.gather(None)  # wait for each other


def run(case: Case, ranks: Ranks, backbones: Path, out: Path) -> dict[str, Any]:
    job = Job(case, ranks, backbones, scratch=out)
    try:
        return RUNS[case.run](job)
    except Exception:  # the other cases are still worth running; the test of this one shows it
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
