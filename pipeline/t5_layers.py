"""T5's norms and feed-forward layers in fewer passes over memory, for scoring on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5LayerNorm

from pipeline.frozen_linear import by_onednn, is_plain, onednn


class LeanNorm(T5LayerNorm):
    """`T5LayerNorm` that makes two tensors of its input's size less, in inference mode, in float32, on a CPU."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., d] -> [..., d]
        """`w x / sqrt(mean x^2 + eps)`."""
        x = hidden_states
        if not (torch.is_inference_mode_enabled() and x.is_cpu and x.dtype == self.weight.dtype == torch.float32):
            output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return output
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        output = (x * mean_square.add_(self.variance_epsilon).rsqrt_()).mul_(self.weight)
        return output


class FusedDense(T5DenseActDense):
    """`T5DenseActDense` whose first product is written through its ReLU, in inference mode where oneDNN multiplies."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # [..., d] -> [..., d]
        """`W_o relu(W_i x)`."""
        x, scoring = hidden_states, torch.is_inference_mode_enabled() and not self.training
        if not (scoring and is_plain(self.wi) and by_onednn(x, self.wi.weight)):
            output: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return output
        output = self.wo(onednn(x, self.wi.weight, "relu"))
        return output


def speed_up_t5(model: nn.Module) -> None:
    """Let the model's T5 norms be `LeanNorm` and its feed-forward layers with a ReLU `FusedDense`, in place."""
    for layer in model.modules():
        if type(layer) is T5LayerNorm:
            layer.__class__ = LeanNorm
        elif type(layer) is T5DenseActDense and type(layer.act) is nn.ReLU:
            layer.__class__ = FusedDense
