"""The triplet adapter: `W x + s U diag(sigma) V x` (LB-CL, NeurIPS 2024; methods.md 4); attach, factors.

Legend: U [d_out, r]; sigma [r]; V [r, d_in]; s scale, the same for every rank r.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.base import TensorProjector, Trained, install, value_of
from pipeline.adapters.branches import AttachedBranches, BranchedLinear, dropout_of, widths_of, with_branch
from pipeline.adapters.lora import Factors, LoraKind

PARTS = ("U", "sigma", "V")
STANDARD_DEVIATION = 0.02  # of a random start's U and V (AdaLoRA's)


@dataclass(frozen=True)
class Triplets:
    """r singular triplets of one layer, float32 on the CPU: `dW = s sum_i sigma_i u_i v_i^T`."""

    U: Tensor  # [d_out, r]
    sigma: Tensor  # [r]
    V: Tensor  # [r, d_in]


class TripletLinear(BranchedLinear):
    """A frozen linear layer with a branch of trainable triplets beside it."""

    parts = PARTS
    U_projector: TensorProjector | None
    V_projector: TensorProjector | None

    def __init__(self, base: nn.Module, U: Trained, sigma: Trained, V: Trained, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.U = install(self, "U", U, self.like)  # of [d_out, r]
        self.sigma = install(self, "sigma", sigma, self.like)  # [r]
        self.V = install(self, "V", V, self.like)  # of [r, d_in]
        self.scale = scale
        self.dropout = dropout_of(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        """`base(x) + s U diag(sigma) V dropout(x)`."""
        hidden = F.linear(self.dropout(x), value_of(self.V, self.V_projector))
        left = value_of(self.U, self.U_projector) * (self.scale * self.sigma)
        return with_branch(self.base(x), hidden, left)


class AttachedTriplets(AttachedBranches[TripletLinear]):
    """Triplet branches in their places in a model."""


class TripletKind(LoraKind):
    """Triplets on the linear layers `targets`; tensors `<layer>.U`, `<layer>.sigma`, `<layer>.V`."""

    name = "triplet"

    def __init__(
        self, targets: Sequence[str], reached: Sequence[str], *, rank: int, scale: float, dropout: float
    ) -> None:
        super().__init__(targets, rank=rank, alpha=scale * rank, dropout=dropout)
        self.reached = reached  # those that old triplets are injected into
        self.scale = scale  # as given: alpha / r would round

    def starts(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """U and V normal with a standard deviation of 0.02, sigma zero, so that dW is zero (methods.md 4.2)."""
        tensors: dict[str, Tensor] = {}
        for name in self.targets:
            d_in, d_out = widths_of(model.get_submodule(name))
            U = torch.empty(d_out, self.rank).normal_(0, STANDARD_DEVIATION, generator=generator)
            V = torch.empty(self.rank, d_in).normal_(0, STANDARD_DEVIATION, generator=generator)
            tensors |= {f"{name}.U": U, f"{name}.sigma": torch.zeros(self.rank), f"{name}.V": V}
        return tensors

    def attach(self, model: nn.Module, trained: Mapping[str, Trained]) -> AttachedTriplets:
        """Put a branch beside each layer that `trained` has tensors for, in place."""
        layers = {}
        for name in (tensor.removesuffix(".U") for tensor in trained if tensor.endswith(".U")):
            U, sigma, V = (trained[f"{name}.{part}"] for part in PARTS)
            layer = TripletLinear(model.get_submodule(name), U, sigma, V, self.scale, self.dropout)
            layer.train(model.training)
            model.set_submodule(name, layer)
            layers[name] = layer
        return AttachedTriplets(model, layers)

    def space_of(self, tensor: str) -> str:
        """U's lies in R^d_out, V's in R^d_in: each tensor has its own."""
        return tensor

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Finished tensors as LoRA's factors, by layer: `B = U diag(sigma)`, `A = V`."""
        return {name: as_factors(found, self.scale) for name, found in triplets_of(tensors).items()}


def triplets_of(tensors: Mapping[str, Tensor]) -> dict[str, Triplets]:
    """Named tensors as triplets, by layer."""
    names = [name.removesuffix(".sigma") for name in tensors if name.endswith(".sigma")]
    return {name: Triplets(*(tensors[f"{name}.{part}"] for part in PARTS)) for name in names}


def as_factors(triplets: Triplets, scale: float) -> Factors:
    """The same update as LoRA's factors: `B = U diag(sigma)`, `A = V`."""
    return Factors(triplets.V, triplets.U * triplets.sigma, scale)


def stage_factors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """A stage's triplets, kept with `<layer>.scale`, as LoRA's factors by layer."""
    return {name: as_factors(found, float(tensors[f"{name}.scale"])) for name, found in triplets_of(tensors).items()}
