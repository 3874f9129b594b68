"""What prefix tuning needs of transformers: caches that hold a prefix, and LLaMA's queries as attention sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionMaskInterface, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from pipeline.adapters.prefix import PrefixKind


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
