"""What reaches into transformers' attention: caches that hold a prefix, LLaMA's queries, T5's masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface, DynamicCache, EncoderDecoderCache, T5ForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from pipeline.adapters.prefix import PrefixKind

SHARED = "sdpa_shared_mask"


def prefix_kind(length: int) -> PrefixKind:
    """Prefix tuning with `length` positions."""
    return PrefixKind(length, filled_cache, queries_seen)


def filled_cache(stack: Any, cache: Any, layers: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A cache whose self-attention holds each layer's key and value, [b, heads, v, c]: `cache` itself, or a new one.

    `stack` is LLaMA's `model` or T5's decoder, whose cross-attention finds nothing cached.
    """
    if cache is None:
        cache = DynamicCache(config=stack.config)
        if stack.config.is_encoder_decoder:
            cache = EncoderDecoderCache(cache, DynamicCache(config=stack.config))
    own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    for layer, (key, value) in enumerate(layers):
        own.update(key, value, layer)
    return cache


@contextmanager
def queries_seen(stack: Any, told: Callable[[nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside, `told` gets every attention of LLaMA's `model` and its queries [b, query heads, s, c] of each forward.

    Rotary queries are no module's output, so the model attends through a function of ours, which hands everything
    on to the attention in use: outputs are the same bits.
    """
    used = stack.config._attn_implementation
    name = f"{used}_seen"  # the old name within: transformers looks for "flash" in it
    assert name not in ALL_ATTENTION_FUNCTIONS, "another model is being observed"
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(used, eager_attention_forward)

    def seen(module: nn.Module, query: Tensor, *arguments: Any, **others: Any) -> Any:
        told(module, query)
        return attend(module, query, *arguments, **others)

    ALL_ATTENTION_FUNCTIONS[name] = seen
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[used])
    stack.config._attn_implementation = name
    try:
        yield
    finally:
        stack.config._attn_implementation = used
        del ALL_ATTENTION_FUNCTIONS[name]


def share_masks(model: nn.Module) -> None:
    """Let T5's layers share the sum of position bias and mask, which each would form by itself; same bits.

    Of a model that attends by torch's own function (`sdpa`); others stay as they are.
    """
    if not isinstance(model, T5ForConditionalGeneration) or model.config._attn_implementation != "sdpa":
        return
    if SHARED not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS[SHARED] = _attend_with_shared_mask
        AttentionMaskInterface.register(SHARED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(SHARED)


def _attend_with_shared_mask(
    module: nn.Module,
    query: Tensor,  # [b, heads, s, c]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # [b, 1, s or 1, keys], bool; or what is to be added
    *,
    position_bias: Tensor | None = None,  # [1, heads, s, keys]: one tensor for all layers of a stack
    **others: Any,
) -> Any:
    hides = attention_mask if attention_mask is not None and attention_mask.dtype == torch.bool else None
    if hides is not None and position_bias is not None and not position_bias.requires_grad:
        attention_mask, position_bias = _together(hides, position_bias), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, position_bias=position_bias, **others)


def _together(mask: Tensor, bias: Tensor) -> Tensor:
    """Bias where the mask is, elsewhere the least number, as transformers has it; made once for these two tensors.

    Kept with the bias, and so for one forward. The least number plus a bias is the least number again in float32 and
    bfloat16, and a sum over contiguous tensors takes a sixth of the time of choosing between them.
    """
    kept: Any = bias
    if getattr(kept, "masked", (None, None))[0] is not mask:
        hides = torch.where(mask, bias.new_zeros(()), bias.new_full((), torch.finfo(bias.dtype).min))
        kept.masked = mask, bias.contiguous() + hides
    summed: Tensor = kept.masked[1]
    return summed
