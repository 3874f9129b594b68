"""`seqlora`: one LoRA through the stream, no reset (methods.md section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pipeline.adapters.lora import Factors, from_tensors
from pipeline.methods.base import TaskContext
from pipeline.methods.lora import LoraMethod
from pipeline.recipe import Adapter, SeqLora


class SequentialLora(LoraMethod[SeqLora]):
    """One LoRA through the stream: each task starts where the last one ended."""

    def __init__(self, settings: SeqLora, adapter: Adapter) -> None:
        super().__init__(settings, adapter)
        self._current: dict[str, Factors] = {}

    def starting_factors(self, ctx: TaskContext) -> dict[str, Factors]:
        """The factors as the last task left them."""
        return self._current or super().starting_factors(ctx)

    def load_trained(self, task_index: int, tensors: Mapping[str, Tensor]) -> None:
        """The one LoRA, as it stands after `task_index`."""
        self._current = from_tensors(tensors)

    def active(self) -> Mapping[str, Sequence[Factors]]:
        """The one LoRA."""
        return {name: [factors] for name, factors in self._current.items()}
