"""What every projecting method shares: a memory of protected subspaces, guards on trained tensors, leaks, growth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.adapters.base import AdapterKind, Trained
from pipeline.methods.adapter_method import AdapterMethod, Finished
from pipeline.methods.base import TaskContext
from pipeline.projection.guard import Guard
from pipeline.projection.memory import SubspaceMemory
from pipeline.projection.projector import start_outside
from pipeline.projection.subspace import Subspace
from pipeline.recipe import Constrained, Projecting

Settings = TypeVar("Settings", bound=Constrained)
Growing = TypeVar("Growing", bound=Projecting)
HEAD = "#"


class ProjectingMethod(AdapterMethod[Settings]):
    """LoRA per task or shared, or another adapter, whose changes stay outside protected subspaces."""

    def __init__(self, settings: Settings, kind: AdapterKind, *, task_count: int) -> None:
        super().__init__(settings, kind, task_count=task_count)
        self.memory = SubspaceMemory()
        self._leaks: dict[int, dict[str, float]] = {}
        self._records: list[dict[str, Any]] = []

    def guard(self, name: str, tensor: Tensor) -> Guard:
        """The protected subspaces of a trained tensor; none where it is free."""
        raise NotImplementedError

    def protected_space(self, tensor: str) -> str:
        """The name under which the space of a trained tensor is kept."""
        raise NotImplementedError

    # ---- a task's start: what may change, and where to

    def trained(self, ctx: TaskContext, starts: Mapping[str, Tensor]) -> dict[str, Trained]:
        """The projected form of each guarded tensor; a layer without a free direction gets no LoRA for this task."""
        trained = {name: self.constrained(ctx, name, start) for name, start in starts.items()}
        if not self.per_task:
            return trained
        closed = {name[:-2] for name, tensor in trained.items() if tensor.fixed and name[-2:] in (".A", ".B")}
        return {name: tensor for name, tensor in trained.items() if name[:-2] not in closed}

    def constrained(self, ctx: TaskContext, name: str, start: Tensor) -> Trained:
        """How one tensor is trained."""
        guard = self.guard(name, start)
        if self.settings.project == "off" or guard.empty:
            return Trained(start)
        if guard.closed:
            return Trained(start, fixed=True)
        if self.per_task and name.endswith(".A"):
            start = start_outside(start, guard.spaces[0])
        return Trained(start, guard.projector(start) if self.settings.project == "exact" else None)

    def project_gradients(self) -> None:
        """With `project: gradient`, the hooks on the attached tensors."""
        if self.settings.project == "gradient":
            for name, trained in self._trained.items():
                if not trained.fixed and not (guard := self.guard(name, trained.start)).empty:
                    guard.project_gradient(self._attached.parameters[name])

    # ---- a task's end: what leaked, and what to protect from now on

    def measure_leaks(self, ctx: TaskContext, finished: Mapping[str, Finished]) -> dict[str, float]:
        """The worst leak of each space's tensors, kept by task; a space that protects nothing yet has none."""
        leaks: dict[str, float] = {}
        for name, tensor in finished.items():
            guard = self.guard(name, tensor.value)
            if not guard.empty:
                space = self.memory.leader(self.protected_space(name))
                leaks[space] = max(leaks.get(space, 0.0), guard.leak(tensor.change))
        if leaks:
            self._leaks[ctx.task_index] = leaks
        return leaks

    def remember(
        self,
        ctx: TaskContext,
        known: Mapping[str, Tensor],
        leaks: Mapping[str, float],
        grown: Callable[[str, Tensor], tuple[Subspace, dict[str, float]]],
    ) -> list[dict[str, Any]]:
        """Keep what `grown` makes of each space and its new directions in `known` [d, n]; give the records.

        `grown` gives figures for the record too. It runs on rank 0, since rounding and singular vectors' signs
        differ between devices; the bases are then broadcast.
        """
        made: dict[str, Subspace] = {}

        def grow_all() -> list[tuple[int, dict[str, float]]]:
            found = {name: grown(name, columns) for name, columns in known.items()}
            made.update({name: space for name, (space, _) in found.items()})
            return [(space.rank, figures) for space, figures in found.values()]

        records = []
        for (name, columns), (rank, figures) in zip(known.items(), ctx.on_first(grow_all), strict=True):
            width = len(columns)
            basis = made[name].basis if name in made else torch.empty(width, rank)
            self.memory.put(name, Subspace(ctx.broadcast(basis)))
            record = {"space": name, "width": width, "rank": rank, "free": width - rank, **figures}
            records.append(record | {"leak": leaks.get(name.partition(HEAD)[0])})
        return records

    def closed_record(self, name: str) -> dict[str, Any]:
        """The record of a space without a free direction, whose layers trained nothing in this task."""
        width = self.memory[name].width
        return {"space": name, "width": width, "rank": width, "free": 0, "energy": None, "leak": None, "closed": True}

    def records(self) -> list[dict[str, Any]]:
        """A space's rank, free dimension, captured energy and leak."""
        return self._records

    def leaks(self) -> dict[int, dict[str, float]]:
        """By task and layer."""
        return self._leaks

    def saved_leaks(self) -> dict[str, dict[str, float]]:
        """The leaks as JSON keeps them."""
        return {str(task): found for task, found in self._leaks.items()}

    def load_leaks(self, saved: Mapping[str, Mapping[str, float]]) -> None:
        """The inverse of `saved_leaks`."""
        self._leaks = {int(task): dict(found) for task, found in saved.items()}


class GrowingMethod(ProjectingMethod[Growing]):
    """A method whose spaces grow by the energy of what finished tasks depend on."""

    def energy(self, task_index: int) -> float:
        """The share of a task's energy that is to be protected."""
        return self.settings.energy

    def grow(
        self,
        ctx: TaskContext,
        known: Mapping[str, Tensor],
        leaks: Mapping[str, float],
        *,
        columns: bool = False,
        caps: Mapping[str, int | float | None],
        merge_beta: float | None = None,
        anew: bool = False,
    ) -> list[dict[str, Any]]:
        """Extend each space by its second moment C [d, d], or by `columns` R [d, n], and give the records of it.

        `anew`: each space is replaced. `caps`: the most directions of each space.
        """
        energy = self.energy(ctx.task_index)

        def extended(name: str, found: Tensor) -> tuple[Subspace, dict[str, float]]:
            old = Subspace.empty(len(found)) if anew else self.memory.get(name, len(found))
            C = found.double() @ found.double().mT if columns else found
            space = old.extended(C=C, energy=energy, max_rank=caps[name], merge_beta=merge_beta)
            return space, {"energy": space.share(C)}

        return self.remember(ctx, known, leaks, extended)
