"""`gorp`: low-rank and full-rank updates orthogonal to the gradients of old tasks (arXiv 2507.02503; methods.md 3).

After task t: take Adam's first moment of each trained matrix as it stands, grow the matrix's space by it, keep later
changes outside. LoRA's factors are projected by construction; a full-rank module learns through a core between bases
that lie outside its space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.base import AdapterKind, Trained
from pipeline.adapters.core import AttachedCores, CoreLoraKind
from pipeline.methods.adapter_method import Finished
from pipeline.methods.base import TaskContext
from pipeline.methods.core_updates import GROUP, CoreUpdates
from pipeline.methods.feature_pass import feature_sample, measure, probe
from pipeline.methods.projecting import GrowingMethod
from pipeline.optimizer_groups import ParameterGroup
from pipeline.projection.guard import Guard
from pipeline.projection.moments import GradientSums, moment_columns
from pipeline.projection.sketch import Protected
from pipeline.recipe import Gorp

SMALL_SPACES = (".h", ".S")  # of r or k dimensions, which no `max_rank` caps


class ProjectedByGradients(GrowingMethod[Gorp]):
    """LoRA shared or per task, and full-rank cores, projected against the gradient spaces of finished tasks.

    Spaces: "<layer>.A" in R^d_in, "<layer>.B" and "<layer>.C" (the core's, lifted) in R^d_out, "<layer>.S" in R^k (the
    literal core's own). With `hidden_features` they are PEGP's: "<layer>" in R^d_in, "<layer>.h" in R^r.
    """

    kind: CoreLoraKind
    _attached: AttachedCores

    def __init__(self, settings: Gorp, kind: AdapterKind, *, task_count: int) -> None:
        assert isinstance(kind, CoreLoraKind)
        super().__init__(settings, kind, task_count=task_count)
        self._matrices: dict[str, Tensor] = {}  # the full-rank modules' weights, float32 on the CPU
        self._cores: CoreUpdates | None = None
        self._gradients: GradientSums | None = None
        self._features = settings.gradient_space == "hidden_features"
        self._literal = settings.mode == "literal" and not self._features

    # ---- a task's start

    def begin_task(self, ctx: TaskContext) -> None:
        """Attach LoRA behind its projectors, and cores between bases from the first global batch's gradient."""
        super().begin_task(ctx)
        if self._features:
            leaders, self._shapes = probe(ctx, self._attached)
            if ctx.task_index == 1:
                self.memory.share(leaders)
        self._project_gradients()
        if layers := self._attached.cores:
            spaces = {name: self._core_space(name, layer.shape) for name, layer in layers.items()}
            free = dict.fromkeys(spaces, Protected())
            wide = {name: torch.promote_types(layer.C.dtype, torch.float32) for name, layer in layers.items()}
            masters = {name: self._weight(ctx, name).to(dtype, copy=True) for name, dtype in wide.items()}
            projecting = self.settings.project != "off" and not self._literal
            self._cores = CoreUpdates(
                ctx, self.settings, layers, masters, protected=spaces if projecting else free, measured=spaces
            )
            self._cores.first_bases()

    def trained(self, ctx: TaskContext, starts: Mapping[str, Tensor]) -> dict[str, Trained]:
        """Of cores, those with a direction left."""
        k = self.kind.core_rank
        names = [f"{layer}.C" for layer in self.kind.cores] if self.settings.trains_cores else []
        cores = {name: torch.zeros(k, k) for name in names if self._open(name)}
        return super().trained(ctx, {**starts, **cores})

    def constrained(self, ctx: TaskContext, name: str, start: Tensor) -> Trained:
        """A core is free: its bases are projected, or in the literal mode its gradient."""
        return Trained(start) if name.endswith(".C") else super().constrained(ctx, name, start)

    def guard(self, name: str, tensor: Tensor) -> Guard:
        """The protected space of a factor, or of the literal core."""
        layer, part = name[:-2], name[-1]
        if part == "C":
            width = self.kind.core_rank
            return Guard([self.memory.get(f"{layer}.S", width)], left=True) if self._literal else Guard([])
        if part == "B" and (not self.settings.project_b or (self._features and self.per_task)):
            return Guard([])
        left = part == "B" and not self._features
        width = tensor.shape[0 if left else 1]
        return Guard([self.memory.get(self.protected_space(name), width)], left=left)

    def protected_space(self, tensor: str) -> str:
        """The name of a factor's space."""
        return self.kind.space_of(tensor) if self._features else tensor

    def _core_space(self, layer: str, shape: tuple[int, int]) -> Protected:
        """What a core's lifted updates are to stay out of; None of a space that is empty."""
        d_out, d_in = shape
        space = self.memory.get(layer, d_in) if self._features else self.memory.get(f"{layer}.C", d_out)
        if not space.rank:
            return Protected()
        return Protected(right=space) if self._features else Protected(left=space)

    def _open(self, core: str) -> bool:
        """Whether a core has a direction left: in the literal mode of its own k, else of the layer's."""
        if self.settings.project == "off":
            return True
        layer = core.removesuffix(".C")
        name = self.memory.leader(layer if self._features else f"{layer}.S" if self._literal else core)
        return name not in set(self.memory) or self.memory[name].free > 0

    def _project_gradients(self) -> None:
        """With `project: gradient`, the hooks on the factors; the literal core knows no other way."""
        self.project_gradients()
        if self._literal and self.settings.project == "exact":
            for name, layer in self._attached.cores.items():
                if not (guard := self.guard(f"{name}.C", layer.C)).empty:
                    guard.project_gradient(layer.C)

    def _weight(self, ctx: TaskContext, layer: str) -> Tensor:
        """A full-rank module's weight as the task finds it."""
        return self._matrices[layer] if layer in self._matrices else ctx.original(layer)

    # ---- during the task

    def groups(self) -> Sequence[ParameterGroup]:
        """The cores, with `full_rank_lr`."""
        cores = [layer.C for layer in self._attached.cores.values()]
        return [ParameterGroup(GROUP, cores, self.settings.full_rank_lr)] if cores else []

    def engine_started(self, ctx: TaskContext) -> None:
        """Start summing gradients, where their mean is asked for."""
        super().engine_started(ctx)
        if self.settings.gradient_space == "mean_gradient":
            self._gradients = GradientSums(
                {name: p for name, p in self._attached.parameters.items() if p.requires_grad and self._summed(name)}
            )
        if self._cores is not None:
            self._cores.prepare()

    def _summed(self, name: str) -> bool:
        return self._literal or not name.endswith(".C")

    def after_step(self, ctx: TaskContext) -> None:
        """Merge cores and make new bases where a window ends."""
        if self._cores is not None:
            self._cores.after_step()

    # ---- a task's end

    def end_task(self, ctx: TaskContext) -> dict[str, Tensor]:
        """Merge the cores, measure leaks, grow the spaces."""
        masters = self._cores.close() if self._cores is not None else {}
        finished = self.finished(ctx)
        leaks = self.measure_leaks(ctx, finished)
        self._records = self._core_records(ctx, masters, leaks)
        if leaks:
            self._leaks[ctx.task_index] = leaks
        known = self._feature_moments(ctx, finished) if self._features else self._columns(ctx)
        caps = {name: None if name.endswith(SMALL_SPACES) else self.settings.max_rank for name in known}
        anew = not self.settings.accumulates
        closed = [name for name in self.memory if name not in known and self.memory[name].free == 0]
        self._records += self.grow(ctx, known, leaks, columns=not self._features, caps=caps, anew=anew)
        self._records += [self.closed_record(name) for name in closed]
        self._cores = self._gradients = None
        factors = self.close({name: tensor.value for name, tensor in finished.items()})
        weights = {**self._matrices, **masters}
        return factors | {f"{name}.W": weight.float() for name, weight in weights.items()}

    def finished(self, ctx: TaskContext) -> dict[str, Finished]:
        """LoRA's factors; cores are merged."""
        factors = {name: trained for name, trained in self._trained.items() if not name.endswith(".C")}
        return {name: self._finished(ctx, name, trained) for name, trained in factors.items()}

    def _core_records(
        self, ctx: TaskContext, masters: Mapping[str, Tensor], leaks: dict[str, float]
    ) -> list[dict[str, Any]]:
        """How far each full-rank module moved, `||dW|| / ||W||`, and the directions its gradient did not have."""
        records = []
        for name, after in masters.items():
            assert self._cores is not None
            before = self._weight(ctx, name).to(after)
            change = float((after - before).double().norm())
            leak = self._cores.leak(name, change)
            if leak is not None:
                leaks[f"{name}.C"] = leak
            moved = change / float(before.double().norm())
            records.append({"full_rank": name, "moved": moved, "missing": self._cores.missing[name], "leak": leak})
        return records

    def _columns(self, ctx: TaskContext) -> dict[str, Tensor]:
        """By space, the columns R that it is to hold: moments, or mean gradients."""
        means = self._gradients.close() if self._gradients is not None else None
        triplets = self._cores.mean_factors() if means is not None and self._cores is not None else {}
        bases = self._cores.bases() if self._cores is not None else {}
        found: dict[str, Tensor] = {}
        for name, trained in self._trained.items():
            parameter, (layer, part) = self._attached.parameters[name], (name[:-2], name[-1])
            if trained.fixed or (part == "B" and not self.settings.project_b):
                continue
            if part == "C" and layer in triplets:
                found[name] = triplets[layer].U * triplets[layer].S
                if not self._literal:
                    continue
            moment = ctx.first_moment(parameter) if means is None else ctx.all_sum(means[name])
            moment = moment.cpu()
            if part != "C":
                projector: Any = trained.projector
                found[name] = moment_columns(moment, projector, left=part == "B")
                continue
            if self._literal:
                found[f"{layer}.S"] = moment
            found.setdefault(name, bases[layer][0].to(moment) @ moment)
        return found

    def _feature_moments(self, ctx: TaskContext, finished: Mapping[str, Finished]) -> dict[str, Tensor]:
        """PEGP's: by space, the second moment of what A is multiplied with, and B where one LoRA is shared."""
        rows = feature_sample(ctx, self.settings.feature_samples)
        moments = {name: C.cpu() for name, C in measure(ctx, self._attached, self._shapes, rows).items()}
        if not self.per_task and self.settings.project_b:
            for name, tensor in finished.items():
                if name.endswith(".A"):
                    layer = name.removesuffix(".A")
                    C, A = moments[self.memory.leader(layer)].double(), tensor.value.double()
                    moments[f"{layer}.h"] = A @ C @ A.mT
        return moments

    # ---- what is kept

    def load_trained(self, task_index: int, tensors: Mapping[str, Tensor]) -> None:
        """LoRA's factors to the past; the full-rank modules' weights as they stand after the task."""
        self._matrices = {name.removesuffix(".W"): tensor for name, tensor in tensors.items() if name.endswith(".W")}
        super().load_trained(task_index, {n: tensor for n, tensor in tensors.items() if not n.endswith(".W")})

    def matrices(self) -> Mapping[str, Tensor]:
        """The full-rank modules' weights."""
        return self._matrices

    def influences(self, task_index: int) -> dict[str, Any]:
        """In the first task, nothing but the cores differs from LoRA on the same layers."""
        if task_index > 1:
            return self.memory_influences()
        found: dict[str, Any] = {"without": list(self.kind.cores)} if self.kind.cores else {}
        if self.kind.cores and self.settings.trains_cores:
            keys = {"full_rank_lr", "core_rank", "core_scale", "refresh_every", "refresh_moments", "svd"}
            found |= self.settings.model_dump(mode="json", include=keys)
        return found

    def memory_influences(self) -> dict[str, Any]:
        """The settings that decide the memory."""
        unused = set() if self._features else {"feature_samples"}
        return self.settings.model_dump(mode="json", exclude=unused)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The memory, and what was measured. Bases, cores and moments begin anew with each task."""
        tensors, memory = self.memory.state_dict()
        return tensors, {"memory": memory, "leaks": self.saved_leaks()}

    def load_state_dict(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.memory.load_state_dict(tensors, values["memory"])
        self.load_leaks(values["leaks"])
