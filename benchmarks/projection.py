"""What projecting costs: `python benchmarks/projection.py [step|layers|features|growth|all]`; see README.md here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # `python benchmarks/projection.py` puts this folder first; ours start at the repository.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks import command_line
from benchmarks.pairs import Report, compare, compare_built
from benchmarks.tasks import STREAM, Bench, PlainTraining, copied
from pipeline.adapters.base import Trained
from pipeline.adapters.lora import LoraLinear
from pipeline.context import Context
from pipeline.methods.feature_pass import feature_sample, measure
from pipeline.projection.projector import projector, start_outside
from pipeline.projection.subspace import Subspace

Q_AND_V = {"mini_t5": ["q", "v"], "mini_llama2": ["q_proj", "v_proj"]}
# name, d_in, d_out
LAYERS = [
    ("T5-large attention", 1024, 1024),
    ("T5-large wo", 4096, 1024),
    ("T5-large v1.1 wo", 2816, 1024),
    ("LLaMA-2-7B attention", 4096, 4096),
    ("LLaMA-2-7B down", 11008, 4096),
]
RANK, SCALE = 8, 4.0
LONGEST_PAIR = 1.3  # seconds: projecting costs the same for any number of tokens, and a micro-batch has thousands
MOST_TOKENS = 8 * 512


def step(report: Report, model: str, pairs: int) -> None:
    """A training step: projected against plain, and at task 15 against task 2."""
    bench = Bench(model, ["dbpedia", "SST-2", "agnews"])
    between = Bench(model, STREAM[1:-1], order="order4")  # whose prompts have room for MultiRC
    pegp = bench.method("pegp")
    after_first = None
    memory = {}
    for index, task in enumerate(STREAM[:-1], start=1):
        (bench if index == 1 else between).remember(pegp, task, index)
        memory[f"{index} {task}"] = pegp.memory.bytes
        if index == 1:
            after_first = copied(pegp.state_dict())
    after_all = copied(pegp.state_dict())
    ranks = {name: f"{pegp.memory[name].rank}/{pegp.memory[name].width}" for name in pegp.memory}
    report.state(f"{model}: bytes of all bases (d x k x 4) after task", memory)
    report.state(f"{model}: k/d after 14 tasks", ranks)

    def trainer(name: str, state: Any, task: str, index: int) -> tuple[Any, PlainTraining]:
        return bench.begin(bench.method(name, state), task, index)

    def measure_steps(name: str, task: str, micro_batch: int, first: Any, second: Any, goal: float | None) -> None:
        """Both train on the same steps of the task, one after another."""

        def build() -> tuple[Callable[[int], None], Callable[[int], None]]:
            ctx, one = trainer(*first)
            _, other = trainer(*second)
            batches = bench.steps(ctx, task, micro_batch=micro_batch)

            def on(training: PlainTraining) -> Callable[[int], None]:
                return lambda index: training.step(batches[index % len(batches)])

            return on(one), on(other)

        title = f"{model}: step, {task}, {16 // micro_batch} x {micro_batch}: {name}"
        some = pairs if goal is not None else max(pairs // 4, 8)
        report.add(compare_built(title, build, pairs=some, goal=goal))

    for task, micro_batch, goal in (("agnews", 16, 1.03), ("agnews", 8, None), ("SST-2", 16, None), ("SST-2", 8, None)):
        projected, plain = ("pegp", after_first, task, 2), ("inclora", None, task, 2)
        measure_steps("pegp / inclora", task, micro_batch, projected, plain, goal)
    plain = ("inclora", None, "agnews", 2)
    measure_steps("inclora / inclora (noise)", "agnews", 16, plain, plain, None)
    late, early = ("pegp", after_all, "agnews", len(STREAM)), ("pegp", after_first, "agnews", 2)
    measure_steps("pegp at task 15 / at task 2", "agnews", 16, late, early, 1.02)


def layers(report: Report, pairs: int, only: str) -> None:
    """Single layers of real widths: forward and backward, projected against plain."""
    for name, d_in, d_out in (layer for layer in LAYERS if only in layer[0]):
        base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
        draw = torch.Generator().manual_seed(0)
        start = torch.randn(RANK, d_in, generator=draw) / d_in**0.5
        out = Trained(torch.randn(d_out, RANK, generator=draw) / RANK**0.5)
        plain = LoraLinear(base, Trained(start), out, SCALE, 0.0)
        tokens = MOST_TOKENS
        while tokens > 64 and 2 * _seconds(plain, tokens) > LONGEST_PAIR:
            tokens //= 2
        x = torch.randn(1, tokens, d_in, generator=draw).requires_grad_()
        for rank in (64, 512):
            space = Subspace(torch.linalg.qr(torch.randn(d_in, rank, generator=draw)).Q.contiguous())
            outside = start_outside(start, space)
            projected = LoraLinear(base, Trained(outside, projector(outside, space)), out, SCALE, 0.0)
            title = f"layer {name} {d_in} to {d_out}, k = {rank}, {tokens} tokens"
            first, second = partial(_there_and_back, projected, x), partial(_there_and_back, plain, x)
            report.add(compare(title, first, second, pairs=pairs, goal=1.03))


def _there_and_back(layer: nn.Module, x: torch.Tensor, _: int = 0) -> None:
    layer(x).sum().backward()
    for tensor in (x, *layer.parameters()):
        tensor.grad = None


def _seconds(layer: LoraLinear, tokens: int) -> float:
    x = torch.zeros(1, tokens, layer.weight.shape[1], requires_grad=True)
    _there_and_back(layer, x)
    start = time.process_time()
    _there_and_back(layer, x)
    return time.process_time() - start


def features(report: Report, model: str, pairs: int) -> None:
    """The feature pass against a plain forward over the same rows."""
    for targets, words, goal in ((Q_AND_V[model], "q and v", 1.3), ("all_linear", "all linear", 1.8)):
        bench = Bench(model, ["agnews"], target_modules=targets)
        method = bench.method("pegp")
        ctx, _ = bench.begin(method, "agnews", 1)
        for size in (96, 256):
            rows = feature_sample(ctx, size)
            found = compare(
                f"{model}: feature pass / forward, {words}, {size} rows",
                partial(_feature_pass, ctx, method, rows),
                partial(_forward, ctx, rows),
                pairs=pairs if size == 96 else max(pairs // 4, 5),
                goal=goal if size == 96 else None,
            )
            report.add(found)


def _feature_pass(ctx: Context, method: Any, rows: Sequence[int], _: int) -> None:
    measure(ctx, method._attached, method._shapes, rows)


def _forward(ctx: Context, rows: Sequence[int], _: int) -> None:
    ctx.run_rows(rows, backward=False)


def growth(report: Report, model: str, pairs: int) -> None:
    """A task's end (leaks, feature pass, growth) as a share of its training time, at task 2. A tenth of the pairs."""
    bench = Bench(model, ["dbpedia", "agnews"])
    pegp = bench.method("pegp")
    bench.remember(pegp, "dbpedia", 1)
    state = copied(pegp.state_dict())
    ctx, training = bench.begin(bench.method("pegp", state), "agnews", 2)
    steps = bench.steps(ctx, "agnews", micro_batch=bench.recipe.training.micro_batch_size)
    epochs = bench.tasks["agnews"].training.epochs
    some = steps[:: max(len(steps) // 8, 1)]
    current: list[Any] = []

    def begin() -> None:
        method = bench.method("pegp", copied(state))
        current[:] = method, bench.begin(method, "agnews", 2)[0]

    def train(_: int) -> None:
        for micro_batches in some:
            training.step(micro_batches)

    scale = len(some) / (epochs * len(steps))
    count = max(pairs // 10, 5)
    name = f"{model}: end of task / its {epochs * len(steps)} steps, 96 rows"
    found = compare(
        name, lambda _: current[0].end_task(current[1]), train, pairs=count, goal=0.05, scale=scale, prepare=begin
    )
    report.add(found)
    begin()
    method, ctx = current
    pass_ms = 1e3 * min(
        _timed(lambda: measure(ctx, method._attached, method._shapes, feature_sample(ctx, 96))) for _ in range(3)
    )
    report.state(f"{model}: of the end of the task, feature pass (ms)", round(pass_ms, 1))


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def chosen(report: Report, options: argparse.Namespace) -> None:
    """What the command line asks for."""
    for part in (step, features, growth):
        if options.what in (part.__name__, "all"):
            for model in options.models:
                part(report, model, options.pairs)
    if options.what in ("layers", "all"):
        layers(report, options.pairs, options.only)


if __name__ == "__main__":
    sys.exit(command_line.run(__file__, __doc__, ("step", "layers", "features", "growth"), chosen))
