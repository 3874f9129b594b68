"""LB-CL's sensitivity of every old triplet to a new task, from one forward and backward (methods.md 4.1).

With the past merged, a layer's inputs x_n and output gradients delta_n give what autograd through separate modules
would: `dL/dsigma_i = s sum_n (delta_n . u_i)(x_n . v_i)`, `dL/du_i = s sigma_i sum_n delta_n (x_n . v_i)`,
`dL/dv_i = s sigma_i sum_n x_n (delta_n . u_i)`; no `d_out x d_in` gradient is formed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pipeline.adapters.core import backward_seen
from pipeline.adapters.triplet import Triplets
from pipeline.methods.base import TaskContext


@dataclass(frozen=True)
class LayerSensitivity:
    """How much the new task's loss hangs on one layer's old triplets."""

    scores: Tensor  # [past tasks, r] float32: S_i = s(sigma_i) + mean_j s(U_ji) + mean_j s(V_ij), s(w) = |w dL/dw|
    fisher: float  # mean over rows and the triplets' numbers of the squared gradient of a row's loss


def measure_sensitivity(
    ctx: TaskContext,
    past: Mapping[str, Sequence[Triplets]],
    rows: Sequence[int],
    *,
    scale: float,
    how: Literal["batch", "per_sample"],
) -> tuple[dict[str, LayerSensitivity], float]:
    """By layer of `past`, and the rows' mean loss per label token; `ctx.model` bears the past merged, nothing more.

    `batch`: |w * summed gradient|; `per_sample`: the mean over rows of |w * a row's gradient|. Collective.
    """
    sums = {name: _LayerSums(triplets, scale, how) for name, triplets in past.items()}
    with _seen(ctx.model, sums):
        loss = ctx.run_rows(rows, backward=True)
    found = {}
    for name in past:
        layer = sums.pop(name)  # one after another: each, in float64, is twice as large as the layer's old triplets
        found[name] = layer.result(ctx.all_sum(layer.packed()), len(rows))
    return found, loss


@contextmanager
def _seen(model: nn.Module, sums: Mapping[str, _LayerSums]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(partial(_told, layer)) for name, layer in sums.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _told(layer: _LayerSums, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
    """A forward hook: the output's backward tells `layer`."""
    return backward_seen(output, inputs[0], (layer,))


class _LayerSums:
    """One layer's gradients with respect to its old triplets, added up over micro-batches.

    The triplets rest on the CPU and are on the device while the layer's backward runs; the sums lie on the CPU.
    """

    def __init__(self, past: Sequence[Triplets], scale: float, how: str) -> None:
        self._past = past
        self._scale, self._per_sample = scale, how == "per_sample"
        r, d_out, d_in = past[0].sigma.numel(), past[0].U.shape[0], past[0].V.shape[1]
        R = r * len(past)
        self._shape = len(past), r
        self._sizes = [1, R] if self._per_sample else [1, R, d_out * R, R * d_in]
        self._sums = [torch.zeros(()) for _ in self._sizes]  # squares, then scores or the three gradients

    def _joined(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All old U [d_out, R], sigma [R] and V [R, d_in]."""
        U, sigma, V = zip(*((part.U, part.sigma, part.V) for part in self._past), strict=True)
        return torch.cat(U, dim=1).to(like), torch.cat(sigma).to(like), torch.cat(V).to(like)

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add one micro-batch's inputs [b, n, d_in] and output gradients [b, n, d_out].

        Row by row: gradients of all rows at once, [b, d_out, R], would outgrow the d_out x d_in that is not formed.
        """
        x, g = x.to(torch.promote_types(x.dtype, torch.float32)), g.to(torch.promote_types(g.dtype, torch.float32))
        weights = self._joined(x)
        parts = None
        for row in zip(x, g, strict=True):
            found = self._row(weights, *row)
            parts = found if parts is None else [one.add_(other) for one, other in zip(parts, found, strict=True)]
        for index, part in enumerate(parts or []):
            self._sums[index] = self._sums[index] + part.cpu()

    def _row(self, weights: tuple[Tensor, Tensor, Tensor], x: Tensor, g: Tensor) -> list[Tensor]:
        """One row's [n, d_in] and [n, d_out]: its gradient's square, then its scores or its three gradients, flat."""
        U, sigma, V = weights
        along_v, along_u = x @ V.mT, g @ U  # [n, R]
        d_sigma = self._scale * (along_v * along_u).sum(dim=0)  # [R]
        d_U = (g.mT @ along_v).mul_(self._scale * sigma)  # [d_out, R]
        d_V = (along_u.mT @ x).mul_(self._scale * sigma[:, None])  # [R, d_in]
        squares = torch.stack([gradient.norm().double() for gradient in (d_sigma, d_U, d_V)]).square().sum()[None]
        if self._per_sample:
            return [squares, _scores(weights, (d_U, d_sigma, d_V))]
        return [squares, d_sigma, d_U.flatten(), d_V.flatten()]

    def packed(self) -> Tensor:
        """All sums, flat, float64, on the CPU; zeros on a rank that had no row."""
        return torch.cat([part.double().expand(size) for part, size in zip(self._sums, self._sizes, strict=True)])

    def result(self, packed: Tensor, row_count: int) -> LayerSensitivity:
        """From the sums over all ranks."""
        squares, *parts = packed.split(self._sizes)
        U, sigma, V = self._joined(packed)
        if self._per_sample:
            scores = parts[0]  # a row's share of the mean loss over N rows has the gradient g_b, its own loss N g_b
        else:
            d_sigma, d_U, d_V = parts
            scores = _scores((U, sigma, V), (d_U.view_as(U), d_sigma, d_V.view_as(V)))
        numbers = U.numel() + sigma.numel() + V.numel()
        return LayerSensitivity(scores.view(self._shape).float(), float(squares) * row_count / numbers)


def _scores(weights: tuple[Tensor, Tensor, Tensor], gradients: tuple[Tensor, Tensor, Tensor]) -> Tensor:  # [R]
    """`s(sigma_i) + mean_j s(U_ji) + mean_j s(V_ij)` with `s(w) = |w g|`."""
    (U, sigma, V), (d_U, d_sigma, d_V) = weights, gradients
    return (sigma * d_sigma).abs() + (U * d_U).abs().mean(dim=0) + (V * d_V).abs().mean(dim=1)
