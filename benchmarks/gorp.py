"""What GORP costs: `python benchmarks/gorp.py [step|growth|layers|naive|memory|flops|all]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/gorp.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks import command_line, gorp_costs, gorp_layers
from benchmarks.pairs import Report, compare_built
from benchmarks.streams import Streams
from benchmarks.tasks import SETTINGS, STREAM, Batch, Bench, PlainTraining
from pipeline.adapters.core import CoreLinear
from pipeline.models import skeleton
from pipeline.projection.sketch import Sketch

WINDOW = SETTINGS["gorp"].refresh_every  # steps: with one refresh
MEMORY_STEPS = 15  # of each old task: beyond Adam's horizon of ten, as its first moment is at a real task's end
REFRESH = "refresh, on the host beside the masters"
Work = Callable[[int], object]


def step(report: Report, streams: Streams, pairs: int) -> None:
    """The mean step, refreshes included, against `inclora`; `olora` beside it."""
    plain, gorp = streams.after("inclora", 0), streams.after("gorp", 1)
    olora, late_olora = (streams.after("olora", 1), 2), (streams.after("olora", 14), len(STREAM))
    for task, micro_batch in (("agnews", 16), ("agnews", 8), ("SST-2", 16), ("SST-2", 8)):
        sides = (gorp, 2), (plain, 2)
        _windows(report, streams, "gorp / inclora", task, micro_batch, *sides, pairs=pairs, goal=1.10)
    _windows(report, streams, "inclora / inclora (noise)", "agnews", 16, (plain, 2), (plain, 2), pairs=pairs)
    _windows(report, streams, "olora at task 2 / inclora", "agnews", 16, olora, (plain, 2), pairs=pairs)
    _windows(report, streams, "olora at task 15 / inclora", "agnews", 16, late_olora, (plain, 2), pairs=pairs)


def growth(report: Report, streams: Streams, pairs: int) -> None:
    """The mean step at task 15 against task 2: a goal of 2 %, as much as builds differ, so of many builds."""
    gorp, late = streams.after("gorp", 1), streams.after("gorp", 14)
    _state_memory(report, streams.model, late)
    sides = (late, len(STREAM)), (gorp, 2)
    _windows(report, streams, "gorp at task 15 / at 2", "agnews", 16, *sides, pairs=4 * pairs, goal=1.02, each=4)


def naive(report: Report, streams: Streams, pairs: int) -> None:
    """The same method with `svd: exact`, which forms G: what sketches save, against `inclora`."""
    plain, exact = streams.after("inclora", 0), copy.deepcopy(streams.after("gorp", 1))
    exact.settings = exact.settings.model_copy(update={"svd": "exact"})
    _windows(report, streams, "gorp, svd exact / inclora", "agnews", 16, (exact, 2), (plain, 2), pairs=pairs)


def _windows(
    report: Report,
    streams: Streams,
    name: str,
    task: str,
    micro_batch: int,
    first: tuple[Any, int],
    second: tuple[Any, int],
    *,
    pairs: int,
    goal: float | None = None,
    each: int = 2,
) -> None:
    """Both train on the same ten steps, in turns: one refresh in each pair; `each` pairs a build, 8 builds or more."""

    def build() -> tuple[Work, Work]:
        one, other = (streams.begin(method, task, index) for method, index in (first, second))
        batches = streams.batches(one, task, micro_batch)

        def on(training: PlainTraining) -> Work:
            return lambda number: training.step(batches[number % len(batches)])

        return on(one), on(other)

    title = f"{streams.model}: 10 steps, {task}, {16 // micro_batch} x {micro_batch}: {name}"
    count = max(pairs // (8 if goal is not None else 16), 2)
    builds = min(count, max(count // each, 8))
    report.add(compare_built(title, build, pairs=count, builds=builds, goal=goal, warm_up=1, parts=WINDOW))


def _state_memory(report: Report, model: str, gorp: Any) -> None:
    spaces: dict[str, list[float]] = {}
    for name in gorp.memory:
        spaces.setdefault(name[-1], []).append(gorp.memory[name].rank)
    ranks = {part: round(sum(found) / len(found), 1) for part, found in spaces.items()}
    report.state(f"{model}: mean directions of A, B and cores after 14 tasks", ranks)
    report.state(f"{model}: bytes of all bases after 14 tasks", gorp.memory.bytes)


def memory(report: Report, streams: Streams, _: int) -> None:
    """Peak bytes of a step on the device, and of a refresh on the host."""
    model = streams.model
    plain, gorp, late = streams.after("inclora", 0), streams.after("gorp", 1), streams.after("gorp", 14)
    for micro_batch in (16, 8):
        title = f"{model}: peak bytes of a step, agnews, {16 // micro_batch} x {micro_batch}"
        batches = streams.longest("agnews", micro_batch)
        base = _peaks(streams, plain, 2, batches)["step"]
        found = {"inclora": base}
        for name, method, index in (("gorp at task 2", gorp, 2), ("gorp at task 15", late, len(STREAM))):
            peaks = _peaks(streams, method, index, batches)
            found |= {f"{name}, {part}": peak for part, peak in peaks.items()}
            ratio = max(peak for part, peak in peaks.items() if part != REFRESH) / base
            verdict = "met" if ratio <= 1.10 else "missed"
            report.state(f"{title}: {name} / inclora", f"{ratio:.3f} (goal 1.10: {verdict})")
        report.state(title, found)
    sizes = gorp_costs.bytes_of(_backbone(streams.bench, gorp))
    report.state(f"{model}: bytes", {key: round(value) for key, value in sizes.items()})


def _backbone(bench: Bench, gorp: Any) -> gorp_costs.Backbone:
    """The layers of a mini; nothing that is asked of it here depends on tokens."""
    model = skeleton(bench.workload.model_folder, bench.recipe.model.family)

    def shapes(names: Sequence[str]) -> list[gorp_costs.Layers]:
        layers: list[Any] = [model.get_submodule(name) for name in names]
        return [gorp_costs.Layers(1, layer.in_features, layer.out_features, tokens=0) for layer in layers]

    return gorp_costs.Backbone(bench.name, shapes(gorp.kind.targets), shapes(gorp.kind.cores), micro_batches=1)


def _peaks(streams: Streams, method: Any, index: int, batches: list[Batch]) -> dict[str, int]:
    """All bytes that lie on the device in a step, at the most, and those that the work after it takes."""
    training = streams.begin(method, "agnews", index)
    peaks = {}
    for number in range(1, WINDOW + 1):
        if number in (WINDOW // 2, WINDOW):
            kind = "window's last step" if number == WINDOW else "step"
            peaks[kind] = _peak(training, batches)
            peaks[REFRESH] = gorp_costs.peak_bytes(training.finish)
        else:
            training.step(batches)
    return peaks


def _peak(training: PlainTraining, micro_batches: list[Batch]) -> int:
    standing = gorp_costs.resident_bytes(list(_on_device(training)))
    return standing + gorp_costs.peak_bytes(lambda: training.learn(micro_batches))


def _on_device(training: PlainTraining) -> Iterator[Tensor]:
    """What a device holds between steps; masters and the memory lie on the host."""
    yield from training.module.parameters()
    yield from training.module.buffers()
    for state in training.optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))
    for group in training.module._together._groups or ():
        yield from (group.starts, group.matrices)
    for layer in training.module.modules():
        for sums in layer.collecting if isinstance(layer, CoreLinear) else ():
            assert isinstance(sums, Sketch)
            yield from (sums._Omega, sums._Psi, *sums.sums.values())


def flops(report: Report, streams: Streams, _: int) -> None:
    """Operations of a step by torch's counter."""
    methods = {
        "inclora": (streams.after("inclora", 0), 2),
        "olora at task 2": (streams.after("olora", 1), 2),
        "olora at task 15": (streams.after("olora", 14), len(STREAM)),
        "gorp at task 2": (streams.after("gorp", 1), 2),
        "gorp at task 15": (streams.after("gorp", 14), len(STREAM)),
    }
    found: dict[str, int] = {}
    batches = streams.longest("agnews", 16)
    for name, (method, index) in methods.items():
        training = streams.begin(method, "agnews", index)
        counts = [gorp_costs.counted(partial(training.step, batches)) for _ in range(WINDOW)]
        found[name] = sum(counts) // WINDOW
        if name.startswith("gorp"):
            found[f"{name}, its plain steps"] = counts[0]
    report.state(f"{streams.model}: operations of a mean step, agnews, 1 x 16 (counted; SVDs are not)", found)


def costs(report: Report, what: str) -> None:
    """By formula, for the large backbones."""
    for backbone in gorp_costs.LARGE:
        if what in ("flops", "all"):
            for task in (2, 15):
                found = gorp_costs.constraint_operations(backbone, task)
                rounded = {key: f"{value:.3g}" for key, value in found.items()}
                report.state(f"{backbone.name}: operations of a mean step at task {task}", rounded)
        if what in ("memory", "all"):
            sizes = {key: round(value) for key, value in gorp_costs.bytes_of(backbone).items()}
            report.state(f"{backbone.name}: bytes", sizes)


def measure(report: Report, options: argparse.Namespace) -> None:
    """What the command line asks for."""
    for model in options.models:
        chosen = [part for part in (step, growth, naive, memory, flops) if options.what in (part.__name__, "all")]
        streams = Streams(model, steps={"gorp": MEMORY_STEPS}) if chosen else None
        for part in chosen:
            assert streams is not None
            part(report, streams, options.pairs)
    costs(report, options.what)
    if options.what in ("layers", "all"):
        gorp_layers.layers(report, options.pairs, options.only)
    if options.what in ("naive", "all"):
        gorp_layers.naive(report)


if __name__ == "__main__":
    sys.exit(command_line.run(__file__, __doc__, ("step", "growth", "layers", "naive", "memory", "flops"), measure))
