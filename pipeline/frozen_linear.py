"""Frozen linear layers of a model in training: their products by oneDNN where a CPU does them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEWEST_ROWS = 32  # below, oneDNN's call costs more than its product saves


class FrozenLinear(nn.Linear):
    """A linear layer without bias, whose weight is frozen.

    On CPUs in float32 both of its products, forward and backward, are oneDNN's, which uses the processor's widest
    vectors whoever made it; MKL, torch's own choice, keeps to half of them on AMD's (2.1 times the time, 1 thread).
    Both sum in float32: results agree up to rounding. Elsewhere it is `nn.Linear`.
    """

    is_product: ClassVar[bool] = True  # so that scoring knows it for a linear layer as any

    def forward(self, x: Tensor) -> Tensor:  # [..., d_in] -> [..., d_out]
        """`W x`."""
        if not _by_onednn(x, self.weight):
            return F.linear(x, self.weight)
        if not torch.is_grad_enabled():
            return _onednn(x, self.weight)
        product: Tensor = _Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return product


def speed_up_frozen(model: nn.Module) -> None:
    """Let the model's frozen linear layers be `FrozenLinear`, in place; layers of other classes stay."""
    for layer in model.modules():
        if type(layer) is nn.Linear and layer.bias is None and not layer.weight.requires_grad:
            layer.__class__ = FrozenLinear


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= FEWEST_ROWS * x.shape[-1] > 0
        and not weight.requires_grad
        and not hasattr(weight, "ds_id")  # ZeRO 3's, whose numbers are there while DeepSpeed's own function runs
        and torch.backends.mkldnn.is_available()
    )


class _Product(torch.autograd.Function):
    """`x W^T`; W gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (weight,) = ctx.saved_tensors
        return _onednn(gradients[0], weight.mT), None


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product
