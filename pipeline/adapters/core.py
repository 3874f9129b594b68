"""GORP's full-rank part as an adapter: `W x + alpha U C V^T x` with a trained core C (methods.md section 3).

`dL/dC = alpha U^T G V` exactly, so neither the gradient G of W nor optimizer states of its size are ever formed.
Legend: U [d_out, k], V [d_in, k] orthonormal columns, constant between refreshes; C [k, k], zero at each refresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.base import Trained, install
from pipeline.adapters.branches import AttachedBranches, BranchedLinear, with_branch
from pipeline.adapters.lora import AttachedLora, LoraKind


class Collects(Protocol):
    """What a layer's inputs and output gradients are added to (`projection.sketch`)."""

    def add(self, x: Tensor, g: Tensor) -> None:
        """Add those of one micro-batch: [..., d_in], [..., d_out]."""


class CoreLinear(BranchedLinear):
    """A frozen linear layer with a trained core between two fixed bases beside it."""

    parts = ("C",)
    U: Tensor
    Vt: Tensor

    def __init__(self, base: nn.Linear, C: Trained, alpha: float) -> None:
        super().__init__(base)
        self.alpha = alpha
        self.C = install(self, "C", C, self.weight)
        k = C.start.shape[0]
        self.shape = base.out_features, base.in_features
        self.register_buffer("U", self.weight.new_zeros(base.out_features, k), persistent=False)
        self.register_buffer("Vt", self.weight.new_zeros(k, base.in_features), persistent=False)
        self.collecting: Sequence[Collects] = ()  # told of every backward

    def set_bases(self, U: Tensor, V: Tensor) -> None:
        """Replace both bases."""
        self.U.copy_(U)
        self.Vt.copy_(V.mT)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        """`base(x) + alpha U C V^T x`."""
        output = with_branch(self.base(x), F.linear(F.linear(x, self.Vt), self.C), self.U, self.alpha)
        if self.collecting and torch.is_grad_enabled():
            output = backward_seen(output, x, self.collecting)
        return output


def backward_seen(y: Tensor, x: Tensor, collecting: Sequence[Collects]) -> Tensor:
    """A layer's output y, whose backward tells `collecting` of the layer's input x and of the gradient of y."""
    seen: Tensor = _Seen.apply(y, x, collecting)  # type: ignore[no-untyped-call]
    return seen


class _Seen(torch.autograd.Function):
    """The identity on a layer's output y; its backward tells the gradient and the layer's input.

    No hook with a reference to x: a saved tensor is what gradient checkpointing recomputes, once for one backward.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, collecting: Sequence[Collects]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.collecting = collecting
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x,) = ctx.saved_tensors
        for sums in ctx.collecting:
            sums.add(x, gradients[0])
        return gradients[0], None, None


class AttachedCores(AttachedBranches[BranchedLinear]):
    """LoRA branches and cores in their places in a model."""

    def __init__(self, model: nn.Module, lora: AttachedLora, cores: Mapping[str, CoreLinear]) -> None:
        super().__init__(model, {**lora.layers, **cores})
        self.cores = cores


class CoreLoraKind(LoraKind):
    """LoRA on `targets`, cores on the layers `cores`; tensors `<layer>.A`, `<layer>.B`, `<layer>.C`."""

    def __init__(
        self,
        targets: Sequence[str],
        cores: Sequence[str],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        core_rank: int,
        core_scale: float,
    ) -> None:
        super().__init__(targets, rank=rank, alpha=alpha, dropout=dropout)
        self.cores, self.core_rank, self.core_scale = cores, core_rank, core_scale

    @property
    def layers(self) -> list[str]:
        """All layers whose weight changes."""
        return [*self.targets, *self.cores]

    def attach(self, model: nn.Module, trained: Mapping[str, Trained]) -> AttachedCores:
        """Put branches and cores beside the layers that `trained` has tensors for, in place."""
        lora = self.attach_branches(model, trained)
        cores = {}
        for name in (tensor.removesuffix(".C") for tensor in trained if tensor.endswith(".C")):
            base = model.get_submodule(name)
            assert isinstance(base, nn.Linear)
            layer = CoreLinear(base, trained[f"{name}.C"], self.core_scale).train(model.training)
            model.set_submodule(name, layer)
            cores[name] = layer
        return AttachedCores(model, lora, cores)
