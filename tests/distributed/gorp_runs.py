"""What a rank does for GORP: `pegp_runs.two_tasks`, watching moments and merges, or writing moments once."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from pegp_runs import learn, new_method, two_tasks
from rank_cases import WRITE_AFTER
from torch import Tensor

from pipeline.methods.core_updates import GROUP, CoreUpdates
from pipeline.methods.gorp import ProjectedByGradients


def forwards_copy(parameter: Tensor) -> Tensor:
    """A tensor as the forward reads it on this rank, whole."""
    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


class _Watched(ProjectedByGradients):
    """Reads Adam's moments at each task's end, and both copies of W and C after each merge."""

    def __init__(self, *settings: Any, **more: Any) -> None:
        super().__init__(*settings, **more)
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        self.merged: list[dict[str, bool]] = []

    def after_step(self, ctx: Any) -> None:
        assert self._cores is not None
        before = {name: core.master.clone() for name, core in self._cores._cores.items()}
        super().after_step(ctx)
        self._look(ctx, self._cores, before)

    def _look(self, ctx: Any, cores: CoreUpdates, before: Any) -> None:
        """The forward's W is the master rounded once; C is zero in both copies."""
        for name, core in cores._cores.items():
            if torch.equal(before[name], core.master):
                continue
            W = forwards_copy(core.layer.weight)
            copies = {"W": torch.equal(W, core.master.to(W.dtype)), "forward": not forwards_copy(core.layer.C).any()}
            self.merged.append(copies | {"master": not ctx.master(core.layer.C).any()})

    def end_task(self, ctx: Any) -> dict[str, Tensor]:
        for name, parameter in self._attached.parameters.items():
            if parameter.requires_grad:
                self.first[f"{ctx.task_index} {name}"] = ctx.first_moment(parameter).cpu()
                self.second[f"{ctx.task_index} {name}"] = ctx.second_moment(parameter).cpu()
        return super().end_task(ctx)


def gorp_tasks(job: Any) -> dict[str, Any]:
    """Two tasks, with what the engine holds at their ends and after each merge."""
    method = new_method(job, _Watched)
    result = two_tasks(job, method)
    spaces = {name: method.memory[name].basis for name in method.memory}
    return result | {"first": method.first, "second": method.second, "merged": method.merged, "spaces": spaces}


class _Writing(ProjectedByGradients):
    """Writes all moments once, lets the cores' step count begin anew, and reads what the next step makes of both."""

    def __init__(self, settings: Any, *more: Any, **others: Any) -> None:
        super().__init__(settings.model_copy(update={"refresh_every": 100}), *more, **others)
        self.seen: dict[str, dict[str, Tensor]] = {}
        self.norm = 0.0

    def before_step(self, ctx: Any) -> None:
        if ctx.step == WRITE_AFTER:
            self.seen["gradient"] = self._read(ctx.gradient)
            self.seen["master before"] = self._read(ctx.master)

    def after_step(self, ctx: Any) -> None:
        super().after_step(ctx)
        if ctx.step == WRITE_AFTER:
            self._write(ctx)
        if ctx.step == WRITE_AFTER + 1:
            self.norm = float(ctx.engine.gradient_norm)
            self.seen["first"], self.seen["second"] = self._read(ctx.first_moment), self._read(ctx.second_moment)
            self.seen["master"] = self._read(ctx.master)

    def _read(self, read: Any) -> dict[str, Tensor]:
        return {name: read(parameter).cpu().clone() for name, parameter in self._attached.parameters.items()}

    def _write(self, ctx: Any) -> None:
        random = ctx.generator("written")
        self.seen["written first"], self.seen["written second"] = {}, {}
        for name, parameter in self._attached.parameters.items():
            shape = ctx.master(parameter).shape
            first = torch.empty(shape).uniform_(-1, 1, generator=random)
            second = torch.empty(shape).uniform_(1, 2, generator=random)
            ctx.write_moments(parameter, first, second)
            self.seen["written first"][name], self.seen["written second"][name] = first, second
        self.seen["read first"], self.seen["read second"] = self._read(ctx.first_moment), self._read(ctx.second_moment)
        ctx.restart_group(GROUP)


def gorp_moments(job: Any) -> dict[str, Any]:
    """Moments written in the middle of a task, and the step after."""
    method = new_method(job, _Writing)
    learn(job, method, 1)
    return method.seen | {"norm": method.norm}
