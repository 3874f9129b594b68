"""`inclora`: a new LoRA for each task, the past frozen and active (methods.md section 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from pipeline.adapters.lora import Factors, from_tensors
from pipeline.methods.lora import LoraMethod
from pipeline.recipe import Adapter, IncLora


class IncrementalLora(LoraMethod[IncLora]):
    """A new LoRA for each task; the earlier ones are frozen, active and merged."""

    def __init__(self, settings: IncLora, adapter: Adapter) -> None:
        super().__init__(settings, adapter)
        self._past: dict[str, list[Factors]] = {}

    def load_trained(self, task_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the task's LoRA to the past."""
        for name, factors in from_tensors(tensors).items():
            self._past.setdefault(name, []).append(factors)

    def frozen(self) -> Mapping[str, Sequence[Factors]]:
        """All finished tasks' LoRAs."""
        return self._past
