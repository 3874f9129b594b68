"""How adapters step into the forwards of a model's modules: rebound forwards, virtual tokens, hooks that look on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.adapters.base import See


def rebind(module: nn.Module, forward: Callable[..., Any], *arguments: Any) -> Callable[[], None]:
    """Let `forward(module, the forward so far, *arguments, ...)` be this one module's forward; returns the undoing.

    Not a hook: some passes run without any. A `partial`, so that a deep copy of the model refers to its own parts.
    """
    before = vars(module).get("forward")
    setattr(module, "forward", functools.partial(forward, module, module.forward, *arguments))  # noqa: B010

    def undo() -> None:
        if before is None:
            del module.forward
        else:
            setattr(module, "forward", before)  # noqa: B010

    return undo


def is_empty(cache: Any) -> bool:
    """Whether a forward given this cache (or None) reads a sequence from its beginning."""
    return cache is None or cache.get_seq_length() == 0


def with_ones(mask: Tensor | None, count: int) -> Tensor | None:
    """The attention mask [b, s] with `count` seen positions put before it; None, which hides nothing, stays."""
    if mask is None:
        return None
    assert mask.ndim == 2, f"a mask of shape {tuple(mask.shape)} cannot take virtual tokens"
    return torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


@contextmanager
def inputs_seen(see: See, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, `see` is told the first input of every call of these modules, under their names here."""

    def hook(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        see(name, inputs[0])

    handles = [module.register_forward_pre_hook(functools.partial(hook, name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
