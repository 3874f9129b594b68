"""LoRA: `W x + s B A x`, s = alpha / r (Hu et al. 2021, eq. 3); attach, factors, merged update.

Legend: d_in, d_out width of the layer; r rank; A [r, d_in]; B [d_out, r]; s scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank branch beside it."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(A)  # [r, d_in]
        self.B = nn.Parameter(B)  # [d_out, r]
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @property
    def weight(self) -> Tensor:
        """The frozen weight: transformers' T5 looks at its dtype before it calls the layer."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        """`base(x) + s B A dropout(x)`."""
        branch = F.linear(F.linear(self.dropout(x), self.A), self.B)
        output: Tensor = self.base(x) + self.scale * branch
        return output


def new_factors(
    model: nn.Module, targets: Iterable[str], *, rank: int, scale: float, generator: torch.Generator
) -> dict[str, Factors]:
    """Starting factors: A Kaiming-uniform with a = sqrt 5 (so U(-1/sqrt d_in, 1/sqrt d_in)), B zero.

    Drawn on the CPU in the order of `targets`, so that every rank and device starts from the same numbers.
    """
    factors = {}
    for name in targets:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        bound = 1 / math.sqrt(layer.in_features)
        A = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        factors[name] = Factors(A, torch.zeros(layer.out_features, rank), scale)
    return factors


def attach(model: nn.Module, starts: Mapping[str, Factors], *, dropout: float) -> dict[str, LoraLinear]:
    """Put a trainable branch beside each named layer, in place, starting at the given factors."""
    attached = {}
    for name, start in starts.items():
        base = model.get_submodule(name)
        weight = base.weight
        assert isinstance(weight, Tensor)
        A, B = (part.to(weight.device, weight.dtype, copy=True) for part in (start.A, start.B))
        layer = LoraLinear(base, A, B, start.scale, dropout)
        layer.train(model.training)
        model.set_submodule(name, layer)
        attached[name] = layer
    return attached


def detach(model: nn.Module, attached: Mapping[str, LoraLinear]) -> None:
    """Undo `attach`: the bare layers stand in the model again."""
    for name, layer in attached.items():
        model.set_submodule(name, layer.base)


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
