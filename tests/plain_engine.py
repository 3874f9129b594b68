"""The engine's part in the loop without DeepSpeed: one process, any dtype. It shows the loop's own arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from plain_reference import Float64
from torch import Tensor, nn

from pipeline.optimizer_groups import ParameterGroup, optimizer_groups
from pipeline.recipe import Training


class PlainEngine:
    """Accumulates micro-batches as DeepSpeed does: each loss is divided by their number."""

    forwards_together = False

    def __init__(
        self, module: nn.Module, training: Training, *, accumulation: int, groups: Sequence[ParameterGroup] = ()
    ) -> None:
        self.module = module
        self.micro_batches_per_step = accumulation
        self._clip = training.gradient_clipping or math.inf
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        for parameter in self._trained:
            parameter.grad = None
        self._optimizer = torch.optim.AdamW(optimizer_groups(self._trained, groups, training), eps=training.adam_eps)
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
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def master(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().clone()

    def first_moment(self, parameter: nn.Parameter) -> Tensor:
        return self._optimizer.state[parameter]["exp_avg"].clone()

    def second_moment(self, parameter: nn.Parameter) -> Tensor:
        return self._optimizer.state[parameter]["exp_avg_sq"].clone()

    def write_moments(self, parameter: nn.Parameter, first: Tensor, second: Tensor) -> None:
        self._optimizer.state[parameter]["exp_avg"].copy_(first)
        self._optimizer.state[parameter]["exp_avg_sq"].copy_(second)

    def restart_group(self, name: str) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"] if group.get("name") == name else ():
                self._optimizer.state[parameter]["step"].zero_()

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    def write_frozen(self, weight: Tensor, value: Tensor) -> None:
        weight.data.copy_(value)

    def close(self) -> None:
        pass
