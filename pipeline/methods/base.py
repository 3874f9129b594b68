"""The interface between the stream and a continual-learning method: hooks that do nothing by default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pipeline.adapters.base import AdapterKind
from pipeline.adapters.lora import Factors
from pipeline.optimizer_groups import ParameterGroup
from pipeline.recipe import Group

Value = TypeVar("Value")
Settings = TypeVar("Settings", bound=Group)


class TaskContext(Protocol):
    """What the engine lends a method while a task is learnt. Collective calls: every rank, same order.

    `model` is the backbone with the frozen past merged; from `begin_task` on it carries the task's adapter.
    """

    model: nn.Module
    task_index: int  # from 1
    step: int  # optimizer steps done in this task

    @property
    def row_count(self) -> int:
        """The task's training rows."""

    @property
    def step_count(self) -> int:
        """The task's optimizer steps."""

    @property
    def first_rows(self) -> list[int]:
        """The rows of the task's first global batch."""

    def original(self, layer: str) -> Tensor:
        """The checkpoint's own weight of a linear layer, float32 on the CPU."""

    def generator(self, purpose: str) -> torch.Generator:
        """A CPU generator seeded from (seed, task, purpose): the same on every rank."""

    def run_rows(self, rows: Sequence[int], *, backward: bool, task_index: int | None = None) -> float:
        """Run training rows through `model` in evaluation mode (each rank its share) with whatever hooks the
        method has put on its layers; returns the mean loss per label token over all ranks.

        `task_index`: rows of another task of the stream, for measurements that training never sees.
        """

    def score_rows(self, rows: Sequence[int]) -> tuple[float, float]:
        """Before training: the mean loss per label token, and the share of rows whose label greedy generation writes.

        Over all ranks. In evaluation mode, as `run_rows`.
        """

    def run_probe(self) -> None:
        """One training row through `model` on every rank, before training: for hooks to see what layers read."""

    def real_positions(self, width: int) -> Tensor:
        """Inside `run_rows`: the positions [n] of the flat batch [b x width] that hold no padding, where `width` is
        that of the prompt or, in a decoder, of the label.
        """

    def on_first(self, action: Callable[[], Value]) -> Value:
        """Run `action` on rank 0 and give its result, small and picklable, to all."""

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over ranks."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's `tensor` on every rank."""

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The global batch's averaged gradient, float32, between the last backward and the step."""

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's `exp_avg` of a trained tensor, whole and float32, wherever ZeRO keeps it."""

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 master copy of a trained tensor, whole, on the CPU."""

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a trained tensor: the float32 master and the forward's copy."""

    def second_moment(self, parameter: nn.Parameter) -> Tensor:
        """Adam's `exp_avg_sq` of a trained tensor, whole and float32."""

    def write_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor) -> None:
        """Set Adam's moments of a trained tensor."""

    def restart_group(self, name: str) -> None:
        """Let Adam's step count of the group `name` (`groups`) begin anew."""

    def write_frozen(self, weight: Tensor, value: Tensor) -> None:
        """Set a frozen weight to `value`, rounded once to its dtype."""


class Method(Generic[Settings]):
    """A continual-learning method. State lives between tasks; adapters live within one.

    The stream calls, per task: `begin_task`, `engine_started`, then per optimizer step `penalty`, `before_step`,
    `after_step`, then `end_task`, and `begin_evaluation` before each task that is scored.
    """

    weights_by_task: ClassVar[bool] = False  # whether `active` depends on the task that is scored

    def __init__(self, settings: Settings, kind: AdapterKind, *, task_count: int) -> None:
        self.settings = settings
        self.kind = kind
        self.task_count = task_count

    def begin_task(self, ctx: TaskContext) -> None:
        """Attach the task's adapter to `ctx.model`."""

    def groups(self) -> Sequence[ParameterGroup]:
        """Trained tensors that the optimizer treats otherwise than the rest, once `begin_task` has attached them."""
        return []

    def engine_started(self, ctx: TaskContext) -> None:
        """Before the first step: the trained tensors are the engine's now and can be written."""

    def penalty(self, ctx: TaskContext) -> Tensor | None:
        """A term added to the loss once per optimizer step, or None."""
        return None

    def before_step(self, ctx: TaskContext) -> None:
        """Between the last backward of a global batch and the optimizer's step."""

    def after_step(self, ctx: TaskContext) -> None:
        """After the optimizer's step."""

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Close the task; returns its trained tensors, float32 on the CPU, as the stage keeps them."""
        raise TypeError(f"{type(self).__name__} trains nothing: a method returns its trained tensors")

    def begin_evaluation(self, task: str, index: int | None) -> None:
        """Before `task` is scored, the order's task `index` (from 1); None: a task outside the order."""

    def load_trained(self, task_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take a finished task's trained tensors, from `end_task` or from a stage."""

    def frozen(self) -> Mapping[str, Sequence[Factors]]:
        """The past: updates that are constant while the next task trains, by layer."""
        return {}

    def active(self) -> Mapping[str, Sequence[Factors]]:
        """All that has been learnt, by layer: what stands in the weights when tasks are scored."""
        return self.frozen()

    def matrices(self) -> Mapping[str, Tensor]:
        """Weights that stand in the place of the checkpoint's, float32 on the CPU, by layer."""
        return {}

    def beside_weights(self) -> Mapping[str, Tensor]:
        """What has been learnt and weights cannot hold, by name: what `equipped` puts into the model."""
        return {}

    def equipped(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, `model` (with `active` merged) carries what has been learnt and weights cannot hold."""
        return nullcontext()

    def records(self) -> Sequence[Mapping[str, Any]]:
        """What the log says of the finished task's subspaces and penalties, a `subspace` event each."""
        return []

    def leaks(self) -> Mapping[int, Mapping[str, float]]:
        """Per task (from 1) and layer, the share of the trained change inside the protected space."""
        return {}

    def memory_influences(self) -> dict[str, Any]:
        """What decides the memory that `state_dict` holds, beside the trained weights."""
        return {}

    def influences(self, task_index: int) -> dict[str, Any]:
        """What of the method influences how task `task_index` trains, for the stage's address."""
        return self.settings.model_dump(mode="json")

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The method's memory: tensors, and values that JSON can hold."""
        return {}, {}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
