"""A backbone whose weights rest in the host's memory and come to the device one block at a time (offload parameters).

For what runs without DeepSpeed: scoring, and a task's first passes. Slower by each block's way to the device in each
forward; results are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models import blocks_of


def _linear(block: nn.Module) -> list[nn.Linear]:
    return [module for module in block.modules() if isinstance(module, nn.Linear)]


def _frozen_linear(block: nn.Module) -> list[nn.Linear]:
    return [layer for layer in _linear(block) if not layer.weight.requires_grad]


def numbers_held(model: nn.Module) -> int:
    """How many of a bare backbone's numbers the device holds at most; it may be a skeleton."""
    sizes = [sum(layer.weight.numel() for layer in _linear(block)) for block in blocks_of(model)]
    return sum(weight.numel() for weight in model.parameters()) - sum(sizes) + max(sizes)


@contextmanager
def blocks_from_host(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model runs on `device`, which holds of its blocks' frozen linear layers those of the block at work.

    All else is there for the whole time: embeddings, the output head, norms, and what adapters brought, which their
    forwards read outside of blocks too. Trained tensors and buffers, which are few, stay there afterwards. A block's
    backward finds its weights where recomputation (`models.recomputing`) runs its forward again; without it they stay
    on the device from the forward to there.
    """
    blocks = blocks_of(model)
    in_blocks = {id(layer.weight) for block in blocks for layer in _frozen_linear(block)}
    resting: list[tuple[Tensor, Tensor]] = []
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) in in_blocks:
            continue
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            resting.append((tensor, tensor.data))
        tensor.data = tensor.data.to(device)
    handles = [handle for block in blocks for handle in _Borrowed(block, device).hooks()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, host in resting:
            tensor.data = host


class _Borrowed:
    """The weights of a block's frozen linear layers, on the device for one forward."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._block = block
        self._device = device
        self._resting: list[tuple[Any, Tensor]] = []

    def hooks(self) -> list[Any]:
        """Around each of the block's forwards, also of one that fails."""
        back = self._block.register_forward_hook(lambda *_: self._give_back(), always_call=True)
        return [self._block.register_forward_pre_hook(lambda *_: self._bring()), back]

    def _bring(self) -> None:
        for layer in _frozen_linear(self._block):
            self._resting.append((layer, layer.weight))
            # Another parameter, not other data of this one: what autograd keeps for the backward stays there.
            copied = layer.weight.detach().to(self._device, copy=True)
            layer.weight = nn.Parameter(copied, requires_grad=False)

    def _give_back(self) -> None:
        for layer, weight in self._resting:
            layer.weight = weight
        self._resting.clear()
