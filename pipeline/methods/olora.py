"""`olora`: `inclora` with a penalty on the overlap of the new A with all old ones (O-LoRA; methods.md section 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.base import AdapterKind
from pipeline.methods.adapter_method import AdapterMethod
from pipeline.methods.base import TaskContext
from pipeline.recipe import OLora


class OrthogonalLora(AdapterMethod[OLora]):
    """A new LoRA for each task, loss + lambda_1 sum |A_old A_new^T| + lambda_2 sum ||p||_2 over new factors."""

    def __init__(self, settings: OLora, kind: AdapterKind, *, task_count: int) -> None:
        super().__init__(settings, kind, task_count=task_count)
        self._old: list[tuple[list[str], Tensor]] = []  # layers of one width, their stacked old A [M, R, d]
        self._overlap = torch.zeros(())
        self._entries = 0

    def begin_task(self, ctx: TaskContext) -> None:
        """Attach the task's LoRA, and stack the old A of layers of equal shape."""
        super().begin_task(ctx)
        by_shape: dict[tuple[int, ...], dict[str, Tensor]] = {}
        for name in self._attached.parameters:
            if name.endswith(".A") and self._past:
                old = torch.cat([tensors[name] for tensors in self._past])  # [R, d]
                by_shape.setdefault(tuple(old.shape), {})[name] = old
        self._old = [(list(group), torch.stack(list(group.values()))) for group in by_shape.values()]
        self._entries = sum(old.shape[0] * old.shape[1] * self._past[0][names[0]].shape[0] for names, old in self._old)

    def penalty(self, ctx: TaskContext) -> Tensor | None:
        """The penalty, batched over layers of equal shape.

        It needs no data: its gradient is sign(A_old A_new^T)^T A_old, formed once per optimizer step.
        """
        terms = []
        if self._old and self.settings.lambda_1:
            new = self._attached.parameters
            self._old = [(names, old.to(new[names[0]].device)) for names, old in self._old]  # moves in the first step
            overlap = sum_of_overlaps(self._old, new)
            self._overlap = overlap.detach()
            terms.append(self.settings.lambda_1 * overlap)
        if self.settings.lambda_2:
            norms = [parameter.float().norm() for parameter in self._attached.parameters.values()]
            terms.append(self.settings.lambda_2 * torch.stack(norms).sum())
        return torch.stack(terms).sum() if terms else None

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """The trained tensors; the stacks of old ones go."""
        self._old = []
        return super().end_task(ctx)

    def influences(self, task_index: int) -> dict[str, Any]:
        """The norms' weight acts from the first task on."""
        if task_index == 1 and self.settings.lambda_2:
            return {"lambda_2": self.settings.lambda_2}
        return super().influences(task_index)

    def records(self) -> list[dict[str, Any]]:
        """The overlap in the task's last step: its raw size depends on rank, width and layers, so per entry too."""
        if not self._entries or not self.settings.lambda_1:
            return []
        overlap = float(self._overlap)
        return [{"penalty": "sum |A_old A_new^T|", "sum": overlap, "per_entry": overlap / self._entries}]


def sum_of_overlaps(old: list[tuple[list[str], Tensor]], new: Mapping[str, Tensor]) -> Tensor:
    """`sum |A_old A_new^T|` over all layers: `old` [M, R, d] by group of layers, `new` [r, d] by layer."""
    sums = []
    for names, stacked in old:
        A = torch.stack([new[name] for name in names])  # [M, r, d]
        sums.append((stacked.to(A) @ A.mT).abs().sum(dtype=torch.float32))
    return torch.stack(sums).sum()
