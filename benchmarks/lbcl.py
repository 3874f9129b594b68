"""What LB-CL costs: `python benchmarks/lbcl.py [step|start|memory|all]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/lbcl.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import gorp_costs
from benchmarks.pairs import Report, compare, compare_built, table, write_json
from benchmarks.tasks import STREAM, Batch, Bench, PlainTraining
from data_prep.errors import UserError
from pipeline.adapters.triplet import Triplets
from pipeline.context import Context

MODELS = ("mini_t5", "mini_llama2")
MEMORY_STEPS = 2  # of each old task: its triplets then leave the span that they were injected in
Work = Callable[[int], object]


class Streams:
    """Methods as they stand before their second task and before the stream's last."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.bench = Bench(model, ["dbpedia", "SST-2", "agnews"])
        self._between = Bench(model, STREAM[1:-1], order="order4")  # whose prompts have room for MultiRC
        self._after: dict[tuple[str, int], Any] = {}

    def after(self, name: str, tasks: int) -> Any:
        """The method after so many tasks; LB-CL has learnt each a little, O-LoRA's old factors may be any."""
        if tasks == 0:
            return self.bench.method(name)
        if (name, tasks) not in self._after:
            method = copy.deepcopy(self.after(name, tasks - 1))
            bench = self.bench if tasks == 1 else self._between
            bench.remember(method, STREAM[tasks - 1], tasks, steps=MEMORY_STEPS if name == "lbcl" else 0)
            self._after[name, tasks] = method
        return self._after[name, tasks]

    def begin(self, method: Any, task: str, index: int) -> tuple[Context, PlainTraining]:
        """A copy of the method at the start of a task."""
        return self.bench.begin(copy.deepcopy(method), task, index)


def step(report: Report, streams: Streams, pairs: int) -> None:
    """A training step, regulariser included: against `inclora`, and at task 15 against task 2; `olora` beside it."""
    plain, last = (streams.after("inclora", 0), 2), len(STREAM)
    early, late = (streams.after("lbcl", 1), 2), (streams.after("lbcl", 14), last)
    bases = {name: f"{late[0].memory[name].rank}/{late[0].memory[name].width}" for name in late[0].memory}
    report.state(f"{streams.model}: k/d after 14 tasks", bases)
    report.state(f"{streams.model}: bytes of all joint bases after 14 tasks", late[0].memory.bytes)
    olora = (streams.after("olora", 14), last)

    def measure(name: str, task: str, size: int, first: Any, second: Any, goal: float | None) -> None:
        def build() -> tuple[Work, Work]:
            (ctx, one), (_, other) = (streams.begin(method, task, index) for method, index in (first, second))
            batches = streams.bench.steps(ctx, task, micro_batch=size)

            def on(training: PlainTraining) -> Work:
                return lambda index: training.step(batches[index % len(batches)])

            return on(one), on(other)

        title = f"{streams.model}: step, {task}, {16 // size} x {size}: {name}"
        report.add(compare_built(title, build, pairs=pairs if goal else max(pairs // 4, 8), goal=goal))

    for task, size, goal in (("agnews", 16, 1.10), ("agnews", 8, None), ("SST-2", 16, None), ("SST-2", 8, None)):
        measure("lbcl / inclora", task, size, early, plain, goal)
    measure("lbcl at task 15 / at task 2", "agnews", 16, late, early, 1.02)
    measure("lbcl at task 15 / inclora", "agnews", 16, late, plain, None)
    measure("olora at task 15 / inclora", "agnews", 16, olora, plain, None)


class Separate(nn.Module):
    """A layer with each old task's triplets beside it as trainable tensors: what one pass with hooks replaces."""

    def __init__(self, base: nn.Module, past: Sequence[Triplets], scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        parts = [part for triplets in past for part in (triplets.U, triplets.sigma, triplets.V)]
        self.parts = nn.ParameterList(nn.Parameter(part.clone()) for part in parts)

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """All branches, one after another."""
        y: Tensor = self.base(x)
        for index in range(0, len(self.parts), 3):
            U, sigma, V = self.parts[index : index + 3]
            y = y + self.scale * nn.functional.linear(nn.functional.linear(x, V) * sigma, U)
        return y


def start(report: Report, streams: Streams, pairs: int) -> None:
    """Sensitivity and injection at task 15: as a share of the task's training time, and against separate modules."""
    method, last = streams.after("lbcl", 14), len(STREAM)
    bench, task = streams.bench, STREAM[-1]
    bare, _ = streams.begin(streams.after("inclora", 0), task, last)
    ours = copy.deepcopy(method)
    ctx, training = streams.begin(method, task, last)
    steps = bench.steps(ctx, task, micro_batch=bench.recipe.training.micro_batch_size)
    some = steps[:: max(len(steps) // 8, 1)]
    total = bench.tasks[task].training.epochs * len(steps)
    # A plain backbone with its engine forgotten: the pass runs before training.
    bare._engine = None
    layers = bare.model
    for name, module in list(layers.named_modules()):
        if hasattr(module, "A_projector"):
            layers.set_submodule(name, module.base)
    rows, _ = ours._seed_rows(bare)

    def train(_: int) -> None:
        for micro_batches in some:
            training.step(micro_batches)

    name = f"{streams.model}: sensitivity and injection / {total} steps of {task}, task 15"
    share = compare(
        name,
        lambda _: ours._injection(bare, rows),
        train,
        pairs=max(pairs // 10, 10),
        goal=0.02,
        scale=len(some) / total,
    )
    report.add(share)
    apart, _ = streams.begin(streams.after("inclora", 0), task, last)
    apart._engine = None
    for layer, past in ours._old_triplets().items():
        base: Any = apart.model.get_submodule(layer)
        apart.model.set_submodule(layer, Separate(base.base, past, ours.kind.scale))

    peaks = {
        "one pass, with injection": gorp_costs.peak_bytes(lambda: ours._injection(bare, rows)),
        "the same pass alone": gorp_costs.peak_bytes(lambda: bare.run_rows(rows, backward=True)),
        "old triplets": sum(4 * part.numel() for tensors in ours._past for part in tensors.values()),
    }
    report.state(f"{streams.model}: bytes before task 15, at the most above what stood before", peaks)

    def separately(_: int) -> None:
        apart.run_rows(rows, backward=True)
        apart.model.zero_grad()

    name = f"{streams.model}: one pass with injection / separate modules' pass, task 15"
    report.add(compare(name, lambda _: ours._injection(bare, rows), separately, pairs=max(pairs // 10, 10)))


def memory(report: Report, streams: Streams, _: int) -> None:
    """Peak bytes of a step above what stands between steps, and with it, at task 15: against `inclora` and `olora`."""
    last, found = len(STREAM), {}
    for name, method in (
        ("inclora", streams.after("inclora", 0)),
        ("olora", streams.after("olora", 14)),
        ("lbcl", streams.after("lbcl", 14)),
    ):
        ctx, training = streams.begin(method, "agnews", last)
        batches = max(streams.bench.steps(ctx, "agnews", micro_batch=16), key=_positions)
        training.step(batches)
        held = [*training.module.parameters(), *training.module.buffers()]
        held += [old for _, old in getattr(training.method, "_old", [])]
        for state in training.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        for group in training.module._together._groups or ():
            held += [group.starts, group.matrices]
        found[name] = gorp_costs.resident_bytes(held) + gorp_costs.peak_bytes(lambda: training.step(batches))  # noqa: B023
    report.state(f"{streams.model}: peak bytes of a step at task 15, agnews, 1 x 16", found)
    report.state(f"{streams.model}: lbcl / olora", f"{found['lbcl'] / found['olora']:.3f} (the paper: 1.14)")


def _positions(step: list[Batch]) -> int:
    return max(batch["input_ids"].numel() for batch in step)


def main() -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python benchmarks/lbcl.py", description=__doc__)
    parser.add_argument("what", nargs="?", default="all", choices=("step", "start", "memory", "all"))
    parser.add_argument("--model", choices=MODELS, help="both by default")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="OUT")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop
    report = Report()
    print(table([]), flush=True)
    try:
        for model in [options.model] if options.model else MODELS:
            streams = Streams(model)
            for part in (start, memory, step):
                if options.what in (part.__name__, "all"):
                    part(report, streams, options.pairs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        arguments = {key: value for key, value in vars(options).items() if key != "json"}
        write_json(options.json, report.ratios, report.stated, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
