"""What LB-CL costs: `python benchmarks/lbcl.py [step|growth|start|memory|all]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/lbcl.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from benchmarks import command_line, gorp_costs
from benchmarks.pairs import Report, compare, compare_built
from benchmarks.streams import Streams
from benchmarks.tasks import STREAM, PlainTraining
from pipeline.adapters.triplet import Triplets

WINDOW = 10  # steps of a pair where the goal is as small as what builds differ by
MEMORY_STEPS = 2  # of each old task: its triplets then leave the span that they were injected in
Work = Callable[[int], object]


def step(report: Report, streams: Streams, pairs: int) -> None:
    """A training step, regulariser included, against `inclora`; `olora` and separate modules beside it."""
    plain, last = (streams.after("inclora", 0), 2), len(STREAM)
    early, late = (streams.after("lbcl", 1), 2), (streams.after("lbcl", 14), last)
    olora = (streams.after("olora", 14), last)
    few = max(pairs // 4, 8)
    for task, size, goal in (("agnews", 16, 1.10), ("agnews", 8, None), ("SST-2", 16, None), ("SST-2", 8, None)):
        build = _sides(streams, task, size, early, plain)
        title = _title(streams, task, size, "lbcl / inclora")
        report.add(compare_built(title, build, pairs=pairs if goal else few, goal=goal))
    for name, first, apart in (
        ("lbcl at task 15 / inclora", late, False),
        ("olora at task 15 / inclora", olora, False),
        ("old triplets as separate modules at task 15 / inclora", late, True),
    ):
        build = _sides(streams, "agnews", 16, first, plain, apart=apart)
        report.add(compare_built(_title(streams, "agnews", 16, name), build, pairs=few))


def growth(report: Report, streams: Streams, pairs: int) -> None:
    """A step at task 15 against one at task 2: a goal of 2 %, as much as builds differ, so windows of many builds."""
    early, late = (streams.after("lbcl", 1), 2), (streams.after("lbcl", 14), len(STREAM))
    bases = {name: f"{late[0].memory[name].rank}/{late[0].memory[name].width}" for name in late[0].memory}
    report.state(f"{streams.model}: k/d after 14 tasks", bases)
    report.state(f"{streams.model}: bytes of all joint bases after 14 tasks", late[0].memory.bytes)
    batches = streams.longest("agnews", 16)
    counts = [
        gorp_costs.counted(partial(streams.begin(method, "agnews", index).step, batches))
        for method, index in (late, early)
    ]
    report.state(f"{streams.model}: operations of a step (counted), task 15 / task 2", f"{counts[0] / counts[1]:.4f}")
    title = _title(streams, "agnews", 16, f"{WINDOW} steps, lbcl at task 15 / at task 2")
    build = _sides(streams, "agnews", 16, late, early)
    count = max(pairs // 2, 8)
    found = compare_built(title, build, pairs=count, builds=max(count // 4, 8), goal=1.02, warm_up=1, parts=WINDOW)
    report.add(found)


def _title(streams: Streams, task: str, size: int, name: str) -> str:
    return f"{streams.model}: step, {task}, {16 // size} x {size}: {name}"


def _sides(
    streams: Streams, task: str, size: int, first: Any, second: Any, *, apart: bool = False
) -> Callable[[], tuple[Work, Work]]:
    """Builds both sides anew, each a method and the number of its task, to train on the same rows."""

    def build() -> tuple[Work, Work]:
        one, other = (streams.begin(method, task, index) for method, index in (first, second))
        if apart:
            _set_apart(one)
        batches = streams.batches(one, task, size)

        def on(training: PlainTraining) -> Work:
            return lambda index: training.step(batches[index % len(batches)])

        return on(one), on(other)

    return build


def _set_apart(training: PlainTraining) -> None:
    """Beside each layer stand its old triplets as frozen modules; its weight, which holds them too, takes no less time.

    What is computed is wrong, so that this is for timing alone.
    """
    for layer, past in training.method._old_triplets().items():
        branched: Any = training.ctx.model.get_submodule(layer)
        branched.base = Separate(branched.base, past, training.method.kind.scale).requires_grad_(False)


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
    bare = streams.begin(streams.after("inclora", 0), task, last).ctx
    ours = copy.deepcopy(method)
    training = streams.begin(method, task, last)
    steps = streams.batches(training, task, bench.recipe.training.micro_batch_size)
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
    _, others = ours._seed_rows(bare)

    def look(_: int) -> None:
        for _ in range(2):  # at random starts and injected
            bare.score_rows(others)
        bare.run_rows(rows, backward=False)

    name = f"{streams.model}: losses and scores before training, noted / {total} steps of {task}, task 15"
    report.add(compare(name, look, train, pairs=max(pairs // 10, 10), scale=len(some) / total))
    apart = streams.begin(streams.after("inclora", 0), task, last).ctx
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
    """The most bytes on the device in a step at task 15, the backbone included: against `inclora` and `olora`."""
    last, found = len(STREAM), {}
    batches = streams.longest("agnews", 16)
    for name, method in (
        ("inclora", streams.after("inclora", 0)),
        ("olora", streams.after("olora", 14)),
        ("lbcl", streams.after("lbcl", 14)),
    ):
        training = streams.begin(method, "agnews", last)
        training.step(batches)
        for module in training.module.modules():
            if hasattr(module, "latest"):
                module.latest = None  # of the step before: each step makes its own
        held = [*training.module.parameters(), *training.module.buffers()]
        held += [old for _, old in getattr(training.method, "_old", [])]
        for state in training.optimizer.state.values():
            held += [value for value in state.values() if isinstance(value, Tensor)]
        for group in training.module._together._groups or ():
            held += [group.starts, group.matrices]
        found[name] = gorp_costs.resident_bytes(held) + gorp_costs.peak_bytes(partial(training.step, batches))
    report.state(f"{streams.model}: peak bytes of a step at task 15, agnews, 1 x 16", found)
    report.state(f"{streams.model}: lbcl / olora", f"{found['lbcl'] / found['olora']:.3f} (the paper: 1.14)")


def measure(report: Report, options: argparse.Namespace) -> None:
    """What the command line asks for."""
    for model in options.models:
        streams = Streams(model, steps={"lbcl": MEMORY_STEPS})
        for part in (start, memory, growth, step):
            if options.what in (part.__name__, "all"):
                part(report, streams, options.pairs)


if __name__ == "__main__":
    sys.exit(command_line.run(__file__, __doc__, ("step", "growth", "start", "memory"), measure))
