"""Single layers as wide as real backbones': LoRA projected, and cores with their refreshes, against plain LoRA."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.pairs import Report, compare_built
from benchmarks.tasks import SETTINGS, PlainOptimizer
from pipeline.adapters.base import Trained
from pipeline.adapters.core import CoreLinear
from pipeline.adapters.lora import LoraLinear
from pipeline.methods.core_updates import GROUP, CoreUpdates
from pipeline.optimizer_groups import ParameterGroup
from pipeline.projection.guard import Guard
from pipeline.projection.sketch import Protected
from pipeline.projection.subspace import Subspace
from pipeline.recipe import Training

Value = TypeVar("Value")
Work = Callable[[int], object]
RANK, SCALE = 8, 4.0
WINDOW = SETTINGS["gorp"].refresh_every  # steps
# name, d_in, d_out, tokens, the share of the pairs: ten steps of LLaMA's take half a minute
CORES = [
    ("T5-large cross-attention", 1024, 1024, 4096, 0.1),
    ("LLaMA-2-7B gate", 4096, 11008, 512, 0.05),
]
BRANCHES = [
    ("T5-large attention", 1024, 1024, 4096, 0.5),
    ("T5-large wo", 4096, 1024, 2048, 0.5),
    ("LLaMA-2-7B attention", 4096, 4096, 512, 0.5),
    ("LLaMA-2-7B down", 11008, 4096, 256, 0.5),
]
STEP_TOKENS = 8 * 512  # of one micro-batch of long rows, for what is stated by extrapolation
TASKS = {2: RANK, 15: 14 * RANK}  # at most so many directions are protected by then


class OneLayer(PlainOptimizer):
    """One layer, trained for a fixed gradient of its output; to `CoreUpdates`, its context."""

    step_count = 10**9
    first_rows: Sequence[int] = ()

    def __init__(self, layer: nn.Module, x: Tensor, g: Tensor, groups: Sequence[ParameterGroup] = ()) -> None:
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        super().__init__(trained, groups, Training())
        self.layer, self.x, self.g, self.step = layer, x, g, 0

    def backward(self) -> None:
        """A forward, and the backward to the input."""
        self.layer(self.x).backward(self.g)
        self.x.grad = None

    def train(self) -> None:
        """One step."""
        self.backward()
        self.update()
        self.step += 1

    def window(self) -> None:
        """As many steps as cores take between two refreshes."""
        for _ in range(WINDOW):
            self.train()

    def run_rows(self, rows: Sequence[int], *, backward: bool) -> None:
        """The layer's own tokens."""
        self.backward()
        self.optimizer.zero_grad()

    def generator(self, purpose: str) -> torch.Generator:
        """Of one seed."""
        return torch.Generator().manual_seed(0)

    def on_first(self, action: Callable[[], Value]) -> Value:
        """Run it."""
        return action()

    def all_sum(self, tensor: Tensor) -> Tensor:
        """A copy."""
        return tensor.detach().clone()

    broadcast = all_sum


class CoreTraining:
    """A core's steps, refreshed by the pipeline's own code."""

    def __init__(self, base: nn.Linear, x: Tensor, g: Tensor, protected: int) -> None:
        settings = SETTINGS["gorp"]
        self.layer = CoreLinear(base, Trained(torch.zeros(RANK, RANK)), settings.core_scale)
        group = ParameterGroup(GROUP, [self.layer.C], settings.full_rank_lr)
        self.run = OneLayer(self.layer, x, g, [group])
        space = Protected(left=drawn_space(base.out_features, protected))
        ctx: Any = self.run
        masters = {"layer": base.weight.detach().clone()}
        spaces = {"layer": space}
        self.cores = CoreUpdates(ctx, settings, {"layer": self.layer}, masters, protected=spaces, measured=spaces)
        self.cores.first_bases()
        self.cores.prepare()

    def window(self, _: int) -> None:
        """From one refresh to the next."""
        for _ in range(WINDOW):
            self.run.train()
            self.cores.after_step()


def drawn_space(width: int, rank: int) -> Subspace:
    """A space of any `rank` directions."""
    draw = torch.Generator().manual_seed(rank)
    return Subspace(torch.linalg.qr(torch.randn(width, rank, generator=draw)).Q.contiguous())


def base_layer(d_in: int, d_out: int, tokens: int) -> tuple[nn.Linear, Tensor, Tensor]:
    """A frozen layer, its inputs, the gradient of its outputs."""
    draw = torch.Generator().manual_seed(0)
    base = nn.Linear(d_in, d_out, bias=False).requires_grad_(False)
    x = torch.randn(1, tokens, d_in, generator=draw).requires_grad_()
    return base, x, torch.randn(1, tokens, d_out, generator=draw) / tokens


def branch(base: nn.Linear, protected: int) -> LoraLinear:
    """A LoRA on the layer, both factors projected against `protected` directions; 0: plain."""
    draw = torch.Generator().manual_seed(0)
    start = {
        "A": torch.randn(RANK, base.in_features, generator=draw) / base.in_features**0.5,
        "B": torch.randn(base.out_features, RANK, generator=draw) / RANK**0.5,
    }
    if not protected:
        return LoraLinear(base, Trained(start["A"]), Trained(start["B"]), SCALE, 0.0)
    guards = {
        "A": Guard([drawn_space(base.in_features, protected)]),
        "B": Guard([drawn_space(base.out_features, protected)], left=True),
    }
    A, B = (Trained(start[part], guards[part].projector(start[part])) for part in "AB")
    return LoraLinear(base, A, B, SCALE, 0.0)


def layers(report: Report, pairs: int, only: str) -> None:
    """Projected LoRA by the step, cores by the window of ten, each against plain LoRA; `only`: part of a name."""
    for name, d_in, d_out, tokens, share in (layer for layer in BRANCHES if only in layer[0]):
        for task, protected in TASKS.items():
            title = f"{name} {d_in} to {d_out}, {tokens} tokens, task {task}: LoRA"
            steps = partial(_branch_steps, d_in, d_out, tokens, protected)
            found = compare_built(title, steps, pairs=max(int(share * pairs), 4), builds=4, goal=1.10)
            report.add(found)
    for name, d_in, d_out, tokens, share in (layer for layer in CORES if only in layer[0]):
        for task, protected in TASKS.items():
            windows = partial(_core_windows, d_in, d_out, tokens, protected)
            title = f"{name} {d_in} to {d_out}, {tokens} tokens, task {task}: core, 10 steps"
            some = max(int(share * pairs), 2)
            report.add(compare_built(title, windows, pairs=some, builds=min(some, 4), goal=1.10, warm_up=1))
        _refresh_beside_full_svd(report, name, d_in, d_out, tokens, naive=False)


def _branch_steps(d_in: int, d_out: int, tokens: int, protected: int) -> tuple[Work, Work]:
    base, x, g = base_layer(d_in, d_out, tokens)
    first, second = (OneLayer(branch(base, rank), x, g) for rank in (protected, 0))
    return lambda _: first.train(), lambda _: second.train()


def _core_windows(d_in: int, d_out: int, tokens: int, protected: int) -> tuple[Work, Work]:
    base, x, g = base_layer(d_in, d_out, tokens)
    core = CoreTraining(base, x, g, protected)
    plain = OneLayer(branch(base_layer(d_in, d_out, 1)[0], 0), x, g)
    return core.window, lambda _: plain.window()


def naive(report: Report) -> None:
    """A refresh that forms G and takes its SVD on full size, beside one from sketches. Single runs: it is slow."""
    for name, d_in, d_out, tokens, _ in CORES:
        _refresh_beside_full_svd(report, name, d_in, d_out, tokens, naive=True)


def _refresh_beside_full_svd(report: Report, name: str, d_in: int, d_out: int, tokens: int, *, naive: bool) -> None:
    """Seconds of a step's parts, and the mean step of `STEP_TOKENS` tokens that they come to."""
    base, x, g = base_layer(d_in, d_out, tokens)
    core = CoreTraining(base, x, g, TASKS[2])
    plain = OneLayer(branch(base_layer(d_in, d_out, 1)[0], 0), x, g)
    core.window(0)
    plain.train()
    parts: dict[str, list[float]] = {key: [] for key in ("lora", "core", "core, collecting", "merge", "new bases")}
    for _ in range(3):
        for index in range(1, WINDOW + 1):
            seconds = _seconds(core.run.train)
            if index < WINDOW:
                core.cores.after_step()
            parts["core, collecting" if index == WINDOW else "core"].append(seconds)
        parts["merge"].append(_seconds(core.cores._merge))
        parts["new bases"].append(_seconds(core.cores.after_step))  # the cores are zero: nothing is left to merge
        parts["lora"].append(_seconds(plain.train))
    found = {key: sorted(values)[len(values) // 2] for key, values in parts.items()}
    grows = STEP_TOKENS / tokens  # the refresh does not
    mean = grows * ((WINDOW - 1) * found["core"] + found["core, collecting"]) + found["merge"]
    mean += found["new bases"]
    stated = {f"{key} (ms)": round(1e3 * value, 2) for key, value in found.items()}
    stated[f"mean step / lora's, by extrapolation to {STEP_TOKENS} tokens"] = round(
        mean / (WINDOW * grows * found["lora"]), 3
    )
    if naive:
        once = _naive_seconds(x, g, repetitions=3 if d_in * d_out < 2**24 else 1)
        stated |= {f"naive: {key} (ms)": round(1e3 * value, 1) for key, value in once.items()}
        slow = grows * (WINDOW * found["core"] + once["forming G"]) + once["SVD of G"] + found["merge"]
        stated[f"naive mean step / lora's, by extrapolation to {STEP_TOKENS} tokens"] = round(
            slow / (WINDOW * grows * found["lora"]), 3
        )
        stated["SVD of G / new bases from sketches"] = round(once["SVD of G"] / found["new bases"], 1)
    report.state(f"{name} {d_in} to {d_out}, {tokens} tokens, task 2", stated)


def _naive_seconds(x: Tensor, g: Tensor, repetitions: int) -> dict[str, float]:
    """Least of a few: the full gradient, its SVD in float32 with both factors."""
    inputs, outputs = x.detach()[0], g[0]
    G = outputs.mT @ inputs
    forming = min(_seconds(lambda: outputs.mT @ inputs) for _ in range(3))
    whole = min(_seconds(lambda: torch.linalg.svd(G, full_matrices=False)) for _ in range(repetitions))
    return {"forming G": forming, "SVD of G": whole}


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
