"""What every method that trains an adapter shares: attach it, read its float32 masters at the end, hold the past."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from pipeline.adapters.base import AdapterKind, Attached, Trained
from pipeline.adapters.lora import Factors, LoraKind, to_tensors
from pipeline.methods.base import Method, TaskContext
from pipeline.recipe import AdapterTraining

Settings = TypeVar("Settings", bound=AdapterTraining)


@dataclass(frozen=True)
class Finished:
    """A tensor at a task's end, float32 on the CPU."""

    value: Tensor
    change: Tensor  # since the task's start


class AdapterMethod(Method[Settings]):
    """A method that trains one adapter: a new one for each task (`per_task`), or one through the stream."""

    _trained: Mapping[str, Trained]
    _attached: Attached

    def __init__(self, settings: Settings, kind: AdapterKind, *, task_count: int) -> None:
        super().__init__(settings, kind, task_count=task_count)
        self.per_task = isinstance(kind, LoraKind) and settings.new_lora_each_task
        self._past: list[Mapping[str, Tensor]] = []  # finished tasks' tensors; of one adapter, its state alone

    def trained(self, ctx: TaskContext, starts: Mapping[str, Tensor]) -> dict[str, Trained]:
        """How each tensor is trained from its start; here, plainly."""
        return {name: Trained(start) for name, start in starts.items()}

    def begin_task(self, ctx: TaskContext) -> None:
        """Attach the adapter that this task trains: a new one, or the one as the last task left it."""
        continued = not self.per_task and self._past
        starts = self._past[-1] if continued else self.kind.starts(ctx.model, ctx.generator("lora"))
        self._trained = self.trained(ctx, starts)
        self._attached = self.kind.attach(ctx.model, self._trained)

    def engine_started(self, ctx: TaskContext) -> None:
        """In bf16, give the float32 masters what attaching had to round."""
        for name, trained in self._trained.items():
            parameter = self._attached.parameters[name]
            if not trained.fixed and parameter.dtype != trained.start.dtype:
                ctx.write(parameter, trained.master())

    def finished(self, ctx: TaskContext) -> dict[str, Finished]:
        """The trained tensors, evaluated once in float32 from their master copies. Collective."""
        return {name: self._finished(ctx, name, trained) for name, trained in self._trained.items()}

    def _finished(self, ctx: TaskContext, name: str, trained: Trained) -> Finished:
        if trained.fixed:
            return Finished(trained.start, trained.start.new_zeros(trained.start.shape))
        master = ctx.master(self._attached.parameters[name])
        if trained.projector is None:
            return Finished(master, master - trained.start)
        change = trained.projector.change(master)
        return Finished(trained.start + change, change)

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """The trained tensors as the stage keeps them."""
        return self.close({name: tensor.value for name, tensor in self.finished(ctx).items()})

    def close(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let go of the attached adapter, which holds on to the whole trained model; the tensors for the stage."""
        del self._attached, self._trained
        return to_tensors(self.kind.factors(tensors)) if isinstance(self.kind, LoraKind) else tensors

    def load_trained(self, task_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the task's adapter to the past, or take the one adapter as it stands after the task."""
        # Sorted, since a file may give them in another order than training did.
        kept = {name: tensors[name] for name in sorted(tensors) if not name.endswith(".scale")}
        self._past = [*self._past, kept] if self.per_task else [kept]

    def frozen(self) -> Mapping[str, Sequence[Factors]]:
        """All finished tasks' LoRAs, where each task has its own."""
        return self._factors() if self.per_task else {}

    def active(self) -> Mapping[str, Sequence[Factors]]:
        """All LoRAs."""
        return self._factors()

    def _factors(self) -> dict[str, list[Factors]]:
        by_layer: dict[str, list[Factors]] = {}
        if isinstance(self.kind, LoraKind):
            for tensors in self._past:
                for name, factors in self.kind.factors(tensors).items():
                    by_layer.setdefault(name, []).append(factors)
        return by_layer

    def beside_weights(self) -> Mapping[str, Tensor]:
        """The adapter, where it is no LoRA."""
        return {} if isinstance(self.kind, LoraKind) or not self._past else self._past[-1]

    @contextmanager
    def equipped(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model` carries the adapter that its weights cannot hold."""
        if isinstance(self.kind, LoraKind) or not self._past:
            yield
            return
        fixed = {name: Trained(tensor, fixed=True) for name, tensor in self._past[-1].items()}
        attached = self.kind.attach(model, fixed)
        try:
            yield
        finally:
            attached.detach()

    def influences(self, task_index: int) -> dict[str, Any]:
        """Nothing for the first task, where nothing is past: runs that differ in later tasks alone share its stage."""
        return {} if task_index == 1 else super().influences(task_index)
