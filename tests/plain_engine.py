"""The engine's part in the loop without DeepSpeed: one process, any dtype. It shows the loop's own arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from plain_reference import Float64
from torch import Tensor, nn

from pipeline.recipe import Training


class PlainEngine:
    """Accumulates micro-batches as DeepSpeed does: each loss is divided by their number."""

    forwards_together = False

    def __init__(self, module: nn.Module, training: Training, *, accumulation: int) -> None:
        self.module = module
        self.micro_batches_per_step = accumulation
        self._clip = training.gradient_clipping
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained, eps=training.adam_eps, weight_decay=training.weight_decay)
        self._done = 0
        self.gradient_norm = float("nan")

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        with self._precision():
            return self.module(**batch)

    def _precision(self) -> AbstractContextManager[Any]:
        return Float64() if self._trained[0].dtype == torch.float64 else nullcontext()

    def backward(self, loss: Tensor) -> None:
        with self._precision():
            (loss / self.micro_batches_per_step).backward()

    def step(self, learning_rate: float) -> None:
        self._done += 1
        if self._done % self.micro_batches_per_step:
            return
        self.gradient_norm = float(nn.utils.clip_grad_norm_(self._trained, self._clip))
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def master(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().clone()

    def close(self) -> None:
        pass
