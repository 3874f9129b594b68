"""The one clean copy of the backbone that a rank holds between tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from pipeline.adapters.lora import Factors
from pipeline.from_host import blocks_from_host
from pipeline.layers import merge
from pipeline.models import CPU, load_backbone
from pipeline.workload import Workload

Updates = Mapping[str, Sequence[Factors]]
Matrices = Mapping[str, Tensor]


class Weights:
    """The backbone with updates merged; what a training engine gets is given away and loaded anew."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self._workload = workload
        self._device = device
        self._model: nn.Module | None = None

    def model(self, updates: Updates, matrices: Matrices | None = None) -> nn.Module:
        """The backbone with `matrices` in its place and `updates` merged, in evaluation mode, where it rests."""
        workload = self._workload
        if self._model is None:
            recipe = workload.recipe
            dtype = torch.bfloat16 if recipe.engine.precision == "bf16" else torch.float32
            self._model = load_backbone(
                workload.model_folder,
                recipe.model.family,
                dtype=dtype,
                quantization=recipe.model.quantization,
                device=CPU if recipe.weights_on_host else self._device,
            )
        merge(self._model, workload.model_folder, workload.targets, updates, matrices or {})
        return self._model.eval()

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, `model`, one of these, runs on the device without an engine."""
        return blocks_from_host(model, self._device) if self._workload.recipe.weights_on_host else nullcontext()

    def give_away(self, updates: Updates, matrices: Matrices | None = None) -> nn.Module:
        """The same, for an engine that changes the model beyond repair."""
        model = self.model(updates, matrices)
        self._model = None
        return model
