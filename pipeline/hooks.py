"""Forward hooks of a model: which there are, and how to keep some from seeing a forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def hook_ids(model: nn.Module) -> set[int]:
    """The ids of all forward hooks and forward pre-hooks in `model`; torch never gives one id twice."""
    return {number for table in _tables(model) for number in table}


@contextmanager
def only_hooks(model: nn.Module, kept: set[int]) -> Iterator[None]:
    """Inside, no forward hook or pre-hook but those in `kept` sees a forward of `model`."""
    saved = [(table, dict(table)) for table in _tables(model)]
    for table, hooks in saved:
        for number in hooks.keys() - kept:
            del table[number]
    try:
        yield
    finally:
        for table, hooks in saved:
            table.clear()
            table.update(hooks)


def _tables(model: nn.Module) -> list[dict[int, Any]]:
    return [table for module in model.modules() for table in (module._forward_hooks, module._forward_pre_hooks)]
