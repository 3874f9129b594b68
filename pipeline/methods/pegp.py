"""`pegp`: updates orthogonal to the features of old tasks, for four kinds of adapter (arXiv 2405.13383; methods.md 2).

After task t: sample features of its training data, grow each space by them, keep later changes outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.base import AdapterKind, Trained
from pipeline.methods.adapter_method import AdapterMethod, Finished
from pipeline.methods.base import TaskContext
from pipeline.methods.feature_pass import feature_sample, measure, probe
from pipeline.projection.features import FeaturesNotFinite
from pipeline.projection.guard import Guard
from pipeline.projection.memory import SubspaceMemory
from pipeline.projection.projector import start_outside
from pipeline.projection.subspace import Subspace
from pipeline.recipe import Pegp

HEAD = "#"


class ProjectedByFeatures(AdapterMethod[Pegp]):
    """LoRA per task or shared, bottleneck, prompt or prefix, projected against the features of finished tasks."""

    def __init__(self, settings: Pegp, kind: AdapterKind, *, task_count: int) -> None:
        super().__init__(settings, kind, task_count=task_count)
        self.memory = SubspaceMemory()
        self._samples: list[list[int]] = []  # by task: the training rows that its features came from
        self._ranks: list[dict[str, int]] = []  # by task: k of each space when it ended
        self._leaks: dict[int, dict[str, float]] = {}
        self._records: list[dict[str, Any]] = []

    def energy(self, task_index: int) -> float:
        """`energy_t = energy_0 + (energy_max - energy_0) t / T`; constant without `energy_max`."""
        first, last = self.settings.energy, self.settings.energy_max
        return first if last is None else first + (last - first) * task_index / self.task_count

    # ---- a task's start: what may change, and where to

    def begin_task(self, ctx: TaskContext) -> None:
        """Attach the task's adapter behind its projectors, and see what its tensors are multiplied with."""
        super().begin_task(ctx)
        leaders, self._shapes = probe(ctx, self._attached)
        if ctx.task_index == 1:
            self.memory.share(leaders)
        assert all(self.memory.leader(name) == leader for name, leader in leaders.items()), "sharing changed"
        if self.settings.project == "gradient":
            for name, trained in self._trained.items():
                if not trained.fixed and not (guard := self._guard(name, trained.start)).empty:
                    guard.project_gradient(self._attached.parameters[name])

    def trained(self, ctx: TaskContext, starts: Mapping[str, Tensor]) -> dict[str, Trained]:
        """The projected form of each guarded tensor; a layer without a free direction gets no LoRA for this task."""
        trained = {name: self._constrained(ctx, name, start) for name, start in starts.items()}
        if not self.per_task:
            return trained
        closed = {name.removesuffix(".A") for name, tensor in trained.items() if tensor.fixed}
        return {name: tensor for name, tensor in trained.items() if name[:-2] not in closed}

    def _constrained(self, ctx: TaskContext, name: str, start: Tensor) -> Trained:
        guard = self._guard(name, start)
        if self.settings.project == "off":
            return Trained(start)
        if name.endswith(".value") and self.settings.prefix_values == "freeze" and ctx.task_index > 1:
            return Trained(start, fixed=True)
        if guard.empty:
            return Trained(start)
        if guard.closed:
            return Trained(start, fixed=True)
        if self.per_task:
            start = start_outside(start, guard.spaces[0])
        return Trained(start, guard.projector(start) if self.settings.project == "exact" else None)

    def _guard(self, name: str, tensor: Tensor) -> Guard:
        """The protected subspaces of what the tensor is multiplied with; none where it is free."""
        free = name.endswith(".value") and self.settings.prefix_values != "project"
        if free or (self.per_task and name.endswith(".B")):  # with A outside, dW x = 0 whatever B does
            return Guard([])
        width = tensor.shape[-1]
        spaces = head_names(self.kind.space_of(name), tensor.shape[:-2])
        return Guard([self.memory.get(space, width) for space in spaces])

    # ---- a task's end: what leaked, and what to protect from now on

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Measure the leak, run the feature pass with the finished adapter, grow the memory."""
        finished = self.finished(ctx)
        leaks = self._measured_leaks(finished)
        if leaks:
            self._leaks[ctx.task_index] = leaks
        rows = feature_sample(ctx, self.settings.feature_samples)
        moments = self._moments(ctx, finished, rows)
        self._records = self._drift(ctx) if self.settings.feature_drift else []
        self._samples.append(rows)
        self._records += self._grow(ctx, moments, leaks)
        self._records += [self._closed(name) for name in self.memory if name not in moments]
        self._ranks.append({name: self.memory[name].rank for name in self.memory})
        return self.close({name: tensor.value for name, tensor in finished.items()})

    def _measured_leaks(self, finished: Mapping[str, Finished]) -> dict[str, float]:
        """The worst leak of each space's tensors; a space that protects nothing yet has none."""
        leaks: dict[str, float] = {}
        for name, tensor in finished.items():
            guard = self._guard(name, tensor.value)
            if not guard.empty:
                space = self.memory.leader(self.kind.space_of(name))
                leaks[space] = max(leaks.get(space, 0.0), guard.leak(tensor.change))
        return leaks

    def _moments(self, ctx: TaskContext, finished: Mapping[str, Finished], rows: Sequence[int]) -> dict[str, Tensor]:
        """`C` by space, a space a head."""
        moments = measure(ctx, self._attached, self._shapes, rows)
        if self.kind.name == "prompt":  # each row is read after the prompt, whose own rows are protected too
            P = finished["prompt"].value.to(moments["prompt"])
            moments["prompt"] += len(rows) * (P.mT @ P)
        if self.kind.name == "lora" and not self.per_task:
            for name, tensor in finished.items():
                if name.endswith(".A"):  # h = A x, so its second moment is A C A^T
                    layer = name.removesuffix(".A")
                    C = moments[self.memory.leader(layer)]
                    A = tensor.value.to(C.device).double()
                    moments[self.kind.space_of(f"{layer}.B")] = A @ C.double() @ A.mT
        for space, C in moments.items():
            if not bool(C.isfinite().all()):  # the features were; so the trained tensor is not
                raise FeaturesNotFinite(space, list(rows))
        return by_head(moments)

    def _closed(self, name: str) -> dict[str, Any]:
        """The record of a space without a free direction, whose layers got no adapter for this task."""
        width = self.memory[name].width
        return {"space": name, "width": width, "rank": width, "free": 0, "energy": None, "leak": None, "closed": True}

    def _grow(
        self, ctx: TaskContext, moments: Mapping[str, Tensor], leaks: Mapping[str, float]
    ) -> list[dict[str, Any]]:
        """Extend each space by its second moment: on rank 0, since signs differ between devices; then broadcast."""
        grown: dict[str, Subspace] = {}
        energy = self.energy(ctx.task_index)

        def grow() -> list[tuple[int, float]]:
            for name, C in moments.items():
                old = self.memory.get(name, len(C))
                cap = None if name.endswith(".h") else self.settings.max_rank  # never of r-dimensional spaces
                grown[name] = old.extended(C=C, energy=energy, max_rank=cap, merge_beta=self.settings.merge_beta)
            return [(grown[name].rank, grown[name].share(C)) for name, C in moments.items()]

        records = []
        for (name, C), (rank, share) in zip(moments.items(), ctx.on_first(grow), strict=True):
            basis = grown[name].basis if name in grown else torch.empty(len(C), rank)
            self.memory.put(name, Subspace(ctx.broadcast(basis)))
            record = {"space": name, "width": len(C), "rank": rank, "free": len(C) - rank, "energy": share}
            records.append(record | {"leak": leaks.get(name.partition(HEAD)[0])})
        return records

    def _drift(self, ctx: TaskContext) -> list[dict[str, Any]]:
        """How much of each old task's features, taken again on its stored rows, still lies in its subspace."""
        records = []
        for old, (rows, ranks) in enumerate(zip(self._samples, self._ranks, strict=True), start=1):
            for name, C in by_head(measure(ctx, self._attached, self._shapes, rows, task_index=old)).items():
                then = Subspace(self.memory[name].basis[:, : ranks[name]])  # growth keeps the leading columns' span
                records.append({"space": name, "drift_of": old, "share": then.share(C)})
        return records

    def records(self) -> list[dict[str, Any]]:
        """A space's rank, free dimension, captured energy and leak; with `feature_drift` the old tasks' shares."""
        return self._records

    def leaks(self) -> dict[int, dict[str, float]]:
        """By task and layer."""
        return self._leaks

    # ---- what is kept

    def influences(self, task_index: int) -> dict[str, Any]:
        """The settings that change how a task trains; the schedule of the energy looks at the stream's length."""
        found = super().influences(task_index)
        return found and self.memory_influences()

    def memory_influences(self) -> dict[str, Any]:
        """The settings that decide the memory."""
        unused = {"feature_drift"}
        if self.kind.name != "lora":
            unused.add("lora")
        if self.kind.name != "prefix":
            unused.add("prefix_values")
        content = self.settings.model_dump(mode="json", exclude=unused)
        return content | ({} if self.settings.energy_max is None else {"task_count": self.task_count})

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The memory, the sampled rows' positions (never their text), and what was measured."""
        tensors, memory = self.memory.state_dict()
        leaks = {str(task): found for task, found in self._leaks.items()}
        return tensors, {"memory": memory, "samples": self._samples, "ranks": self._ranks, "leaks": leaks}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.memory.load_state_dict(tensors, values["memory"])
        self._samples, self._ranks = list(values["samples"]), list(values["ranks"])
        self._leaks = {int(task): dict(found) for task, found in values["leaks"].items()}


def head_names(space: str, heads: Sequence[int]) -> list[str]:
    """The names of a space's parts: itself, or "<space>#<head>" for each head."""
    return [f"{space}{HEAD}{head}" for head in range(heads[0])] if heads else [space]


def by_head(moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Second moments [heads, d, d] as one entry a head."""
    return {
        name: part
        for space, C in moments.items()
        for name, part in zip(head_names(space, C.shape[:-2]), C if C.dim() == 3 else [C], strict=True)
    }
