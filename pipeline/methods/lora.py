"""What every LoRA method shares: attach a LoRA at a task's start, read its float32 masters at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.adapters.lora import Factors, LoraLinear, attach, new_factors, to_tensors
from pipeline.methods.base import Method, Settings, TaskContext


class LoraMethod(Method[Settings]):
    """A method that trains one LoRA on the targets per task."""

    _attached: Mapping[str, LoraLinear]
    _starts: Mapping[str, Factors]

    def starting_factors(self, ctx: TaskContext) -> dict[str, Factors]:
        """Where this task's LoRA starts: A random, B zero (methods.md section 1)."""
        scale = self.adapter.alpha / self.adapter.rank
        generator = ctx.generator("lora")
        return new_factors(ctx.model, ctx.targets, rank=self.adapter.rank, scale=scale, generator=generator)

    def begin_task(self, ctx: TaskContext) -> None:
        """Attach the LoRA that this task trains."""
        self._starts = self.starting_factors(ctx)
        self._attached = attach(ctx.model, self._starts, dropout=self.adapter.dropout)

    def engine_started(self, ctx: TaskContext) -> None:
        """In bf16, give the float32 masters what `attach` had to round."""
        for name, layer in self._attached.items():
            for parameter, start in ((layer.A, self._starts[name].A), (layer.B, self._starts[name].B)):
                if parameter.dtype != start.dtype:
                    ctx.write(parameter, start)

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """The trained factors, from the float32 masters."""
        attached, self._attached = self._attached, {}  # the layers hold on to the whole trained model
        return to_tensors(
            {name: Factors(ctx.master(layer.A), ctx.master(layer.B), layer.scale) for name, layer in attached.items()}
        )

    def influences(self, task_index: int) -> dict[str, Any]:
        """Nothing for the first task: every LoRA method trains it alike, and may share its stage."""
        return {} if task_index == 1 else super().influences(task_index)
