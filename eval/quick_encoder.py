"""T5's encoder as a CPU scores with it: what transformers computes, in fewer calls and passes over memory.

Legend: b rows, s tokens, d width of the model, h heads of c numbers, f width of the feed-forward layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.t5 import modeling_t5 as t5

LINEAR_ROWS = 1024  # about as many tokens as are read at once: oneDNN lays out weights for so many
PARTS = {
    *(t5.T5Stack, t5.T5Block, t5.T5LayerSelfAttention, t5.T5Attention, t5.T5LayerFF, t5.T5DenseActDense),
    *(t5.T5LayerNorm, nn.ModuleList, nn.Embedding, nn.Dropout, nn.ReLU, nn.Linear),
}


def quick_encoder(encoder: nn.Module) -> QuickEncoder | None:
    """The encoder's quick form: of a float32 T5 with ReLUs, to which nothing was added, on an x86 CPU; else None."""
    onednn = torch.backends.mkldnn.is_available() and _vector() > 1
    return QuickEncoder(encoder) if onednn and all(map(_is_plain, encoder.modules())) else None


@dataclass(frozen=True)
class _Block:
    """A block's weights; those of products as oneDNN lays them out."""

    attention_norm: Tensor  # (d,)
    queries_keys_values: Tensor  # (3 h c, d)
    output: Tensor  # (d, h c)
    dense_norm: Tensor  # (d,)
    inner: Tensor  # (f, d)
    outer: Tensor  # (d, f)


class QuickEncoder:
    """A T5 encoder's function, of the weights that it has when this is made; in evaluation mode, without gradients.

    Products are oneDNN's, of weights laid out once, and hold queries, keys and values in one; the ReLU is written with
    its product, sums in place. Equal to transformers' encoder up to rounding. While it lives, the products' weights
    are there twice.
    """

    def __init__(self, encoder: Any) -> None:
        self._embeddings: Tensor = encoder.embed_tokens.weight
        self._norm: Tensor = encoder.final_layer_norm.weight
        self._epsilon: float = encoder.final_layer_norm.variance_epsilon
        self._attention = encoder.block[0].layer[0].SelfAttention  # which alone has a position bias
        self._blocks = [_packed(block) for block in encoder.block]
        self._bias = torch.empty(1, 0, 0, 0)

    def __call__(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Of tokens `(b, s)` and 1 on those to be seen, `(b, s)`, the encoder's output `(b, s, d)`."""
        spare = _spare_keys(input_ids.shape[1])
        scores = self._added_to_scores(input_ids.shape[1], mask, spare)
        x = F.embedding(input_ids, self._embeddings)
        for block in self._blocks:
            heads = _product(self._normed(x, block.attention_norm), block.queries_keys_values)
            x = _product(self._attended(heads, scores, spare), block.output).add_(x)
            inner = _product(self._normed(x, block.dense_norm), block.inner, "relu")
            x = _product(inner, block.outer).add_(x)
        return self._normed(x, self._norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """`w x / sqrt(mean x^2 + eps)`."""
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        normed: Tensor = (x * mean_square.add_(self._epsilon).rsqrt_()).mul_(weight)
        return normed

    def _attended(self, queries_keys_values: Tensor, scores: Tensor, spare: int) -> Tensor:
        rows, tokens, _ = queries_keys_values.shape
        heads = queries_keys_values.view(rows, tokens, 3, self._attention.n_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (b, h, s, c)
        if spare:
            key, value = F.pad(heads[:, :, 1:], (0, 0, 0, 0, 0, 0, 0, spare)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, scores, scale=1.0)
        return attended.transpose(1, 2).reshape(rows, tokens, -1)

    def _added_to_scores(self, tokens: int, mask: Tensor | None, spare: int) -> Tensor:
        """Position bias, and the least number for what is not to be seen: `(b or 1, h, s, s + spare)`."""
        if tokens > self._bias.shape[-1]:
            self._bias = self._attention.compute_bias(tokens, tokens)
        bias = self._bias[:, :, :tokens, :tokens].contiguous()  # that of fewer is the upper left corner
        least = torch.finfo(bias.dtype).min
        if mask is not None:
            bias = bias + torch.where(mask[:, None, None].bool(), 0.0, least)
        return F.pad(bias, (0, spare), value=least) if spare else bias


def _packed(block: Any) -> _Block:
    first, last = block.layer
    attention, dense = first.SelfAttention, last.DenseReluDense
    return _Block(
        attention_norm=first.layer_norm.weight,
        queries_keys_values=_pack(torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])),
        output=_pack(attention.o.weight),
        dense_norm=last.layer_norm.weight,
        inner=_pack(dense.wi.weight),
        outer=_pack(dense.wo.weight),
    )


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LINEAR_ROWS)
    return packed


def _product(x: Tensor, packed: Tensor, then: Literal["none", "relu"] = "none") -> Tensor:
    """`x W^T`, and its ReLU if told so."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, then, [], "")
    return product


def _is_plain(part: nn.Module) -> bool:
    """Whether a module of an encoder is transformers' own, of float32 on a CPU, and nobody watches it."""
    known = type(part) in PARTS or (isinstance(part, nn.Linear) and getattr(part, "is_product", False))
    changed = part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part)
    biased = getattr(part, "bias", None) is not None
    return known and not changed and not biased and all(map(_is_float, part.parameters(recurse=False)))


def _is_float(weight: Tensor) -> bool:
    return weight.is_cpu and weight.dtype == torch.float32 and not hasattr(weight, "ds_id")  # a part is elsewhere


def _vector() -> int:
    """How many float32 numbers a vector of this processor holds, as far as torch uses them."""
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 1)


def _spare_keys(keys: int) -> int:
    """How many keys that nobody sees are worth adding to an attention.

    torch's takes the weights that fill no vector one by one: of 127 keys fifteen, which cost a third of the time of
    128. To add keys is to copy them, and worth it where many weights are left over.
    """
    wide = _vector()
    return -keys % wide if keys % wide > wide / 2 else 0
