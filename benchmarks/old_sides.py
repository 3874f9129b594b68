"""How much of what LB-CL learns lies in old tasks' spans: `python benchmarks/old_sides.py RUN [RUN ...]`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/old_sides.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
from collections.abc import Iterator, Sequence

import torch

from benchmarks.finished_runs import FinishedRun
from data_prep.errors import UserError
from pipeline.adapters.triplet import Triplets, triplets_of


def shares(old: Sequence[Triplets], new: Triplets) -> torch.Tensor:
    """`||dW||^2`, and of it what has old inputs, old outputs, both [4]; float64, the scale left out."""
    P = torch.linalg.qr(torch.cat([part.V.double() for part in old]).mT).Q  # [d_in, R]
    Q = torch.linalg.qr(torch.cat([part.U.double() for part in old], dim=1)).Q  # [d_out, R]
    dW = (new.U * new.sigma).double() @ new.V.double()
    return torch.stack([part.square().sum() for part in (dW, dW @ P, Q.mT @ dW, Q.mT @ dW @ P)])


def sums(run: FinishedRun) -> Iterator[tuple[str, torch.Tensor]]:
    """By task from the second on, over all layers."""
    past: dict[str, list[Triplets]] = {}
    for task, method, _ in run.stages():
        found = triplets_of(method._past[-1])
        if past:
            yield (
                task.name,
                torch.stack([shares(past[name], new) for name, new in found.items() if name in past]).sum(0),
            )
        for name, new in found.items():
            past.setdefault(name, []).append(new)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/old_sides.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    options = parser.parse_args()
    try:
        for folder in options.runs:
            run = FinishedRun(folder)
            if run.recipe.method.name != "lbcl":
                raise UserError(f"{folder}: a run of {run.recipe.method.name}; give runs of lbcl")
            for name, (whole, inputs, outputs, both) in sums(run):
                either = (inputs + outputs - both) / whole
                print(f"{folder.name}  {name:12} an old side {either:6.1%}  two {both / whole:6.1%}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
