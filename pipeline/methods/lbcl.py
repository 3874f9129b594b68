"""`lbcl`: triplets injected from old tasks, trained outside their singular vectors (LB-CL, NeurIPS 2024; methods.md 4).

Before task t: how sensitive is its loss to every old triplet? The weighted old triplets are its start. After it: its
left and right singular vectors join the bases that later changes stay outside of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.base import AdapterKind, Trained
from pipeline.adapters.triplet import PARTS, AttachedTriplets, TripletKind, Triplets, triplets_of
from pipeline.methods.adapter_method import Finished
from pipeline.methods.base import TaskContext
from pipeline.methods.injection import injected
from pipeline.methods.projecting import ProjectingMethod
from pipeline.methods.sensitivity import LayerSensitivity, measure_sensitivity
from pipeline.optimizer_groups import ParameterGroup
from pipeline.projection.features import FeaturesNotFinite
from pipeline.projection.guard import Guard
from pipeline.projection.projector import FromLeft, start_outside
from pipeline.projection.triplets import joined, subtract_pairwise
from pipeline.recipe import LbCl

GROUP = "sigma"
OTHER_ROWS = 64  # training rows that injection has not seen


class InjectedTriplets(ProjectingMethod[LbCl]):
    """New triplets for each task; the earlier ones are frozen, active and merged.

    Spaces: "<layer>.U" in R^d_out, "<layer>.V" in R^d_in: the joint spans of all finished tasks' U and V.
    """

    kind: TripletKind
    _attached: AttachedTriplets

    def __init__(self, settings: LbCl, kind: AdapterKind, *, task_count: int) -> None:
        assert isinstance(kind, TripletKind)
        super().__init__(settings, kind, task_count=task_count)
        self._sensitivity: dict[int, dict[str, Any]] = {}  # by task and layer: what the report draws
        self._jumps: dict[int, list[dict[str, Any]]] = {}  # by task: the loss before training
        self._start: dict[str, Tensor] = {}

    # ---- a task's start

    def begin_task(self, ctx: TaskContext) -> None:
        """Inject old triplets into the task's new ones, behind their projectors; note what that does to the loss.

        Raises `FeaturesNotFinite` where a sensitivity or that loss is not finite.
        """
        seeds, others = self._seed_rows(ctx)
        self._start = {}
        if not self._past:
            super().begin_task(ctx)
            return
        if self.settings.init == "random":
            loss = ctx.run_rows(seeds, backward=False)
        else:
            self._start, loss = self._injection(ctx, seeds)
        scored = ctx.score_rows(others) if others else None  # sigma is zero: as with random starts
        super().begin_task(ctx)
        self._project_gradients()
        loss_now = ctx.run_rows(seeds, backward=False) if self._start else loss
        jumps = [_jump("seed_samples", seeds, (loss, None), (loss_now, None))]
        if scored is not None:
            jumps.append(_jump("other_rows", others, scored, ctx.score_rows(others) if self._start else scored))
        self._jumps[ctx.task_index] = jumps

    def _seed_rows(self, ctx: TaskContext) -> tuple[list[int], list[int]]:
        """The seed samples, and others that the loss is looked at on too; drawn from the recipe's seed, ascending."""
        wanted = self.settings.seed_samples
        assert wanted <= ctx.row_count, "checked when the recipe was read"
        drawn = torch.randperm(ctx.row_count, generator=ctx.generator("seed samples")).tolist()
        # From the end: the same others, however many seed samples there are.
        return sorted(drawn[:wanted]), sorted(drawn[max(wanted, len(drawn) - OTHER_ROWS) :])

    def _injection(self, ctx: TaskContext, rows: Sequence[int]) -> tuple[dict[str, Tensor], float]:
        """The starts of the layers within reach, rank 0's, and the rows' loss without them.

        Raises `FeaturesNotFinite` where a sensitivity is not finite.
        """
        reached = set(self.kind.reached)
        past = {name: triplets for name, triplets in self._old_triplets().items() if name in reached}
        found, loss = measure_sensitivity(ctx, past, rows, scale=self.kind.scale, how=self.settings.sensitivity)
        self._sensitivity[ctx.task_index] = {name: _figures(layer) for name, layer in found.items()}
        start: dict[str, Tensor] = {}
        for name, triplets in past.items():
            if not bool(found[name].scores.isfinite().all()):
                raise FeaturesNotFinite(name, list(rows))
            new = self._new_triplets(triplets, found[name].scores)
            start |= {f"{name}.{part}": ctx.broadcast(getattr(new, part)) for part in PARTS}
        return start, loss

    def _new_triplets(self, past: Sequence[Triplets], scores: Tensor) -> Triplets:
        if self.settings.init == "copy":
            return past[-1]
        new = injected(past, scores, align=self.settings.align)
        if self.settings.init == "without_sigma":
            return Triplets(new.U, torch.zeros_like(new.sigma), new.V)
        return new

    def _old_triplets(self) -> dict[str, list[Triplets]]:
        by_layer: dict[str, list[Triplets]] = {}
        for tensors in self._past:
            for name, triplets in triplets_of(tensors).items():
                by_layer.setdefault(name, []).append(triplets)
        return by_layer

    def trained(self, ctx: TaskContext, starts: Mapping[str, Tensor]) -> dict[str, Trained]:
        """The injected tensors in the place of random ones; a layer without a free direction gets no triplets."""
        trained = super().trained(ctx, {**starts, **self._start})
        layers = [name.removesuffix(".sigma") for name in trained if name.endswith(".sigma")]
        closed = {name for name in layers if all(trained[f"{name}.{part}"].fixed for part in "UV")}
        return {name: tensor for name, tensor in trained.items() if name.rpartition(".")[0] not in closed}

    def constrained(self, ctx: TaskContext, name: str, start: Tensor) -> Trained:
        """A random start is moved outside the old span; an injected one lies inside it on purpose."""
        guard = self.guard(name, start)
        if self.settings.projection == "sum":  # the paper's: its gradient is all that is constrained
            return Trained(start)
        if self.settings.project != "off" and name not in self._start and not guard.empty and not guard.closed:
            start = start_outside(start.mT, guard.spaces[0]).mT if guard.left else start_outside(start, guard.spaces[0])
        return super().constrained(ctx, name, start.contiguous())

    def guard(self, name: str, tensor: Tensor) -> Guard:
        """U stays outside the old U from the left, V outside the old V from the right; sigma is free."""
        if name.endswith(".sigma"):
            return Guard([])
        left = name.endswith(".U")
        return Guard([self.memory.get(name, tensor.shape[0 if left else 1])], left=left)

    def protected_space(self, tensor: str) -> str:
        """Each tensor's own."""
        return tensor

    def _project_gradients(self) -> None:
        """With `project: gradient`, the hooks: on the joint bases, or the sum of pairwise projections."""
        if self.settings.projection == "joint":
            self.project_gradients()
        elif self.settings.project == "gradient":
            for layer, past in self._old_triplets().items():
                U, V = torch.cat([old.U for old in past], dim=1), torch.cat([old.V for old in past])
                for part, vectors in (("U", U), ("V", V.mT)):
                    subtract_pairwise(self._attached.parameters[f"{layer}.{part}"], vectors, left=part == "U")

    # ---- during the task

    def groups(self) -> Sequence[ParameterGroup]:
        """sigma, where it has a learning rate of its own."""
        if self.settings.sigma_lr is None:
            return []
        sigmas = [layer.sigma for layer in self._attached.layers.values()]
        return [ParameterGroup(GROUP, sigmas, self.settings.sigma_lr, weight_decay=None)]

    def penalty(self, ctx: TaskContext) -> Tensor | None:
        """`gamma` times the mean over all U and V of `||U^T U - I||_F`, `||V V^T - I||_F`, batched by width."""
        if not self.settings.gamma:
            return None
        by_width: dict[int, list[Tensor]] = {}
        for layer in self._attached.layers.values():
            for rows in (_now(layer.U, layer.U_projector).mT, _now(layer.V, layer.V_projector)):  # [r, d]
                by_width.setdefault(rows.shape[1], []).append(rows)
        norms = [_distances(torch.stack(rows)) for rows in by_width.values()]
        return self.settings.gamma * torch.cat(norms).mean()

    # ---- a task's end

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Measure the leaks, let the new singular vectors join the bases."""
        finished = self.finished(ctx)
        leaks = self.measure_leaks(ctx, finished)
        closed = [name for name in self.memory if name not in finished]
        self._records = [*self._jumps.get(ctx.task_index, []), *self._sensitivity_records(ctx)]
        if all(bool(tensor.value.isfinite().all()) for tensor in finished.values()):  # else the stage is refused
            self._records += self._join(ctx, finished, leaks)
        self._records += [self.closed_record(name) for name in closed]
        tensors = self.close({name: tensor.value for name, tensor in finished.items()})
        self._start = {}
        return tensors

    def close(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Triplets as triplets, with their scale."""
        super().close({})
        scales = {f"{layer}.scale": torch.tensor(self.kind.scale) for layer in triplets_of(tensors)}
        return tensors | scales

    def _join(
        self, ctx: TaskContext, finished: Mapping[str, Finished], leaks: Mapping[str, float]
    ) -> list[dict[str, Any]]:
        """The new singular vectors join the bases."""
        columns = {
            name: tensor.value if name.endswith(".U") else tensor.value.mT
            for name, tensor in finished.items()
            if not name.endswith(".sigma")
        }
        return self.remember(ctx, columns, leaks, lambda name, R: (joined(self.memory.get(name, len(R)), R), {}))

    def _sensitivity_records(self, ctx: TaskContext) -> list[dict[str, Any]]:
        found = self._sensitivity.get(ctx.task_index, {})
        return [{"sensitivity_of": name, **figures} for name, figures in found.items()]

    # ---- what is kept

    def load_trained(self, task_index: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the task's triplets to the past. ValueError where old and new ones cannot be paired by index."""
        super().load_trained(task_index, tensors)
        ranks = {triplets.sigma.numel() for triplets in triplets_of(self._past[-1]).values()}
        if tensors and ranks != {self.kind.rank}:
            found = f"triplets of rank {', '.join(map(str, sorted(ranks)))}" if ranks else "no triplets"
            raise ValueError(f"task {task_index} left {found}; triplets are paired by index, at rank {self.kind.rank}")

    def influences(self, task_index: int) -> dict[str, Any]:
        """In the first task there is nothing to inject, nor to stay outside of."""
        if task_index == 1:
            return self.settings.model_dump(mode="json", include={"gamma", "sigma_lr"})
        return super().influences(task_index)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The joint bases, and what was measured."""
        tensors, memory = self.memory.state_dict()
        sensitivity = {str(task): layers for task, layers in self._sensitivity.items()}
        jumps = {str(task): found for task, found in self._jumps.items()}
        return tensors, {"memory": memory, "leaks": self.saved_leaks(), "sensitivity": sensitivity, "jumps": jumps}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.memory.load_state_dict(tensors, values["memory"])
        self.load_leaks(values["leaks"])
        self._sensitivity = {int(task): dict(layers) for task, layers in values["sensitivity"].items()}
        self._jumps = {int(task): list(found) for task, found in values["jumps"].items()}


def _jump(
    name: str, rows: Sequence[int], before: tuple[float, float | None], now: tuple[float, float | None]
) -> dict[str, Any]:
    """What injection does before training: (loss, share of rows that are right, where that was looked at).

    Raises `FeaturesNotFinite` where a loss is not finite.
    """
    if not math.isfinite(before[0] + now[0]):
        raise FeaturesNotFinite("the output", list(rows))
    found: dict[str, Any] = {"jump_on": name, "rows": len(rows)}
    found |= {"loss_at_random": before[0], "loss_injected": now[0]}
    return found | {"right_at_random": before[1], "right_injected": now[1]}


def _figures(layer: LayerSensitivity) -> dict[str, Any]:
    return {"mean": float(layer.scores.mean()), "per_task": layer.scores.mean(dim=1).tolist(), "fisher": layer.fisher}


def _now(parameter: nn.Parameter, projector: Any) -> Tensor:
    """A projected tensor as the forward in progress has used it, or made again where the forward kept none."""
    if projector is None:
        return parameter
    inner = projector.turned if isinstance(projector, FromLeft) else projector
    if inner.latest is not None:
        latest: Tensor = inner.latest.mT if isinstance(projector, FromLeft) else inner.latest
        return latest
    made: Tensor = projector(parameter)
    return made


def _distances(rows: Tensor) -> Tensor:  # [M, r, d] -> [M]
    """`||R R^T - I||_F` of each."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    eye = torch.eye(rows.shape[1], dtype=wide.dtype, device=wide.device)
    distances: Tensor = torch.linalg.matrix_norm(wide @ wide.mT - eye)
    return distances
