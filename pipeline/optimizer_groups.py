"""Which trained tensors the optimizer treats otherwise than the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pipeline.recipe import Training


@dataclass(frozen=True)
class ParameterGroup:
    """Trained tensors with a learning rate of their own, under the task's schedule."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    weight_decay: float | None = 0.0  # None: the recipe's


def optimizer_groups(
    trained: Sequence[nn.Parameter], groups: Sequence[ParameterGroup], training: Training
) -> list[dict[str, Any]]:
    """AdamW's groups: `lr_scale` multiplies the step's learning rate."""
    apart = {id(parameter) for group in groups for parameter in group.parameters}
    rest = [parameter for parameter in trained if id(parameter) not in apart]
    found: list[dict[str, Any]] = [{"params": rest, "weight_decay": training.weight_decay}] if rest else []
    for group in groups:
        scale = group.learning_rate / training.learning_rate
        decay = training.weight_decay if group.weight_decay is None else group.weight_decay
        found.append({"params": list(group.parameters), "weight_decay": decay, "lr_scale": scale, "name": group.name})
    return found
