"""`pegp`: updates orthogonal to the features of old tasks, for four kinds of adapter (arXiv 2405.13383; methods.md 2).

After task t: sample features of its training data, grow each space by them, keep later changes outside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pipeline.adapters.base import AdapterKind, Trained
from pipeline.methods.adapter_method import Finished
from pipeline.methods.base import TaskContext
from pipeline.methods.feature_pass import feature_sample, measure, probe
from pipeline.methods.projecting import HEAD, GrowingMethod
from pipeline.projection.features import FeaturesNotFinite
from pipeline.projection.guard import Guard
from pipeline.projection.subspace import Subspace
from pipeline.recipe import Pegp


class ProjectedByFeatures(GrowingMethod[Pegp]):
    """LoRA per task or shared, bottleneck, prompt or prefix, projected against the features of finished tasks."""

    def __init__(self, settings: Pegp, kind: AdapterKind, *, task_count: int) -> None:
        super().__init__(settings, kind, task_count=task_count)
        self._samples: list[list[int]] = []  # by task: the training rows that its features came from
        self._ranks: list[dict[str, int]] = []  # by task: k of each space when it ended

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
        self.project_gradients()

    def constrained(self, ctx: TaskContext, name: str, start: Tensor) -> Trained:
        """A prefix's values may be fixed too."""
        frozen = name.endswith(".value") and self.settings.prefix_values == "freeze" and ctx.task_index > 1
        if frozen and self.settings.project != "off":
            return Trained(start, fixed=True)
        return super().constrained(ctx, name, start)

    def guard(self, name: str, tensor: Tensor) -> Guard:
        """The protected subspaces of what the tensor is multiplied with; none where it is free."""
        free = name.endswith(".value") and self.settings.prefix_values != "project"
        if free or (self.per_task and name.endswith(".B")):  # with A outside, dW x = 0 whatever B does
            return Guard([])
        width = tensor.shape[-1]
        spaces = head_names(self.kind.space_of(name), tensor.shape[:-2])
        return Guard([self.memory.get(space, width) for space in spaces])

    def protected_space(self, tensor: str) -> str:
        """The space of what the tensor is multiplied with."""
        return self.kind.space_of(tensor)

    # ---- a task's end: what leaked, and what to protect from now on

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Measure the leak, run the feature pass with the finished adapter, grow the memory."""
        finished = self.finished(ctx)
        leaks = self.measure_leaks(ctx, finished)
        rows = feature_sample(ctx, self.settings.feature_samples)
        moments = self._moments(ctx, finished, rows)
        self._records = self._drift(ctx) if self.settings.feature_drift else []
        self._samples.append(rows)
        # The cap is never of r-dimensional spaces.
        caps = {name: None if name.endswith(".h") else self.settings.max_rank for name in moments}
        self._records += self.grow(ctx, moments, leaks, caps=caps, merge_beta=self.settings.merge_beta)
        self._records += [self.closed_record(name) for name in self.memory if name not in moments]
        self._ranks.append({name: self.memory[name].rank for name in self.memory})
        return self.close({name: tensor.value for name, tensor in finished.items()})

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

    def _drift(self, ctx: TaskContext) -> list[dict[str, Any]]:
        """How much of each old task's features, taken again on its stored rows, still lies in its subspace."""
        records = []
        for old, (rows, ranks) in enumerate(zip(self._samples, self._ranks, strict=True), start=1):
            for name, C in by_head(measure(ctx, self._attached, self._shapes, rows, task_index=old)).items():
                then = Subspace(self.memory[name].basis[:, : ranks[name]])  # growth keeps the leading columns' span
                records.append({"space": name, "drift_of": old, "share": then.share(C)})
        return records

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
        values = {"memory": memory, "samples": self._samples, "ranks": self._ranks, "leaks": self.saved_leaks()}
        return tensors, values

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.memory.load_state_dict(tensors, values["memory"])
        self._samples, self._ranks = list(values["samples"]), list(values["ranks"])
        self.load_leaks(values["leaks"])


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
