"""Bottleneck adapters: `y + W_up relu(W_down y)` on each feed-forward block's output (Houlsby et al. 2019), no biases.

y is the output before dropout and the residual sum. Legend: d width of the model; W_down [width, d]; W_up [d, width].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.base import See, TensorProjector, Trained, install, value_of
from pipeline.adapters.forwards import inputs_seen


class Bottleneck(nn.Module):
    """A frozen feed-forward block with a trainable bottleneck on its output."""

    down_projector: TensorProjector | None
    up_projector: TensorProjector | None

    def __init__(self, base: nn.Module, down: Trained, up: Trained, like: Tensor) -> None:
        super().__init__()
        self.base = base
        self.training = base.training
        self.output = nn.Identity()  # y and relu(W_down y) pass through these two for hooks to see them
        self.mid = nn.Identity()
        self.down = install(self, "down", down, like)  # of [width, d]
        self.up = install(self, "up", up, like)  # of [d, width]

    def forward(self, x: Tensor) -> Tensor:  # [..., d] -> [..., d]
        """`y + W_up relu(W_down y)`, y = base(x)."""
        y: Tensor = self.output(self.base(x))
        mid = self.mid(F.relu(F.linear(y, value_of(self.down, self.down_projector))))
        return y + F.linear(mid, value_of(self.up, self.up_projector))


class AttachedBottlenecks:
    """Bottlenecks in their places in a model."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Bottleneck]) -> None:
        self._model = model
        self._layers = layers
        self.parameters: Mapping[str, nn.Parameter] = {
            f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in ("down", "up")
        }

    def observe(self, see: See) -> AbstractContextManager[None]:
        """Inside, every forward tells `see` each block's y [b, s, d] and, as `<block>.mid`, relu(W_down y)."""
        taps: dict[str, nn.Module] = {}
        for name, layer in self._layers.items():
            taps |= {name: layer.output, f"{name}.mid": layer.mid}
        return inputs_seen(see, taps)

    def detach(self) -> None:
        """The bare blocks stand in the model again."""
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer.base)


class BottleneckKind:
    """A bottleneck of `width` units on each of `blocks`, feed-forward blocks by full name.

    Tensors `<block>.down`, `<block>.up`. While attached, a block's own modules stand below `<block>.base`.
    """

    name = "bottleneck"

    def __init__(self, blocks: Sequence[str], width: int) -> None:
        self.blocks = blocks
        self.width = width

    def starts(self, model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
        """W_down Kaiming-uniform with a = sqrt 5 (so U(-1/sqrt d, 1/sqrt d)), W_up zero: the model is unchanged.

        Drawn on the CPU in the order of `blocks`, so that every rank and device starts from the same numbers.
        """
        d = _embeddings(model).shape[1]
        bound = 1 / math.sqrt(d)
        tensors: dict[str, Tensor] = {}
        for block in self.blocks:
            down = torch.empty(self.width, d).uniform_(-bound, bound, generator=generator)
            tensors |= {f"{block}.down": down, f"{block}.up": torch.zeros(d, self.width)}
        return tensors

    def attach(self, model: nn.Module, trained: Mapping[str, Trained]) -> AttachedBottlenecks:
        """Put a bottleneck on each block that `trained` has tensors for, in place."""
        like = _embeddings(model)  # not the block's own weight, which may be quantized
        layers = {}
        for block in (tensor.removesuffix(".down") for tensor in trained if tensor.endswith(".down")):
            base = model.get_submodule(block)
            layers[block] = Bottleneck(base, trained[f"{block}.down"], trained[f"{block}.up"], like)
            model.set_submodule(block, layers[block])
        return AttachedBottlenecks(model, layers)

    def space_of(self, tensor: str) -> str:
        """`<block>.down` is multiplied with the block's output, `<block>.up` with what lies between."""
        block, _, part = tensor.rpartition(".")
        return {"down": block, "up": f"{block}.mid"}[part]


def _embeddings(model: Any) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # [vocabulary, d]
    return weight
