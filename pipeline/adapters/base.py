"""What every kind of adapter is to a method: named tensors that are attached, trained, observed and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

# (space, x): the named space's input x of the forward in progress, [batch, positions, d] or
# [batch, positions, heads, d], padding positions included.
See = Callable[[str, Tensor], None]


class TensorProjector(Protocol):
    """What a trained tensor passes through in the forward; an `nn.Module` (`projection.projector`)."""

    def initial(self) -> Tensor:
        """The trained tensor's starting value, float32: the projector turns it into the tensor's start."""

    def change(self, trained: Tensor) -> Tensor:
        """What training has added to the start, float32, from the trained tensor's float32 master."""

    def __call__(self, trained: Tensor) -> Tensor:
        """The tensor that the adapter uses."""


@dataclass(frozen=True)
class Trained:
    """How one tensor of an adapter is trained."""

    start: Tensor  # float32 on the CPU: the value it has when the task begins
    projector: TensorProjector | None = None  # None: the trained tensor is the tensor itself
    fixed: bool = False  # it keeps its start

    def master(self) -> Tensor:
        """The trained tensor's starting value in float32."""
        return self.start if self.projector is None else self.projector.initial()


def install(module: nn.Module, name: str, trained: Trained, like: Tensor) -> nn.Parameter:
    """Register `trained` in `module` as the parameter `name` and the submodule `<name>_projector` (or None there).

    In the device and dtype of `like`. `value_of` reads the tensor back in a forward.
    """
    start = trained.master().to(like.device, like.dtype, copy=True)
    parameter = nn.Parameter(start, requires_grad=not trained.fixed)
    module.register_parameter(name, parameter)
    projector = trained.projector
    if projector is not None:
        assert isinstance(projector, nn.Module)
        projector = projector.to(like.device, like.dtype)
    setattr(module, f"{name}_projector", projector)
    return parameter


def value_of(parameter: Tensor, projector: TensorProjector | None) -> Tensor:
    """The tensor that a parameter stands for."""
    return parameter if projector is None else projector(parameter)


class Attached(Protocol):
    """An adapter in its place in a model."""

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trained tensors by name."""

    def observe(self, see: See) -> AbstractContextManager[None]:
        """Inside, every forward tells `see` what the adapter's tensors are multiplied with."""

    def detach(self) -> None:
        """Take the adapter off: the model is as it was."""


class AdapterKind(Protocol):
    """One kind of adapter with its settings, for one backbone."""

    @property
    def name(self) -> str:
        """lora, bottleneck, prompt or prefix."""

    def starts(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """Starting values of a new adapter's tensors by name, float32 on the CPU, the same on every rank."""

    def attach(self, model: nn.Module, trained: Mapping[str, Trained]) -> Attached:
        """Put the adapter into `model`, in place."""

    def space_of(self, tensor: str) -> str:
        """The name of the space of inputs that the tensor `tensor` is multiplied with."""
