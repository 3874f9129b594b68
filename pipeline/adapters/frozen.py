"""The past beside a weight that nothing can be merged into: one frozen low-rank branch (methods.md section 1).

Legend: d_in, d_out width of the layer; R the ranks of all its finished updates together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.branches import BranchedLinear
from pipeline.adapters.lora import Factors


class PastBranch(BranchedLinear):
    """A quantized linear layer and what has been learnt since, `W x + left right x`; `right` may have no rows."""

    left: Tensor  # [d_out, R]
    right: Tensor  # [R, d_in]

    def __init__(self, base: nn.Linear, like: Tensor) -> None:
        """`like`: of the model's device and dtype."""
        super().__init__(base)
        self.in_features, self.out_features = base.in_features, base.out_features
        # Buffers: nothing trains them, and no engine scatters them.
        self.register_buffer("left", like.new_zeros(self.out_features, 0), persistent=False)
        self.register_buffer("right", like.new_zeros(0, self.in_features), persistent=False)

    @property
    def like(self) -> Tensor:
        """The branch's own tensors: the weight is packed."""
        return self.left

    def hold(self, updates: Sequence[Factors]) -> None:
        """Take `updates` in the place of those before; their factors side by side, rounded once."""
        shape = self.out_features, 0
        left = torch.cat([torch.zeros(shape), *(part.scale * part.B.float() for part in updates)], dim=1)
        right = torch.cat([torch.zeros(0, self.in_features), *(part.A.float() for part in updates)])
        self.left, self.right = left.to(self.left), right.to(self.right)

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        """The layer as the finished tasks left it."""
        output: Tensor = self.base(x)
        return output + F.linear(F.linear(x, self.right), self.left) if len(self.right) else output


def past_branch(model: nn.Module, name: str, like: Tensor) -> PastBranch:
    """The branch beside the layer `name`, put there where none stands yet."""
    layer = model.get_submodule(name)
    if not isinstance(layer, PastBranch):
        assert isinstance(layer, nn.Linear)
        layer = PastBranch(layer, like)
        layer.train(model.training)
        model.set_submodule(name, layer)
    return layer
