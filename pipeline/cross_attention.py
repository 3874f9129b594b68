"""T5's cross-attention without keys and values of its own, for scoring: few queries read the encoder's output as is.

Of a head's query q and an encoder's outputs h_i: q . (K h_i) = (K^T q) . h_i, and sum_i p_i V h_i = V (sum_i p_i h_i).
So where few queries ask, two products of each of them take the place of two products of each prompt token, and no
cache of keys and values is held. Equal up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention, T5LayerCrossAttention

from pipeline.frozen_linear import FrozenLinear


class DirectCrossAttention(T5Attention):
    """`T5Attention` that reads the encoder's output directly while that is cheaper.

    In inference mode, over plain linear layers; elsewhere it is `T5Attention`, also once keys and values are cached.
    """

    def forward(self, hidden_states: Tensor, *arguments: Any, **others: Any) -> Any:
        """`hidden_states [b, s, d]`; output [b, s, d], position bias, attention weights (None where unknown)."""
        if arguments or not self._reads_directly(hidden_states, others):
            return super().forward(hidden_states, *arguments, **others)
        output = self._read(hidden_states, others["key_value_states"], others.get("mask"))
        return output, others.get("position_bias"), None

    def _reads_directly(self, hidden_states: Tensor, others: dict[str, Any]) -> bool:
        cached = getattr(others.get("past_key_values"), "is_updated", {}).get(self.layer_idx)
        # A query costs its head a product with [c, d] for keys and for values, a prompt token one c-th of that.
        few = 2 * hidden_states.shape[1] <= self.key_value_proj_dim
        mask = others.get("mask")  # additive where another attention than torch's is in use
        plain = _plain(self.k) and _plain(self.v) and (mask is None or mask.dtype == torch.bool)
        return few and not cached and plain and torch.is_inference_mode_enabled()

    def _read(self, x: Tensor, encoded: Tensor, mask: Tensor | None) -> Tensor:
        rows, queries, _ = x.shape
        heads = (self.n_heads, self.key_value_proj_dim)
        query = self.q(x).view(rows, queries, *heads)
        asked = torch.einsum("bshc,hcd->bhsd", query, self.k.weight.view(*heads, -1))
        scores = torch.bmm(asked.flatten(1, 2), encoded.mT).view(rows, self.n_heads, queries, -1)
        if mask is not None:  # [b, 1, s or 1, n]
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        whole = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, dim=-1, dtype=whole).to(scores.dtype)
        read = torch.bmm(weights.flatten(1, 2), encoded).view_as(asked)
        value = torch.einsum("bhsd,hcd->bshc", read, self.v.weight.view(*heads, -1))
        output: Tensor = self.o(value.flatten(2))
        return output


def _plain(layer: nn.Module) -> bool:
    """Whether its output is its weight's product and nothing else, and nobody watches."""
    watched = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) in (nn.Linear, FrozenLinear) and getattr(layer, "bias", None) is None and not watched


def read_directly(model: nn.Module) -> None:
    """Let the model's cross-attentions be `DirectCrossAttention`, in place."""
    for layer in model.modules():
        if isinstance(layer, T5LayerCrossAttention) and type(layer.EncDecAttention) is T5Attention:
            layer.EncDecAttention.__class__ = DirectCrossAttention
