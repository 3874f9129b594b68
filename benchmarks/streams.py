"""Methods as they stand before their second task and before the stream's last."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from benchmarks.tasks import STREAM, Batch, Bench, PlainTraining

MODELS = ("mini_t5", "mini_llama2")


class Streams:
    """One model, its rows, and methods at any place of the stream, each made once."""

    def __init__(self, model: str, *, steps: Mapping[str, int]) -> None:
        """`steps`: how long a method trains on each old task; others train not at all, so their memory is any."""
        self.model = model
        self.bench = Bench(model, ["dbpedia", "SST-2", "agnews"])
        self._between = Bench(model, STREAM[1:-1], order="order4")  # whose prompts have room for MultiRC
        self._steps = steps
        self._after: dict[tuple[str, int], Any] = {}

    def after(self, name: str, tasks: int) -> Any:
        """The method after so many tasks."""
        if tasks == 0:
            return self.bench.method(name)
        if (name, tasks) not in self._after:
            method = copy.deepcopy(self.after(name, tasks - 1))
            bench = self.bench if tasks == 1 else self._between
            bench.remember(method, STREAM[tasks - 1], tasks, steps=self._steps.get(name, 0))
            self._after[name, tasks] = method
        return self._after[name, tasks]

    def begin(self, method: Any, task: str, index: int) -> PlainTraining:
        """A copy of the method at the start of a task."""
        return self.bench.begin(copy.deepcopy(method), task, index)[1]

    def batches(self, training: PlainTraining, task: str, micro_batch: int) -> list[list[Batch]]:
        """An epoch's steps."""
        return self.bench.steps(training.ctx, task, micro_batch=micro_batch)

    def longest(self, task: str, micro_batch: int) -> list[Batch]:
        """The step of most positions."""
        steps = self.batches(self.begin(self.after("inclora", 0), task, 2), task, micro_batch)
        return max(steps, key=lambda step: max(batch["input_ids"].numel() for batch in step))
