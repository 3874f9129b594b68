"""`pertask`: one model a task, the single-task reference (methods.md section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.adapters.base import AdapterKind
from pipeline.adapters.lora import Factors
from pipeline.methods.adapter_method import AdapterMethod
from pipeline.recipe import PerTask


class OneModelPerTask(AdapterMethod[PerTask]):
    """A LoRA for each task, on the bare backbone; a task is scored with its own, or untrained while it has none."""

    weights_by_task = True

    def __init__(self, settings: PerTask, kind: AdapterKind, *, task_count: int) -> None:
        super().__init__(settings, kind, task_count=task_count)
        self._scored: int | None = None  # from 1

    def begin_evaluation(self, task: str, index: int | None) -> None:
        """Take the task's own model."""
        self._scored = index

    def frozen(self) -> Mapping[str, Sequence[Factors]]:
        """Nothing: each task starts from the backbone."""
        return {}

    def active(self) -> Mapping[str, Sequence[Factors]]:
        """The LoRA of the task that is scored."""
        if self._scored is None or self._scored > len(self._past):
            return {}
        return {name: factors[self._scored - 1 :][:1] for name, factors in self._factors().items()}
