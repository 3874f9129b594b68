"""Where old tasks' outputs move: `python benchmarks/old_outputs.py RUN [RUN ...] [--rows 96] [--json OUT]`.

Legend: X what a layer reads of a task's training rows in the model as that task left it, a column a token;
C = X X^T [d_in, d_in]; W the layer's weight then, W_end after the last task.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/old_outputs.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command_line import writable
from benchmarks.finished_runs import FinishedRun
from benchmarks.tasks import OneRank
from data_prep.errors import UserError
from pipeline.adapters.forwards import inputs_seen
from pipeline.context import Context
from pipeline.methods.feature_pass import feature_sample
from pipeline.projection.features import SecondMoments
from pipeline.projection.subspace import Subspace
from pipeline.workload import StreamTask


@dataclass(frozen=True)
class Then:
    """A task as its own stage saw it."""

    C: Mapping[str, Tensor]  # by layer
    weights: Mapping[str, Tensor]
    protected: Mapping[str, Subspace]  # of inputs, from then on
    loss: float


@dataclass(frozen=True)
class OldTask:
    """What became of one old task by the end."""

    run: str
    method: str
    task: str
    protected_energy: float | None  # mean over layers of the share of X's energy in the directions kept from changing
    moved: float  # mean over layers of ||(W_end - W) X|| / ||W X||
    moved_by_part: Mapping[str, float]  # the same over the layers whose names end alike
    loss: float  # per label token, then
    loss_at_end: float
    exact_match: float
    exact_match_at_end: float


class Run(FinishedRun):
    """A finished run, its stages looked at one after another."""

    def old_tasks(self, row_count: int) -> list[OldTask]:
        """Each task but the last. `UserError` for a quantized backbone, whose weights no longer hold what is learnt."""
        if self.recipe.model.quantization is not None:
            raise UserError(f"{self.folder}: its backbone is quantized; outputs are compared through whole weights")
        seen = []
        for task, method, model in self.stages():
            seen.append(self._look(model, task, row_count, self._protected(method)))
        end = self._layers(model)
        matrix = self.results["matrix"]["exact_match"]
        found = []
        for task, then in zip(self.workload.tasks[:-1], seen, strict=False):
            shares = [then.protected[layer].share(C) for layer, C in then.C.items() if layer in then.protected]
            moved = {layer: _moved(then.weights[layer], end[layer].weight, C) for layer, C in then.C.items()}
            parts = {layer.rpartition(".")[2] for layer in moved}
            ctx = self._context(model, task)
            found.append(
                OldTask(
                    run=self.folder.name,
                    method=self.recipe.method.name,
                    task=task.name,
                    protected_energy=_mean(shares) if shares else None,
                    moved=_mean(moved.values()),
                    moved_by_part={
                        part: _mean(value for layer, value in moved.items() if layer.rpartition(".")[2] == part)
                        for part in sorted(parts)
                    },
                    loss=then.loss,
                    loss_at_end=ctx.run_rows(feature_sample(ctx, row_count), backward=False),
                    exact_match=matrix[task.index - 1][task.index - 1],
                    exact_match_at_end=matrix[-1][task.index - 1],
                )
            )
        return found

    def _layers(self, model: nn.Module) -> dict[str, Any]:
        return {name: model.get_submodule(name) for name in self.workload.targets}

    def _context(self, model: nn.Module, task: StreamTask) -> Context:
        return Context(
            model,
            ranks=OneRank(),
            family=self.recipe.model.family,
            pad_id=int(self.workload.tokenizer.pad_token_id or 0),
            targets=self.workload.targets,
            task_index=task.index,
            examples=task.train,
            micro_batch_size=self.recipe.training.micro_batch_size,
            seed=self.recipe.seed,
        )

    def _look(self, model: nn.Module, task: StreamTask, row_count: int, protected: Mapping[str, Subspace]) -> Then:
        ctx, layers = self._context(model, task), self._layers(model)
        moments = SecondMoments(layers)
        with inputs_seen(lambda name, x: moments.add(name, x, ctx.real_positions(x.shape[1])), layers):
            loss = ctx.run_rows(feature_sample(ctx, row_count), backward=False)
        weights = {name: layer.weight.detach().float().clone() for name, layer in layers.items()}
        return Then(moments.sums, weights, protected, loss)

    def _protected(self, method: Any) -> dict[str, Subspace]:
        """By layer, the directions of its inputs that the method keeps from now on; O-LoRA's penalty: all old A's."""
        if self.recipe.method.name == "olora":
            factors = method.active()
            return {
                layer: Subspace(torch.linalg.qr(torch.cat([part.A for part in parts]).mT).Q)
                for layer, parts in factors.items()
            }
        memory = getattr(method, "memory", {})
        spaces = {}
        for layer in self.workload.targets:
            for space in (layer, f"{layer}.A", f"{layer}.V"):
                if len(memory) and memory.leader(space) in set(memory):
                    spaces[layer] = memory[space]
        return spaces


def _moved(before: Tensor, after: Tensor, C: Tensor) -> float:
    """`||(after - before) X|| / ||before X||` from C alone."""
    change, C = (after.float() - before).double(), C.double()
    return float((((change @ C) * change).sum() / ((before.double() @ C) * before.double()).sum()).sqrt())


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found)


def table(found: Sequence[OldTask]) -> str:
    """As text, a line a task."""
    lines = [f"{'run':34} {'task':10} {'protected':>9} {'moved':>6} {'loss':>6} {'at end':>7} {'EM':>5} {'at end':>6}"]
    for old in found:
        share = "-" if old.protected_energy is None else f"{100 * old.protected_energy:.1f} %"
        lines.append(
            f"{old.run:34} {old.task:10} {share:>9} {old.moved:6.2f} {old.loss:6.2f} {old.loss_at_end:7.2f} "
            f"{old.exact_match:5.1f} {old.exact_match_at_end:6.1f}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/old_outputs.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--rows", type=int, default=96, help="training rows of each old task, drawn from the seed")
    parser.add_argument("--json", type=writable, metavar="OUT")
    options = parser.parse_args()
    found: list[OldTask] = []
    print(table([]), flush=True)
    try:
        for folder in options.runs:
            found += (of_run := Run(folder).old_tasks(options.rows))
            print("\n".join(table(of_run).splitlines()[1:]), flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps([asdict(old) for old in found], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
