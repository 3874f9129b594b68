"""GORP's full-rank part during a task: bases from sketches, merges into the weights, Adam's moments (methods.md 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.adapters.core import CoreLinear
from pipeline.methods.base import TaskContext
from pipeline.projection.sketch import ExactGradient, Factors, GradientSum, Protected, Sketch
from pipeline.recipe import Gorp

GROUP = "cores"


@dataclass
class _Core:
    """One full-rank layer: its master weight, what has been added to it, and the bases that hold now."""

    layer: CoreLinear
    master: Tensor  # [d_out, d_in] float32 on the CPU
    protected: Protected  # what its gradient is projected against before its bases are made
    measured: Protected  # what its leak is measured against, projected or not
    inside: Tensor  # the part of the lifted updates inside the measured space, float64
    U: Tensor = field(default_factory=lambda: torch.empty(0))
    V: Tensor = field(default_factory=lambda: torch.empty(0))


class CoreUpdates:
    """All cores of a task. Collective calls: every rank, same order."""

    def __init__(
        self,
        ctx: TaskContext,
        settings: Gorp,
        layers: Mapping[str, CoreLinear],
        masters: Mapping[str, Tensor],
        *,
        protected: Mapping[str, Protected],
        measured: Mapping[str, Protected],
    ) -> None:
        """`masters`: the weights as the task finds them, which are changed in place."""
        self._ctx, self._settings = ctx, settings
        self._generator = ctx.generator("sketch")
        apart = ctx.generator("mean sketch")  # else bases would depend on what spaces are made of
        self._cores = {
            name: _Core(layer, masters[name], protected[name], measured[name], _nothing(layer, measured[name]))
            for name, layer in layers.items()
        }
        self._sums: dict[str, GradientSum] = {}
        self._means = {name: self._collector(name, apart) for name in layers} if _means(settings) else {}
        self.missing: dict[str, int] = dict.fromkeys(layers, 0)  # directions that were not there, over all bases

    def first_bases(self) -> None:
        """From the first global batch, before training: one backward without an update."""
        self._collect(means=False)
        self._ctx.run_rows(self._ctx.first_rows, backward=True)
        for name, factors in self._factors().items():
            self._set(name, factors)
        self._stop_collecting()

    def prepare(self) -> None:
        """Before each step: collect in a window's last one, of which new bases are to be made."""
        if self._ends_window(self._ctx.step + 1):
            self._collect(means=True)

    def after_step(self) -> None:
        """Merge and make new bases where a window ends."""
        if self._ends_window(self._ctx.step):
            old = {name: (core.U, core.V) for name, core in self._cores.items()}
            factors = self._factors()
            self._stop_collecting()
            self._merge()
            for name, found in factors.items():
                self._set(name, found)
                self._carry_moments(name, *old[name])
            if self._settings.refresh_moments == "reset":
                self._ctx.restart_group(GROUP)
        self.prepare()

    def close(self) -> dict[str, Tensor]:
        """Merge what the last window has learnt; the weights, float32 on the CPU."""
        self._merge()
        return {name: core.master for name, core in self._cores.items()}

    def bases(self) -> dict[str, tuple[Tensor, Tensor]]:
        """U, V of each layer as they hold now."""
        return {name: (core.U, core.V) for name, core in self._cores.items()}

    def leak(self, name: str, change: float) -> float | None:
        """The share of the lifted updates inside the protected space; None where none was protected.

        Of the updates, added up in float64, not of `W_end - W_start`, whose rounding would drown it. `change` is that
        difference's norm: updates so small that rounding swallows them count as larger than they are.
        """
        core = self._cores[name]
        if core.inside.numel() == 0:
            return None
        return float(core.inside.norm()) / change if change > 0 else 0.0

    def mean_factors(self) -> dict[str, Factors]:
        """The leading triplets of the gradient summed over the task."""
        return self._reduced(self._means)

    # ---- sketches

    def _ends_window(self, step: int) -> bool:
        """Whether new bases follow after this many steps: never after the task's last."""
        return 0 < step < self._ctx.step_count and step % self._settings.refresh_every == 0

    def _collector(self, name: str, generator: torch.Generator) -> GradientSum:
        core = self._cores[name]
        d_out, d_in = core.layer.shape
        if self._settings.svd == "exact":
            return ExactGradient(d_out, d_in, core.protected)
        return Sketch(d_out, d_in, self._settings.core_rank, generator, core.protected)

    def _collect(self, *, means: bool) -> None:
        self._sums = {name: self._collector(name, self._generator) for name in self._cores}
        for name, core in self._cores.items():
            also = (self._means[name],) if means and name in self._means else ()
            core.layer.collecting = (self._sums[name], *also)

    def _stop_collecting(self) -> None:
        for name, core in self._cores.items():
            core.layer.collecting = (self._means[name],) if name in self._means else ()
        self._sums = {}

    def _factors(self) -> dict[str, Factors]:
        return self._reduced(self._sums)

    def _reduced(self, sums: Mapping[str, GradientSum]) -> dict[str, Factors]:
        """The triplets of each layer's gradient over all ranks, made on rank 0: signs differ between devices."""
        _sum_over_ranks(self._ctx, sums)
        rank, found = self._settings.core_rank, {}

        def decompose() -> None:
            found.update({name: collected.factors(rank) for name, collected in sums.items()})

        self._ctx.on_first(decompose)
        for name, core in self._cores.items():
            d_out, d_in = core.layer.shape
            mine = found[name] if name in found else _empty(d_out, d_in, rank)
            found[name] = Factors(*(self._ctx.broadcast(part) for part in mine))
        return found

    # ---- bases and merges

    def _set(self, name: str, factors: Factors) -> None:
        core = self._cores[name]
        core.U, core.V = factors.U, factors.V
        core.layer.set_bases(core.U, core.V)
        self.missing[name] += factors.missing

    def _merge(self) -> None:
        """`W += alpha U C V^T` in the float32 master, rounded once into the forward's copy; C begins at zero."""
        for core in self._cores.values():
            C = self._ctx.master(core.layer.C).double()
            if not C.any():
                continue
            left, right = self._settings.core_scale * core.U.double() @ C, core.V.double()
            core.inside += _inside(left, right, core.measured)
            core.master.addmm_(left.to(core.master), right.mT.to(core.master))  # no second matrix of W's size
            self._ctx.write_frozen(core.layer.weight, core.master)
            self._ctx.write(core.layer.C, torch.zeros_like(C))

    def _carry_moments(self, name: str, U: Tensor, V: Tensor) -> None:
        """Adam's moments at a refresh: into the new coordinates, as they are, or begun anew.

        `m <- R m S`, `v <- (R o R) v (S o S)` with `R = U_new^T U_old`, `S = V_old^T V_new`.
        """
        how, core = self._settings.refresh_moments, self._cores[name]
        if how == "keep":
            return
        C = core.layer.C
        first, second = (moment(C).cpu() for moment in (self._ctx.first_moment, self._ctx.second_moment))
        if how == "reset":
            self._ctx.write_moments(C, torch.zeros_like(first), torch.zeros_like(second))
            return
        R, S = core.U.mT.to(first) @ U.to(first), V.mT.to(first) @ core.V.to(first)
        self._ctx.write_moments(C, R @ first @ S, (R * R) @ second @ (S * S))


def _means(settings: Gorp) -> bool:
    return settings.gradient_space == "mean_gradient"


def _empty(d_out: int, d_in: int, rank: int) -> Factors:
    return Factors(torch.zeros(d_out, rank), torch.zeros(rank), torch.zeros(d_in, rank))


def _nothing(layer: CoreLinear, measured: Protected) -> Tensor:
    d_out, d_in = layer.shape
    if measured.left is not None:
        return torch.zeros(measured.left.rank, d_in, dtype=torch.float64)
    return torch.zeros(d_out, 0 if measured.right is None else measured.right.rank, dtype=torch.float64)


def _inside(left: Tensor, right: Tensor, measured: Protected) -> Tensor:
    """`Q^T (L R^T)` of a left space, `(L R^T) Q` of a right one."""
    if measured.left is not None:
        return measured.left.coordinates(left.mT).mT @ right.mT
    return left @ right.mT[:, :0] if measured.right is None else left @ measured.right.coordinates(right.mT)


def _sum_over_ranks(ctx: TaskContext, sums: Mapping[str, GradientSum]) -> None:
    """Add up all sums in one message."""
    parts = [(held, key) for held in (collected.sums for collected in sums.values()) for key in held]
    if not parts:
        return
    like = max((held[key] for held, key in parts), key=lambda part: part.element_size())
    total = ctx.all_sum(torch.cat([held[key].to(like.device, like.dtype).flatten() for held, key in parts]))
    for (held, key), found in zip(parts, total.split([held[key].numel() for held, key in parts]), strict=True):
        held[key] = found.view_as(held[key])
