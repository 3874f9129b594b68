"""What LoRA, triplets and cores have in common: a branch beside each of some frozen linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from pipeline.adapters.base import See
from pipeline.adapters.forwards import inputs_seen


class BranchedLinear(nn.Module):
    """A frozen linear layer with a trained branch beside it."""

    parts: ClassVar[Sequence[str]]  # names of the branch's trained tensors, attributes of the layer

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Tensor:
        """The frozen weight: transformers' T5 looks at its dtype before it calls the layer."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def like(self) -> Tensor:
        """A tensor of the device and dtype that trained tensors take: the weight, unless it is quantized."""
        return self.base.like if isinstance(self.base, BranchedLinear) else self.weight


def widths_of(layer: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer, bare or with a branch of the past beside it."""
    found: Any = layer
    return int(found.in_features), int(found.out_features)


def dropout_of(share: float) -> nn.Module:
    """The dropout of a branch's input."""
    return nn.Dropout(share) if share > 0 else nn.Identity()


def with_branch(output: Tensor, hidden: Tensor, left: Tensor, scale: float = 1.0) -> Tensor:
    """A layer's `output` [..., d_out] + `scale` x `hidden` [..., r] x `left`^T, `left` [d_out, r], as one product.

    Of a trained `left` a turned copy is multiplied with: autograd then forms its gradient as hidden^T g, which a CPU
    does five times as fast as the same numbers by g^T hidden, r being small.
    """
    right = left.mT.contiguous() if left.requires_grad else left.mT
    flat = output.reshape(-1, output.shape[-1])
    summed = torch.addmm(flat, hidden.reshape(len(flat), -1), right, alpha=scale)
    return summed.view(output.shape)


Layer = TypeVar("Layer", bound=BranchedLinear)


class AttachedBranches(Generic[Layer]):
    """Branches in their places in a model."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Layer]) -> None:
        self._model = model
        self.layers = layers
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in layer.parts
        }

    def observe(self, see: See) -> AbstractContextManager[None]:
        """Inside, every forward tells `see` the inputs [b, s, d_in] of the layers, under their names."""
        return inputs_seen(see, self.layers)

    def detach(self) -> None:
        """The bare layers stand in the model again."""
        for name, layer in self.layers.items():
            self._model.set_submodule(name, layer.base)
