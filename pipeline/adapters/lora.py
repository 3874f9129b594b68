"""LoRA: `W x + s B A x`, s = alpha / r (Hu et al. 2021, eq. 3); attach, factors, merged update.

Legend: d_in, d_out width of the layer; r rank; A [r, d_in]; B [d_out, r]; s scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.base import Attached, TensorProjector, Trained, install, value_of
from pipeline.adapters.branches import AttachedBranches, BranchedLinear, dropout_of, widths_of, with_branch


@dataclass(frozen=True)
class Factors:
    """One task's finished low-rank update of one layer, float32 on the CPU: `dW = scale B A`."""

    A: Tensor  # [r, d_in]
    B: Tensor  # [d_out, r]
    scale: float


def summed_update(parts: Sequence[Factors]) -> Tensor:
    """`sum_k s_k B_k A_k`, [d_out, d_in] float32, as one product of concatenated factors."""
    left = torch.cat([part.scale * part.B.float() for part in parts], dim=1)
    return left @ torch.cat([part.A.float() for part in parts], dim=0)


class LoraLinear(BranchedLinear):
    """A frozen linear layer with a trainable low-rank branch beside it."""

    parts = ("A", "B")
    A_projector: TensorProjector | None
    B_projector: TensorProjector | None

    def __init__(self, base: nn.Module, A: Trained, B: Trained, scale: float, dropout: float) -> None:
        super().__init__(base)
        self.A = install(self, "A", A, self.like)  # of [r, d_in]
        self.B = install(self, "B", B, self.like)  # of [d_out, r]
        self.scale = scale
        self.dropout = dropout_of(dropout)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        """`base(x) + s B A dropout(x)`."""
        hidden = F.linear(self.dropout(x), value_of(self.A, self.A_projector))
        return with_branch(self.base(x), hidden, value_of(self.B, self.B_projector), self.scale)


class AttachedLora(AttachedBranches[LoraLinear]):
    """LoRA branches in their places in a model."""


class LoraKind:
    """LoRA on the linear layers `targets`; tensors `<layer>.A`, `<layer>.B`."""

    name = "lora"

    def __init__(self, targets: Sequence[str], *, rank: int, alpha: float, dropout: float) -> None:
        self.targets = targets
        self.rank, self.dropout = rank, dropout
        self.scale = alpha / rank

    @property
    def layers(self) -> list[str]:
        """All layers whose weight changes."""
        return list(self.targets)

    def starts(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """A Kaiming-uniform with a = sqrt 5 (so U(-1/sqrt d_in, 1/sqrt d_in)), B zero (methods.md section 1).

        Drawn on the CPU in the order of `targets`, so that every rank and device starts from the same numbers.
        """
        tensors: dict[str, Tensor] = {}
        for name in self.targets:
            d_in, d_out = widths_of(model.get_submodule(name))
            bound = 1 / math.sqrt(d_in)
            A = torch.empty(self.rank, d_in).uniform_(-bound, bound, generator=generator)
            tensors |= {f"{name}.A": A, f"{name}.B": torch.zeros(d_out, self.rank)}
        return tensors

    def attach(self, model: nn.Module, trained: Mapping[str, Trained]) -> Attached:
        """Put a branch beside each layer that `trained` has tensors for, in place."""
        return self.attach_branches(model, trained)

    def attach_branches(self, model: nn.Module, trained: Mapping[str, Trained]) -> AttachedLora:
        """The same."""
        layers = {}
        for name in (tensor.removesuffix(".A") for tensor in trained if tensor.endswith(".A")):
            base = model.get_submodule(name)
            layer = LoraLinear(base, trained[f"{name}.A"], trained[f"{name}.B"], self.scale, self.dropout)
            layer.train(model.training)
            model.set_submodule(name, layer)
            layers[name] = layer
        return AttachedLora(model, layers)

    def space_of(self, tensor: str) -> str:
        """A multiplies the layer's input, "<layer>"; B multiplies A x, "<layer>.h"."""
        layer = tensor[:-2]
        return layer if tensor.endswith(".A") else f"{layer}.h"

    def factors(self, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Finished tensors as factors, by layer."""
        names = [tensor[:-2] for tensor in tensors if tensor.endswith(".A")]
        return {name: Factors(tensors[f"{name}.A"], tensors[f"{name}.B"], self.scale) for name in names}


def to_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors as named tensors for a safetensors file: `<layer>.A`, `<layer>.B`, `<layer>.scale`."""
    tensors: dict[str, Tensor] = {}
    for name, part in factors.items():
        tensors |= {f"{name}.A": part.A, f"{name}.B": part.B, f"{name}.scale": torch.tensor(part.scale)}
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    """The inverse of `to_tensors`."""
    names = [name.removesuffix(".A") for name in tensors if name.endswith(".A")]
    return {
        name: Factors(tensors[f"{name}.A"], tensors[f"{name}.B"], float(tensors[f"{name}.scale"])) for name in names
    }
